package e2e

import (
	"errors"
	"net/netip"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// Queries of the pod and of the node itself, and what has to become of them.

// A client is where queries come from.
type client struct {
	name string
	ns   *lab.Namespace
}

func (n *node) clients() []client { return []client{{"pod", n.Pod}, {"host", n.Node}} }

var protos = []string{"udp", "tcp"}

// on is the addresses' DNS port.
func on(addrs ...netip.Addr) (to []netip.AddrPort) {
	for _, a := range addrs {
		to = append(to, netip.AddrPortFrom(a, 53))
	}
	return to
}

// run runs a load, every query of which has to be answered.
func (n *node) run(l lab.Load, byCluster bool) {
	n.Helper()
	r, err := l.Run()
	n.must(err)
	n.answered(r, byCluster)
}

func (n *node) answered(r *lab.Result, byCluster bool) {
	n.Helper()
	if !r.AllAnswered(byCluster) {
		by := "the node's cache"
		if byCluster {
			by = "the cluster"
		}
		n.Errorf("not every query was answered by %s: %v", by, r)
	}
}

// answersEverybody asks from everywhere over everything.
func (n *node) answersEverybody(byCluster bool, addrs ...netip.Addr) {
	n.Helper()
	for _, c := range n.clients() {
		for _, proto := range protos {
			n.run(lab.Load{From: c.ns, Proto: proto, To: on(addrs...), Count: 5 * len(addrs)}, byCluster)
		}
	}
}

// clusterAnswers waits until the cluster answers queries to its service: a pod's at
// once, and the node's own as soon as the rules for them are out of force.
func (n *node) clusterAnswers() {
	n.Helper()
	service := on(lab.ClusterIP, lab.ClusterIP6)
	for _, proto := range protos {
		n.run(lab.Load{From: n.Pod, Proto: proto, To: service, Count: 20}, true)
	}
	for _, proto := range protos {
		for _, to := range service {
			ask := lab.Load{From: n.Node, Proto: proto, To: []netip.AddrPort{to}, Count: 1, Timeout: 500 * time.Millisecond}
			var r *lab.Result
			ok := eventually(func() bool {
				var err error
				r, err = ask.Run()
				n.must(err)
				return r.AllAnswered(true)
			})
			if !ok {
				n.Errorf("the cluster never answered the host at %v over %s: %v", to, proto, r)
			}
		}
		n.run(lab.Load{From: n.Node, Proto: proto, To: service, Count: 20}, true)
	}
}

// start starts loads, each of which has to be stopped.
func (n *node) start(loads ...lab.Load) (running []*lab.Running) {
	n.Helper()
	for _, l := range loads {
		r, err := l.Start()
		n.must(err)
		n.Cleanup(func() { r.Stop() })
		running = append(running, r)
	}
	return running
}

// stop stops loads; every query has to have been answered, by whomever.
func (n *node) stop(running []*lab.Running) {
	n.Helper()
	for i, r := range running {
		result, err := r.Stop()
		n.must(err)
		n.Logf("load %d: %v", i, result)
		if result.Sent == 0 || result.Answered != result.Sent {
			n.Errorf("load %d lost queries: %v", i, result)
		}
	}
}

// sent waits until each load has sent so many more queries.
func (n *node) sent(running []*lab.Running, more int) {
	n.Helper()
	for _, r := range running {
		until := r.Sent() + more
		if !eventually(func() bool { return r.Sent() >= until }) {
			n.Fatal(errors.New("the load came to a halt"))
		}
	}
}
