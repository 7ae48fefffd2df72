package e2e

import (
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// meddled is a node on which nodecache is put to the test: it has rules of others,
// and its repairs can be counted.
func meddled(t *testing.T, b backend, properties ...string) (*node, *process) {
	t.Helper()
	n := newNode(t, b)
	for _, command := range []string{
		"iptables -t raw -A PREROUTING -p udp --dport 9999 -j NOTRACK",
		"ip6tables -t raw -A OUTPUT -p udp --dport 9999 -j NOTRACK",
		"iptables -t raw -N NODECACHE-NOT-OURS",
		"iptables -A INPUT -p udp --dport 9999 -j ACCEPT",
		"nft add table inet nodecache-not-ours",
		"nft add chain inet nodecache-not-ours x { type filter hook output priority 0; }",
		"nft add rule inet nodecache-not-ours x udp dport 9999 notrack",
		"ip link add other type veth peer name other2",
		"ip addr add 169.254.20.11/32 dev other",
	} {
		n.runs(command)
	}
	metrics := plainBlock("metrics.lab:5399", "127.0.0.1", "prometheus 127.0.0.1:9253")
	return n, n.serve(n.corefile(properties...) + metrics)
}

// runs runs a command on the node; a table is iptables-restore's.
func (n *node) runs(command string) {
	n.Helper()
	if strings.HasPrefix(command, "*") {
		_, err := n.Node.RunInput(command, "iptables-restore", "--noflush")
		n.must(err)
		return
	}
	words := strings.Fields(command)
	_, err := n.Node.Run(words[0], words[1:]...)
	n.must(err)
}

// repairs is what the process says that it has repaired, by object.
func (n *node) repairs() map[string]int {
	n.Helper()
	body, err := get(n.Node, "http://127.0.0.1:9253/metrics")
	n.must(err)
	count := map[string]int{}
	for _, m := range regexp.MustCompile(`coredns_nodecache_repairs_total\{object="(\w+)"\} (\d+)`).FindAllStringSubmatch(body, -1) {
		count[m[1]], err = strconv.Atoi(m[2])
		n.must(err)
	}
	if len(count) == 0 {
		n.Fatalf("no count of repairs in\n%s", body)
	}
	return count
}

// What somebody else removes comes back, is counted, and nothing else changes. With
// every query counted: to remove a rule costs none.
func TestMeddlingIsRepaired(t *testing.T) {
	all := []backend{iptablesNFT, iptablesLegacy, nftables}
	ipt := []backend{iptablesNFT, iptablesLegacy}
	for _, c := range []struct {
		name     string
		backends []backend
		object   string // "" where there is nothing to repair
		loses    bool
		commands []string
	}{
		{"link-deleted", all, "link", true, []string{"ip link del nodelocaldns"}},
		{"link-renamed", all, "link", true, []string{"ip link set nodelocaldns down", "ip link set nodelocaldns name stolen"}},
		{"link-down", all, "address", true, []string{"ip link set nodelocaldns down"}},
		{"address-deleted", all, "address", true, []string{"ip addr del 10.96.0.10/32 dev nodelocaldns"}},
		{"address6-deleted", all, "address", true, []string{"ip addr del fd00:20::10/128 dev nodelocaldns"}},
		{"addresses-flushed", all, "address", true, []string{"ip addr flush dev nodelocaldns"}},
		{"chain-flushed", ipt, "rule", false, []string{"iptables -t raw -F NODECACHE-PREROUTING"}},
		{"chain6-flushed", ipt, "rule", false, []string{"ip6tables -t raw -F NODECACHE-OUTPUT"}},
		{"filter-chain-flushed", ipt, "rule", false, []string{"iptables -F NODECACHE-INPUT"}},
		{"jump-deleted", ipt, "rule", false, []string{"iptables -t raw -D PREROUTING 1"}},
		{"one-rule-deleted", ipt, "rule", false, []string{"iptables -t raw -D NODECACHE-OUTPUT 2"}},
		// At once, or the jump would be back before the chain is gone.
		{"chain-deleted", ipt, "rule", false, []string{
			"*raw\n-F NODECACHE-OUTPUT\n-D OUTPUT 1\n-X NODECACHE-OUTPUT\nCOMMIT\n"}},
		{"table-of-another-process", []backend{nftables}, "", false, []string{"nft delete table inet nodecache-not-ours"}},
	} {
		for _, b := range c.backends {
			t.Run(c.name+"/"+strings.ReplaceAll(b.String(), " ", "-"), func(t *testing.T) {
				t.Parallel()
				// The kernel tells nobody of what happens to iptables-legacy.
				n, p := meddled(t, b, "sync 3s")
				was, counted := n.snapshot(), n.repairs()
				if c.object == "" {
					for _, command := range c.commands {
						n.runs(command)
					}
					was = n.snapshot()
					n.answersEverybody(false, addrs...)
					n.same("later", was, n.snapshot())
					return
				}
				mark := p.Mark()
				tr := n.flow(addrs...)
				begun := time.Now()
				for _, command := range c.commands {
					n.runs(command)
				}
				n.comesBack(was)
				n.must(p.WaitLog(mark, "put back"))
				n.Logf("seen to be back %v after it: %s", time.Since(begun).Round(time.Millisecond), strings.TrimSpace(p.Log()[mark:]))
				tr.more(100)
				if c.loses {
					for name, byAddr := range tr.stop() {
						for a, r := range byAddr {
							n.Logf("%s to %v: %d of %d got no answer, over %v", name, a, r.Bad(), r.Sent, r.LastBad.Sub(r.FirstBad).Round(time.Millisecond))
						}
					}
				} else {
					tr.end(c.name)
				}
				if got := n.repairs()[c.object]; got <= counted[c.object] {
					n.Errorf("repairs of %s: %d before, %d after", c.object, counted[c.object], got)
				}
				n.answersEverybody(false, addrs...)
				n.must(n.FlushConntrack())
				n.answersEverybody(false, addrs...)
				n.untracked()
				n.same("after the repair", was, n.unlabelled())
			})
		}
	}
}

// comesBack waits at most 10 s until the node has a snapshot.
func (n *node) comesBack(want string) {
	n.Helper()
	got := ""
	for late := time.Now().Add(10 * time.Second); got != want; {
		if time.Now().After(late) {
			n.same("10 s after the meddling", want, got)
			n.FailNow()
		}
		got = n.unlabelled()
	}
}

var label = regexp.MustCompile(` nodelocaldns:\d+ `)

// unlabelled is the node's snapshot without what the kernel adds to the label of an
// address when it renames the link.
func (n *node) unlabelled() string {
	n.Helper()
	return label.ReplaceAllString(n.snapshot(), " nodelocaldns ")
}

// All rules of all programs are gone: ours come back, the others' not through us.
func TestMeddlingWithTheWholeRuleset(t *testing.T) {
	for _, b := range []backend{iptablesNFT, nftables} {
		t.Run(b.firewall, func(t *testing.T) {
			n, p := meddled(t, b)
			n.runs("nft flush ruleset") // the others' are gone for good
			if b == iptablesNFT {
				n.must(p.WaitLog(0, "put back"))
			}
			n.answersEverybody(false, addrs...)
			was, counted := n.snapshot(), n.repairs()["rule"]
			for _, a := range addrs {
				if b == iptablesNFT && !strings.Contains(was, a.String()+" ") {
					n.Errorf("no rule for %v:\n%s", a, was)
				}
			}
			tr := n.flow(addrs...)
			n.runs("nft flush ruleset")
			n.comesBack(was)
			tr.more(100)
			tr.end("nft flush ruleset")
			if got := n.repairs()["rule"]; (got > counted) != (b == iptablesNFT) {
				n.Errorf("repairs of rules: %d before, %d after", counted, got)
			}
			n.must(n.FlushConntrack())
			n.answersEverybody(false, addrs...)
			n.untracked()
			n.same("after the repair", was, n.snapshot())
		})
	}
}

// Against somebody who removes an address again and again nodecache neither gives up
// nor fills the log.
func TestFightIsLimited(t *testing.T) {
	forBackends(t, func(n *node) {
		m, p := meddled(n.T, n.backend)
		was, mark := m.snapshot(), p.Mark()
		deleted := 0
		for range 1000 {
			if _, err := m.Node.Run("ip", "addr", "del", "10.96.0.10/32", "dev", "nodelocaldns"); err == nil {
				deleted++
			}
			if deleted == 25 {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		m.comesBack(was)
		said := strings.Count(p.Log()[mark:], "\n")
		m.Logf("%d deletions, %d lines:\n%s", deleted, said, p.Log()[mark:])
		if said > 20 {
			m.Errorf("%d lines in the log", said)
		}
		if got := m.repairs()["address"]; got > deleted || got < 2 {
			m.Errorf("%d repairs of %d deletions", got, deleted)
		}
		m.run(lab.Load{From: m.Pod, Proto: "udp", To: on(lab.ClusterIP), Count: 10}, false)
	})
}
