package e2e

import "strings"

// A kind is one of the states that a node's packet filters are in at other people's sites: rules
// of our own in the shape of what a program writes there, and what becomes of a cache beside them.
type kind struct {
	name  string
	file  string // of testdata/nodes, or
	rules string // of iptables, with words between at signs (wordsOf4), or
	nft   string
	setup string // commands, one a line, before the cache is started,
	after string // and once it is there, as of an agent that puts its jump first
	often int    // how often after is done, with a check of the cache's in between; 0: once
	// What comes of it with firewall iptables, and with firewall nftables.
	iptables, nftables outcome
}

// An outcome is who gets no answer, and what is told. Where nobody loses and nothing is told it is
// the zero value.
type outcome struct {
	lost string // pods or nobody
	past bool   // the node's own programs are answered, some by the cluster
	told []tell
}

// tell is a fault, "" for a warning that is of none, and words of its warning.
type tell struct{ fault, words string }

func (k kind) backends() []backend {
	if k.nft != "" || strings.HasSuffix(k.file, ".nft") {
		return []backend{iptablesNFT, nftables}
	}
	return backends
}

// dropped is that pods get no answer, by words that name where.
func dropped(words string) outcome {
	return outcome{lost: "pods", told: []tell{{"firewall_drops", words}}}
}

const (
	everyQuery  = "the firewall drops every query"
	podsQueries = "the firewall drops every query of this node's pods"
	podsAnswers = "the firewall drops every answer of this node's pods"
)

// In all of these the pods' links are those that begin with to-pod, and to-dns leads to the world.
var kinds = []kind{
	{name: "kube-proxy", file: "kubeadm.rules"},
	{name: "kube-proxy in nftables", file: "kube-proxy.nft"},
	{name: "k3s", file: "k3s.rules"},
	{name: "GKE", file: "gke.rules"},
	{name: "EKS", file: "eks.rules"},
	{name: "Talos", file: "talos.nft"},
	{
		name: "a default of dropping", nftables: dropped(everyQuery + " … the policy of the chain INPUT"),
		rules: `*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:OUTPUT DROP [0:0]
-A INPUT -i lo -j ACCEPT
-A INPUT -s @LOOPBACK@ -j DROP
-A INPUT -p @ICMP@ -j ACCEPT
-A INPUT -p tcp -m state --state ESTABLISHED -j ACCEPT
-A INPUT -p udp -m state --state ESTABLISHED -j ACCEPT
-A INPUT -p tcp -m tcp --dport 22 -m state --state NEW -j ACCEPT
-A FORWARD -m conntrack --ctstate NEW,RELATED,ESTABLISHED -j ACCEPT
-A OUTPUT -o lo -j ACCEPT
-A OUTPUT -p @ICMP@ -j ACCEPT
-A OUTPUT -m state --state NEW,ESTABLISHED -j ACCEPT
-A OUTPUT -m state --state UNTRACKED -j ACCEPT
COMMIT
`,
	},
	{
		name: "what is invalid is dropped", nft: `table inet host {
	chain mangle { type filter hook prerouting priority -150; ct state invalid counter drop; tcp flags & (fin|syn) == (fin|syn) drop; }
	chain input { type filter hook input priority 0; ct state vmap { established : accept, related : accept, invalid : drop }; }
	chain forward { type filter hook forward priority 0; ct state invalid drop; }
	chain output { type filter hook output priority 0; ct state invalid drop; }
	chain postrouting { type filter hook postrouting priority 0; ct state invalid drop; }
}
`,
	},
	{
		name:  "strict rp_filter",
		setup: `for s in all default lo to-pod to-dns; do echo 1 >/proc/sys/net/ipv4/conf/$s/rp_filter; done`,
		nft: `table inet host {
	chain prerouting { type filter hook prerouting priority -310; meta nfproto ipv4 fib saddr . mark . iif oif missing drop; icmpv6 type { nd-neighbor-solicit, nd-router-advert } accept; meta nfproto ipv6 fib saddr . iif oif missing drop; }
}
`,
	},
	{
		name:  "route_localnet",
		setup: `echo 1 >/proc/sys/net/ipv4/conf/all/route_localnet`,
		rules: `*filter
:KUBE-FIREWALL - [0:0]
-A INPUT -j KUBE-FIREWALL
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL ! -s @LOOPBACK@ -d @LOOPBACK@ -m comment --comment "block incoming localnet connections" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
COMMIT
*raw
-A PREROUTING -d @LOOPBACK@ ! -i lo -j DROP
COMMIT
`,
	},
	{
		name: "firewalld, pods trusted", nft: firewalld(`iifname "to-pod*" goto filter_IN_trusted`),
	},
	{
		name: "firewalld, dns open", nft: firewalld(`goto filter_IN_dns`),
	},
	{
		name: "firewalld, pods unknown", nft: firewalld(""),
		iptables: dropped(everyQuery + " … of the chain filter_IN_public of the nftables table inet firewalld)"), nftables: dropped(everyQuery + " … of the chain filter_IN_public of the nftables table inet firewalld)"),
	},
	{
		name: "firewalld, dns open to one link", nft: firewalld(`iifname "to-dns" goto filter_IN_dns`),
		iptables: dropped(podsQueries + " … of the chain filter_IN_public of the nftables table inet firewalld)"), nftables: dropped(podsQueries + " … of the chain filter_IN_public of the nftables table inet firewalld)"),
	},
	{
		name: "firewalld with iptables, pods unknown", rules: firewalldIptables,
		nftables: dropped(everyQuery + " … of the chain IN_public of the "),
		// A reload of firewalld's, which empties all tables first.
		after: flushed(firewalldIptables), iptables: outcome{told: []tell{{"", "put back what another program had removed"}}},
	},
	{name: "ufw, pods let in", rules: ufw("-A ufw@6@-user-input -i to-pod+ -j ACCEPT")},
	{
		name: "ufw, pods unknown", rules: ufw(""), nftables: dropped(everyQuery + " … the policy of the chain INPUT"),
	},
	{
		name: "ufw, dns open to one link", rules: ufw("-A ufw@6@-user-input -i to-dns -p udp -m udp --dport 53 -j ACCEPT\n-A ufw@6@-user-input -i to-dns -p tcp -m tcp --dport 53 -j ACCEPT"),
		nftables: dropped(podsQueries + " … the policy of the chain INPUT"),
	},
	{name: "Docker", rules: dockerIptables},
	{name: "Docker in nftables", nft: dockerNFT},
	{name: "Calico", rules: calico("ACCEPT", ""), after: insertCalico, often: 7},
	{name: "Calico, a host endpoint that is not tracked", rules: calico("ACCEPT", "to-dns"), after: insertCalico, often: 7},
	{
		name: "Calico, all links a host endpoint that is not tracked", rules: calico("ACCEPT", "+"), after: insertCalico, often: 7,
		iptables: outcome{past: true, told: []tell{
			{"", "put back what another program had removed"},
			{"", "come first again"},
			{"foreign_rule_first", "cali-failsafe-out -p udp -m multiport --dports 53 -j ACCEPT … where another program has put it again and again"},
			{"own_query_lost", "queries that this cache itself sends to"},
		}},
	},
	{
		name: "Calico, pods kept from the host", rules: calico("DROP", ""), after: insertCalico,
		iptables: dropped(podsQueries + " … (chain INPUT of the "), nftables: dropped(podsQueries + " … (chain INPUT of the "),
	},
	{
		name: "Calico in append mode, pods kept from the host", rules: calico("DROP", ""),
		nftables: dropped(podsQueries + " … (chain INPUT of the "),
	},
	{name: "Calico in nftables", nft: calicoNFT("return")},
	{
		name: "Calico in nftables, pods kept from the host", nft: calicoNFT("drop"),
		iptables: dropped(podsQueries + " … (chain filter-INPUT of the nftables table ip"), nftables: dropped(podsQueries + " … (chain filter-INPUT of the nftables table ip"),
	},
	{
		name: "kube-router", rules: kubeRouter,
		after: again("KUBE-ROUTER-INPUT INPUT", "KUBE-ROUTER-OUTPUT OUTPUT"),
	},
	{name: "kube-router in nftables", nft: kubeRouterNFT},
	{
		name: "agent that accepts what is established alone, after ours", rules: established,
		nftables: dropped(podsAnswers + " … of the chain AGENT of the "),
	},
	{
		name: "agent that accepts what is established alone, before ours", rules: established, after: again("AGENT OUTPUT"),
		iptables: dropped(podsAnswers + " … of the chain AGENT of the "), nftables: dropped(podsAnswers + " … of the chain AGENT of the "),
	},
	{
		name: "a policy for one pod", nft: `table inet agent {
	chain input { type filter hook input priority 0; iifname "to-pod2" jump pod; }
	chain output { type filter hook output priority 0; oifname "to-pod2" jump pod; }
	chain pod { ct state established,related accept; drop; }
}
`,
	},
	{
		name: "another network of the pods' addresses", rules: `*filter
:ts-input - [0:0]
-A INPUT -j ts-input
-A ts-input -s @PODS@ ! -i tailscale0 -j DROP
-A ts-input -s @PODS2@ ! -i tailscale0 -j DROP
COMMIT
`,
		nftables: dropped(podsQueries + " … (chain INPUT of the "),
		after:    again("ts-input INPUT"), iptables: dropped(podsQueries + " … (chain INPUT of the "),
	},
	{name: "kube-network-policies", nft: queuePolicies},
	{name: "the VPC's network of AWS", rules: awsVPC},
	{name: "Cilium chained", rules: cilium, after: insert("raw CILIUM_PRE_raw PREROUTING", "raw CILIUM_OUTPUT_raw OUTPUT", "filter CILIUM_INPUT INPUT", "filter CILIUM_OUTPUT OUTPUT")},
	{name: "Antrea", rules: antrea},
	{name: "blocked addresses", rules: "*filter\n:f2b-sshd - [0:0]\n-A INPUT -p tcp -m multiport --dports 22 -j f2b-sshd\n-A f2b-sshd -s @OTHER@ -j REJECT\n-A f2b-sshd -j RETURN\nCOMMIT\n"},
	{name: "blocked addresses in nftables", nft: "table ip blocked {\n\tset addrs { type ipv4_addr; flags timeout; elements = { 192.0.2.66 }; }\n\tchain in { type filter hook input priority -10; ip saddr @addrs drop; }\n\tchain forwarded { type filter hook forward priority -10; ip saddr @addrs drop; }\n}\n"},
}
