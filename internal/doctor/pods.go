package doctor

import (
	"cmp"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
	"github.com/contentful-labs/coredns-nodecache/internal/ruleset"
)

// mostPods bounds the links that are looked at; nodes have fewer. Of a node that has more nothing
// is said, since those that are left out may be served.
const mostPods = 512

// podLinks returns the links by which pods of this node ask, with the pods' addresses, for IPv4
// (true) and IPv6: bridges with pods on them, and veth links with a route to what is behind them.
// One pod alone is left out, since what drops its queries may be a policy for that pod; and all are
// where others ask in ways that can't be seen here, as with Cilium and Open vSwitch.
func podLinks() map[bool][]ruleset.Link {
	links, err := nodelinks.Dumped(netlink.LinkList)
	if err != nil {
		return nil
	}
	ports := map[int]int{} // by their bridge's index
	for _, l := range links {
		if l.Type() == "veth" {
			ports[l.Attrs().MasterIndex]++
		}
	}
	found := map[bool][]ruleset.Link{}
	for is4, family := range map[bool]int{true: netlink.FAMILY_V4, false: netlink.FAMILY_V6} {
		behind, uplinks := routes(family)
		pods, seen := 0, map[int]bool{}
		for _, l := range links {
			a := l.Attrs()
			switch {
			case uplinks[a.Index] || a.MasterIndex != 0 || len(behind[a.Index]) == 0:
				continue
			case l.Type() == "veth":
				pods++
			case l.Type() == "bridge" && ports[a.Index] > 0:
				pods += 2 // rules for one of them do not name the bridge
			default:
				continue
			}
			seen[a.Index] = true
			for _, peers := range behind[a.Index] {
				found[is4] = append(found[is4], ruleset.Link{Name: a.Name, Index: a.Index, Peers: peers})
			}
		}
		hidden := slices.ContainsFunc(links, func(l netlink.Link) bool {
			a := l.Attrs()
			elsewhere := l.Type() == "veth" && a.NetNsID >= 0 // its other end is
			return elsewhere && a.Flags&net.FlagUp != 0 && !uplinks[a.Index] && !seen[cmp.Or(a.MasterIndex, a.Index)]
		})
		if pods < 2 || hidden || len(found[is4]) > mostPods {
			delete(found, is4)
		}
	}
	return found
}

// routes returns what is right behind each link, by its index, and which links lead to gateways.
func routes(family int) (behind map[int][]netip.Prefix, uplinks map[int]bool) {
	behind, uplinks = map[int][]netip.Prefix{}, map[int]bool{}
	list, err := nodelinks.Dumped(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return behind, uplinks
	}
	for _, r := range list {
		for _, hop := range r.MultiPath {
			uplinks[hop.LinkIndex] = true
		}
		if r.Gw != nil || r.Via != nil || r.Dst == nil || r.Dst.IP.IsUnspecified() {
			uplinks[r.LinkIndex] = true
			continue
		}
		to, ok := netip.AddrFromSlice(r.Dst.IP)
		if ones, _ := r.Dst.Mask.Size(); ok && r.Type == unix.RTN_UNICAST && !to.IsLinkLocalUnicast() && !to.IsMulticast() {
			behind[r.LinkIndex] = append(behind[r.LinkIndex], netip.PrefixFrom(to.Unmap(), ones))
		}
	}
	return behind, uplinks
}
