package e2e

import "strings"

// The rules of kinds that the programs of a cluster's network and of its policies write.

// calico is Calico's three tables, with what it does with packets from pods to the host, and a
// policy that keeps a host endpoint's packets out of connection tracking; "" is without.
func calico(toHost, endpoint string) string {
	from, to := "", ""
	switch endpoint {
	case "":
	case "+": // all links that are not pods'
		from, to = "-A cali-from-host-endpoint -g cali-fh-any\n", "-A cali-to-host-endpoint -o to-pod+ -j RETURN\n-A cali-to-host-endpoint -g cali-th-any\n"
	default:
		from, to = "-A cali-from-host-endpoint -i "+endpoint+" -g cali-fh-any\n", "-A cali-to-host-endpoint -o "+endpoint+" -g cali-th-any\n"
	}
	return `*raw
:cali-PREROUTING - [0:0]
:cali-OUTPUT - [0:0]
:cali-rpf-skip - [0:0]
:cali-from-host-endpoint - [0:0]
:cali-to-host-endpoint - [0:0]
:cali-fh-any - [0:0]
:cali-th-any - [0:0]
:cali-pi-policy - [0:0]
:cali-failsafe-in - [0:0]
:cali-failsafe-out - [0:0]
-A PREROUTING -j cali-PREROUTING
-A OUTPUT -j cali-OUTPUT
-A cali-PREROUTING -j MARK --set-xmark 0x0/0xf0000
-A cali-PREROUTING -p udp -m multiport --dports 4789 -j NOTRACK
-A cali-PREROUTING -i to-pod+ -j MARK --set-xmark 0x40000/0x40000
-A cali-PREROUTING -m mark --mark 0x40000/0x40000 -j cali-rpf-skip
-A cali-PREROUTING -m mark --mark 0x40000/0x40000 -m rpfilter --validmark --invert -j DROP
-A cali-PREROUTING -m mark --mark 0x0/0x40000 -j cali-from-host-endpoint
-A cali-PREROUTING -m mark --mark 0x10000/0x10000 -j ACCEPT
-A cali-OUTPUT -j MARK --set-xmark 0x0/0xf0000
-A cali-OUTPUT -j cali-to-host-endpoint
-A cali-OUTPUT -p udp -m multiport --dports 4789 -j NOTRACK
-A cali-OUTPUT -m mark --mark 0x10000/0x10000 -j ACCEPT
-A cali-fh-any -j cali-failsafe-in
-A cali-fh-any -j MARK --set-xmark 0x0/0x30000
-A cali-fh-any -m mark --mark 0x0/0x20000 -j cali-pi-policy
-A cali-fh-any -m mark --mark 0x10000/0x10000 -j NOTRACK
-A cali-fh-any -m mark --mark 0x10000/0x10000 -j RETURN
-A cali-th-any -j cali-failsafe-out
-A cali-th-any -j MARK --set-xmark 0x0/0x30000
-A cali-pi-policy -p tcp -m multiport --dports 11211 -j MARK --set-xmark 0x10000/0x10000
-A cali-failsafe-in -p tcp -m multiport --dports 22 -j ACCEPT
-A cali-failsafe-in -p udp -m multiport --dports 68 -j ACCEPT
-A cali-failsafe-in -p tcp -m multiport --dports 6443 -j ACCEPT
-A cali-failsafe-in -p udp -m multiport --sports 53 -j ACCEPT
-A cali-failsafe-in -p udp -m multiport --sports 67 -j ACCEPT
-A cali-failsafe-in -p tcp -m multiport --sports 2379 -j ACCEPT
-A cali-failsafe-out -p udp -m multiport --dports 53 -j ACCEPT
-A cali-failsafe-out -p udp -m multiport --dports 67 -j ACCEPT
-A cali-failsafe-out -p tcp -m multiport --dports 2379 -j ACCEPT
-A cali-failsafe-out -p tcp -m multiport --sports 22 -j ACCEPT
-A cali-failsafe-out -p tcp -m multiport --sports 6443 -j ACCEPT
` + from + to + `COMMIT
*mangle
:cali-PREROUTING - [0:0]
:cali-POSTROUTING - [0:0]
:cali-from-host-endpoint - [0:0]
:cali-to-host-endpoint - [0:0]
-A PREROUTING -j cali-PREROUTING
-A POSTROUTING -j cali-POSTROUTING
-A cali-PREROUTING -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A cali-PREROUTING -m mark --mark 0x10000/0x10000 -j ACCEPT
-A cali-PREROUTING -j cali-from-host-endpoint
-A cali-PREROUTING -m mark --mark 0x10000/0x10000 -j ACCEPT
-A cali-POSTROUTING -m mark --mark 0x10000/0x10000 -j RETURN
-A cali-POSTROUTING -j MARK --set-xmark 0x0/0xf0000
-A cali-POSTROUTING -m conntrack --ctstate DNAT -j cali-to-host-endpoint
-A cali-POSTROUTING -m mark --mark 0x10000/0x10000 -j RETURN
COMMIT
*filter
:cali-INPUT - [0:0]
:cali-OUTPUT - [0:0]
:cali-wl-to-host - [0:0]
:cali-from-wl-dispatch - [0:0]
:cali-fw-pod - [0:0]
:cali-fw-pod2 - [0:0]
:cali-pro-ns - [0:0]
:cali-from-host-endpoint - [0:0]
:cali-to-host-endpoint - [0:0]
-A INPUT -j cali-INPUT
-A OUTPUT -j cali-OUTPUT
-A cali-INPUT -p udp -m multiport --dports 4789 -m addrtype --dst-type LOCAL -j DROP
-A cali-INPUT -i to-pod+ -g cali-wl-to-host
-A cali-INPUT -m mark --mark 0x10000/0x10000 -j ACCEPT
-A cali-INPUT -j MARK --set-xmark 0x0/0xf0000
-A cali-INPUT -j cali-from-host-endpoint
-A cali-INPUT -m mark --mark 0x10000/0x10000 -j ACCEPT
-A cali-OUTPUT -m mark --mark 0x10000/0x10000 -j ACCEPT
-A cali-OUTPUT -o to-pod+ -j RETURN
-A cali-OUTPUT -j MARK --set-xmark 0x0/0xf0000
-A cali-OUTPUT -m conntrack ! --ctstate DNAT -j cali-to-host-endpoint
-A cali-OUTPUT -m mark --mark 0x10000/0x10000 -j ACCEPT
-A cali-wl-to-host -p @ICMP@ -j ACCEPT
-A cali-wl-to-host -j cali-from-wl-dispatch
-A cali-wl-to-host -m comment --comment "Configured DefaultEndpointToHostAction" -j ` + toHost + `
-A cali-from-wl-dispatch -i to-pod -g cali-fw-pod
-A cali-from-wl-dispatch -i to-pod2 -g cali-fw-pod2
-A cali-from-wl-dispatch -m comment --comment "Unknown interface" -j DROP
` + calicoPod("pod") + calicoPod("pod2") + `-A cali-pro-ns -j MARK --set-xmark 0x10000/0x10000
COMMIT
`
}

// calicoPod is the chain of one of Calico's pods.
func calicoPod(name string) string {
	return strings.ReplaceAll(`-A cali-fw-POD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A cali-fw-POD -m conntrack --ctstate INVALID -j DROP
-A cali-fw-POD -j MARK --set-xmark 0x0/0x30000
-A cali-fw-POD -p udp -m comment --comment "Drop VXLAN encapped packets originating in workloads" -m multiport --dports 4789 -j DROP
-A cali-fw-POD -p 4 -m comment --comment "Drop IPinIP encapped packets originating in workloads" -j DROP
-A cali-fw-POD -j cali-pro-ns
-A cali-fw-POD -m comment --comment "Return if profile accepted" -m mark --mark 0x10000/0x10000 -j RETURN
-A cali-fw-POD -m comment --comment "Drop if no profiles matched" -j DROP
`, "POD", name)
}

var insertCalico = insert("raw cali-PREROUTING PREROUTING", "raw cali-OUTPUT OUTPUT", "filter cali-INPUT INPUT", "filter cali-OUTPUT OUTPUT")

// calicoNFT is Calico with its own tables of nftables.
func calicoNFT(toHost string) string {
	table := `table IP calico {
	map cali-fw-dispatch { type ifname : verdict; elements = { "to-pod" : goto cali-fw-pod, "to-pod2" : goto cali-fw-pod }; }
	chain raw-PREROUTING { type filter hook prerouting priority raw; jump raw-cali-PREROUTING; }
	chain raw-cali-PREROUTING {
		meta mark set mark and 0xfff0ffff
		iifname "to-pod*" meta mark set mark or 0x40000
		meta mark & 0x40000 == 0x40000 fib saddr . mark . iif oif missing drop
		meta mark & 0x10000 == 0x10000 accept
	}
	chain filter-INPUT { type filter hook input priority filter; jump filter-cali-INPUT; }
	chain filter-cali-INPUT {
		iifname "to-pod*" goto filter-cali-wl-to-host
		meta mark & 0x10000 == 0x10000 accept
		meta mark set mark and 0xfff0ffff
	}
	chain filter-cali-wl-to-host {
		ICMP accept
		jump filter-cali-from-wl-dispatch
		TOHOST
	}
	chain filter-cali-from-wl-dispatch { iifname vmap @cali-fw-dispatch; drop; }
	chain cali-fw-pod {
		ct state established,related accept
		ct state invalid drop
		meta mark set mark or 0x10000
		meta mark & 0x10000 == 0x10000 return
		drop
	}
	chain filter-OUTPUT { type filter hook output priority filter; oifname "to-pod*" return; meta mark & 0x10000 == 0x10000 accept; }
}
`
	table = strings.ReplaceAll(table, "TOHOST", toHost)
	return strings.NewReplacer("IP ", "ip ", "ICMP", "meta l4proto icmp").Replace(table) + strings.NewReplacer("IP ", "ip6 ", "ICMP", "meta l4proto ipv6-icmp").Replace(table)
}

// kubeRouter has a policy for what comes to the pod.
const kubeRouter = `*filter
:KUBE-ROUTER-INPUT - [0:0]
:KUBE-ROUTER-OUTPUT - [0:0]
:KUBE-NWPLCY-COMMON - [0:0]
:KUBE-NWPLCY-DEFAULT - [0:0]
:KUBE-POD-FW-A - [0:0]
-A INPUT -j KUBE-ROUTER-INPUT
-A OUTPUT -j KUBE-ROUTER-OUTPUT
-A KUBE-ROUTER-INPUT -d @SERVICES@ -j RETURN
-A KUBE-ROUTER-INPUT -p udp -m addrtype --dst-type LOCAL -m multiport --dports 30000:32767 -j RETURN
-A KUBE-ROUTER-INPUT -s @PODS@ -j KUBE-POD-FW-A
-A KUBE-ROUTER-INPUT -m mark --mark 0x20000/0x20000 -j ACCEPT
-A KUBE-ROUTER-OUTPUT -d @PODS@ -j KUBE-POD-FW-A
-A KUBE-ROUTER-OUTPUT -m mark --mark 0x20000/0x20000 -j ACCEPT
-A KUBE-NWPLCY-COMMON -m conntrack --ctstate INVALID -j DROP
-A KUBE-NWPLCY-COMMON -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A KUBE-NWPLCY-COMMON -p @ICMP@ -j ACCEPT
-A KUBE-NWPLCY-DEFAULT -j MARK --set-xmark 0x10000/0x10000
-A KUBE-POD-FW-A -j KUBE-NWPLCY-COMMON
-A KUBE-POD-FW-A -d @PODS@ -m addrtype --src-type LOCAL -j ACCEPT
-A KUBE-POD-FW-A -s @PODS@ -j KUBE-NWPLCY-DEFAULT
-A KUBE-POD-FW-A -m mark ! --mark 0x10000/0x10000 -j REJECT
-A KUBE-POD-FW-A -j MARK --set-xmark 0x0/0x10000
-A KUBE-POD-FW-A -j MARK --set-xmark 0x20000/0x20000
COMMIT
`

const kubeRouterNFT = `table ip kube-router-filter-ipv4 {
	chain KUBE-ROUTER-INPUT { type filter hook input priority filter; ip daddr 10.96.0.0/16 counter return; ip saddr 10.0.1.2 jump KUBE-POD-FW-A; meta mark & 0x20000 == 0x20000 accept; }
	chain KUBE-ROUTER-OUTPUT { type filter hook output priority filter; ip daddr 10.0.1.2 jump KUBE-POD-FW-A; meta mark & 0x20000 == 0x20000 accept; }
	chain KUBE-NWPLCY-COMMON { ct state invalid counter drop; ct state established,related counter accept; icmp type echo-request accept; }
	chain KUBE-POD-FW-A {
		jump KUBE-NWPLCY-COMMON
		ip daddr 10.0.1.2 fib saddr type local counter accept
		ip saddr 10.0.1.2 counter meta mark set mark or 0x10000
		meta mark & 0x10000 != 0x10000 counter reject
		counter meta mark set mark and 0xfffeffff
		counter meta mark set mark or 0x20000
	}
}
`

// established is of an agent that takes what goes to pods for answers.
const established = `*filter
:AGENT - [0:0]
-A OUTPUT -j AGENT
-A AGENT -p @ICMP@ -j RETURN
-A AGENT -o to-pod+ -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A AGENT -o to-pod+ -j DROP
COMMIT
`

// queuePolicies is what hands packets of pods with policies to a program. Here they are dropped, as
// the kernel does where that program is not there.
const queuePolicies = `table inet kube-network-policies {
	set podips-v4 { type ipv4_addr; elements = { 10.0.1.2 }; }
	set podips-v6 { type ipv6_addr; elements = { fd00:1::2 }; }
	chain postrouting {
		type filter hook postrouting priority srcnat - 5; policy accept;
		icmpv6 type { nd-router-solicit, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert, nd-redirect } accept
		meta skuid 0 counter accept
		ct state established,related counter accept
		ip daddr @podips-v4 drop
		ip6 daddr @podips-v6 drop
	}
	chain input {
		type filter hook input priority 101; policy accept;
		iifname "lo" accept
		ip saddr @podips-v4 ct state new drop
		ip6 saddr @podips-v6 ct state new drop
	}
}
`

const awsVPC = `*mangle
-A PREROUTING -i to-dns -m comment --comment "AWS, primary ENI" -m addrtype --dst-type LOCAL --limit-iface-in -j CONNMARK --set-xmark 0x80/0x80
-A PREROUTING -i to-pod+ -m comment --comment "AWS, primary ENI" -j CONNMARK --restore-mark --nfmask 0x80 --ctmask 0x80
COMMIT
*nat
:AWS-CONNMARK-CHAIN-0 - [0:0]
:AWS-SNAT-CHAIN-0 - [0:0]
-A PREROUTING -i to-pod+ -m comment --comment "AWS, outbound connections" -j AWS-CONNMARK-CHAIN-0
-A PREROUTING -m comment --comment "AWS, CONNMARK" -j CONNMARK --restore-mark --nfmask 0x80 --ctmask 0x80
-A POSTROUTING -m comment --comment "AWS SNAT CHAIN" -j AWS-SNAT-CHAIN-0
-A AWS-CONNMARK-CHAIN-0 -d @PODS@ -j RETURN
-A AWS-CONNMARK-CHAIN-0 -j CONNMARK --set-xmark 0x80/0x80
-A AWS-SNAT-CHAIN-0 -d @PODS@ -j RETURN
COMMIT
`

const cilium = `*raw
:CILIUM_PRE_raw - [0:0]
:CILIUM_OUTPUT_raw - [0:0]
-A PREROUTING -j CILIUM_PRE_raw
-A OUTPUT -j CILIUM_OUTPUT_raw
-A CILIUM_PRE_raw -m mark --mark 0x200/0xf00 -j CT --notrack
-A CILIUM_OUTPUT_raw -o to-pod+ -m mark --mark 0xa00/0xfffffeff -j CT --notrack
-A CILIUM_OUTPUT_raw -o to-pod+ -m mark --mark 0x800/0xe00 -j CT --notrack
COMMIT
*filter
:CILIUM_INPUT - [0:0]
:CILIUM_OUTPUT - [0:0]
:CILIUM_FORWARD - [0:0]
-A INPUT -j CILIUM_INPUT
-A OUTPUT -j CILIUM_OUTPUT
-A FORWARD -j CILIUM_FORWARD
-A CILIUM_INPUT -m mark --mark 0x200/0xf00 -j ACCEPT
-A CILIUM_OUTPUT -m mark --mark 0xa00/0xe00 -j ACCEPT
-A CILIUM_OUTPUT -m mark ! --mark 0xe00/0xf00 -m mark ! --mark 0xd00/0xf00 -m mark ! --mark 0x400/0xf00 -m mark ! --mark 0xa00/0xe00 -j MARK --set-xmark 0xc00/0xf00
-A CILIUM_FORWARD -i to-pod+ -j ACCEPT
-A CILIUM_FORWARD -o to-pod+ -j ACCEPT
COMMIT
`

const antrea = `*raw
:ANTREA-PREROUTING - [0:0]
:ANTREA-OUTPUT - [0:0]
-A PREROUTING -j ANTREA-PREROUTING
-A OUTPUT -j ANTREA-OUTPUT
-A ANTREA-PREROUTING -p udp -m udp --dport 6081 -m addrtype --dst-type LOCAL -j NOTRACK
-A ANTREA-OUTPUT -p udp -m udp --dport 6081 -m addrtype --src-type LOCAL -j NOTRACK
COMMIT
*mangle
:ANTREA-MANGLE - [0:0]
:ANTREA-OUTPUT - [0:0]
-A PREROUTING -j ANTREA-MANGLE
-A OUTPUT -j ANTREA-OUTPUT
-A ANTREA-OUTPUT -o antrea-gw0 -m addrtype --src-type LOCAL -j MARK --set-xmark 0x80000000/0x80000000
COMMIT
*filter
:ANTREA-FORWARD - [0:0]
:ANTREA-INPUT - [0:0]
-A FORWARD -j ANTREA-FORWARD
-A INPUT -j ANTREA-INPUT
-A ANTREA-FORWARD -i antrea-gw0 -j ACCEPT
-A ANTREA-FORWARD -o antrea-gw0 -j ACCEPT
-A ANTREA-INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ANTREA-INPUT -p tcp -m tcp --dport 10351 -j ACCEPT
COMMIT
`
