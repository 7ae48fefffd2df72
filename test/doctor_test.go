package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

const examined = "looked for what commonly goes wrong on a node: "

// commands runs commands in a namespace, one a line.
func (n *node) commands(ns *lab.Namespace, lines string) {
	n.Helper()
	for line := range strings.Lines(lines) {
		if line = strings.TrimSpace(line); line != "" {
			_, err := ns.Run("sh", "-ec", line)
			n.must(err)
		}
	}
}

// examination starts CoreDNS and returns it with what it warns of.
func (n *node) examination(corefile string) (p *process, warnings string) {
	n.Helper()
	p = n.serve(corefile)
	n.must(p.WaitLog(0, examined))
	return p, p.warnings(0)
}

// examination after a reload.
func (p *process) again(corefile string) string {
	p.n.Helper()
	mark := p.Mark()
	p.reload(corefile)
	p.n.must(p.WaitLog(mark, examined))
	return p.warnings(mark)
}

func (p *process) warnings(mark int) string {
	var out strings.Builder
	for line := range strings.Lines(p.Log()[mark:]) {
		if strings.Contains(line, "[WARNING]") {
			out.WriteString(line)
		}
	}
	return out.String()
}

// faulty checks that a fault is told of with it and not without: fault brings it and
// returns what takes it away.
func (n *node) faulty(corefile, want string, fault func() (undo func())) {
	n.Helper()
	p, before := n.examination(corefile)
	if before != "" {
		n.Errorf("before the fault: %s", before)
	}
	undo := fault()
	during := p.again(corefile + "# during\n")
	n.has(during, want)
	if strings.Count(during, "\n") != 1 {
		n.Errorf("want one warning, got %s", during)
	}
	undo()
	if after := p.again(corefile + "# after\n"); after != "" {
		n.Errorf("after the fault: %s", after)
	}
}

// What a node-cache that was killed leaves in the table raw takes queries out of
// connection tracking for good; the warning's own remedy removes it.
func TestWarnsOfRulesOfNodeCache(t *testing.T) {
	forBackends(t, func(n *node) {
		corefile := n.corefile()
		n.faulty(corefile, "node-cache's rules", func() func() {
			for _, f := range [][2]string{{"iptables", "10.96.0.10"}, {"ip6tables", "fd00:96::10"}} {
				n.commands(n.Node, fmt.Sprintf(`
					%[1]s -t raw -I PREROUTING -p udp -d %[2]s --dport 53 -j NOTRACK -m comment --comment "NodeLocal DNS Cache: skip conntrack"
					%[1]s -t filter -I INPUT -p udp -d %[2]s --dport 53 -j ACCEPT -m comment --comment "NodeLocal DNS Cache: allow DNS traffic"`, f[0], f[1]))
			}
			return func() {
				const remedy = `for t in raw filter; do iptables-save -t $t | sed -n "/NodeLocal DNS Cache/s/^-A/iptables -t $t -D/p"; done | sh`
				if source := read(n.T, filepath.Join("..", "internal", "doctor", "firewall.go")); !strings.Contains(source, `iptables-save -t $t | sed -n \"/%s/s/^-A/iptables -t $t -D/p\"; done | sh`) {
					n.Error("the remedy that is tested is not the one that the warning has")
				}
				n.commands(n.Node, remedy+"\n"+strings.ReplaceAll(remedy, "iptables", "ip6tables"))
			}
		})
	})
}

// Another CoreDNS on the same address, as on the way from node-cache, is named; a twin
// is not a fault.
func TestWarnsOfSharedPort(t *testing.T) {
	n := newNode(t, nftables)
	corefile := n.block(".:53", "10.96.0.10 169.254.20.10")
	var other *process
	n.faulty(corefile, `10.96.0.10:53/udp is served by "coredns" (process `, func() func() {
		other = n.launch(plainBlock(".:53", "10.96.0.10"), lab.Options{})
		n.must(other.WaitServing())
		return func() { other.exit(syscall.SIGTERM) }
	})
	if _, warnings := n.examination(corefile); warnings != "" {
		t.Errorf("beside a twin: %s", warnings)
	}
}

// An address on somebody else's dummy link goes with that link.
func TestWarnsOfAddressElsewhere(t *testing.T) {
	n := newNode(t, nftables)
	corefile := n.block(".:53", "169.254.20.10")
	n.commands(n.Node, `ip link add theirs type dummy 2>/dev/null || ip tuntap add theirs mode tun
		ip addr add 169.254.20.10/32 dev theirs`)
	p, during := n.examination(corefile)
	n.has(during, "169.254.20.10 is on the link theirs, which is not this cache's")
	n.commands(n.Node, "ip link del theirs")
	if after := p.again(corefile + "# after\n"); after != "" {
		t.Errorf("after the fault: %s", after)
	}
	n.answersEverybody(false, lab.LinkLocal)
}

// Where the Corefile says that somebody else makes the link, it is theirs as it should be.
func TestInterfaceOfSomebodyElse(t *testing.T) {
	n := newNode(t, nftables)
	n.commands(n.Node, `ip link add theirs type dummy 2>/dev/null || ip tuntap add theirs mode tun
		ip addr add 169.254.20.10/32 dev theirs`)
	_, warnings := n.examination(n.block(".:53", "169.254.20.10", "interface none"))
	if warnings != "" {
		t.Error(warnings)
	}
	n.answersEverybody(false, lab.LinkLocal)
}

// A firewall in a table of its own drops what our rules can't accept there.
func TestWarnsOfFirewallThatDrops(t *testing.T) {
	for _, b := range []backend{iptablesNFT, nftables} {
		t.Run(b.String(), func(t *testing.T) {
			n := newNode(t, b)
			ask := lab.Load{From: n.Pod, Proto: "udp", To: on(lab.ClusterIP), Count: 1, Timeout: time.Second}
			n.faulty(n.corefile(), "the firewall drops every query (the policy of the chain input of the nftables table inet host)", func() func() {
				n.commands(n.Node, `nft 'table inet host { chain input { type filter hook input priority 0; policy drop; ct state established,related accept; iif lo accept; meta l4proto icmpv6 accept; tcp dport { 22, 6443 } accept; }; }'`)
				r, err := ask.Run()
				n.must(err)
				if r.Answered > 0 {
					n.Errorf("it does not drop: %v", r)
				}
				return func() {
					// The remedy.
					n.commands(n.Node, `nft 'add rule inet host input meta l4proto { tcp, udp } th dport 53 accept'`)
					n.run(ask, false)
				}
			})
		})
	}
}

// With the backend nftables there is no ACCEPT in the chains of iptables either, of
// whichever variant; with iptables there is.
func TestWarnsOfIptablesThatDrops(t *testing.T) {
	for _, b := range []backend{iptablesNFT, iptablesLegacy, nftables, {lab.Legacy, "nftables"}} {
		t.Run(b.String(), func(t *testing.T) {
			n := newNode(t, b)
			n.commands(n.Node, `iptables -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
				iptables -A INPUT -i lo -j ACCEPT
				iptables -A INPUT ! -s 10.0.1.0/24 -p tcp -m multiport --dports 22,6443:6445 -m comment --comment "to \"the\" -j ACCEPT" -j ACCEPT
				iptables -A INPUT -s 127.0.0.0/8 -j ACCEPT
				iptables -P INPUT DROP`)
			_, warnings := n.examination(n.block(".:53", "10.96.0.10"))
			r, err := lab.Load{From: n.Pod, Proto: "udp", To: on(lab.ClusterIP), Count: 1, Timeout: time.Second}.Run()
			n.must(err)
			words := "the policy of the chain INPUT of the nftables table ip filter"
			if b.iptables == lab.Legacy {
				words = "the policy of the chain INPUT of the table filter of iptables-legacy"
			}
			warned := strings.Contains(warnings, words)
			if dropped := r.Answered == 0; dropped != (b.firewall == "nftables") || warned != dropped || !warned && warnings != "" {
				t.Errorf("dropped: %v, warned: %v: %s", dropped, warned, warnings)
			}
		})
	}
}

// A full table takes the cache's own queries, not those to it.
func TestWarnsOfFullConntrack(t *testing.T) {
	n := newNode(t, nftables)
	n.faulty(n.corefile(), "the connection tracking table is nearly full (", func() func() {
		n.must(n.Node.Do(func() error {
			b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_max")
			if err != nil {
				return err
			}
			limit := 0
			if _, err := fmt.Sscan(string(b), &limit); err != nil {
				return err
			}
			for i := range limit*91/100 + 1 {
				src, dst := netip.AddrFrom4([4]byte{10, 1, byte(i >> 16), 1}), netip.AddrFrom4([4]byte{10, 2, 0, 1})
				flow := &netlink.ConntrackFlow{FamilyType: netlink.FAMILY_V4, TimeOut: 600,
					Forward: netlink.IPTuple{SrcIP: src.AsSlice(), DstIP: dst.AsSlice(), SrcPort: uint16(i), DstPort: 9, Protocol: 17},
					Reverse: netlink.IPTuple{SrcIP: dst.AsSlice(), DstIP: src.AsSlice(), SrcPort: 9, DstPort: uint16(i), Protocol: 17}}
				if err := netlink.ConntrackCreate(netlink.ConntrackTable, netlink.FAMILY_V4, flow); err != nil {
					return fmt.Errorf("entry %d of %d: %w", i, limit, err)
				}
			}
			return nil
		}))
		return func() { n.must(n.FlushConntrack()) }
	})
}

// bridged has the pod and the cluster's DNS server on one bridge, as on a node whose
// network plugin has a bridge.
func (n *node) bridged() {
	n.commands(n.Node, `ip link add br0 address 02:00:00:00:00:b0 type bridge
		ip link set br0 addrgenmode none
		ip addr flush dev to-pod
		ip addr flush dev to-dns
		ip link set to-pod master br0
		ip link set to-dns master br0
		ip link set br0 up
		ip addr add 10.0.1.1/24 dev br0
		ip addr add 10.0.2.1/24 dev br0
		ip route replace default via 10.0.2.2`)
	n.commands(n.DNS, "ip route replace 10.0.1.0/24 dev eth0")
	n.commands(n.Pod, "ip route replace 10.0.2.0/24 dev eth0")
}

// Without bridge-nf-call-iptables a query that falls through to a DNS pod on the same
// bridge gets no answer; the cache itself answers either way, and out of connection
// tracking.
func TestWarnsOfBridgeWithoutNetfilter(t *testing.T) {
	forBackends(t, func(n *node) {
		if _, err := os.Stat("/proc/sys/net/bridge"); err != nil {
			n.Skip("this kernel has no br_netfilter")
		}
		n.bridged()
		set := func(to string) {
			n.must(n.Node.Do(func() error { return lab.Sysctl("bridge/bridge-nf-call-iptables", to) }))
		}
		load := lab.Load{From: n.Pod, Proto: "udp", To: on(lab.ClusterIP), Count: 3, Workers: 1, Timeout: time.Second}
		corefile := n.block(".:53", "10.96.0.10 169.254.20.10")

		set("1")
		n.run(load, true) // the cluster, by kube-proxy's rules
		p, warnings := n.examination(corefile)
		if warnings != "" {
			n.Errorf("with bridge-nf-call-iptables: %s", warnings)
		}
		for _, to := range []string{"1", "0"} {
			set(to)
			n.must(n.FlushConntrack())
			n.run(load, false)
			entries, err := n.Conntrack(lab.ClusterIP)
			n.must(err)
			if entries > 0 {
				n.Errorf("with bridge-nf-call-iptables=%s, %d queries are tracked", to, entries)
			}
		}
		n.has(p.again(corefile+"# off\n"), "pods on the bridge br0 get no answer from a DNS pod on the same bridge")
		p.Kill()
		if r, err := load.Run(); err != nil || r.Answered > 0 {
			n.Errorf("with bridge-nf-call-iptables off, a query that falls through has an answer (%v): %v", err, r)
		}
		set("1")
		n.must(n.FlushConntrack())
		n.run(load, true)
	})
}

// Without bridge-nf-call-iptables all is well with bridges that have no DNS pod: those of
// another program's containers, and all, where what is bound is no Service's address.
func TestBridgesWithoutDNSPods(t *testing.T) {
	n := newNode(t, nftables)
	if _, err := os.Stat("/proc/sys/net/bridge"); err != nil {
		n.Skip("this kernel has no br_netfilter")
	}
	n.commands(n.Node, `ip link add docker0 type bridge
		ip link add c1 type veth peer name d1
		ip link add c2 type veth peer name d2
		ip link set c1 master docker0
		ip link set c2 master docker0
		ip addr add 172.17.0.1/16 dev docker0
		ip -6 addr add fd00:17::1/64 dev docker0 nodad
		ip link set docker0 up`)
	n.must(n.Node.Do(func() error {
		for _, s := range []string{"bridge/bridge-nf-call-iptables", "bridge/bridge-nf-call-ip6tables"} {
			if err := lab.Sysctl(s, "0"); err != nil {
				return err
			}
		}
		return nil
	}))
	p, warnings := n.examination(n.corefile())
	if warnings != "" {
		t.Errorf("with the bridge of containers: %s", warnings)
	}
	n.bridged()
	if warnings := p.again(n.block(".:53", "169.254.20.10 192.168.253.10 fd00:20::10")); warnings != "" {
		t.Errorf("with addresses of no Service: %s", warnings)
	}
	n.has(p.again(n.corefile()), "pods on the bridge br0")
}

// A strict reverse path filter is no fault: everybody is answered with it, and falls
// through to the cluster with it.
func TestStrictReversePathFilter(t *testing.T) {
	forBackends(t, func(n *node) {
		n.must(n.Node.Do(func() error {
			for _, l := range []string{"all", "default", "lo", "to-pod", "to-dns"} {
				if err := lab.Sysctl("ipv4/conf/"+l+"/rp_filter", "1"); err != nil {
					return err
				}
			}
			return nil
		}))
		p, warnings := n.examination(n.block(".:53", "10.96.0.10 169.254.20.10"))
		if warnings != "" {
			n.Error(warnings)
		}
		n.answersEverybody(false, lab.ClusterIP, lab.LinkLocal)
		p.Kill()
		n.clusterAnswers()
	})
}

// Addresses and routes of others on the cache's link draw to it what is meant for elsewhere.
func TestWarnsOfForeignAddress(t *testing.T) {
	n := newNode(t, nftables)
	n.faulty(n.corefile(), "the link nodelocaldns of this cache carries 169.254.7.7/16 of somebody else", func() func() {
		n.commands(n.Node, "ip addr add 169.254.7.7/16 dev nodelocaldns")
		if out, err := n.Node.Run("ip", "route", "get", "169.254.169.254"); err != nil || !strings.Contains(out, "nodelocaldns") {
			t.Errorf("it draws nothing: %v %s", err, out)
		}
		return func() { n.commands(n.Node, "ip addr del 169.254.7.7/16 dev nodelocaldns") } // the remedy
	})
}

func TestWarnsOfForeignRoute(t *testing.T) {
	n := newNode(t, nftables)
	n.faulty(n.corefile(), "a route of somebody else leads over the link nodelocaldns of this cache, where what is sent to 169.254.169.254/32, fd00:9::/64 is lost", func() func() {
		n.commands(n.Node, `ip route add 169.254.169.254 dev nodelocaldns
			ip route add fd00:9::/64 dev nodelocaldns table 7`)
		return func() {
			n.commands(n.Node, `ip route del 169.254.169.254/32 dev nodelocaldns
				ip route del fd00:9::/64 dev nodelocaldns table 7`)
		}
	})
}

// Rules of both variants of iptables filter packets, and each program sees only its own.
// Tables without rules do not matter, nor do ours.
func TestWarnsOfBothVariantsOfIptables(t *testing.T) {
	forBackends(t, func(n *node) {
		other := map[lab.Iptables]string{lab.NFT: "legacy", lab.Legacy: "nft"}[n.backend.iptables]
		n.commands(n.Node, fmt.Sprintf("iptables-%s -t filter -P FORWARD ACCEPT\nip6tables-%[1]s -t filter -P FORWARD ACCEPT", other))
		n.faulty(n.corefile(), "programs of this node write rules with both variants of iptables", func() func() {
			n.commands(n.Node, fmt.Sprintf("iptables-%s -A FORWARD -s 10.9.0.0/16 -j ACCEPT", other))
			return func() { n.commands(n.Node, fmt.Sprintf("iptables-%s -D FORWARD -s 10.9.0.0/16 -j ACCEPT", other)) }
		})
	})
}
