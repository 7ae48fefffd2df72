package doctor

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
)

// foreignAddress finds addresses on our links that somebody else has put there. With a prefix
// they draw other destinations to a link that leads nowhere.
func foreignAddress(s Site) (found []string) {
	for _, l := range s.ownLinks() {
		name := l.Attrs().Name
		others, err := nodelinks.Foreign(l)
		if err != nil || len(others) == 0 {
			continue
		}
		found = append(found, fmt.Sprintf("the link %s of this cache carries %s of somebody else: while the link is up, what is sent to %s is lost, other addresses of the link-local net among it such as a cloud's 169.254.169.254; and the link stays when this cache has left: find who adds that, and take it off with: ip addr del %s dev %s",
			name, some(others), some(masked(others)), others[0], name))
	}
	return found
}

func masked(ps []netip.Prefix) []netip.Prefix {
	ps = slices.Clone(ps)
	for i := range ps {
		ps[i] = ps[i].Masked()
	}
	return ps
}

// foreignRoute finds routes over our links that neither the kernel nor we have made.
func foreignRoute(s Site) (found []string) {
	for _, l := range s.ownLinks() {
		name := l.Attrs().Name
		routes, err := nodelinks.Dumped(func() ([]netlink.Route, error) {
			// Of all tables.
			return netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{LinkIndex: l.Attrs().Index}, netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			continue
		}
		var to []prefix
		for _, r := range routes {
			if r.Type == unix.RTN_UNICAST && r.Protocol != unix.RTPROT_KERNEL {
				to = append(to, prefix{r})
			}
		}
		if len(to) > 0 {
			found = append(found, fmt.Sprintf("a route of somebody else leads over the link %s of this cache, where what is sent to %s is lost: find who adds it, and remove it with: ip route del %s dev %s", name, some(to), to[0], name))
		}
	}
	return found
}

// prefix is where a route leads.
type prefix struct{ netlink.Route }

func (p prefix) String() string {
	if p.Dst == nil {
		return "default"
	}
	return p.Dst.String()
}

// ownLinks returns those of our links that are there.
func (s Site) ownLinks() (links []netlink.Link) {
	for _, name := range slices.Sorted(maps.Keys(s.Links)) {
		if l, err := nodelinks.ByName(name); err == nil && l != nil {
			links = append(links, l)
		}
	}
	return links
}
