package e2e

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// upstreamService is a Corefile as the manifests have it: the cluster's DNS is asked by a second
// Service's ClusterIP.
func (n *node) upstreamService(bind string) string {
	return strings.Replace(n.block(".:53", bind), "forward . "+lab.DNSAddr.String(), "forward . 10.96.0.11", 1)
}

// service has kube-proxy know of that Service, or not any more.
func (n *node) service(how string) {
	n.Helper()
	for _, proto := range protos {
		n.commands(n.Node, "iptables -t nat -"+how+" OUTPUT -d 10.96.0.11 -p "+proto+" --dport 53 -j DNAT --to-destination 10.0.2.2:53")
	}
}

// unreachable drops what goes to that Service's address while no rule knows it, as the node's
// network does.
func (n *node) unreachable() {
	n.commands(n.DNS, `nft 'table inet f { chain prerouting { type filter hook prerouting priority 0; ip daddr 10.96.0.11 drop; }; }'`)
}

// On a node whose pods the cluster answers a cache takes them over when it can answer them: no
// query gets a wrong answer, and none is lost.
func TestArrivesWhenItsUpstreamAnswers(t *testing.T) {
	forBackends(t, func(n *node) {
		before := n.snapshot()
		n.unreachable()
		loads := n.start(n.everywhere(200, lab.ClusterIP)...)
		n.sent(loads, 5)
		p := n.launch(n.upstreamService("169.254.20.10 10.96.0.10"), lab.Options{})
		n.must(p.WaitServing())
		n.sent(loads, 3)
		if strings.Contains(p.Log(), inPlace) {
			n.Errorf("it has taken the queries over")
		}
		// Somebody asks the local address, which nobody else serves.
		n.service("A")
		n.must(p.WaitLog(0, inPlace))
		n.sent(loads, 5)
		n.answersEverybody(false, lab.ClusterIP, lab.LinkLocal)
		n.stop(loads)
		if entries, err := n.Conntrack(lab.LinkLocal); err != nil || entries > 0 {
			n.Errorf("%d queries to the local address are tracked (%v)", entries, err)
		}
		p.exit(syscall.SIGTERM)
		n.service("D")
		n.becomes("after the exit", before)
	})
}

// It does not wait for ever, nor where nobody answers the pods, nor for a local address, nor
// beside a twin that serves.
func TestArrivesAtOnce(t *testing.T) {
	t.Parallel()
	n := newNode(t, nftables)
	n.unreachable()
	took := func(p *process) string {
		n.must(p.WaitLog(0, inPlace))
		_, after, _ := strings.Cut(p.Log(), inPlace+" after ")
		d, _, _ := strings.Cut(after, ":")
		return d
	}
	limited := func(p *process) time.Duration {
		d, err := time.ParseDuration(took(p))
		n.must(err)
		return d
	}
	p := n.launch(n.upstreamService("169.254.20.10"), lab.Options{})
	if d := limited(p); d > 5*time.Second {
		t.Errorf("a local address waited for %s", d)
	}
	p.exit(syscall.SIGTERM)

	p = n.launch(n.upstreamService("10.96.0.10"), lab.Options{})
	n.must(p.WaitLog(0, "the upstreams of . have not answered for 10s, or with SERVFAIL only; taking the queries to 10.96.0.10 over from the cluster all the same"))
	n.must(p.WaitLog(0, inPlace))
	twin := n.launch(n.upstreamService("10.96.0.10"), lab.Options{})
	if d := limited(twin); d > 5*time.Second {
		t.Errorf("beside a twin it waited for %s", d)
	}
	twin.exit(syscall.SIGTERM)
	p.exit(syscall.SIGTERM)

	// A node that boots: kube-proxy has written nothing yet.
	n.commands(n.Node, "iptables -t nat -F PREROUTING")
	p = n.launch(n.upstreamService("10.96.0.10"), lab.Options{})
	if d := limited(p); d > 5*time.Second {
		t.Errorf("on a node that boots it waited for %s", d)
	}
}

// A reload that adds a ClusterIP does so too, and an exit meanwhile leaves nothing.
func TestReloadArrivesWhenItsUpstreamAnswers(t *testing.T) {
	t.Parallel()
	n := newNode(t, nftables)
	n.unreachable()
	before := n.snapshot()
	p := n.serve(n.upstreamService("169.254.20.10"))
	loads := n.start(n.everywhere(200, lab.ClusterIP)...)
	n.sent(loads, 5)
	n.must(p.Reload(n.upstreamService("169.254.20.10 10.96.0.10")))
	n.sent(loads, 3)
	p.exit(syscall.SIGTERM)
	n.stop(loads)
	n.becomes("after the exit", before)

	p = n.serve(n.upstreamService("169.254.20.10"))
	loads = n.start(n.everywhere(200, lab.ClusterIP)...)
	n.must(p.Reload(n.upstreamService("169.254.20.10 10.96.0.10")))
	mark := p.Mark()
	n.sent(loads, 3)
	n.service("A")
	n.must(p.WaitLog(mark, inPlace))
	n.answersEverybody(false, lab.ClusterIP)
	n.stop(loads)
}
