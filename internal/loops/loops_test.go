package loops

import (
	"net"
	"strings"
	"testing"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/miekg/dns"

	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/forward"
	_ "github.com/coredns/coredns/plugin/hosts"
	_ "github.com/coredns/coredns/plugin/loop"
	_ "github.com/coredns/coredns/plugin/template"

	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
)

// guardsPlugin is a plugin that calls Guard, as nodecache does.
const guardsPlugin = "guards"

func init() {
	plugin.Register(guardsPlugin, func(c *caddy.Controller) error {
		_, err := Guard(c.Context())
		return err
	})
}

func start(t *testing.T, corefile string) (*caddy.Instance, error) {
	t.Helper()
	testkit.NeedRoot(t)
	directives, quiet := dnsserver.Directives, dnsserver.Quiet
	t.Cleanup(func() { dnsserver.Directives, dnsserver.Quiet = directives, quiet })
	dnsserver.Directives, dnsserver.Quiet = []string{"bind", guardsPlugin, "hosts", "template", "loop", "forward"}, true
	in, err := caddy.Start(caddy.CaddyfileInput{Filepath: "Corefile", ServerTypeName: "dns", Contents: []byte(corefile)})
	if err == nil {
		t.Cleanup(func() { in.Stop() })
	}
	return in, err
}

func TestCorefiles(t *testing.T) {
	for name, c := range map[string]struct{ corefile, shouldErr string }{
		"itself":        {".:5301 {\nbind 127.0.0.1\nguards\nforward . 127.0.0.1:5301\n}\n", "Corefile:4 - Error during parsing: forward: the upstream 127.0.0.1:5301 is this server block itself"},
		"all addresses": {".:5301 {\nguards\nforward . 127.0.0.9:5301\n}\n", "Corefile:3 - Error during parsing: forward: the upstream 127.0.0.9:5301 is this server block itself"},
		"two blocks": {".:5301 {\nbind 127.0.0.1\nguards\nforward . 127.0.0.1:5302\n}\na.test:5302 {\nbind 127.0.0.1\nforward . 127.0.0.1:5301\n}\n",
			"to the server block a.test:5302, which asks 127.0.0.1:5301 (Corefile:8)"},
		"what comes to an end": {".:5301 {\nbind 127.0.0.1\nguards\nforward a.test 127.0.0.1:5302 {\nexcept b.a.test\n}\nforward . 127.0.0.1:5399\n}\na.test:5302 {\nbind 127.0.0.1\nforward . 127.0.0.1:5398\n}\n", ""},
		"what is answered":     {".:5301 {\nbind 127.0.0.1\nguards\ntemplate ANY ANY {\nrcode NXDOMAIN\n}\nforward . 127.0.0.1:5301\n}\n", ""},
		"what is passed on":    {".:5301 {\nbind 127.0.0.1\nguards\nhosts {\nfallthrough\n}\nforward . 127.0.0.1:5301\n}\n", "would come back to it without end"},
		"of one type only":     {".:5301 {\nbind 127.0.0.1\nguards\ntemplate IN AAAA {\nrcode NXDOMAIN\n}\nforward . 127.0.0.1:5301\n}\n", "would come back to it without end"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := start(t, c.corefile)
			testkit.WantError(t, err, c.shouldErr)
		})
	}
}

// A server that sends back what it is asked: no Corefile shows it. The queries that have come
// back are refused, the plugin loop ends nothing, and what comes to an end is answered.
func TestServerThatSendsBack(t *testing.T) {
	testkit.NeedRoot(t)
	sendsBack, err := net.ListenPacket("udp", "127.0.0.1:5400")
	testkit.Must(t, err)
	back := &dns.Server{PacketConn: sendsBack, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
		client := dns.Client{Timeout: 2 * time.Second}
		if m, _, err := client.Exchange(r, "127.0.0.1:5311"); err == nil {
			w.WriteMsg(m)
		}
	})}
	go back.ActivateAndServe()
	t.Cleanup(func() { back.Shutdown() })
	// Another port: CoreDNS may keep one whose instance was stopped before it served.
	_, err = start(t, ".:5311 {\nbind 127.0.0.1\nguards\nhosts {\n192.0.2.1 www.test\nfallthrough\n}\nloop\nforward . 127.0.0.1:5400\n}\n")
	testkit.Must(t, err)
	ask := func(name string) int {
		client := dns.Client{Timeout: 20 * time.Second}
		m, _, err := client.Exchange(new(dns.Msg).SetQuestion(name, dns.TypeA), "127.0.0.1:5311")
		testkit.Must(t, err)
		return m.Rcode
	}
	if code := ask("www.test."); code != dns.RcodeSuccess {
		t.Errorf("what is known gets %s", dns.RcodeToString[code])
	}
	if code := ask("other.test."); code == dns.RcodeSuccess {
		t.Error("what goes round is answered")
	}
	if code := ask(strings.Repeat("a.", 20) + "test."); code == dns.RcodeSuccess {
		t.Error("what goes round is answered")
	}
}
