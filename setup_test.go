package nodecache

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
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
