package e2e

import (
	"fmt"
	"strings"
)

// The longer rules of kinds.

// firewalld is the table of firewalld with its backend nftables, and a rule that sends what comes
// in to a zone; else it is in the zone public. Its empty chains are left out.
func firewalld(zone string) string {
	return `table inet firewalld {
	chain mangle_PREROUTING { type filter hook prerouting priority mangle + 10; policy accept; }
	chain filter_PREROUTING {
		type filter hook prerouting priority filter + 10; policy accept;
		icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept
		meta nfproto ipv6 fib saddr . mark . iif oif missing drop
	}
	chain filter_INPUT {
		type filter hook input priority filter + 10; policy accept;
		ct state { established, related } accept
		ct status dnat accept
		iifname "lo" accept
		ct state invalid drop
		jump filter_INPUT_ZONES
		reject with icmpx admin-prohibited
	}
	chain filter_FORWARD {
		type filter hook forward priority filter + 10; policy accept;
		ct state { established, related } accept
		ct status dnat accept
		iifname "lo" accept
		ct state invalid drop
		reject with icmpx admin-prohibited
	}
	chain filter_OUTPUT {
		type filter hook output priority filter + 10; policy accept;
		ct state { established, related } accept
		oifname "lo" accept
		ip6 daddr { ::/96, ::ffff:0.0.0.0/96, 2002::/24 } reject with icmpv6 addr-unreachable
	}
	chain filter_INPUT_POLICIES_pre { icmpv6 type { nd-neighbor-advert, nd-neighbor-solicit, nd-router-advert, nd-redirect } accept; }
	chain filter_IN_dns {
		jump filter_INPUT_POLICIES_pre
		tcp dport 53 accept
		udp dport 53 accept
		reject with icmpx admin-prohibited
	}
	chain filter_IN_public {
		jump filter_INPUT_POLICIES_pre
		jump filter_IN_public_allow
		meta l4proto { icmp, ipv6-icmp } accept
		reject with icmpx admin-prohibited
	}
	chain filter_IN_public_allow {
		tcp dport 22 accept
		ip6 daddr fe80::/64 udp dport 546 accept
	}
	chain filter_IN_trusted { accept; }
	chain filter_INPUT_ZONES {
		` + zone + `
		goto filter_IN_public
	}
}
`
}

// firewalldIptables is firewalld with its backend iptables and no zone for pods.
const firewalldIptables = `*raw
:PREROUTING_direct - [0:0]
:PREROUTING_ZONES - [0:0]
:PRE_public - [0:0]
:OUTPUT_direct - [0:0]
-A PREROUTING -j PREROUTING_direct
-A PREROUTING -j PREROUTING_ZONES
-A OUTPUT -j OUTPUT_direct
-A PREROUTING_ZONES -i to-dns -g PRE_public
-A PREROUTING_ZONES -g PRE_public
COMMIT
*filter
:INPUT_direct - [0:0]
:INPUT_ZONES - [0:0]
:IN_public - [0:0]
:IN_public_allow - [0:0]
:OUTPUT_direct - [0:0]
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT
-A INPUT -i lo -j ACCEPT
-A INPUT -m conntrack --ctstate INVALID -j DROP
-A INPUT -j INPUT_direct
-A INPUT -j INPUT_ZONES
-A INPUT -j REJECT
-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT
-A FORWARD -m conntrack --ctstate INVALID -j DROP
-A FORWARD -j REJECT
-A OUTPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A OUTPUT -o lo -j ACCEPT
-A OUTPUT -j OUTPUT_direct
-A INPUT_ZONES -i to-dns -g IN_public
-A INPUT_ZONES -g IN_public
-A IN_public -j IN_public_allow
-A IN_public -p @ICMP@ -j ACCEPT
-A IN_public -j REJECT
-A IN_public_allow -p tcp -m tcp --dport 22 -j ACCEPT
COMMIT
`

// flushed are commands that empty the tables raw and filter and write these rules again.
func flushed(rules string) string {
	var lines []string
	for _, f := range []struct {
		program string
		words   *strings.Replacer
	}{{"iptables", wordsOf4}, {"ip6tables", wordsOf6}} {
		for _, table := range []string{"raw", "filter"} {
			lines = append(lines, fmt.Sprintf("%[1]s -t %[2]s -F; %[1]s -t %[2]s -X", f.program, table))
		}
		lines = append(lines, fmt.Sprintf("printf %%s '%s' | %s-restore --noflush", strings.ReplaceAll(f.words.Replace(rules), "\n", `'"\n"'`), f.program))
	}
	return strings.ReplaceAll(strings.Join(lines, "\n"), `printf %s '`, `printf '`)
}

// insert are commands by which an agent puts its jumps, each a table, a chain and where from, first
// again.
func insert(jumps ...string) string {
	var lines []string
	for _, jump := range jumps {
		w := strings.Fields(jump)
		for _, program := range []string{"iptables", "ip6tables"} {
			lines = append(lines, fmt.Sprintf("%[1]s -t %[2]s -D %[4]s -j %[3]s; %[1]s -t %[2]s -I %[4]s 1 -j %[3]s", program, w[0], w[1], w[2]))
		}
	}
	return strings.Join(lines, "\n")
}

// again is insert for jumps of the table filter.
func again(jumps ...string) string {
	var all []string
	for _, jump := range jumps {
		all = append(all, "filter "+jump)
	}
	return insert(all...)
}

// ufw is ufw's with one more rule of its user's.
func ufw(rule string) string {
	return `*filter
:INPUT DROP [0:0]
:ufw@6@-before-input - [0:0]
:ufw@6@-after-input - [0:0]
:ufw@6@-reject-input - [0:0]
:ufw@6@-track-input - [0:0]
:ufw@6@-before-output - [0:0]
:ufw@6@-track-output - [0:0]
:ufw@6@-logging-deny - [0:0]
:ufw@6@-not-local - [0:0]
:ufw@6@-skip-to-policy-input - [0:0]
:ufw@6@-user-input - [0:0]
:ufw@6@-user-output - [0:0]
-A INPUT -j ufw@6@-before-input
-A INPUT -j ufw@6@-after-input
-A INPUT -j ufw@6@-reject-input
-A INPUT -j ufw@6@-track-input
-A OUTPUT -j ufw@6@-before-output
-A OUTPUT -j ufw@6@-track-output
-A ufw@6@-before-input -i lo -j ACCEPT
-A ufw@6@-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw@6@-before-input -m conntrack --ctstate INVALID -j ufw@6@-logging-deny
-A ufw@6@-before-input -m conntrack --ctstate INVALID -j DROP
-A ufw@6@-before-input -p @ICMP@ -j ACCEPT
-A ufw@6@-before-input -j ufw@6@-not-local
-A ufw@6@-before-input -d @MDNS@ -p udp -m udp --dport 5353 -j ACCEPT
-A ufw@6@-before-input -j ufw@6@-user-input
-A ufw@6@-not-local -m addrtype --dst-type LOCAL -j RETURN
-A ufw@6@-not-local -m addrtype --dst-type MULTICAST -j RETURN
-A ufw@6@-not-local -m limit --limit 3/min --limit-burst 10 -j ufw@6@-logging-deny
-A ufw@6@-not-local -j DROP
-A ufw@6@-logging-deny -m conntrack --ctstate INVALID -m limit --limit 3/min --limit-burst 10 -j RETURN
-A ufw@6@-logging-deny -m limit --limit 3/min --limit-burst 10 -j LOG --log-prefix "[UFW BLOCK] "
-A ufw@6@-after-input -p udp -m udp --dport 137 -j ufw@6@-skip-to-policy-input
-A ufw@6@-skip-to-policy-input -j DROP
-A ufw@6@-before-output -o lo -j ACCEPT
-A ufw@6@-before-output -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw@6@-before-output -j ufw@6@-user-output
-A ufw@6@-track-output -p tcp -m conntrack --ctstate NEW -j ACCEPT
-A ufw@6@-track-output -p udp -m conntrack --ctstate NEW -j ACCEPT
-A ufw@6@-user-input -p tcp -m tcp --dport 22 -j ACCEPT
` + rule + `
COMMIT
`
}

// dockerIptables is Docker 28, with a container that has published a port, and pods beside it.
const dockerIptables = `*raw
-A PREROUTING -d @LOOPBACK@ ! -i lo -p tcp -m tcp --dport 8080 -j DROP
-A PREROUTING -d @OTHER@ ! -i docker0 -j DROP
COMMIT
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d @LOOPBACK@ -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s @OTHER@ ! -o docker0 -j MASQUERADE
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination @TO-OTHER@
COMMIT
*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-BRIDGE - [0:0]
:DOCKER-CT - [0:0]
:DOCKER-FORWARD - [0:0]
:DOCKER-INTERNAL - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-FORWARD
-A FORWARD -i to-pod+ -j ACCEPT
-A FORWARD -o to-pod+ -j ACCEPT
-A DOCKER -d @OTHER@ ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER ! -i docker0 -o docker0 -j DROP
-A DOCKER-BRIDGE -o docker0 -j DOCKER
-A DOCKER-CT -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A DOCKER-FORWARD -j DOCKER-CT
-A DOCKER-FORWARD -j DOCKER-INTERNAL
-A DOCKER-FORWARD -j DOCKER-BRIDGE
-A DOCKER-FORWARD -i docker0 -j ACCEPT
COMMIT
`

// dockerNFT is Docker 29 with nftables.
const dockerNFT = `table ip docker-bridges {
	map forward-in { type ifname : verdict; elements = { "docker0" : jump in-docker0 }; }
	map forward-out { type ifname : verdict; elements = { "docker0" : jump out-docker0 }; }
	chain raw-PREROUTING { type filter hook prerouting priority raw; ip daddr 172.17.0.2 iifname != "docker0" counter drop; }
	chain filter-FORWARD { type filter hook forward priority filter; oifname vmap @forward-in; iifname vmap @forward-out; }
	chain in-docker0 { ct state established,related accept; ip daddr 172.17.0.2 tcp dport 80 accept; drop; }
	chain out-docker0 { ct state established,related accept; accept; }
}
`
