package nodecache

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
)

// corefile is one server block as setup sees it.
type corefile struct {
	directive string
	hosts     string // what bind resolved to
	keys      string
}

// dns53 is the key of a block for the root zone.
const dns53 = "dns://.:53"

// read has c's blocks parsed and added, as setup does, without a look at the machine.
func read(blocks ...corefile) (*config, error) {
	cfg := newConfig()
	for _, in := range blocks {
		b, err := parse(caddy.NewTestController("dns", in.directive))
		if err == nil {
			err = cfg.add(b, strings.Fields(in.hosts), strings.Fields(in.keys))
		}
		if err != nil {
			return nil, err
		}
	}
	return cfg, nil
}

// describe puts a config into lines.
func describe(c *config) (lines []string) {
	keep := map[bool]string{true: " keep"}
	for name, l := range c.links {
		lines = append(lines, fmt.Sprintf("link %s %s %s", name, l.backend, l.sync))
	}
	for a, p := range c.addrs {
		lines = append(lines, fmt.Sprintf("addr %s %s%s", a, p.link, keep[p.keep]))
	}
	for e, o := range c.wants {
		extra := map[bool]string{true: " extra"}[e.Extra]
		lines = append(lines, fmt.Sprintf("want %s %s%s%s", e, o.link, keep[o.keep], extra))
	}
	slices.Sort(lines)
	return lines
}

func TestParse(t *testing.T) {
	for i, test := range []struct {
		input     string
		shouldErr string
		want      block
	}{
		{"nodecache", "", block{link: "nodelocaldns"}},
		{"nodecache skipteardown", "", block{link: "nodelocaldns", skipteardown: true}},
		{"nodecache SkipTeardown", "", block{link: "nodelocaldns", skipteardown: true}},
		{"nodecache {\n}", "", block{link: "nodelocaldns"}},
		{"nodecache {\ninterface cache0\n}", "", block{link: "cache0"}},
		{"nodecache {\ninterface none\n}", "", block{link: "none"}},
		{"nodecache {\ninterface 123456789012345\n}", "", block{link: "123456789012345"}},
		{"nodecache {\nfirewall nftables\n}", "", block{link: "nodelocaldns", backend: "nftables"}},
		{"nodecache {\nfirewall none\n}", "", block{link: "nodelocaldns", backend: "none"}},
		{"nodecache {\nsync 90s\n}", "", block{link: "nodelocaldns", sync: 90 * time.Second}},
		{"nodecache {\nsync 100ms\n}", "", block{link: "nodelocaldns", sync: minSync}},
		{"nodecache {\nsync 24h\n}", "", block{link: "nodelocaldns", sync: maxSync}},
		{"nodecache {\nuntracked 8080 9253 65535\n}", "", block{link: "nodelocaldns", extra: []uint16{8080, 9253, 65535}}},
		{"nodecache skipteardown {\nuntracked 8080\nsync 5s\nfirewall iptables\ninterface cache0\n}", "",
			block{link: "cache0", skipteardown: true, backend: "iptables", sync: 5 * time.Second, extra: []uint16{8080}}},

		{"nodecache keep", `Testfile:1 - Error during parsing: unknown argument "keep"`, block{}},
		{"nodecache skipteardown skipteardown", "Testfile:1 - Error during parsing: skipteardown is given twice", block{}},
		{"nodecache\nnodecache", "Testfile:2 - Error during parsing: nodecache stands in this server block already, at Testfile:1", block{}},
		{"nodecache {\n}\nnodecache {\n}", "stands in this server block already", block{}},
		{"nodecache {\nport 53\n}", `Testfile:2 - Error during parsing: unknown property "port"`, block{}},
		{"nodecache {\ninterface a\ninterface b\n}", "Testfile:3 - Error during parsing: interface is given twice, before this at Testfile:2", block{}},
		{"nodecache {\nfirewall none\nfirewall none\n}", "firewall is given twice", block{}},
		{"nodecache {\nsync 1s\nsync 1s\n}", "sync is given twice", block{}},
		{"nodecache {\nuntracked 1\nuntracked 2\n}", "untracked is given twice", block{}},
		{"nodecache {\ninterface\n}", "interface needs a value", block{}},
		{"nodecache {\nuntracked\n}", "untracked needs a value", block{}},
		{"nodecache {\ninterface a b\n}", "interface takes one value, not 2", block{}},
		{"nodecache {\nsync 1s 2s\n}", "sync takes one value, not 2", block{}},
		{"nodecache {\nfirewall none auto none\n}", "firewall takes one value, not 3", block{}},
		{"nodecache {\ninterface 1234567890123456\n}", "it has 16 bytes, and the kernel takes 15", block{}},
		{"nodecache {\ninterface eth0/1\n}", `"eth0/1" can't be the name of an interface`, block{}},
		{"nodecache {\ninterface ..\n}", "can't be the name of an interface", block{}},
		{"nodecache {\nfirewall ipfw\n}", `unknown firewall "ipfw"; it is auto, iptables, nftables or none`, block{}},
		{"nodecache {\nsync soon\n}", `sync "soon" is no duration`, block{}},
		{"nodecache {\nsync 60\n}", `sync "60" is no duration`, block{}},
		{"nodecache {\nsync -1s\n}", "sync -1s is out of range; it is 100ms to 24h0m0s", block{}},
		{"nodecache {\nsync 0s\n}", "out of range", block{}},
		{"nodecache {\nsync 99ms\n}", "out of range", block{}},
		{"nodecache {\nsync 24h1ns\n}", "out of range", block{}},
		{"nodecache {\nsync 300000h\n}", "out of range", block{}},
		{"nodecache {\nsync 99999999999h\n}", "is no duration", block{}},
		{"nodecache {\nuntracked 0\n}", `untracked "0" is no port; a port is 1 to 65535`, block{}},
		{"nodecache {\nuntracked 65536\n}", "is no port", block{}},
		{"nodecache {\nuntracked 8080 x\n}", `untracked "x" is no port`, block{}},
		{"nodecache {\nuntracked -1\n}", "is no port", block{}},
	} {
		got, err := parse(caddy.NewTestController("dns", test.input))
		wantError(t, err, test.shouldErr)
		if err != nil {
			continue
		}
		g := *got
		g.at, g.backendAt, g.syncAt, g.ifaceAt, g.extraAt = "", "", "", "", ""
		if fmt.Sprintf("%+v", g) != fmt.Sprintf("%+v", test.want) {
			t.Errorf("Test %d (%q): got %+v, want %+v", i, test.input, g, test.want)
		}
	}
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

func TestBadLinkName(t *testing.T) {
	for name, why := range map[string]string{
		"nodelocaldns":     "",
		"a":                "",
		"123456789012345":  "",
		"dns.cache-0_x":    "",
		"...":              "",
		"":                 "the kernel refuses it",
		".":                "the kernel refuses it",
		"..":               "the kernel refuses it",
		"1234567890123456": "it has 16 bytes, and the kernel takes 15",
		"éééééééé":         "it has 16 bytes, and the kernel takes 15",
		"a/b":              "it has a slash",
		"a:1":              "it has a slash, a colon",
		"dns%d":            "a percent sign",
		"a b":              "a blank",
		"a\tb":             "a blank",
		"a\x00":            "a blank",
		"a\x7f":            "a blank",
	} {
		got := badLinkName(name)
		if (got == "") != (why == "") || !strings.Contains(got, why) {
			t.Errorf("%q: got %q, want %q", name, got, why)
		}
	}
}

// What the directive accepts, the kernel has to accept too: it would say no only
// while CoreDNS starts, and then with nothing but "invalid argument".
func TestKernelTakesAcceptedLinkNames(t *testing.T) {
	needRoot(t)
	cleanLinks(t)
	names := []string{"...", "123456789012345", "-"}
	for r := rune('!'); r < 0x7f; r++ {
		names = append(names, "nc"+string(r))
	}
	for _, name := range names {
		if badLinkName(name) != "" {
			continue
		}
		if err := (&netif{name: name}).add(); err != nil {
			t.Errorf("%q: %v", name, err)
		}
		removeLink(t, name)
	}
}

func TestCheckOrder(t *testing.T) {
	for _, test := range []struct{ input, shouldErr string }{
		{"metadata bind nodecache health ready prometheus pprof errors", ""},
		{"bind errors log", ""}, // nodecache is not in the list: it was registered by a test
		{"nodecache", ""},
		{"nodecache bind health", "runs nodecache before bind: move the line nodecache of its plugin.cfg right after bind"},
		{"bind health nodecache", "runs health before nodecache"},
		{"bind ready nodecache", "runs ready before nodecache"},
		{"bind prometheus nodecache", "runs prometheus before nodecache"},
		{"bind pprof nodecache", "runs pprof before nodecache"},
	} {
		wantError(t, checkOrder(strings.Fields(test.input)), test.shouldErr)
	}
}

// controller is caddy's for one block of an instance of its own.
func controller(in corefile) *caddy.Controller {
	c := caddy.NewTestController("dns", in.directive)
	c.ServerBlockKeys = strings.Fields(in.keys)
	if in.hosts != "" {
		dnsserver.GetConfig(c).ListenHosts = strings.Fields(in.hosts)
	}
	return c
}

func TestSetup(t *testing.T) {
	needRoot(t)
	for i, test := range []struct {
		input     corefile
		shouldErr string
	}{
		{corefile{"nodecache", "169.254.20.10", dns53}, ""},
		{corefile{"nodecache", "169.254.20.10 fd00:20::10", dns53}, ""},
		{corefile{"nodecache", "127.0.0.1", dns53}, ""}, // carried by lo, served there
		{corefile{"nodecache {\ninterface none\nfirewall none\n}", "127.0.0.1", dns53}, ""},
		{corefile{"nodecache keep", "169.254.20.10", dns53}, "plugin/nodecache: Testfile:1 - Error during parsing: unknown argument"},
		{corefile{"nodecache", "", dns53}, "plugin/nodecache: Testfile:1 - Error during parsing: nodecache needs the addresses"},
		{corefile{"nodecache {\ninterface lo\n}", "169.254.20.10", dns53}, "plugin/nodecache: Testfile:2 - Error during parsing: interface lo: a link of this name exists"},
		{corefile{"nodecache {\ninterface none\n}", "169.254.20.10", dns53}, "bind 169.254.20.10: no link of this node carries the address, and interface none"},
	} {
		c := controller(test.input)
		before := links(t)
		wantError(t, setup(c), test.shouldErr)
		if after := links(t); !slices.Equal(before, after) {
			t.Errorf("Test %d: setup has changed the links to %q", i, after)
		}
		if got, want := len(dnsserver.GetConfig(c).Plugin), map[bool]int{true: 1}[test.shouldErr == ""]; got != want {
			t.Errorf("Test %d: %d plugins in the chain, want %d", i, got, want)
		}
	}
}

func TestSetupRefusesWrongPluginOrder(t *testing.T) {
	old := dnsserver.Directives
	defer func() { dnsserver.Directives = old }()
	dnsserver.Directives = []string{"nodecache", "bind"}
	wantError(t, setup(controller(corefile{"nodecache", "169.254.20.10", dns53})), "plugin/nodecache: this build runs nodecache before bind")
}

func TestBlocksOfOneInstanceShareConfig(t *testing.T) {
	needRoot(t)
	c := controller(corefile{"nodecache", "169.254.20.10", dns53})
	must(t, setup(c))
	cfg := c.Get(configKey{}).(*config)
	b, err := parse(caddy.NewTestController("dns", "nodecache"))
	must(t, err)
	must(t, cfg.add(b, []string{"10.96.0.10"}, []string{dns53}))
	if got, want := cfg.String(), "10.96.0.10, 169.254.20.10 (tcp 53, udp 53)"; got != want {
		t.Errorf("the config is %q, want %q", got, want)
	}
}

// checked reads one block and has the machine looked at.
func checked(t *testing.T, in corefile, ours ...string) (*config, error) {
	t.Helper()
	cfg, err := read(in)
	must(t, err)
	b, err := parse(caddy.NewTestController("dns", in.directive))
	must(t, err)
	return cfg, cfg.check(b, ours)
}

func TestCheckNamesMissingNetAdmin(t *testing.T) {
	needRoot(t)
	// A capability is a thread's: this one is not given back to the runtime.
	runtime.LockOSThread()
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	must(t, unix.Capget(&head, &data[0]))
	had := data
	data[0].Effective &^= 1 << unix.CAP_NET_ADMIN
	must(t, unix.Capset(&head, &data[0]))
	defer func() {
		if err := unix.Capset(&head, &had[0]); err == nil {
			runtime.UnlockOSThread()
		}
	}()
	_, err := checked(t, corefile{"nodecache", "169.254.20.10", dns53})
	wantError(t, err, "needs the capability NET_ADMIN")
	_, err = checked(t, corefile{"nodecache {\ninterface none\nfirewall nftables\n}", "127.0.0.1", dns53})
	wantError(t, err, "needs the capability NET_ADMIN")
	// Who asks for neither needs no capability.
	_, err = checked(t, corefile{"nodecache {\ninterface none\nfirewall none\n}", "127.0.0.1", dns53})
	wantError(t, err, "")
}

func TestCheckNamesMissingIPTables(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	const v4, v6 = "169.254.20.10", "fd00:20::10"
	const ipt = "nodecache {\nfirewall iptables\n}"
	have := func(names ...string) {
		for _, n := range names {
			must(t, os.WriteFile(filepath.Join(dir, n), []byte("#!/bin/sh\n"), 0o755))
		}
	}
	_, err := checked(t, corefile{ipt, v4, dns53})
	wantError(t, err, "Testfile:2 - Error during parsing: firewall iptables: finding the program iptables: ")
	have("iptables", "iptables-save")
	_, err = checked(t, corefile{ipt, v4, dns53})
	wantError(t, err, "finding the program iptables-restore: ")
	have("iptables-restore")
	_, err = checked(t, corefile{ipt, v4, dns53})
	wantError(t, err, "")
	_, err = checked(t, corefile{ipt, v4 + " " + v6, dns53})
	wantError(t, err, "finding the program ip6tables: ")
	_, err = checked(t, corefile{"nodecache", v6, dns53}) // auto takes what is there
	wantError(t, err, "")
}

func TestAutoTakesIPTablesWhereItIs(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	n := newNode()
	for word, want := range map[string]string{"auto": "nftables", "iptables": "iptables", "none": "none"} {
		if got := n.resolve(word); got != want {
			t.Errorf("without iptables, %s is %s, want %s", word, got, want)
		}
	}
	must(t, os.WriteFile(filepath.Join(dir, "iptables"), []byte("#!/bin/sh\n"), 0o755))
	if got := n.resolve("auto"); got != "nftables" {
		t.Errorf("auto is %s all of a sudden: the rules made until then would be forgotten", got)
	}
	n = newNode()
	if got := n.resolve("auto"); got != "iptables" {
		t.Errorf("with iptables, auto is %s", got)
	}
	for name, want := range map[string]string{"iptables": "iptables", "nftables": "nftables"} {
		fw, err := n.backend(name)
		if err != nil || fw.String() != want {
			t.Errorf("backend %s: %v, error %v", name, fw, err)
		}
		if again, _ := n.backend(name); again != fw {
			t.Errorf("backend %s is made twice", name)
		}
	}
	if _, err := n.backend("ipfw"); err == nil {
		t.Error("there is a backend ipfw")
	}
}

func TestCheckRefusesAddressOnIPVSLink(t *testing.T) {
	needRoot(t)
	cleanLinks(t)
	must(t, (&netif{name: nodelinks.IPVS}).add())
	defer removeLink(t, nodelinks.IPVS)
	addAddr(t, nodelinks.IPVS, "10.96.0.10/32")
	_, err := checked(t, corefile{"nodecache", "169.254.20.10 10.96.0.10", dns53})
	wantError(t, err, "Testfile:1 - Error during parsing: bind 10.96.0.10: the link kube-ipvs0 carries this address")
	_, err = checked(t, corefile{"nodecache", "169.254.20.10", dns53})
	wantError(t, err, "")
}

func TestAddressOfAnotherLinkIsServedThere(t *testing.T) {
	newTestLink(t, "10.96.0.10")
	in := corefile{"nodecache", "169.254.20.10 10.96.0.10 127.0.0.1", dns53}
	on := func(cfg *config) []netip.Addr {
		return cfg.state(false, func(b string) string { return b }).Links["nodelocaldns"]
	}
	cfg, err := checked(t, in)
	must(t, err)
	if got, want := on(cfg), addrs("169.254.20.10"); !slices.Equal(got, want) {
		t.Errorf("ours to carry are %v, want %v", got, want)
	}
	// A link that a reload's old configuration has is no other.
	cfg, err = checked(t, in, testLink)
	must(t, err)
	if got, want := on(cfg), addrs("10.96.0.10", "169.254.20.10"); !slices.Equal(got, want) {
		t.Errorf("ours to carry are %v, want %v", got, want)
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
		s := cfg.state(false, func(b string) string { return b })
		if kept := cfg.state(true, func(b string) string { return b }); b.skipteardown != !kept.Empty() && !s.Empty() {
			t.Errorf("skipteardown is %v, but kept is %v", b.skipteardown, kept)
		}
	})
}

func TestProgramsOfAddresses(t *testing.T) {
	cfg, err := read(corefile{"nodecache", "169.254.20.10 10.96.0.10", dns53}, corefile{"nodecache {\ninterface six\n}", "fd00:20::10", dns53})
	must(t, err)
	if got, want := cfg.binaries("nodelocaldns"), []string{"iptables", "iptables-save", "iptables-restore"}; !slices.Equal(got, want) {
		t.Errorf("IPv4 takes %v, want %v", got, want)
	}
	if got, want := cfg.binaries("six"), []string{"ip6tables", "ip6tables-save", "ip6tables-restore"}; !slices.Equal(got, want) {
		t.Errorf("IPv6 takes %v, want %v", got, want)
	}
}

// lookPath finds one of the system's programs, or skips the test.
func lookPath(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%v", err)
	}
	return path
}
