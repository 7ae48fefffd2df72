package nodecache

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func list[T fmt.Stringer](vs []T) string {
	var s []string
	for _, v := range vs {
		s = append(s, v.String())
	}
	return strings.Join(s, ",")
}

// newTestNode returns what one process has, with a fake firewall. Its link is
// a real one. It leaves when the test is over, and the links have to be as before.
func newTestNode(t *testing.T) (*node, *fakeFirewall) {
	t.Helper()
	needRoot(t)
	cleanLinks(t)
	n, fw := newNode(), &fakeFirewall{t: t}
	n.firewalls[backendIPT] = fw
	t.Cleanup(n.exit)
	return n, fw
}

// demand is what a Corefile asks for that binds to the addresses.
func demand(t testing.TB, arguments, properties string, addresses ...string) *config {
	t.Helper()
	in := corefile{
		directive: fmt.Sprintf("nodecache %s {\ninterface %s\nfirewall iptables\n%s\n}", arguments, testLink, properties),
		hosts:     strings.Join(addresses, " "),
		keys:      dns53,
	}
	cfg, err := read(in)
	must(t, err)
	return cfg
}

func dnsOf(addresses ...string) string { return list(dnsOn(addresses...)) }

// up starts cfg as the process's first and waits until it is complete.
func up(t *testing.T, n *node, cfg *config) []*socket {
	t.Helper()
	must(t, n.start(cfg))
	socks := serveOn(t, cfg.listeners()...)
	eventually(t, "the start is complete", n.ready.Load)
	return socks
}

func closeAll(socks []*socket) {
	for _, s := range socks {
		s.Close()
	}
}

// running returns how many goroutines are in one of node's methods.
func running(method string) int {
	stacks := make([]byte, 1<<20)
	return strings.Count(string(stacks[:runtime.Stack(stacks, true)]), "nodecache.(*node)."+method+"(")
}

// watchAddrs notes every address that goes, until the function it returns is called.
func watchAddrs(t *testing.T) (gone func() []string) {
	t.Helper()
	updates, done := make(chan netlink.AddrUpdate, 1000), make(chan struct{})
	must(t, netlink.AddrSubscribe(updates, done))
	return func() (list []string) {
		// An address of the test's own marks the end of what was reported.
		addAddr(t, "lo", "192.0.2.254/32")
		delAddr(t, "lo", "192.0.2.254/32")
		for {
			select {
			case u := <-updates:
				if u.NewAddr {
					continue
				}
				if u.LinkAddress.IP.String() == "192.0.2.254" {
					close(done)
					return list
				}
				list = append(list, u.LinkAddress.IP.String())
			case <-time.After(30 * time.Second):
				t.Fatal("no report of an address within 30 s")
			}
		}
	}
}

// freebind opens sockets on addresses that are not on the node.
var freebind = net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
	if e := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1) }); e != nil {
		return e
	}
	return err
}}

// With the real backends: rules, link and sockets of one process.
func TestNodeWithRealFirewall(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		n, _ := newTestNode(t)
		delete(n.firewalls, backendIPT)
		up(t, n, demand(t, "", "", "169.254.20.10", "fd00:20::10"))
		fw := n.firewalls[backendIPT].(*iptables)
		whole := func() bool {
			text := v.rules(t)
			return strings.Contains(text, "queries of this node to 169.254.20.10:53/udp") && strings.Contains(text, "queries of this node to [fd00:20::10]:53/tcp")
		}
		if !whole() {
			t.Fatalf("rules are missing:\n%s", v.rules(t))
		}
		for _, program := range []string{"iptables", "ip6tables"} {
			before := repaired(t, objectRule)
			v.run(t, program, "-t", "raw", "-F")
			eventually(t, "flushed rules are counted", grown(t, objectRule, before)) // the sync of a minute is too late
			eventually(t, "they are back", whole)
		}
		for f, x := range fw.families {
			wantRules(t, v, x, ofFamily(dnsOn("169.254.20.10", "fd00:20::10"), f))
		}
		n.exit()
	})
}

func TestAutoFallsBackToNFTables(t *testing.T) {
	testkit.NeedOwnedTables(t)
	n, _ := newTestNode(t)
	delete(n.firewalls, backendIPT)
	dir := t.TempDir()
	for _, p := range programs {
		must(t, os.WriteFile(dir+"/"+p, []byte("#!/bin/sh\necho broken >&2\nexit 1\n"), 0o755))
	}
	t.Setenv("PATH", dir)
	cfg, err := read(corefile{"nodecache {\ninterface nctest0\n}", "169.254.20.10", dns53})
	must(t, err)
	up(t, n, cfg)
	if fw := n.firewalls[backendNFT]; fw == nil || n.firewalls[backendIPT] != nil {
		t.Errorf("the firewalls are %v", n.firewalls)
	}
	// Who asks for iptables gets it, or an error.
	m := newNode()
	defer m.exit()
	err = m.start(demand(t, "", "", "10.96.0.10"))
	wantError(t, err, "running iptables --version: exit status 1: broken")
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
