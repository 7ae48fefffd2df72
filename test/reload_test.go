package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// endless is for loads that are stopped.
const endless = 1 << 20

// everywhere is loads of so many queries a second in all, from pod and host, over UDP
// and TCP, with new sockets and with kept ones.
func (n *node) everywhere(rate int, addrs ...netip.Addr) (loads []lab.Load) {
	for _, c := range n.clients() {
		for _, proto := range protos {
			for _, keep := range []bool{false, true} {
				// Mostly UDP, as it is in life.
				r := rate * 7 / 32
				if proto == "tcp" {
					r = rate / 32
				}
				loads = append(loads, lab.Load{From: c.ns, Proto: proto, To: on(addrs...), Keep: keep, Rate: max(r, 1), Count: endless})
			}
		}
	}
	return loads
}

func TestReloadKeepsWhatStays(t *testing.T) {
	forBackends(t, func(n *node) {
		before := n.snapshot()
		less := n.corefile()
		more := n.block(".:53", allAddrs+" 10.96.0.53 fd00:96::53")
		p := n.serve(less)
		loads := n.start(n.everywhere(scale(2000), addrs...)...)
		n.sent(loads, 1)
		corefile := less
		for i := range scale(50) {
			corefile = []string{more, less}[i%2]
			p.reload(corefile)
			n.sent(loads, 1)
		}
		n.stop(loads)
		reloaded := n.snapshot()
		p.exit(syscall.SIGTERM)
		n.same("after the exit", before, n.snapshot())
		n.serve(corefile)
		n.same("after many reloads instead of a fresh start", n.snapshot(), reloaded)
	})
}

// A reload of every kind, by signal and by the reload plugin: what stays is served
// throughout, and afterwards the node is as after a fresh start with the
// configuration in force.
func TestReload(t *testing.T) {
	const own = "10.0.1.1" // an address that the node has anyway
	taken := plainBlock("taken.:5300", own)
	for _, c := range []struct {
		name          string
		before, after func(n *node) string
		refused       string // part of the error of a reload that is to fail
		stays         []netip.AddrPort
		slow          bool // it takes a minute
	}{
		{
			name:   "same",
			before: func(n *node) string { return n.corefile() },
			after:  func(n *node) string { return n.corefile() },
			stays:  on(addrs...),
		},
		{
			name:   "address-added",
			before: func(n *node) string { return n.block(".:53", "169.254.20.10") },
			after:  func(n *node) string { return n.corefile() },
			stays:  on(lab.LinkLocal),
		},
		{
			name:   "address-removed",
			before: func(n *node) string { return n.corefile() },
			after:  func(n *node) string { return n.block(".:53", "169.254.20.10 fd00:20::10") },
			stays:  on(lab.LinkLocal, lab.Local6),
		},
		{
			name:   "last-ipv6-address-removed",
			before: func(n *node) string { return n.corefile() },
			after:  func(n *node) string { return n.block(".:53", "169.254.20.10") },
			stays:  on(lab.LinkLocal),
		},
		{
			name: "address-moved-to-another-block",
			before: func(n *node) string {
				return n.block("lab.:53", allAddrs) + n.block("other.:53", "169.254.20.10")
			},
			after: func(n *node) string {
				return n.block("lab.:53", "169.254.20.10") + n.block(".:53", "10.96.0.10 fd00:20::10 fd00:96::10")
			},
			stays: on(addrs...),
		},
		{
			name:   "block-added",
			before: func(n *node) string { return n.corefile() },
			after:  func(n *node) string { return n.corefile() + n.block("other.:5300", allAddrs) },
			stays:  on(addrs...),
		},
		{
			name:   "port-changed",
			before: func(n *node) string { return n.corefile() + n.block("other.:5300", allAddrs) },
			after:  func(n *node) string { return n.corefile() + n.block("other.:5301", allAddrs) },
			stays:  on(addrs...),
		},
		{
			name:   "directive-removed-from-one-block",
			before: func(n *node) string { return n.corefile() + n.block("other.:5300", "10.96.0.53 fd00:96::53") },
			after:  func(n *node) string { return n.corefile() + plainBlock("other.:5300", own) },
			stays:  on(addrs...),
		},
		{
			name:   "directive-removed-from-one-block-with-the-same-addresses",
			before: func(n *node) string { return n.corefile() + n.block("other.:5300", allAddrs) },
			after:  func(n *node) string { return n.corefile() + plainBlock("other.:5300", allAddrs) },
			stays:  on(addrs...),
		},
		{
			name:   "directive-removed",
			before: func(n *node) string { return n.corefile() + plainBlock(".:5300", own) },
			after:  func(*node) string { return plainBlock(".:5300", own) },
			stays:  []netip.AddrPort{netip.MustParseAddrPort(own + ":5300")},
		},
		{
			name:   "directive-added",
			before: func(*node) string { return plainBlock(".:5300", own) },
			after:  func(n *node) string { return n.corefile() + plainBlock(".:5300", own) },
			stays:  []netip.AddrPort{netip.MustParseAddrPort(own + ":5300")},
		},
		{
			name:   "interface-renamed",
			before: func(n *node) string { return n.corefile() },
			after:  func(n *node) string { return n.corefile("interface other") },
			stays:  on(addrs...),
		},
		{
			name:    "bad-syntax",
			before:  func(n *node) string { return n.corefile() },
			after:   func(n *node) string { return n.corefile("nonsense") },
			refused: "nonsense",
			stays:   on(addrs...),
		},
		{
			name:    "bad-in-another-plugin",
			before:  func(n *node) string { return n.corefile() },
			after:   func(n *node) string { return n.block(".:53", "169.254.20.11") + plainBlock("other.:5300", own, "ttl") },
			refused: "ttl",
			stays:   on(addrs...),
		},
		{
			name:    "port-of-another-block-taken",
			before:  func(n *node) string { return n.corefile() },
			after:   func(n *node) string { return n.block(".:53", allAddrs+" 10.96.0.53 fd00:96::53") + taken },
			refused: "5300",
			stays:   on(addrs...),
		},
		{
			name:   "port-of-another-block-taken-and-less-wanted",
			before: func(n *node) string { return n.corefile() },
			after: func(n *node) string {
				return n.block(".:53", "169.254.20.10 10.96.0.53") + taken
			},
			refused: "5300",
			stays:   on(addrs...),
		},
		{
			name:   "port-of-another-plugin-taken",
			before: func(n *node) string { return n.corefile() },
			after: func(n *node) string {
				return n.block(".:53", "169.254.20.11", "untracked 5300") + plainBlock("x.:5400", own, "health "+own+":5300")
			},
			refused: "5300",
			stays:   on(addrs...),
		},
		{
			name:    "directive-added-and-port-of-another-block-taken",
			before:  func(*node) string { return plainBlock(".:53", own) },
			after:   func(n *node) string { return n.corefile() + taken },
			refused: "5300",
			stays:   []netip.AddrPort{netip.MustParseAddrPort(own + ":53")},
			slow:    true,
		},
		{
			name:    "directive-removed-and-port-of-another-block-taken",
			before:  func(n *node) string { return n.corefile() },
			after:   func(*node) string { return plainBlock(".:53", own) + taken },
			refused: "5300",
			stays:   on(addrs...),
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, b := range backends {
				for _, by := range []string{"signal", "plugin"} {
					t.Run(strings.ReplaceAll(b.String(), " ", "-")+"-by-"+by, func(t *testing.T) {
						if c.name == "same" && by == "plugin" {
							t.Skip("it does not reload what has not changed")
						}
						if c.slow && (testing.Short() || b != iptablesNFT) {
							t.Skip("it takes a minute")
						}
						t.Parallel()
						n := newNode(t, b)
						if strings.Contains(c.name, "taken") {
							for _, proto := range protos {
								n.hold(proto, 5300)
							}
						}
						empty := n.snapshot()
						before, after := c.before(n), c.after(n)
						if by == "plugin" {
							before, after = reloading(before), reloading(after)
						}
						p := n.serve(before)
						was := n.snapshot()
						var loads []*lab.Running
						for _, client := range n.clients() {
							for _, proto := range protos {
								loads = append(loads, n.start(lab.Load{From: client.ns, Proto: proto, To: c.stays, Rate: 100, Count: endless})...)
							}
						}
						n.sent(loads, 5)
						mark := p.Mark()
						var err error
						if by == "plugin" {
							n.must(p.Configure(after))
							err = p.WaitReload(mark)
						} else {
							err = p.Reload(after)
						}
						switch {
						case c.refused == "":
							n.must(err)
							if strings.Contains(after, "nodecache") {
								n.must(p.WaitLog(mark, inPlace))
							}
							n.sent(loads, 5)
							n.stop(loads)
							reloaded := n.snapshot()
							p.exit(syscall.SIGTERM)
							n.becomes("after the exit", empty)
							fresh := n.serve(after)
							n.same("after a reload instead of a fresh start", n.snapshot(), reloaded)
							fresh.exit(syscall.SIGTERM)
						case err == nil:
							n.Errorf("the reload succeeded")
						default:
							n.has(err.Error(), c.refused)
							n.sent(loads, 5)
							n.stop(loads)
							n.becomes("after a reload that failed", was)
							// The next one is none the worse for it.
							if by == "signal" {
								p.reload(before)
								n.becomes("after the next reload", was)
							}
							p.exit(syscall.SIGTERM)
						}
						n.becomes("after the exit", empty)
					})
				}
			}
		})
	}
}

// CoreDNS keeps the sockets of a reload that failed open for a while, and reads none
// of them: that they are there must not put any rule in force.
func TestFailedReloadTakesNoQuery(t *testing.T) {
	forBackends(t, func(n *node) {
		for _, proto := range protos {
			n.hold(proto, 5300)
		}
		p := n.serve(plainBlock(".:53", "10.0.1.1"))
		// In which order CoreDNS opens its sockets is chance.
		for range max(2, scale(6)) {
			if err := p.Reload(n.corefile() + plainBlock("taken.:5300", "10.0.1.1")); err == nil {
				n.Fatal("the reload succeeded")
			}
			for _, c := range n.clients() {
				l := lab.Load{From: c.ns, Proto: "udp", To: on(lab.ClusterIP, lab.ClusterIP6), Count: 1, Timeout: time.Second}
				if !eventually(func() bool {
					r, err := l.Run()
					n.must(err)
					return r.AllAnswered(true)
				}) {
					n.Fatalf("the cluster never answers the %s", c.name)
				}
			}
		}
	})
}

// reloading is a Corefile with the reload plugin, as often as it can look.
func reloading(corefile string) string {
	return strings.Replace(corefile, "errors\n", "errors\n    reload 2s 1s\n", 1)
}

// Reloads that come fast, as from somebody who sends the signal in a loop.
func TestReloadsInARow(t *testing.T) {
	forBackends(t, func(n *node) {
		before := n.snapshot()
		last := n.block(".:53", allAddrs+" fd00:96::53")
		p := n.serve(last)
		fresh := n.snapshot()
		p.exit(syscall.SIGTERM)
		p = n.serve(n.corefile())
		loads := n.start(n.everywhere(scale(500), addrs...)...)
		n.sent(loads, 1)
		for i := range scale(30) {
			n.must(p.Configure(n.block(".:53", fmt.Sprintf("%s 10.96.1.%d", allAddrs, i+1))))
			n.must(p.Signal(syscall.SIGUSR1))
		}
		n.must(p.Configure(last))
		n.must(p.Signal(syscall.SIGUSR1))
		n.becomes("after reloads in a row instead of a fresh start", fresh)
		n.sent(loads, 5)
		n.stop(loads)
		p.exit(syscall.SIGTERM)
		n.same("after the exit", before, n.snapshot())
	})
}
