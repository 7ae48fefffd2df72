package doctor

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
	"github.com/contentful-labs/coredns-nodecache/internal/ruleset"
)

// conntrackNearlyFull is at which share of its limit the table counts as full.
const conntrackNearlyFull = 0.9

// conntrackFull finds a connection tracking table with hardly any room. Queries to
// the cache need none, but its own to the cluster and the outside do.
func conntrackFull(Site) []string {
	count, max := sysctlValue("net/netfilter/nf_conntrack_count"), sysctlValue("net/netfilter/nf_conntrack_max")
	if max == 0 || float64(count) < conntrackNearlyFull*float64(max) {
		return nil
	}
	return []string{fmt.Sprintf("the connection tracking table is nearly full (%d of %d entries): answers from the cache do not need it, but this cache's own queries to its upstreams are dropped when it is full, and so are the pods' other connections: raise net.netfilter.nf_conntrack_max, or find who opens so many connections", count, max)}
}

// sysctlValue returns 0 where there is no such setting.
func sysctlValue(path string) int {
	b, err := os.ReadFile("/proc/sys/" + path)
	if err != nil {
		return 0
	}
	v, _ := strconv.Atoi(strings.TrimSpace(string(b)))
	return v
}

// bridgeNetfilterOff finds bridges whose frames pass by iptables and nf_tables. It
// matters when a pod's query falls through to a DNS pod on the same bridge: the answer
// goes straight back over the bridge, with the DNS pod's address on it, which the
// asking pod does not know. So it is told where a rule of kube-proxy's sends queries for
// an address of ours to one that is on the bridge.
func bridgeNetfilterOff(s Site) (found []string) {
	if _, err := os.Stat("/proc/sys/net/core"); err != nil {
		return nil // settings are hidden from here
	}
	bridges := bridgesOfPods()
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		name := "bridge-nf-call-iptables"
		if family == netlink.FAMILY_V6 {
			name = "bridge-nf-call-ip6tables"
		}
		if len(bridges) == 0 || sysctlValue("net/bridge/"+name) != 0 {
			continue
		}
		servers := s.behind(family)
		for _, l := range bridges {
			if slices.ContainsFunc(servers, network(l, family)) {
				found = append(found, fmt.Sprintf("pods on the bridge %s get no answer from a DNS pod on the same bridge when this cache is down, since net.bridge.%s is off: load the module br_netfilter and set net.bridge.%s=1, as kube-proxy asks for too", l.Attrs().Name, name, name))
			}
		}
	}
	return found
}

// behind returns where queries for our addresses of a family go when this cache is down,
// by the rules for them that are certain.
func (s Site) behind(family int) []netip.Addr {
	return look([]string{"nat"}, func(r *ruleset.Ruleset) (servers []netip.Addr) {
		for _, e := range s.Listeners {
			if e.Proto != "udp" || e.Addr.Is6() != (family == netlink.FAMILY_V6) || s.Addrs[e.Addr].Foreign {
				continue
			}
			query := ruleset.Packet{Proto: unix.IPPROTO_UDP, Dst: e.Addr, DstPort: e.Port, State: ruleset.StateNew}
			for _, res := range r.Through(query, unix.NF_INET_PRE_ROUTING, "nat") {
				if res.Translated && !res.Accept {
					servers = append(servers, res.Targets...)
				}
			}
		}
		return servers
	})
}

// bridgesOfPods returns the bridges with two pods or more: one alone has no other to ask.
func bridgesOfPods() (bridges []netlink.Link) {
	links, err := nodelinks.Dumped(netlink.LinkList)
	if err != nil {
		return nil
	}
	pods := map[int]int{} // veth links by their bridge's index
	for _, l := range links {
		if l.Type() == "veth" && l.Attrs().MasterIndex != 0 {
			pods[l.Attrs().MasterIndex]++
		}
	}
	return slices.DeleteFunc(links, func(l netlink.Link) bool { return l.Type() != "bridge" || pods[l.Attrs().Index] < 2 })
}

// network tells of an address whether it is in a network of a link's, as the pods' are in
// that of the bridge that is their gateway.
func network(l netlink.Link, family int) func(netip.Addr) bool {
	own, err := nodelinks.Dumped(func() ([]netlink.Addr, error) { return netlink.AddrList(l, family) })
	return func(a netip.Addr) bool {
		return err == nil && slices.ContainsFunc(own, func(o netlink.Addr) bool { return o.IPNet != nil && o.Contains(a.AsSlice()) })
	}
}
