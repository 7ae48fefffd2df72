package lab

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
)

// Conntrack counts the node's connection tracking entries that have one of the
// addresses at either end; without addresses, all of them.
func (l *Lab) Conntrack(addrs ...netip.Addr) (int, error) {
	entries, err := l.ConntrackEntries(addrs...)
	return len(entries), err
}

// ConntrackEntries is Conntrack with the entries themselves, as text.
func (l *Lab) ConntrackEntries(addrs ...netip.Addr) ([]string, error) {
	var entries []string
	err := l.Node.Do(func() error {
		for _, family := range []netlink.InetFamily{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
			if err != nil {
				return fmt.Errorf("listing connection tracking entries: %w", err)
			}
			for _, f := range flows {
				if len(addrs) == 0 || touches(f.Forward, addrs) || touches(f.Reverse, addrs) {
					entries = append(entries, f.String())
				}
			}
		}
		return nil
	})
	return entries, err
}

func touches(t netlink.IPTuple, addrs []netip.Addr) bool {
	src, _ := netip.AddrFromSlice(t.SrcIP)
	dst, _ := netip.AddrFromSlice(t.DstIP)
	return slices.Contains(addrs, src.Unmap()) || slices.Contains(addrs, dst.Unmap())
}

// FlushConntrack forgets every connection.
func (l *Lab) FlushConntrack() error {
	return l.Node.Do(func() error {
		if err := netlink.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
			return fmt.Errorf("flushing connection tracking: %w", err)
		}
		return nil
	})
}
