package otherports

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/coredns/caddy"
	"github.com/coredns/caddy/caddyfile"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"

	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/whoami"

	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
)

func TestMain(m *testing.M) { os.Exit(testkit.Main(m)) }

// What the other plugins will listen on is read as they read it themselves.
func TestPortsOfOtherPlugins(t *testing.T) {
	for _, test := range []struct {
		line string
		want string
	}{
		{"health", "Corefile:2 [::]:8080/tcp"},
		{"health {\n lameduck 5s\n}", "Corefile:2 [::]:8080/tcp"},
		{"health 10.0.0.1:1", "Corefile:2 10.0.0.1:1/tcp"},
		{"health 0.0.0.0:1", "Corefile:2 [::]:1/tcp"}, // for Go it is the address of both families
		{"health [fd00::1]:1 {\n lameduck 5s\n}", "Corefile:2 [fd00::1]:1/tcp"},
		{"ready", "Corefile:2 [::]:8181/tcp"},
		{"ready :1 {\n monitor continuously\n}", "Corefile:2 [::]:1/tcp"},
		{"prometheus", "Corefile:2 127.0.0.1:9153/tcp"},
		{"prometheus [::1]:1 {\n tls web.yaml\n}", "Corefile:2 [::1]:1/tcp"},
		{"pprof", "Corefile:2 127.0.0.1:6053/tcp"},
		{"pprof 127.0.0.1:http", "Corefile:2 127.0.0.1:80/tcp"},
		{"dnstap listen tcp://127.0.0.1:1 full\ndnstap listen tls://127.0.0.1:2 {\n tls a b\n}", "Corefile:2 127.0.0.1:1/tcp, Corefile:3 127.0.0.1:2/tcp"},
		// Nothing that could be tried.
		{"dnstap tcp://127.0.0.1:1 full", ""},
		{"dnstap /tmp/dnstap.sock full", ""},
		{"dnstap listen unix:///tmp/dnstap.sock", ""},
		{"health nonsense", ""},
		{"health 127.0.0.1:99999", ""},
		{"health \"a b:1\"", ""},
		{"health [fe80::1%lo]:1", ""},
	} {
		names := []string{"health", "ready", "prometheus", "pprof", "dnstap"}
		blocks, err := caddyfile.Parse("Corefile", strings.NewReader(".:53 {\n"+test.line+"\n}\n"), names)
		testkit.Must(t, err)
		var got []string
		for _, name := range names {
			tokens := caddyfile.NewDispenserTokens("Corefile", blocks[0].Tokens[name])
			for _, p := range pluginPorts(name, standardPorts[name], tokens) {
				if p.e.Port != 0 {
					got = append(got, p.at+" "+p.e.String())
				}
			}
		}
		if got := strings.Join(got, ", "); got != test.want {
			t.Errorf("with %q other plugins listen on %q, want %q", test.line, got, test.want)
		}
	}
}

func TestServerBlockIsNamedByItsFirstLine(t *testing.T) {
	blocks, err := caddyfile.Parse("Corefile", strings.NewReader(".:53 {\n\nwhoami\nbind 10.0.0.1\n}\n"), []string{"bind", "whoami"})
	testkit.Must(t, err)
	if got := begin("Corefile", blocks[0]); got != "Corefile:3" {
		t.Errorf("the block is at %s", got)
	}
	for _, ts := range blocks[0].Tokens {
		for i := range ts {
			ts[i].File = "custom"
		}
	}
	if got := begin("Corefile", blocks[0]); got != "custom:3" {
		t.Errorf("the imported block is at %s", got)
	}
}

// The blocks without nodecache are tried as well, all of their keys, and each port once.
func TestPortsOfOtherBlocks(t *testing.T) {
	testkit.NeedRoot(t)
	defer func(directives []string, quiet bool) { dnsserver.Directives, dnsserver.Quiet = directives, quiet }(dnsserver.Directives, dnsserver.Quiet)
	dnsserver.Directives, dnsserver.Quiet = []string{"bind", directive, "whoami"}, true
	var l *Latecomers
	plugin.Register(directive, func(c *caddy.Controller) (err error) {
		l, err = New(c, func() (is, over bool) { return false, true })
		return err
	})
	in, err := caddy.Start(caddy.CaddyfileInput{Filepath: "Corefile", ServerTypeName: "dns", Contents: []byte("example.org {\nbind 127.0.0.9\nnodecache\nwhoami\n}\n" +
		"a.test:5301 b.test:5302 tls://c.test {\nbind 127.0.0.1 ::1\nwhoami\n}\nd.test:5301 {\nbind 127.0.0.1\nwhoami\n}\n. {\nwhoami\n}\n")})
	testkit.Must(t, err)
	defer in.Stop()
	var got []string
	for _, p := range l.ports {
		got = append(got, fmt.Sprintf("%s %s", p.at, p.e))
	}
	want := []string{}
	for _, port := range []string{"5301/udp", "5301/tcp", "5302/udp", "5302/tcp", "853/tcp"} {
		want = append(want, "Corefile:7 127.0.0.1:"+port, "Corefile:7 [::1]:"+port)
	}
	want = append(want, "Corefile:15 [::]:53/udp", "Corefile:15 [::]:53/tcp")
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("other blocks listen on\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// Whatever stands in a Corefile, what is read of other plugins' ports ends, and in no panic.
func FuzzPorts(f *testing.F) {
	f.Add(".:53 {\nprometheus :9253\nready\nhealth 169.254.20.10:8080 {\nlameduck 5s\n}\n}")
	f.Add("dns://.:53 {\npprof :1\ndnstap listen tcp://:6000 full\n}")
	f.Add(".:0 {\nready [::1]:8181\nhealth\nprometheus localhost:http\n}")
	f.Fuzz(func(t *testing.T, text string) {
		if strings.ContainsAny(text, "*/$") && (strings.Contains(text, "import") || strings.Contains(text, "/dev") || strings.Contains(text, "/proc")) {
			t.Skip("other files")
		}
		blocks, err := caddyfile.Parse("Corefile", strings.NewReader(text), nil)
		if err != nil {
			return
		}
		for _, b := range blocks {
			for name, standard := range standardPorts {
				pluginPorts(name, standard, caddyfile.NewDispenserTokens("Corefile", b.Tokens[name]))
			}
			begin("Corefile", b)
		}
	})
}
