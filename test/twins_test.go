package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

var clusterIPs = []netip.Addr{lab.ClusterIP, lab.ClusterIP6}

// repeats is how often a test repeats what must not lose a query; LAB_REPEAT says
// otherwise.
func repeats(n int) int {
	if r, err := strconv.Atoi(os.Getenv("LAB_REPEAT")); err == nil {
		return r
	}
	return scale(n)
}

// traffic is queries from pod and host, each over new sockets and over kept ones,
// some of them slow, and some over TCP.
type traffic struct {
	n     *node
	flows map[string]*lab.Flowing
	tcp   map[string]*lab.Running
}

// Queries a second of each kind of client.
const udpRate, tcpRate = 200, 40

// flow starts traffic to addresses and waits until slow queries are out.
func (n *node) flow(addrs ...netip.Addr) *traffic {
	n.Helper()
	t := &traffic{n: n, flows: map[string]*lab.Flowing{}, tcp: map[string]*lab.Running{}}
	for _, c := range n.clients() {
		for kind, sockets := range map[string]int{"new sockets": 0, "kept sockets": 32} {
			name := c.name + ", " + kind
			f, err := lab.Flow{From: c.ns, To: addrs, Rate: udpRate, Sockets: sockets, Misses: 30, Slow: 6, Tag: tag(c.name)}.Start()
			n.must(err)
			n.Cleanup(func() { f.Stop() })
			t.flows[name] = f
			t.tcp[name] = n.start(lab.Load{From: c.ns, Proto: "tcp", To: on(addrs...), Names: lab.Misses, Tag: tag(c.name, "tcp"),
				Rate: tcpRate, Count: 1 << 30, Keep: sockets > 0, Workers: 4})[0]
		}
	}
	t.more(100)
	return t
}

var tags int

// tag makes names that no other load asks for.
func tag(parts ...any) string {
	tags++
	return strings.ReplaceAll("-"+fmt.Sprint(parts...)+"-"+strconv.Itoa(tags), " ", "")
}

// more waits until each flow has sent so many more queries, and over TCP its share of
// them.
func (t *traffic) more(k int) {
	t.n.Helper()
	until := map[interface{ Sent() int }]int{}
	for _, f := range t.flows {
		until[f] = f.Sent() + k
	}
	for _, r := range t.tcp {
		until[r] = r.Sent() + k*tcpRate/udpRate
	}
	for f, k := range until {
		if !eventually(func() bool { return f.Sent() >= k }) {
			t.n.Fatal("a flow came to a halt")
		}
	}
}

// end stops the traffic, and every query has to have been answered, except those of
// one kind of client.
func (t *traffic) end(what string, except ...string) {
	t.n.Helper()
	for name, byAddr := range t.stop() {
		for a, r := range byAddr {
			if (r.Sent == 0 || r.Bad() > 0) && !slices.Contains(except, name) {
				t.n.Errorf("%s: %s to %v: of %d queries %d were lost, %d refused, %d answered wrongly:\n\t%s",
					what, name, a, r.Sent, r.Lost, r.Refused, r.Wrong, strings.Join(r.Errors, "\n\t"))
			}
		}
	}
	for name, r := range t.tcp {
		result, err := r.Stop()
		t.n.must(err)
		if (result.Sent == 0 || result.Answered != result.Sent) && !slices.Contains(except, name) {
			t.n.Errorf("%s: %s over TCP: %v", what, name, result)
		}
	}
}

// stop stops the UDP flows.
func (t *traffic) stop() map[string]map[netip.Addr]*lab.FlowResult {
	t.n.Helper()
	results := map[string]map[netip.Addr]*lab.FlowResult{}
	for name, f := range t.flows {
		r, err := f.Stop()
		t.n.must(err)
		results[name] = r
	}
	return results
}

// What is planned loses no query: not one that is under way, not one that a socket
// holds unread, not one that comes a moment later.
func TestPlannedLosesNothing(t *testing.T) {
	for _, c := range []struct {
		name  string
		addrs []netip.Addr
		// event prepares the node, and repeats what happens to it.
		event func(n *node, repeat func(what string, event func()))
	}{
		{"reload", addrs, func(n *node, repeat func(string, func())) {
			p := n.serve(n.corefile())
			repeat("reload", func() { p.reload(n.corefile()) })
		}},
		{"reload-with-one-address-less", clusterIPs, func(n *node, repeat func(string, func())) {
			p := n.serve(n.corefile())
			repeat("reload", func() {
				p.reload(n.block(".:53", "10.96.0.10 fd00:96::10"))
				p.reload(n.corefile())
			})
		}},
		{"failed-reload", addrs, func(n *node, repeat func(string, func())) {
			n.hold("udp", 5300)
			n.hold("tcp", 5301)
			p := n.serve(n.corefile())
			repeat("failed reload", func() {
				for _, bad := range []string{
					"{\n",
					n.corefile("unknown"),
					n.corefile() + n.block("other.lab:5300", "169.254.20.10"),
					n.corefile() + plainBlock("other.lab:5300", "127.0.0.1"),
					n.corefile() + plainBlock("other.lab:5301", "127.0.0.1"),
				} {
					if err := p.Reload(bad); err == nil {
						n.Errorf("took\n%s", bad)
					}
				}
			})
		}},
		{"SIGTERM-of-a-twin", addrs, func(n *node, repeat func(string, func())) {
			p := []*process{n.serve(n.corefile()), n.serve(n.corefile())}
			repeat("SIGTERM of a twin", func() {
				p[0].exit(syscall.SIGTERM)
				p = append(p[1:], n.serve(n.corefile()))
			})
		}},
		{"SIGTERM-of-a-twin-with-or-without-fastpath", addrs, func(n *node, repeat func(string, func())) {
			p := []*process{n.serve(n.corefile("fastpath")), n.serve(n.corefile())}
			next := []string{n.corefile("fastpath"), n.corefile()}
			repeat("SIGTERM of a twin", func() { // those with and without in turn
				p[0].exit(syscall.SIGTERM)
				p = append(p[1:], n.serve(next[0]))
				next[0], next[1] = next[1], next[0]
			})
		}},
		{"reload-that-turns-fastpath-on-and-off", addrs, func(n *node, repeat func(string, func())) {
			p := n.serve(n.corefile("fastpath"))
			repeat("reload", func() {
				p.reload(n.corefile())
				p.reload(n.corefile("fastpath"))
			})
		}},
		{"reload-with-fastpath-and-one-address-less", clusterIPs, func(n *node, repeat func(string, func())) {
			p := n.serve(n.corefile("fastpath"))
			repeat("reload", func() {
				p.reload(n.block(".:53", "10.96.0.10 fd00:96::10", "fastpath"))
				p.reload(n.corefile("fastpath"))
			})
		}},
		{"surge-replace", addrs, func(n *node, repeat func(string, func())) {
			p := n.serve(n.corefile())
			repeat("surge replace", func() {
				next := n.serve(n.corefile())
				p.exit(syscall.SIGTERM)
				p = next
			})
		}},
		{"skipteardown", clusterIPs, func(n *node, repeat func(string, func())) {
			corefile := strings.Replace(n.corefile(), "nodecache {", "nodecache skipteardown {", 1)
			p := n.serve(corefile)
			repeat("SIGTERM of a twin with skipteardown", func() {
				next := n.serve(corefile)
				p.exit(syscall.SIGTERM)
				p = next
			})
		}},
	} {
		for _, b := range backends {
			t.Run(c.name+"/"+strings.ReplaceAll(b.String(), " ", "-"), func(t *testing.T) {
				t.Parallel()
				n := newNode(t, b)
				c.event(n, func(what string, event func()) {
					for i := range repeats(2) {
						tr := n.flow(c.addrs...)
						event()
						tr.more(100)
						tr.end(fmt.Sprintf("%s %d", what, i))
					}
				})
			})
		}
	}
}

// What a process holds when it is killed is lost, and nothing else.
func TestKillOfATwinLosesOnlyWhatItHeld(t *testing.T) {
	forBackends(t, func(n *node) {
		p := []*process{n.serve(n.corefile()), n.serve(n.corefile())}
		for range repeats(2) {
			tr := n.flow(addrs...)
			held := 0
			p[0].Kill()
			for _, f := range tr.flows {
				f.Mark()
				held += f.Open()
			}
			tr.more(100)
			tr.onlyBefore(held)
			p = append(p[1:], n.serve(n.corefile()))
		}
	})
}

// onlyBefore stops the traffic. Queries sent before the mark may have been lost, as
// many as were out then and those that were refused just before; none sent after it.
func (t *traffic) onlyBefore(held int) {
	t.n.Helper()
	lost := 0
	for name, byAddr := range t.stop() {
		for a, r := range byAddr {
			lost += r.Lost
			if r.Sent == 0 || r.Entered > 0 || r.Wrong > 0 {
				t.n.Errorf("%s to %v: of %d queries %d sent after the kill got no answer; %d were lost in all, %d refused, %d answered wrongly:\n\t%s",
					name, a, r.Sent, r.Entered, r.Lost, r.Refused, r.Wrong, strings.Join(r.Errors, "\n\t"))
			}
		}
	}
	t.n.Logf("%d were lost, %d were out", lost, held)
	if lost > held {
		t.n.Errorf("%d queries were lost, but only %d were out when the process was killed", lost, held)
	}
	for _, r := range t.tcp {
		_, err := r.Stop()
		t.n.must(err)
	}
}

// Two backends on one node do not know each other's rules; whoever leaves first
// takes only his own.
func TestTwoBackendsSideBySide(t *testing.T) {
	for _, v := range []lab.Iptables{lab.NFT, lab.Legacy} {
		for _, first := range []string{"iptables", "nftables"} {
			t.Run(string(v)+"-"+first+"-leaves-first", func(t *testing.T) {
				other := map[string]string{"iptables": "nftables", "nftables": "iptables"}[first]
				n := newNode(t, backend{v, first})
				m := &node{Lab: n.Lab, T: t, backend: backend{v, other}}
				before := n.snapshot()
				stays := m.serve(m.corefile())
				alone := n.snapshot()
				goes := n.serve(n.corefile())
				tr := n.flow(addrs...)
				goes.exit(syscall.SIGTERM)
				tr.more(100)
				tr.end("with two backends")
				n.same("after the first has left", alone, n.snapshot())
				n.must(n.FlushConntrack())
				n.answersEverybody(false, addrs...)
				n.untracked()
				stays.exit(syscall.SIGTERM)
				n.same("after both have left", before, n.snapshot())
			})
		}
	}
}
