package e2e

import (
	"fmt"
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// arrivals are the values of own_query_arrives, 0 for those addresses and 1 for the others.
func arrivals(lost ...string) map[string]float64 {
	want := map[string]float64{`node_faults{fault="own_query_lost"}`: 0}
	for _, a := range addrs {
		want[fmt.Sprintf("own_query_arrives{address=%q}", a)] = 1
	}
	for _, a := range lost {
		want[fmt.Sprintf("own_query_arrives{address=%q}", a)] = 0
		want[`node_faults{fault="own_query_lost"}`] = 1
	}
	return want
}

// A cache asks itself by every address, which is nobody's query, needs no entry of
// connection tracking, and goes to a twin as well. When nobody else asks, that shows.
func TestAsksItself(t *testing.T) {
	forBackends(t, func(n *node) {
		const at = "127.0.0.1:9253"
		p := n.serve(n.monitored(9253, "fastpath"))
		n.shows(at, arrivals())
		n.checksAgain(at)
		n.untracked()
		before := n.metrics(at)
		n.checksAgain(at)
		n.checksAgain(at)
		after := n.metrics(at)
		for _, name := range []string{"last_query_timestamp_seconds", "fastpath_misses_total", "fastpath_hits_total"} {
			if before[name] != after[name] {
				n.Errorf("nobody asks, and %s goes from %v to %v", name, before[name], after[name])
			}
		}
		for _, from := range []*lab.Namespace{n.Pod, n.Node} {
			n.run(lab.Load{From: from, Proto: "udp", To: on(lab.ClusterIP), Count: 1}, false)
			now := n.metrics(at)["last_query_timestamp_seconds"]
			if now <= after["last_query_timestamp_seconds"] {
				n.Errorf("somebody has asked, and the last query is still that of %v", now)
			}
			after["last_query_timestamp_seconds"] = now
		}
		n.serve(n.block(".:53", allAddrs, "sync 100ms"))
		n.checksAgain(at)
		n.checksAgain(at)
		n.shows(at, arrivals())
		if said := p.warnings(0); said != "" {
			n.Errorf("it says %s", said)
		}
	})
}

// In a Corefile without the zone of all names too.
func TestAsksItselfInAZone(t *testing.T) {
	n := newNode(t, nftables)
	n.serve(n.block("cluster.local:53 10.in-addr.arpa:53", "10.96.0.10", "sync 100ms") + plainBlock("metrics.lab:5399", "127.0.0.1", "prometheus 127.0.0.1:9253"))
	n.shows("127.0.0.1:9253", map[string]float64{`own_query_arrives{address="10.96.0.10"}`: 1, `node_faults{fault="own_query_lost"}`: 0})
}

// What its own queries do not pass is told, with where to look.
func TestWarnsOfOwnQueriesThatAreLost(t *testing.T) {
	const at = "127.0.0.1:9253"
	for _, c := range []struct {
		name, fault, undo, says string
		backends                []backend
	}{
		{"dropped", "nft 'table inet theirs { chain i { type filter hook input priority 0; iif lo ip daddr 10.96.0.10 udp dport 53 drop; }; }'", "nft delete table inet theirs",
			"queries that this cache itself sends to 10.96.0.10:53/udp get no answer", backends},
		{"rejected over TCP", "nft 'table inet theirs { chain i { type filter hook input priority 0; iif lo ip daddr 10.96.0.10 tcp dport 53 reject with tcp reset; }; }'", "nft delete table inet theirs",
			"queries that this cache itself sends to 10.96.0.10:53/tcp get no answer", []backend{nftables}},
		{"directed to the cluster", "nft 'table inet theirs { chain o { type filter hook output priority -300; ip daddr 10.96.0.10 ct zone set 3; }; chain p { type filter hook prerouting priority -300; ip saddr 10.0.2.2 ct zone set 3; }; }'", "nft delete table inet theirs",
			"queries that this cache itself sends to 10.96.0.10:53/udp, 10.96.0.10:53/tcp are answered by another server", []backend{iptablesNFT, nftables}},
		{"another port", "nft 'table inet theirs { chain i { type filter hook input priority 0; udp dport 54 drop; }; }'", "nft delete table inet theirs", "", backends},
	} {
		for _, b := range c.backends {
			t.Run(c.name+"/"+b.String(), func(t *testing.T) {
				t.Parallel()
				n := newNode(t, b)
				p, _ := n.examination(n.monitored(9253))
				n.shows(at, arrivals())
				mark := p.Mark()
				n.commands(n.Node, c.fault)
				if c.says == "" {
					n.checksAgain(at)
					n.checksAgain(at)
					n.shows(at, arrivals())
					if said := p.warnings(mark); said != "" {
						n.Errorf("it says %s", said)
					}
					return
				}
				n.must(p.WaitLog(mark, c.says))
				n.shows(at, arrivals("10.96.0.10"))
				n.commands(n.Node, c.undo)
				n.shows(at, arrivals())
			})
		}
	}
}

// Where its queries come and are tracked, that is told too.
func TestWarnsOfOwnQueriesThatAreTracked(t *testing.T) {
	const at = "127.0.0.1:9253"
	n := newNode(t, iptablesNFT)
	p, _ := n.examination(n.monitored(9253))
	const rule = "-d 169.254.20.10 -j ACCEPT"
	n.commands(n.Node, "iptables -t raw -I OUTPUT 1 "+rule)
	for i := range 5 {
		n.shows(at, map[string]float64{`repairs_total{object="rule"}`: float64(i + 1)})
		n.commands(n.Node, "iptables -t raw -D OUTPUT "+rule+"\niptables -t raw -I OUTPUT 1 "+rule)
	}
	n.must(p.WaitLog(0, "queries that this cache itself sends to 169.254.20.10:53/udp, 169.254.20.10:53/tcp come here, but are tracked"))
	n.shows(at, arrivals("169.254.20.10"))
}

// A process that asks itself leaves as fast as one that does not.
func TestAskingItselfDoesNotHoldUpAnExit(t *testing.T) {
	n := newNode(t, nftables)
	before := n.snapshot()
	p := n.serve(n.monitored(9253))
	n.commands(n.Node, "nft 'table inet theirs { chain i { type filter hook input priority 0; iif lo ip daddr 10.96.0.10 drop; }; }'")
	n.must(p.WaitLog(0, "get no answer"))
	began := time.Now()
	p.exit(15)
	t.Logf("it has left after %v", time.Since(began).Round(time.Millisecond))
	n.has(p.Log(), "nothing of nodecache is on the node any more")
	n.commands(n.Node, "nft delete table inet theirs")
	n.same("after the exit", before, n.snapshot())
}
