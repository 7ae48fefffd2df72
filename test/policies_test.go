package e2e

import (
	"fmt"
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// What docs/conntrack-policies.md says of rules that go by the connection's state.
func TestPolicyByConnectionState(t *testing.T) {
	const (
		agent = `iptables -N AGENT
			iptables -A AGENT -i to-pod -m conntrack --ctstate %s -j ACCEPT
			iptables -A AGENT -i to-pod -j DROP`
		byState = "NEW,ESTABLISHED"
		all     = byState + ",UNTRACKED"
	)
	table := func(states string) string {
		return "nft 'table inet agent { chain input { type filter hook input priority 0; iifname to-pod ct state " + states + " accept; iifname to-pod drop; }; }'"
	}
	for _, c := range []struct {
		name     string
		backend  backend
		before   string // commands before the cache starts
		after    string // and after
		answered bool
	}{
		{"rules after ours", iptablesNFT, fmt.Sprintf(agent, byState) + "\niptables -A INPUT -j AGENT", "", true},
		{"rules before ours", iptablesNFT, fmt.Sprintf(agent, byState), "iptables -I INPUT -j AGENT", false},
		{"rules before ours, with UNTRACKED", iptablesNFT, fmt.Sprintf(agent, all), "iptables -I INPUT -j AGENT", true},
		{"a table of their own", iptablesNFT, table("new,established"), "", false},
		{"a table of their own, with untracked", nftables, table("new,established,untracked"), "", true},
		{"no rules of ours", backend{lab.NFT, "none"}, fmt.Sprintf(agent, byState), "iptables -I INPUT -j AGENT", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t, c.backend)
			n.commands(n.Node, c.before)
			n.serve(n.block(".:53", "169.254.20.10"))
			n.commands(n.Node, c.after)
			load := lab.Load{From: n.Pod, Proto: "udp", To: on(lab.LinkLocal), Count: 2, Workers: 1, Timeout: time.Second}
			if c.answered {
				n.run(load, false)
			} else if r, err := load.Run(); err != nil || r.Answered > 0 {
				t.Errorf("queries are answered (%v): %v", err, r)
			}
		})
	}
}
