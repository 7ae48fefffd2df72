package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// A foreign rule is one that somebody puts where it counts for our packets, with what is to
// come of it; healthy is one like it that is not for them.
type foreignRule struct {
	name          string
	backends      []backend
	rule, healthy string // commands, one a line
	undo          string // of either
	moved         bool   // ours come first again
	fault         string // is told while it stands; "" is none
	tracked       bool   // of pods' queries to the ClusterIP
}

var foreignRules = []foreignRule{
	{
		name: "accept", backends: []backend{iptablesNFT, iptablesLegacy}, moved: true,
		rule:    "iptables -t raw -I PREROUTING 1 ! -p 253 -j ACCEPT",
		healthy: "iptables -t raw -I PREROUTING 1 -p udp --dport 54 -j ACCEPT",
	},
	{
		name: "accept of IPv6", backends: []backend{iptablesNFT, iptablesLegacy}, moved: true,
		rule:    "ip6tables -t raw -I PREROUTING 1 -p udp -j ACCEPT",
		healthy: "ip6tables -t raw -I PREROUTING 1 -p ipv6-icmp -j ACCEPT",
	},
	{
		name: "chain that accepts pods", backends: []backend{iptablesNFT, iptablesLegacy}, moved: true,
		rule:    "iptables -t raw -N theirs\niptables -t raw -A theirs -s 10.0.1.0/24 -j ACCEPT\niptables -t raw -I PREROUTING 1 -j theirs",
		healthy: "iptables -t raw -N theirs\niptables -t raw -A theirs -d 10.0.1.0/24 -j ACCEPT\niptables -t raw -I PREROUTING 1 -j theirs",
	},
	{
		name: "zone", backends: []backend{iptablesNFT, iptablesLegacy}, moved: true,
		rule:    "iptables -t raw -I PREROUTING 1 -j CT --zone 3",
		healthy: "iptables -t raw -I PREROUTING 1 -p tcp --dport 54 -j CT --zone 3",
	},
	{
		name: "drop of what is not tracked", backends: []backend{iptablesNFT, iptablesLegacy}, moved: true,
		rule:    "iptables -I INPUT 1 -m conntrack --ctstate UNTRACKED -j DROP",
		healthy: "iptables -I INPUT 1 -m conntrack --ctstate INVALID -j DROP",
	},
	{
		name: "zone of nftables", backends: backends, tracked: true,
		rule:    "nft 'table inet theirs { chain p { type filter hook prerouting priority -300; ct zone set 3; }; }'",
		healthy: "nft 'table inet theirs { chain p { type filter hook prerouting priority -300; udp dport 54 ct zone set 3; }; }'",
		undo:    "nft delete table inet theirs",
		fault:   "of the chain p of the nftables table inet theirs has all queries tracked",
	},
	{
		name: "accept of nftables", backends: backends,
		rule: "nft 'table inet theirs { chain p { type filter hook prerouting priority -400; accept; }; chain o { type filter hook output priority -400; accept; }; }'",
		undo: "nft delete table inet theirs",
	},
	{
		name: "table raw beside nftables", backends: []backend{nftables, legacyNFT},
		rule: "iptables -t raw -I PREROUTING 1 -j CT --zone 3\niptables -t raw -A PREROUTING -j ACCEPT",
	},
}

// What a rule of somebody else's before ours comes to: queries, log and metrics. The table
// is that of docs/on-the-node.md.
func TestForeignRulesBeforeOurs(t *testing.T) {
	for _, f := range foreignRules {
		for _, b := range f.backends {
			t.Run(f.name+"/"+strings.ReplaceAll(b.String(), " ", "-"), func(t *testing.T) {
				t.Parallel()
				n := newNode(t, b)
				p, _ := n.examination(n.monitored(9253))
				const at = "127.0.0.1:9253"
				none := map[string]float64{`node_faults{fault="foreign_rule_first"}`: 0, `repairs_total{object="rule"}`: 0, `objects_in_place{object="rule"}`: 8}
				if f.healthy != "" {
					mark := p.Mark()
					n.commands(n.Node, f.healthy)
					n.checksAgain(at)
					n.shows(at, none)
					if said := p.warnings(mark); said != "" {
						n.Errorf("of a rule that is not for us it says %s", said)
					}
					n.untrackedPods(false)
					n.takeBack(f)
				}
				mark := p.Mark()
				n.commands(n.Node, f.rule)
				switch {
				case f.moved:
					n.must(p.WaitLog(mark, "come first again"))
					n.shows(at, map[string]float64{`repairs_total{object="rule"}`: 1, `node_faults{fault="foreign_rule_first"}`: 0, `objects_in_place{object="rule"}`: 8})
				case f.fault != "":
					n.must(p.WaitLog(mark, f.fault))
					n.shows(at, map[string]float64{`node_faults{fault="foreign_rule_first"}`: 1, `objects_in_place{object="rule"}`: 0, `repairs_total{object="rule"}`: 0})
				default:
					n.checksAgain(at)
					n.shows(at, none)
					if said := p.warnings(mark); said != "" {
						n.Errorf("it says %s", said)
					}
				}
				n.untrackedPods(f.tracked)
				if f.fault != "" {
					n.takeBack(f)
					n.shows(at, none)
				}
			})
		}
	}
}

// takeBack removes a foreign rule, or the healthy one.
func (n *node) takeBack(f foreignRule) {
	n.Helper()
	if f.undo != "" {
		n.commands(n.Node, f.undo)
		return
	}
	for line := range strings.Lines(f.healthy) {
		if !strings.Contains(line, " -N ") {
			line = strings.NewReplacer(" -I PREROUTING 1 ", " -D PREROUTING ", " -I INPUT 1 ", " -D INPUT ", " -A theirs ", " -D theirs ").Replace(line)
			n.commands(n.Node, line)
		}
	}
	if strings.Contains(f.healthy, " -N ") {
		n.commands(n.Node, "iptables -t raw -X theirs")
	}
}

// checksAgain waits until the node has been looked at from beginning to end.
func (n *node) checksAgain(at string) {
	n.Helper()
	for range 2 {
		before := n.metrics(at)["last_sync_success_timestamp_seconds"]
		if !eventually(func() bool { return n.metrics(at)["last_sync_success_timestamp_seconds"] > before }) {
			n.Fatal("no later check")
		}
	}
}

// untrackedPods checks that this cache answers pods, over UDP and TCP, and whether their
// queries are tracked.
func (n *node) untrackedPods(tracked bool) {
	n.Helper()
	n.must(n.FlushConntrack())
	if tracked {
		if _, err := (lab.Load{From: n.Pod, Proto: "udp", To: on(lab.ClusterIP), Count: 4, Timeout: time.Second}).Run(); err != nil {
			n.Error(err)
		}
	} else {
		for _, proto := range protos {
			n.run(lab.Load{From: n.Pod, Proto: proto, To: on(addrs...), Count: 8}, false)
		}
	}
	entries, err := n.ConntrackEntries(addrs...)
	n.must(err)
	if (len(entries) > 0) != tracked {
		n.Errorf("%d entries of connection tracking, tracked should be %v", len(entries), tracked)
	}
}

// Against an agent that puts its rule first again and again ours come back a few times;
// then it has its way, which is told. One whose rules are not for our packets, as Calico's,
// may do so as often as it likes.
func TestAgentThatWantsToBeFirst(t *testing.T) {
	for _, b := range []backend{iptablesNFT, iptablesLegacy} {
		t.Run(b.String(), func(t *testing.T) {
			t.Parallel()
			n := newNode(t, b)
			p, _ := n.examination(n.monitored(9253))
			const at = "127.0.0.1:9253"
			insist := func(rule string) {
				n.commands(n.Node, "iptables -t raw -D PREROUTING "+rule+"\niptables -t raw -I PREROUTING 1 "+rule)
			}
			calico := "-m comment --comment cali:6gwbT8clXdHdC1b1 -j cali-PREROUTING"
			n.commands(n.Node, `iptables -t raw -N cali-PREROUTING
				iptables -t raw -A cali-PREROUTING -j MARK --set-xmark 0x0/0xf0000
				iptables -t raw -A cali-PREROUTING -i to-po+ -j MARK --set-xmark 0x40000/0x40000
				iptables -t raw -A cali-PREROUTING -m mark --mark 0x40000/0x40000 -m rpfilter --validmark --invert -j DROP
				iptables -t raw -A cali-PREROUTING -m mark --mark 0x10000/0x10000 -j ACCEPT
				iptables -t raw -I PREROUTING 1 `+calico)
			mark := p.Mark()
			for range 8 {
				n.checksAgain(at)
				insist(calico)
			}
			n.checksAgain(at)
			n.shows(at, map[string]float64{`repairs_total{object="rule"}`: 0, `node_faults{fault="foreign_rule_first"}`: 0})
			if said := p.warnings(mark); said != "" {
				t.Errorf("with Calico it says %s", said)
			}
			n.untrackedPods(false)

			const rule = "! -p 253 -j ACCEPT"
			n.commands(n.Node, "iptables -t raw -I PREROUTING 1 "+rule)
			for i := range 5 {
				n.shows(at, map[string]float64{`repairs_total{object="rule"}`: float64(i + 1)})
				insist(rule)
			}
			n.must(p.WaitLog(mark, "the rule \"-A PREROUTING ! -p 253 -j ACCEPT\" of the table raw stands before nodecache's and has what they are for tracked, where another program has put it again and again, for 10.96.0.10:53/udp"))
			n.shows(at, map[string]float64{`node_faults{fault="foreign_rule_first"}`: 1, `repairs_total{object="rule"}`: 5, `objects_in_place{object="rule"}`: 4})
			n.commands(n.Node, "iptables -t raw -D PREROUTING "+rule)
			n.shows(at, map[string]float64{`node_faults{fault="foreign_rule_first"}`: 0, `objects_in_place{object="rule"}`: 8})
			n.untrackedPods(false)
		})
	}
}
