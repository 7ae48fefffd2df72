package loops

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/coredns/caddy/caddyfile"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin/pkg/transport"
)

// Whatever stands in a Corefile, what is read of the plugins that ask upstreams ends, and in
// no panic. The first seeds have the form that node-cache's Corefiles have.
func FuzzCorefile(f *testing.F) {
	for _, seed := range []string{
		`cluster.local:53 in-addr.arpa:53 {
    errors
    cache { 
        success 9984 30
        denial 9984 5
    }
    reload
    loop
    bind 169.254.20.10 10.96.0.10
    forward . __PILLAR__CLUSTER__DNS__ {
        force_tcp
    }
    prometheus :9253
    health 169.254.20.10:8080
}
.:53 {
    bind 169.254.20.10
    forward . __PILLAR__UPSTREAM__SERVERS__ /etc/resolv.conf 10.96.0.10
    prometheus :9253
    ready
}`,
		"(s) {\nforward corp.test 169.254.20.10 {\nexcept a.corp.test\nnext NXDOMAIN\n}\n}\n10.0.0.0/22:53 tls://corp.test {\nimport s\nbind lo\nrewrite continue name exact a b\nview v {\nexpr true\n}\n}",
		"dns://.:53 {\nforward . tls://[fe80::1%eth0]:853%name.test unix:///x fd00::1\ngrpc . 10.0.0.1:53\nfanout . 1.1.1.1 {\nnetwork tcp\n}\n}",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if strings.ContainsAny(text, "*/$") && (strings.Contains(text, "import") || strings.Contains(text, "/dev") || strings.Contains(text, "/proc")) {
			t.Skip("other files")
		}
		blocks, err := caddyfile.Parse("Corefile", strings.NewReader(text), nil)
		if err != nil {
			return
		}
		var all []*route
		for i, b := range blocks {
			r := &route{name: strings.Join(b.Keys, " "), renames: renames(b.Tokens["rewrite"]), hosts: []netip.Addr{netip.MustParseAddr("169.254.20.10"), netip.IPv6Unspecified()}[i%2 : i%2+1]}
			for range min(zonesOf(b.Keys), 100) {
				r.configs = append(r.configs, &dnsserver.Config{Zone: "corp.test.", Port: "53", Transport: transport.DNS})
			}
			for _, name := range forwarders {
				r.stanzas = append(r.stanzas, stanzasOf("Corefile", name, b.Tokens[name])...)
			}
			all = append(all, r)
		}
		rs := newRouting(all)
		rs.local = func(a netip.Addr) bool { return a.IsLoopback() }
		rs.check()
	})
}
