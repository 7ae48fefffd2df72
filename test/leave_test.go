package e2e

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// When nobody is left to serve the cluster's service on the node, the cluster answers:
// no query is lost on the way there.
func TestLeavesTheServiceToTheCluster(t *testing.T) {
	for _, c := range []struct {
		name  string
		leave func(n *node, p *process)
		again func(n *node, p *process) *process
	}{
		{"SIGTERM-of-the-only-one", func(_ *node, p *process) { p.exit(syscall.SIGTERM) },
			func(n *node, _ *process) *process { return n.serve(n.corefile()) }},
		{"reload-without-the-addresses", func(n *node, p *process) { p.reload(n.block(".:53", "169.254.20.10 fd00:20::10")) },
			func(n *node, p *process) *process { p.reload(n.corefile()); return p }},
		{"reload-without-the-directive", func(_ *node, p *process) { p.reload(plainBlock("other.lab:5300", "127.0.0.1")) },
			func(n *node, p *process) *process { p.reload(n.corefile()); return p }},
	} {
		for _, b := range backends {
			t.Run(c.name+"/"+strings.ReplaceAll(b.String(), " ", "-"), func(t *testing.T) {
				t.Parallel()
				n := newNode(t, b)
				n.warm()
				p := n.serve(n.corefile())
				for i := range repeats(2) {
					tr := n.flow(clusterIPs...)
					c.leave(n, p)
					// A TCP client tries once more when its connection ends, and each of the
					// two events ends some.
					tr.more(100)
					p = c.again(n, p)
					tr.more(100)
					// A socket that a host client has opened before has the service's address as
					// its own. It can send nothing once that is no longer on the node, nor get what
					// was under way. On a busy machine even a socket for one query is one of these
					// when its client is interrupted before it sends.
					tr.end(fmt.Sprintf("%s %d", c.name, i), "host, kept sockets", "host, new sockets")
				}
			})
		}
	}
}

// warm waits until the cluster answers pod and host. In a node that is a second old
// neighbours on the way may not have found each other yet.
func (n *node) warm() {
	n.Helper()
	for _, c := range n.clients() {
		if !eventually(func() bool {
			r, err := lab.Load{From: c.ns, Proto: "udp", To: on(clusterIPs...), Count: 4, Timeout: 500 * time.Millisecond}.Run()
			n.must(err)
			return r.AllAnswered(true)
		}) {
			n.Fatalf("the cluster never answered %s", c.name)
		}
	}
}

// When the only process is killed, the cluster answers the next query to its
// service, but for those of host clients with the backend iptables: that notices
// within its heartbeat.
func TestKillOfTheOnlyOne(t *testing.T) {
	forBackends(t, func(n *node) {
		n.warm()
		for range repeats(2) {
			p := n.serve(n.corefile())
			tr := n.flow(clusterIPs...)
			p.Kill()
			killed := time.Now()
			for _, f := range tr.flows {
				f.Mark()
			}
			// The heartbeat, and time to be seen.
			wait := 100
			if n.backend != nftables {
				wait = 200 * 8
			}
			tr.more(wait)
			for name, byAddr := range tr.stop() {
				atOnce := n.backend == nftables || strings.HasPrefix(name, "pod")
				for a, r := range byAddr {
					after := r.LastBad.Sub(killed)
					n.Logf("%s to %v: %d lost, %d refused, %d of all sent after the kill, the last %v after it; %d answered by the cluster",
						name, a, r.Lost, r.Refused, r.Entered, after.Round(time.Millisecond), r.FromCluster)
					switch {
					case r.FromCluster == 0:
						n.Errorf("%s to %v: the cluster answered none of %d queries", name, a, r.Sent)
					case atOnce && r.Entered > 0:
						n.Errorf("%s to %v: %d queries sent after the kill were not answered:\n\t%s", name, a, r.Entered, strings.Join(r.Errors, "\n\t"))
					case after > 5*time.Second:
						n.Errorf("%s to %v: a query sent %v after the kill was not answered", name, a, after)
					}
				}
			}
			for _, r := range tr.tcp {
				_, err := r.Stop()
				n.must(err)
			}
			n.clusterAnswers()
		}
	})
}
