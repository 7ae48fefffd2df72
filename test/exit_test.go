package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// furnish gives the node what others put there: it has to survive.
func (n *node) furnish() {
	n.Helper()
	for _, command := range []string{
		"iptables -t raw -A PREROUTING -p udp --dport 9999 -j NOTRACK",
		"ip6tables -t raw -A PREROUTING -p udp --dport 9999 -j NOTRACK",
		"iptables -N FOREIGN",
		"iptables -A FOREIGN -s 10.9.9.9 -j DROP",
		"iptables -A INPUT -j FOREIGN",
		"ip6tables -A OUTPUT -d fd00:9::9 -j DROP",
		"nft add table inet foreign",
		"ip addr add 10.9.9.1/32 dev lo",
	} {
		words := strings.Fields(command)
		_, err := n.Node.Run(words[0], words[1:]...)
		n.must(err)
	}
}

func TestExitLeavesNodeAsItWas(t *testing.T) {
	forBackends(t, func(n *node) {
		n.sub("empty", (*node).exitsLeaveNothing)
		n.furnish()
		n.sub("furnished", (*node).exitsLeaveNothing)
	})
}

func (n *node) exitsLeaveNothing() {
	before := n.snapshot()
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT} {
		p := n.serve(n.corefile())
		if n.snapshot() == before {
			n.Error("the snapshot shows nothing of a node's cache")
		}
		n.answersEverybody(false, addrs...)
		p.exit(s)
		n.same(fmt.Sprint("after ", s), before, n.snapshot())
		n.answersEverybody(true, lab.ClusterIP, lab.ClusterIP6)
	}
}

// An address that was on the node before stays where it was.
func TestExitLeavesForeignAddress(t *testing.T) {
	forBackends(t, func(n *node) {
		for _, addr := range []string{"169.254.20.10/32", "fd00:96::10/128"} {
			_, err := n.Node.Run("ip", "addr", "add", addr, "dev", "lo", "nodad")
			n.must(err)
		}
		before := n.snapshot()
		p := n.serve(n.corefile())
		n.answersEverybody(false, addrs...)
		p.exit(syscall.SIGTERM)
		n.same("after the exit", before, n.snapshot())
	})
}

// A start whose port is taken says by whom, and leaves no trace.
func TestStartFailsOnTakenPort(t *testing.T) {
	for _, b := range backends {
		for _, proto := range protos {
			t.Run(strings.ReplaceAll(b.String(), " ", "-")+"-"+proto, func(t *testing.T) {
				n := newNode(t, b)
				n.furnish()
				n.hold(proto, 53)
				before := n.snapshot()
				said := n.refuse(n.corefile(), lab.Options{})
				n.has(said, ":53", fmt.Sprint(os.Getpid()))
				n.same("after a start that failed", before, n.snapshot())
			})
		}
	}
}

func TestSkipTeardown(t *testing.T) {
	forBackends(t, func(n *node) {
		before := n.snapshot()
		keeping := plainBlock(".:53", allAddrs, "nodecache skipteardown {\n firewall "+n.backend.firewall+"\n}")
		for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT} {
			p := n.serve(keeping)
			during := n.snapshot()
			n.answersEverybody(false, addrs...)
			p.exit(s)
			if n.backend != nftables {
				n.same(fmt.Sprint("after ", s), during, n.snapshot())
			} else if links, _, _ := strings.Cut(n.snapshot(), "== ip route"); !strings.HasPrefix(during, links) {
				// The kernel takes an owner's table with it.
				n.same(fmt.Sprint("the addresses after ", s), during, links)
			}
			n.clusterAnswers()
		}
		p := n.serve(n.corefile())
		n.answersEverybody(false, addrs...)
		p.exit(syscall.SIGTERM)
		n.same("after an exit without skipteardown", before, n.snapshot())
	})
}

// skipteardown in one of two blocks keeps what that one needs.
func TestSkipTeardownOfOneBlock(t *testing.T) {
	forBackends(t, func(n *node) {
		keeping := plainBlock("lab.:53", "169.254.20.10 fd00:20::10", "nodecache skipteardown {\n firewall "+n.backend.firewall+"\n}")
		only := n.serve(keeping)
		want := n.snapshot()
		only.exit(syscall.SIGTERM)
		left := n.snapshot()
		if n.backend != nftables {
			n.same("after skipteardown", want, left)
		}
		p := n.serve(keeping + n.block(".:53", "10.96.0.10 fd00:96::10"))
		n.answersEverybody(false, addrs...)
		p.exit(syscall.SIGTERM)
		n.same("after skipteardown in one block", left, n.snapshot())
	})
}

func TestKillFallsThroughToCluster(t *testing.T) {
	forBackends(t, func(n *node) {
		p := n.serve(n.corefile())
		n.answersEverybody(false, addrs...)
		p.Kill()
		n.clusterAnswers()
	})
}

// After a kill the next process takes over what it finds, and owns it.
func TestRestartAdopts(t *testing.T) {
	forBackends(t, func(n *node) {
		n.furnish()
		before := n.snapshot()
		p := n.serve(n.corefile())
		fresh := n.snapshot()
		for range 3 {
			p.Kill()
			p = n.serve(n.corefile())
			n.same("after kill and restart instead of a fresh start", fresh, n.snapshot())
			n.answersEverybody(false, addrs...)
		}
		p.exit(syscall.SIGTERM)
		n.same("after the exit", before, n.snapshot())
	})
}

// The next process may want something else.
func TestRestartAdoptsAnotherConfiguration(t *testing.T) {
	forBackends(t, func(n *node) {
		before := n.snapshot()
		less := n.block(".:53", "169.254.20.10 fd00:20::10 10.96.0.53")
		p := n.serve(less)
		fresh := n.snapshot()
		p.exit(syscall.SIGTERM)
		p = n.serve(n.corefile() + n.block("other.:5300", allAddrs))
		p.Kill()
		p = n.serve(less)
		n.becomes("after kill and restart with less instead of a fresh start", fresh)
		n.clusterAnswers() // of an address that is no longer wanted
		p.exit(syscall.SIGTERM)
		n.same("after the exit", before, n.snapshot())
	})
}

// A process with another backend removes what the killed one has left.
func TestRestartAdoptsFromAnotherBackend(t *testing.T) {
	for _, c := range [][2]string{{"iptables", "nftables"}, {"nftables", "iptables"}} {
		t.Run(c[0]+"-"+c[1], func(t *testing.T) {
			n := newNode(t, backend{lab.NFT, c[1]})
			before := n.snapshot()
			p := n.serve(n.corefile())
			fresh := n.snapshot()
			p.exit(syscall.SIGTERM)
			p = n.serve(plainBlock(".:53", allAddrs, "nodecache {\n firewall "+c[0]+"\n}"))
			p.Kill()
			p = n.serve(n.corefile())
			n.same("after kill and restart instead of a fresh start", fresh, n.snapshot())
			p.exit(syscall.SIGTERM)
			n.same("after the exit", before, n.snapshot())
		})
	}
}

// What has arrived before the exit is answered, however long it takes.
func TestAnswersInFlightAtExit(t *testing.T) {
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT} {
		t.Run(s.String(), func(t *testing.T) {
			forBackends(t, func(n *node) {
				before := n.snapshot()
				p := n.serve(n.corefile())
				const each = 8
				var loads []lab.Load
				for _, c := range n.clients() {
					for _, proto := range protos {
						for _, to := range on(addrs...) {
							loads = append(loads, lab.Load{From: c.ns, Proto: proto, To: []netip.AddrPort{to}, Names: lab.Slow,
								Tag:   strings.NewReplacer(".", "", ":", "").Replace(c.name + proto + to.Addr().String()),
								Count: each, Workers: each, Timeout: lab.Patience})
						}
					}
				}
				asked := n.Cluster.Queries()
				running := n.start(loads...)
				out := int64(len(loads) * each)
				if !eventually(func() bool { return n.Cluster.Queries()-asked >= out }) {
					n.Fatalf("%d of %d queries reached the cluster", n.Cluster.Queries()-asked, out)
				}
				done := 0
				p.exit(s)
				for i, r := range running {
					result, err := r.Wait()
					n.must(err)
					if !result.AllAnswered(false) {
						l := loads[i]
						n.Errorf("%s to %v: %v", l.Proto, l.To, result)
					}
					done += result.Answered
				}
				n.Logf("%d of %d answered", done, out)
				n.same("after the exit", before, n.snapshot())
			})
		})
	}
}
