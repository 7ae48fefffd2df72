package loops

import (
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/coredns/caddy/caddyfile"
	"github.com/coredns/coredns/core/dnsserver"

	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
)

func TestMain(m *testing.M) { os.Exit(testkit.Main(m)) }

func TestWithoutZone(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.1:53":              "192.0.2.1:53",
		"[fe80::1%eth0]:53":         "[fe80::1]:53",
		"192.0.2.1%cache.test:853":  "192.0.2.1:853",
		"[fd00::1%cache.test]:8853": "[fd00::1]:8853",
		"192.0.2.1%cache.test":      "192.0.2.1",
	} {
		if got := withoutZone(in); got != want {
			t.Errorf("%s without its zone is %s, want %s", in, got, want)
		}
	}
}

func TestZonesOf(t *testing.T) {
	if n := zonesOf([]string{"dns://a.:53", "10.0.0.0/22:53", "tls://."}); n != 6 {
		t.Errorf("%d zones, want 6", n)
	}
}

func TestRenames(t *testing.T) {
	for in, want := range map[string]bool{
		"rewrite name a.test b.test":                                                           true,
		"rewrite stop name regex (.*) {1}.test":                                                true,
		"rewrite stop {\nname suffix .a.test .b.test\nanswer auto\n}":                          true,
		"rewrite continue {\nttl exact a.test 5\n}\nrewrite {\nNAME suffix .a.test .b.test\n}": true,
		"rewrite type ANY HINFO":                                                               false,
		"rewrite stop {\nttl suffix name 5\n}":                                                 false,
		"":                                                                                     false,
	} {
		blocks, err := caddyfile.Parse("Corefile", strings.NewReader(". {\n"+in+"\n}\n"), []string{"rewrite"})
		testkit.Must(t, err)
		if got := renames(blocks[0].Tokens["rewrite"]); got != want {
			t.Errorf("%q changes names: %v, want %v", in, got, want)
		}
	}
}

// The server block of the most specific zone gets a query, and the exact address goes before
// the wildcard.
func TestReceiver(t *testing.T) {
	block := func(name, zone, host string) *route {
		r := &route{name: name, configs: []*dnsserver.Config{{Zone: zone, Port: "53", Transport: "dns"}}}
		a, err := readHost(host)
		testkit.Must(t, err)
		r.hosts = append(r.hosts, a)
		return r
	}
	rs := newRouting([]*route{
		block("root", ".", "192.0.2.1"), block("test", "test.", "192.0.2.1"), block("every", ".", ""), block("four", "four.", "0.0.0.0"),
	})
	viewed := block("view", "view.test.", "192.0.2.1")
	viewed.view = true
	rs.all = append(rs.all, viewed)
	for _, c := range []struct{ at, transport, name, want string }{
		{"192.0.2.1:53", "dns", "a.test.", "test"},
		{"192.0.2.1:53", "dns", "a.example.", "root"},
		{"192.0.2.1:53", "dns", "a.view.test.", ""}, // it can't be told
		{"192.0.2.1:53", "tls", "a.test.", ""},
		{"192.0.2.1:54", "dns", "a.test.", ""},
		{"192.0.2.2:53", "dns", "a.test.", ""}, // another machine
		{"127.1.2.3:53", "dns", "a.test.", "every"},
		{"127.0.0.1:53", "dns", "a.four.", "four"},
		{"[::1]:53", "dns", "a.four.", "every"},
	} {
		got := rs.receiver(target{transport: c.transport, at: netip.MustParseAddrPort(c.at)}, c.name)
		if name := func() string {
			if got == nil {
				return ""
			}
			return got.name
		}(); name != c.want {
			t.Errorf("%s of %s over %s goes to the block %q, want %q", c.name, c.at, c.transport, name, c.want)
		}
	}
}

// The kernel has the ClusterIPs of kube-proxy in IPVS mode, and yet nobody here gets what is
// sent to them.
func TestReceiverBesideIPVS(t *testing.T) {
	testkit.Link(t, nodelinks.IPVS, "10.96.0.10")
	testkit.Eventually(t, "the address is seen", func() bool { return locals.has(netip.MustParseAddr("10.96.0.10")) })
	rs := newRouting([]*route{{configs: []*dnsserver.Config{{Zone: ".", Port: "53", Transport: "dns"}}, hosts: []netip.Addr{netip.IPv6Unspecified()}}})
	if rs.receiver(target{transport: "dns", at: netip.MustParseAddrPort("10.96.0.10:53")}, "a.test.") != nil {
		t.Error("a query to the ClusterIP comes to a server block that listens on all addresses")
	}
}
