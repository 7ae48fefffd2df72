// Package nodelinks looks at the links of the node, and changes nothing.
package nodelinks

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
)

// IPVS is where kube-proxy in IPVS mode puts the ClusterIPs.
const IPVS = "kube-ipvs0"

// Dumped repeats a netlink dump that the kernel says was interrupted by a
// change: what it returned then is only a part.
func Dumped[T any](dump func() (T, error)) (T, error) {
	for range 10 {
		v, err := dump()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return v, err
		}
	}
	return dump()
}

// ByName returns nil without an error where there is no such link.
func ByName(name string) (netlink.Link, error) {
	l, err := Dumped(func() (netlink.Link, error) { return netlink.LinkByName(name) })
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("looking for the link %s: %w", name, err)
	}
	return l, nil
}

// Kind returns "dummy" or "tun" for a link that can carry a cache's addresses, and
// an error that says what it is otherwise.
func Kind(l netlink.Link) (string, error) {
	if t, ok := l.(*netlink.Tuntap); ok && t.Mode != netlink.TUNTAP_MODE_TAP {
		if t.NonPersist { // it goes when its program does; ours has none
			return "", errors.New("a link of this name exists and belongs to a running program: name another interface")
		}
		return "tun", nil
	}
	if l.Type() == "dummy" {
		return "dummy", nil
	}
	return "", fmt.Errorf("a link of this name exists and is of the type %s, not dummy: remove it or name another interface", l.Type())
}

// Carriers returns the names of the links that carry each address.
func Carriers() (map[netip.Addr][]string, error) {
	links, err := Dumped(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("listing links: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	addrs, err := Dumped(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("listing addresses: %w", err)
	}
	carriers := map[netip.Addr][]string{}
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			carriers[ip.Unmap()] = append(carriers[ip.Unmap()], names[a.LinkIndex])
		}
	}
	return carriers, nil
}

// Foreign returns the addresses on l, a link of a cache, that only somebody else can have put
// there: those with another prefix than a cache's own, /32 and /128, less what the kernel gives
// each link.
func Foreign(l netlink.Link) (others []netip.Prefix, err error) {
	list, err := Dumped(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("listing the addresses of %s: %w", l.Attrs().Name, err)
	}
	for _, x := range list {
		ip, ok := netip.AddrFromSlice(x.IP)
		if ones, bits := x.Mask.Size(); ok && ones != bits && !(ip.Is6() && ip.IsLinkLocalUnicast()) {
			others = append(others, netip.PrefixFrom(ip.Unmap(), ones))
		}
	}
	return others, nil
}
