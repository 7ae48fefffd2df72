package e2e

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/ruleset"
	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// Parts of which TestRulesetForetells makes firewalls.
var (
	someMatches = []string{"", "udp dport 53", "udp dport != 53", "udp dport 40-60", "udp dport { 52, 54-60 }", "th dport { 53, 853 }", "udp sport > 1023", "tcp dport 53",
		"ip saddr 10.0.1.0/24", "ip saddr 10.0.0.0/8", "ip saddr 127.0.0.0/8", "ip saddr != 10.0.1.2", "ip daddr 10.96.0.0/12", "ip daddr != 10.96.0.10", "ip daddr { 10.96.0.1-10.96.0.9 }",
		"iifname to-pod", "iifname != lo", "iif lo", "iifname { lo, eth0 }", "ct state untracked", "ct state established,related", "ct state != new", "ct state invalid", "ct status dnat",
		"meta mark 1", "meta mark & 0xf0 == 0", "fib daddr type local", "fib saddr type local", "ip daddr . udp dport { 10.96.0.10 . 53 }", "ip saddr . udp dport { 10.0.1.2 . 53 }",
		"meta l4proto . th dport { udp . 50-60 }", "meta nfproto ipv6", "limit rate 1000/second", "ip ttl > 30", "meta length < 20", "meta pkttype host"}
	someVerdicts = []string{"accept", "drop", "reject", "jump first", "jump second", "goto first", "return", "counter"}
)

func someRules(r *rand.Rand, most int, verdicts []string) string {
	var b strings.Builder
	for range r.IntN(most + 1) {
		for range r.IntN(3) {
			b.WriteString(someMatches[r.IntN(len(someMatches))] + " ")
		}
		b.WriteString(verdicts[r.IntN(len(verdicts))] + "; ")
	}
	return b.String()
}

// What is said to be certain of a query happens to it, with firewalls at random.
func TestRulesetForetells(t *testing.T) {
	n := newNode(t, nftables)
	n.serve(n.block(".:53", "10.96.0.10"))
	r := rand.New(rand.NewPCG(1, 2))
	certain := map[string]int{}
	for i := range scale(150) {
		text := fmt.Sprintf("table inet made { chain first { %s }; chain second { %s}; chain input { type filter hook input priority 0; policy %s; %s }; }",
			someRules(r, 2, []string{"accept", "drop", "return"}), someRules(r, 2, []string{"accept", "drop", "return", "jump first"}), someVerdicts[r.IntN(2)], someRules(r, 5, someVerdicts))
		if _, err := n.Node.RunInput(text, "nft", "-f", "-"); err != nil {
			certain["refused"]++ // such as two protocols in one rule
			continue
		}
		said := ""
		n.must(n.Node.Do(func() error {
			return ruleset.Look(nil, func(r *ruleset.Ruleset) {
				for _, res := range r.Through(ruleset.Packet{Proto: unix.IPPROTO_UDP, Dst: lab.ClusterIP, DstPort: 53, State: ruleset.StateUntracked}, unix.NF_INET_LOCAL_IN, "filter") {
					said = map[[2]bool]string{{true, false}: "answered", {false, true}: "dropped"}[[2]bool{res.Accept, res.Drop}]
				}
			})
		}))
		certain[said]++
		result, err := lab.Load{From: n.Pod, Proto: "udp", To: on(lab.ClusterIP), Count: 1, Timeout: 100 * time.Millisecond}.Run()
		if said == "answered" {
			result, err = lab.Load{From: n.Pod, Proto: "udp", To: on(lab.ClusterIP), Count: 1}.Run()
		}
		n.must(err)
		if said == "answered" && result.Answered == 0 || said == "dropped" && result.Answered > 0 {
			t.Errorf("firewall %d: said to be %s, but %v:\n%s", i, said, result, text)
		}
		_, err = n.Node.Run("nft", "delete", "table", "inet", "made")
		n.must(err)
	}
	t.Logf("certain: %v", certain)
	if scale(150) == 150 && (certain["answered"] < 30 || certain["dropped"] < 30) {
		t.Errorf("too little is certain: %v", certain)
	}
}

// What is said to be certain of a query's being tracked is what connection tracking has,
// with chains at random before and after a cache's own.
func TestRulesetForetellsTracking(t *testing.T) {
	n := newNode(t, nftables)
	n.serve(n.block(".:53", "169.254.20.10"))
	ours := func(c ruleset.Chain) bool { return strings.HasPrefix(c.Table, "nodecache-") }
	query, _, _ := ruleset.PacketsOf("udp", netip.AddrPortFrom(lab.LinkLocal, 53))
	r := rand.New(rand.NewPCG(3, 4))
	verdicts := []string{"accept", "notrack", "ct zone set 3", "ct zone set 3", "jump first", "goto first", "return", "counter", "meta mark set 1", "meta mark set meta mark or 2"}
	certain := map[string]int{}
	for i := range scale(100) {
		text := fmt.Sprintf("table inet made { chain first { %s }; chain before { type filter hook prerouting priority %d; %s }; chain after { type filter hook prerouting priority %d; %s }; }",
			someRules(r, 2, []string{"accept", "ct zone set 3", "return", "meta mark set 1"}), -360-r.IntN(60), someRules(r, 3, verdicts), -340+r.IntN(140), someRules(r, 4, verdicts))
		if _, err := n.Node.RunInput(text, "nft", "-f", "-"); err != nil {
			certain["refused"]++
			continue
		}
		said := ""
		n.must(n.Node.Do(func() error {
			return ruleset.Look(nil, func(r *ruleset.Ruleset) {
				tr := r.Tracking(query, unix.NF_INET_PRE_ROUTING, ours)
				said = map[[2]bool]string{{true, false}: "untracked", {false, true}: "tracked"}[[2]bool{tr.Untracked, tr.Tracked}]
			})
		}))
		certain[said]++
		n.must(n.FlushConntrack())
		if _, err := (lab.Load{From: n.Pod, Proto: "udp", To: on(lab.LinkLocal), Count: 1, Timeout: 200 * time.Millisecond}).Run(); err != nil {
			n.must(err)
		}
		entries, err := n.ConntrackEntries(lab.PodAddr)
		n.must(err)
		queries := 0
		for _, e := range entries { // an answer that is tracked has an entry of its own
			if strings.Contains(e, "src=10.0.1.2 dst=169.254.20.10") {
				queries++
			}
		}
		if said == "untracked" && queries > 0 || said == "tracked" && queries == 0 {
			t.Errorf("ruleset %d: said to be %s, and there are %d entries of\n%s\nwith\n%s", i, said, queries, entries, text)
		}
		_, err = n.Node.Run("nft", "delete", "table", "inet", "made")
		n.must(err)
	}
	t.Logf("certain: %v", certain)
	if scale(100) == 100 && (certain["untracked"] < 15 || certain["tracked"] < 15) {
		t.Errorf("too little is certain: %v", certain)
	}
}
