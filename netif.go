package nodecache

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
)

// netif is the interface that carries our addresses: a dummy, or a TUN device
// where the kernel has no dummy driver (those of micro-VMs).
type netif struct {
	name string
	kind string // "dummy" or "tun"
	made bool   // by this process; else it was there and is adopted
	// index is the kernel's, once known: it stays when somebody renames the link.
	index int
}

// ensureLink makes the link, or adopts the one that is there.
func (n *netif) ensureLink() (netlink.Link, error) {
	l, err := nodelinks.ByName(n.name)
	if err != nil {
		return nil, setupError(errInterfaceCheck, err)
	}
	if l == nil {
		l = n.renamed()
	}
	if l == nil {
		if err := n.add(); err != nil {
			return nil, setupError(errInterfaceAdd, err)
		}
		if l, err = nodelinks.ByName(n.name); err != nil || l == nil {
			return nil, setupError(errInterfaceCheck, fmt.Errorf("looking for the link %s that was just made: %w", n.name, cmpErr(err, "it is gone")))
		}
		n.made = true
		// No generated link-local address, which would show up among the node's.
		if err := netlink.LinkSetIP6AddrGenMode(l, nl.IN6_ADDR_GEN_MODE_NONE); err != nil {
			log.Debugf("keeping %s from generating an IPv6 address: %v", n.name, err) // no IPv6 in this kernel
		}
		mark(l)
	}
	if n.kind, err = nodelinks.Kind(l); err != nil {
		return nil, setupError(errInterfaceCheck, fmt.Errorf("interface %s: %w", n.name, err))
	}
	n.index = l.Attrs().Index
	return l, nil
}

// renamed gives our link its name back, if that is all that it lacks.
func (n *netif) renamed() netlink.Link {
	l, err := netlink.LinkByIndex(n.index)
	if n.index == 0 || err != nil {
		return nil
	}
	if _, err := nodelinks.Kind(l); err != nil {
		return nil // the number stands for another link by now
	}
	// Kernels before 6.3 rename no link that is up. ensure sets it up again.
	if err := errors.Join(netlink.LinkSetDown(l), netlink.LinkSetName(l, n.name)); err != nil {
		log.Warningf("giving the link %s its name %s back: %v; making another", l.Attrs().Name, n.name, err)
		return nil
	}
	if l, err = nodelinks.ByName(n.name); err != nil {
		return nil
	}
	return l
}

func cmpErr(err error, otherwise string) error {
	if err != nil {
		return err
	}
	return errors.New(otherwise)
}

var sayTUN sync.Once

func (n *netif) add() error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = n.name
	err := netlink.LinkAdd(&netlink.Dummy{LinkAttrs: attrs})
	if errors.Is(err, unix.EOPNOTSUPP) {
		sayTUN.Do(func() { log.Infof("this kernel has no dummy driver; %s is a TUN device, which serves as well", n.name) })
		err = netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TUN, Flags: netlink.TUNTAP_DEFAULTS | netlink.TUNTAP_NO_PI})
		if errors.Is(err, unix.ENOENT) {
			err = fmt.Errorf("the kernel has neither a dummy driver nor %s: %w", netlink.TUN, err)
		}
	}
	if errors.Is(err, unix.EPERM) {
		err = fmt.Errorf("%w (the capability NET_ADMIN is missing)", err)
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("adding the link %s: %w", n.name, err)
	}
	return nil
}

// ensure puts addrs on the link, making the link if need be, and returns those
// that were missing. It takes nothing away.
func (n *netif) ensure(addrs []netip.Addr) (missing []netip.Addr, err error) {
	l, err := n.ensureLink()
	if err != nil {
		return nil, err
	}
	have, err := n.addrs(l)
	if err != nil {
		return nil, setupError(errInterfaceCheck, err)
	}
	// IPv4 is delivered with the link down, and what is down is not taken for an
	// address of the node by anybody. An IPv6 address needs the link up.
	if l.Attrs().RawFlags&unix.IFF_UP == 0 && slices.ContainsFunc(addrs, netip.Addr.Is6) {
		if err := netlink.LinkSetUp(l); err != nil {
			return nil, setupError(errInterfaceAdd, fmt.Errorf("setting %s up, which its IPv6 addresses need: %w", n.name, err))
		}
	}
	for _, a := range addrs {
		if slices.Contains(have, a) {
			continue
		}
		err := netlink.AddrAdd(l, netlinkAddr(a))
		switch {
		case err == nil:
			missing = append(missing, a)
		case errors.Is(err, unix.EEXIST): // somebody was faster
		case errors.Is(err, unix.EACCES) && a.Is6():
			err = fmt.Errorf("%w (IPv6 is switched off here: see the sysctl net.ipv6.conf.%s.disable_ipv6)", err, n.name)
			fallthrough
		default:
			return missing, setupError(errInterfaceAdd, fmt.Errorf("adding %s to %s: %w", a, n.name, err))
		}
		if a.Is6() {
			if err := makeLocal(l, a); err != nil {
				log.Warningf("adding the local route of %s to %s: %v; until the kernel does, packets to it are lost", a, n.name, err)
			}
		}
	}
	return missing, nil
}

// makeLocal has what is sent to a, a new IPv6 address of l, stay on the node. The
// kernel makes the address's prefix route at once, but its local route later, from a
// work queue (addrconf_dad_work, Linux 6.1 and 6.18), and on a busy node more than a
// second later: what comes in between leaves by the link, and is lost. A server that
// listens already attracts it, as its socket has the rules in force.
func makeLocal(l netlink.Link, a netip.Addr) error {
	return netlink.RouteReplace(ourRoute(l, a, a.AsSlice()))
}

// look returns the addresses of ours on the link; none where there is no link, or another in
// its place.
func (n *netif) look() ([]netip.Addr, error) {
	l, err := nodelinks.ByName(n.name)
	if err != nil || l == nil {
		return nil, err
	}
	if _, err := nodelinks.Kind(l); err != nil {
		return nil, nil
	}
	return n.addrs(l)
}

// trim takes addrs from the link, and with whole the link away, if nothing is left on it. It
// is down unless an IPv6 address is.
func (n *netif) trim(addrs []netip.Addr, whole bool) error {
	l, err := nodelinks.ByName(n.name)
	if err != nil || l == nil {
		return err
	}
	if _, err := nodelinks.Kind(l); err != nil {
		return nil // somebody has put another link in our place: not ours
	}
	others, err := nodelinks.Foreign(l)
	if err != nil {
		return err
	}
	left, err := n.addrs(l)
	if err != nil {
		return err
	}
	left = slices.DeleteFunc(left, func(a netip.Addr) bool { return slices.Contains(addrs, a) })
	if whole && len(left) == 0 {
		if len(others) == 0 {
			if err := netlink.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
				return fmt.Errorf("removing the link %s: %w", n.name, err)
			}
			return nil
		}
		log.Warningf("the link %s stays, as it carries %s of somebody else", n.name, join(others))
	}
	if err := n.remove(l, addrs); err != nil {
		return err
	}
	if l.Attrs().RawFlags&unix.IFF_UP != 0 && len(others) == 0 && !slices.ContainsFunc(left, netip.Addr.Is6) {
		if err := netlink.LinkSetDown(l); err != nil {
			return fmt.Errorf("setting %s down, as it carries no IPv6 address any more: %w", n.name, err)
		}
	}
	return nil
}

func (n *netif) remove(l netlink.Link, addrs []netip.Addr) error {
	for _, a := range addrs {
		if err := netlink.AddrDel(l, netlinkAddr(a)); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("removing %s from %s: %w", a, n.name, err)
		}
		// The kernel lets a local route of ours stay, and with it nobody else on the
		// network could be reached at this address.
		netlink.RouteDel(localRoute(l, a))
	}
	return nil
}

// addrs returns the addresses on the link l, less those with another prefix
// than ours, which only somebody else can have put there.
func (n *netif) addrs(l netlink.Link) ([]netip.Addr, error) {
	list, err := nodelinks.Dumped(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("listing the addresses of %s: %w", n.name, err)
	}
	var addrs []netip.Addr
	for _, x := range list {
		if ip, ok := netip.AddrFromSlice(x.IP); ok {
			if ones, bits := x.Mask.Size(); ones == bits {
				addrs = append(addrs, ip.Unmap())
			}
		}
	}
	return addrs, nil
}

// unprefer has the node's own programs send to addrs from another address of the
// node from now on. By default they send from the address itself, and an answer of
// the cluster that comes when it has gone finds nobody. It does what it can: a node
// without a default route has no such other address.
func (n *netif) unprefer(addrs []netip.Addr) {
	for _, a := range addrs {
		far := net.IPv4(192, 0, 2, 1) // of the documentation, RFC 5737
		if a.Is6() {
			far = net.ParseIP("2001:db8::1") // RFC 3849
		}
		if routes, err := netlink.RouteGet(far); err == nil && len(routes) > 0 && len(routes[0].Src) > 0 {
			n.sendFrom(a, routes[0].Src)
		}
	}
}

// prefer takes unprefer back.
func (n *netif) prefer(addrs []netip.Addr) {
	for _, a := range addrs {
		if l, err := nodelinks.ByName(n.name); err == nil && l != nil && a.Is6() {
			if has, err := metrics(localRoute(l, a)); err != nil || slices.Contains(has, 0) {
				continue // the kernel's own
			}
		}
		n.sendFrom(a, a.AsSlice())
	}
}

// sendFrom has the node's own programs send to a, an address of this link, from src.
func (n *netif) sendFrom(a netip.Addr, src net.IP) {
	l, err := nodelinks.ByName(n.name)
	if err != nil || l == nil {
		return
	}
	r := ourRoute(l, a, src)
	if err = netlink.RouteReplace(r); err == nil && a.Is6() {
		if has, e := metrics(r); e == nil && slices.Contains(has, 0) {
			err = netlink.RouteDel(localRoute(l, a)) // of those that match, the one with the lowest metric
		}
	}
	if err != nil {
		log.Debugf("having the node send from %s to %s: %v", src, a, err)
	}
}

// ourRoute is the local route to a that this program makes, for the node's own programs
// to send from src. The kernel's own for IPv6 has the metric 0, which nobody else can
// write: ours comes beside it, and then the kernel's can go. When ours names no source
// the kernel takes the address itself.
func ourRoute(l netlink.Link, a netip.Addr, src net.IP) *netlink.Route {
	r := localRoute(l, a)
	r.Src, r.Protocol = src, unix.RTPROT_KERNEL
	if a.Is6() {
		r.Priority = 1
		if src.Equal(a.AsSlice()) {
			r.Src = nil
		}
	}
	return r
}

// localRoute is the route that the kernel makes with an address.
func localRoute(l netlink.Link, a netip.Addr) *netlink.Route {
	r := &netlink.Route{LinkIndex: l.Attrs().Index, Dst: netlink.NewIPNet(a.AsSlice()), Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL}
	if a.Is4() {
		r.Scope = netlink.SCOPE_HOST
	}
	return r
}

// metrics returns those of all routes to where r leads.
func metrics(r *netlink.Route) (ms []int, err error) {
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_V6, r, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST|netlink.RT_FILTER_OIF)
	for _, r := range routes {
		ms = append(ms, r.Priority)
	}
	return ms, err
}

func netlinkAddr(a netip.Addr) *netlink.Addr {
	x := &netlink.Addr{IPNet: netlink.NewIPNet(a.AsSlice())}
	if a.Is6() {
		// Without it the address is tentative at first, and bind fails.
		x.Flags = syscall.IFA_F_NODAD
	}
	return x
}
