package nodecache

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coredns/caddy"
)

func TestConfigs(t *testing.T) {
	same := func(b string) string { return b }
	a := demand(t, "", "sync 5s", "169.254.20.10")
	b := demand(t, "skipteardown", "", "169.254.20.10", "fd00:20::10")
	if got := a.sync(); got != 5*time.Second {
		t.Errorf("sync is %s", got)
	}
	if got := b.sync(); got != defaultSync {
		t.Errorf("sync is %s", got)
	}
	if u, w := a.state(same).Union(b.state(same)), b.state(same); fmt.Sprint(u) != fmt.Sprint(w) {
		t.Errorf("the union is %v, want %v", u, w)
	}
	if gone := b.state(same).Minus(a.state(same)); list(gone.Rules[backendIPT]) != dnsOf("fd00:20::10") || list(gone.Links[testLink]) != "fd00:20::10" {
		t.Errorf("gone are %v", gone)
	}
	if !a.kept(same).Empty() || b.kept(same).Empty() {
		t.Error("only the second one is kept")
	}
	var none *config
	if !none.state(same).Empty() {
		t.Error("no config wants something")
	}
	if a.auto() {
		t.Error("a has no auto")
	}
	if got := orNone(nil, "nothing") + orNone([]string{"a", "b"}, ""); got != "nothinga, b" {
		t.Errorf("got %q", got)
	}
}

// describe puts a config into lines.
func describe(c *config) (lines []string) {
	keep := map[bool]string{true: " keep"}
	for name, l := range c.links {
		lines = append(lines, fmt.Sprintf("link %s %s %s", name, l.backend, l.sync))
	}
	for a, p := range c.addrs {
		lines = append(lines, fmt.Sprintf("addr %s %s%s", a, p.link, keep[p.skipteardown]))
	}
	for e, o := range c.wants {
		extra := map[bool]string{true: " extra"}[e.Extra]
		lines = append(lines, fmt.Sprintf("want %s %s%s%s", e, o.link, keep[o.skipteardown], extra))
	}
	slices.Sort(lines)
	return lines
}

func TestAdd(t *testing.T) {
	const v4, v6 = "169.254.20.10", "fd00:20::10"
	for i, test := range []struct {
		blocks    []corefile
		shouldErr string
		want      []string
	}{
		{[]corefile{{"nodecache", v4, dns53}}, "", []string{
			"addr 169.254.20.10 nodelocaldns",
			"link nodelocaldns auto 1m0s",
			"want 169.254.20.10:53/tcp nodelocaldns",
			"want 169.254.20.10:53/udp nodelocaldns",
		}},
		// Both families in one block.
		{[]corefile{{"nodecache skipteardown", v4 + " " + v6, dns53}}, "", []string{
			"addr 169.254.20.10 nodelocaldns keep",
			"addr fd00:20::10 nodelocaldns keep",
			"link nodelocaldns auto 1m0s",
			"want 169.254.20.10:53/tcp nodelocaldns keep",
			"want 169.254.20.10:53/udp nodelocaldns keep",
			"want [fd00:20::10]:53/tcp nodelocaldns keep",
			"want [fd00:20::10]:53/udp nodelocaldns keep",
		}},
		// Several zones on one address and port, in one block and in two.
		{[]corefile{{"nodecache", v4, "dns://cluster.local.:53 dns://10.in-addr.arpa.:53"}, {"nodecache skipteardown", v4, dns53}}, "", []string{
			"addr 169.254.20.10 nodelocaldns keep",
			"link nodelocaldns auto 1m0s",
			"want 169.254.20.10:53/tcp nodelocaldns keep",
			"want 169.254.20.10:53/udp nodelocaldns keep",
		}},
		// skipteardown holds for its own block's address only.
		{[]corefile{{"nodecache skipteardown", v4, dns53}, {"nodecache", "10.96.0.10", dns53}}, "", []string{
			"addr 10.96.0.10 nodelocaldns",
			"addr 169.254.20.10 nodelocaldns keep",
			"link nodelocaldns auto 1m0s",
			"want 10.96.0.10:53/tcp nodelocaldns",
			"want 10.96.0.10:53/udp nodelocaldns",
			"want 169.254.20.10:53/tcp nodelocaldns keep",
			"want 169.254.20.10:53/udp nodelocaldns keep",
		}},
		// Keys with several transports.
		{[]corefile{{"nodecache {\nfirewall none\n}", v4, "dns://.:53 tls://.:853 quic://.:853 https://.:443 https3://.:8443 grpc://.:8053"}}, "", []string{
			"addr 169.254.20.10 nodelocaldns",
			"link nodelocaldns none 1m0s",
			"want 169.254.20.10:443/tcp nodelocaldns",
			"want 169.254.20.10:53/tcp nodelocaldns",
			"want 169.254.20.10:53/udp nodelocaldns",
			"want 169.254.20.10:8053/tcp nodelocaldns",
			"want 169.254.20.10:8443/udp nodelocaldns",
			"want 169.254.20.10:853/tcp nodelocaldns",
			"want 169.254.20.10:853/udp nodelocaldns",
		}},
		// A port of untracked that CoreDNS serves has the stricter guard, in either order.
		{[]corefile{{"nodecache {\nuntracked 53 8080\n}", v4, dns53}}, "", []string{
			"addr 169.254.20.10 nodelocaldns",
			"link nodelocaldns auto 1m0s",
			"want 169.254.20.10:53/tcp nodelocaldns",
			"want 169.254.20.10:53/udp nodelocaldns",
			"want 169.254.20.10:8080/tcp nodelocaldns extra",
		}},
		{[]corefile{{"nodecache {\nuntracked 853\n}", v4, dns53}, {"nodecache", v4, "tls://.:853"}}, "", []string{
			"addr 169.254.20.10 nodelocaldns",
			"link nodelocaldns auto 1m0s",
			"want 169.254.20.10:53/tcp nodelocaldns",
			"want 169.254.20.10:53/udp nodelocaldns",
			"want 169.254.20.10:853/tcp nodelocaldns",
		}},
		// What one block says of an interface holds for all of them.
		{[]corefile{{"nodecache {\nsync 30s\nfirewall iptables\n}", v4, dns53}, {"nodecache", v6, dns53}, {"nodecache {\nsync 0.5m\nfirewall iptables\n}", v6, "dns://a.:53"}}, "", []string{
			"addr 169.254.20.10 nodelocaldns",
			"addr fd00:20::10 nodelocaldns",
			"link nodelocaldns iptables 30s",
			"want 169.254.20.10:53/tcp nodelocaldns",
			"want 169.254.20.10:53/udp nodelocaldns",
			"want [fd00:20::10]:53/tcp nodelocaldns",
			"want [fd00:20::10]:53/udp nodelocaldns",
		}},
		// Two interfaces may differ.
		{[]corefile{{"nodecache {\ninterface a\nsync 30s\nfirewall iptables\n}", v4, dns53}, {"nodecache {\ninterface b\nsync 40s\nfirewall none\n}", v6, dns53}}, "", []string{
			"addr 169.254.20.10 a",
			"addr fd00:20::10 b",
			"link a iptables 30s",
			"link b none 40s",
			"want 169.254.20.10:53/tcp a",
			"want 169.254.20.10:53/udp a",
			"want [fd00:20::10]:53/tcp b",
			"want [fd00:20::10]:53/udp b",
		}},
		// bind with an interface's name brings its link-local address too.
		{[]corefile{{"nodecache", "fd00:20::10 fe80::1%eth0", dns53}}, "", []string{
			"addr fd00:20::10 nodelocaldns",
			"link nodelocaldns auto 1m0s",
			"want [fd00:20::10]:53/tcp nodelocaldns",
			"want [fd00:20::10]:53/udp nodelocaldns",
		}},

		{[]corefile{{"nodecache", "", dns53}}, "Testfile:1 - Error during parsing: nodecache needs the addresses of a bind", nil},
		{[]corefile{{"nodecache", "0.0.0.0", dns53}}, "bind 0.0.0.0: the wildcard address", nil},
		{[]corefile{{"nodecache", v4 + " ::", dns53}}, "bind ::: the wildcard address", nil},
		{[]corefile{{"nodecache", "::ffff:10.0.0.1", dns53}}, "an IPv4-mapped IPv6 address; write 10.0.0.1", nil},
		{[]corefile{{"nodecache", "224.0.0.251", dns53}}, "a multicast or broadcast address", nil},
		{[]corefile{{"nodecache", "ff02::fb", dns53}}, "a multicast or broadcast address", nil},
		{[]corefile{{"nodecache", "fe80::53", dns53}}, "a link-local IPv6 address", nil},
		{[]corefile{{"nodecache", v4, "dns://.:0"}}, `reading the server block's key dns://.:0: "0" is no port`, nil},
		{[]corefile{{"nodecache", v4, "smtp://.:25"}}, "does not know the transport smtp", nil},
		{[]corefile{{"nodecache {\nfirewall iptables\n}", v4, dns53}, {"nodecache {\nsync 1s\nfirewall nftables\n}", v6, dns53}},
			"Testfile:3 - Error during parsing: firewall nftables here, but iptables at Testfile:2 for the same interface nodelocaldns", nil},
		{[]corefile{{"nodecache {\nsync 10s\n}", v4, dns53}, {"nodecache {\nsync 20s\n}", v6, dns53}},
			"sync 20s here, but 10s at Testfile:2 for the same interface nodelocaldns", nil},
		{[]corefile{{"nodecache", v4, dns53}, {"nodecache {\ninterface b\n}", v4, "dns://a.:53"}},
			"Testfile:2 - Error during parsing: interface b here, but nodelocaldns at Testfile:1 for the same address 169.254.20.10", nil},
	} {
		cfg, err := read(test.blocks...)
		wantError(t, err, test.shouldErr)
		if err != nil {
			continue
		}
		if got := describe(cfg); !slices.Equal(got, test.want) {
			t.Errorf("Test %d: got\n%s\nwant\n%s", i, strings.Join(got, "\n"), strings.Join(test.want, "\n"))
		}
	}
	// The wildcard of a block without bind.
	b, err := parse(caddy.NewTestController("dns", "nodecache"))
	must(t, err)
	wantError(t, newConfig().add(b, []string{""}, []string{dns53}), "needs the addresses of a bind")
}

func TestParseAddr(t *testing.T) {
	for _, test := range []struct{ input, shouldErr string }{
		{"169.254.20.10", ""},
		{"10.96.0.10", ""},
		{"127.0.0.1", ""},
		{"fd00:20::10", ""},
		{"::1", ""},
		{"fe80::1%eth0", ""},
		{"", "unable to parse IP"},
		{"localhost", "unable to parse IP"},
		{"10.0.0.1/32", "unexpected"},
		{"10.0.0.01", "leading zero"},
		{"0.0.0.0", "wildcard"},
		{"::", "wildcard"},
		{"::ffff:0.0.0.0", "IPv4-mapped"},
		{"::ffff:10.0.0.1", "IPv4-mapped"},
		{"224.0.0.1", "multicast"},
		{"239.255.255.255", "multicast"},
		{"255.255.255.255", "broadcast"},
		{"ff02::1", "multicast"},
		{"ff02::1%eth0", "multicast"},
		{"fe80::1", "link-local IPv6"},
	} {
		a, err := parseAddr(test.input)
		wantError(t, err, test.shouldErr)
		if err == nil && a != addr(test.input) {
			t.Errorf("%q: got %s", test.input, a)
		}
	}
}

func FuzzDirective(f *testing.F) {
	for _, seed := range []string{
		"nodecache", "nodecache skipteardown", "nodecache {\n}", "nodecache {", "nodecache { {", "nodecache }", "nodecache {}",
		"nodecache skipteardown {\ninterface cache0\nfirewall auto\nsync 1m\nuntracked 8080 9253\n}",
		"nodecache {\ninterface a\ninterface b\n}", "nodecache\nnodecache", "nodecache {\nuntracked 0\n}",
		"nodecache {\ninterface \"a b\"\n}", "nodecache {\nsync -5s\n}", "nodecache {\ninterface { }\n}", "nodecache \"\n\"",
	} {
		f.Add(seed, "169.254.20.10 fd00:20::10", "dns://.:53 tls://.:853")
	}
	f.Add("nodecache", "0.0.0.0", "dns://.:53")
	f.Add("nodecache", "fe80::1%eth0 ::ffff:1.2.3.4", "https3://a.:443")
	f.Add("nodecache {\nuntracked 53\n}", "127.0.0.1 ::1", "a.:")
	f.Fuzz(func(t *testing.T, directive, hosts, keys string) {
		b, err := parse(caddy.NewTestController("dns", directive))
		if err != nil || b == nil { // nil: no token at all, for which setup is not called
			return
		}
		cfg := newConfig()
		// As two zones' blocks, which share everything: the second has to fit the first.
		for range 2 {
			if err := cfg.add(b, strings.Fields(hosts), strings.Fields(keys)); err != nil {
				return
			}
		}
		for name, l := range cfg.links {
			if why := badLinkName(name); why != "" {
				t.Errorf("the link %q: %s", name, why)
			}
			if !slices.Contains([]string{backendAuto, backendIPT, backendNFT, backendNone}, l.backend) {
				t.Errorf("the backend %q", l.backend)
			}
			if l.sync < minSync || l.sync > maxSync {
				t.Errorf("sync is %s", l.sync)
			}
		}
		if s := cfg.sync(); s < minSync || s > maxSync {
			t.Errorf("sync of all is %s", s)
		}
		for a, p := range cfg.addrs {
			if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || a.Is4In6() || a.Zone() != "" || cfg.links[p.link] == nil {
				t.Errorf("the address %s on %q", a, p.link)
			}
		}
		for e, o := range cfg.wants {
			p := cfg.addrs[e.Addr]
			if p == nil || p.link != o.link {
				t.Errorf("%s on %q, but the address is %+v", e, o.link, p)
			}
			if e.Port == 0 || e.Proto != "udp" && e.Proto != "tcp" || e.Extra && e.Proto != "tcp" {
				t.Errorf("the endpoint %s, extra %v", e, e.Extra)
			}
			twin := e
			if twin.Extra = !e.Extra; cfg.wants[twin] != nil {
				t.Errorf("%s is wanted with both guards", e)
			}
		}
		s := cfg.state(func(b string) string { return b })
		if kept := cfg.kept(func(b string) string { return b }); b.skipteardown != !kept.Empty() && !s.Empty() {
			t.Errorf("skipteardown is %v, but kept is %v", b.skipteardown, kept)
		}
	})
}
