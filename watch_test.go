package nodecache

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
)

// subscriptions returns the addresses of this process's netlink sockets of a protocol
// that hear the kernel's reports.
func subscriptions(t *testing.T, protocol int) (as []*unix.SockaddrNetlink) {
	t.Helper()
	fds, err := sockets.Descriptors()
	must(t, err)
	for _, fd := range fds {
		if p, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL); err != nil || p != protocol {
			continue
		}
		sa, _ := unix.Getsockname(fd)
		if a, ok := sa.(*unix.SockaddrNetlink); ok && a.Groups != 0 {
			as = append(as, a)
		}
	}
	return as
}

// What the kernel tells of is heard again after an error, such as a message that is
// none brings about.
func TestReportsAreHeardAgainAfterAnError(t *testing.T) {
	needRoot(t)
	c := make(chan struct{}, 1)
	before := len(subscriptions(t, unix.NETLINK_ROUTE))
	go subscription{"links", c, unix.NETLINK_ROUTE, []uint{unix.RTNLGRP_LINK}}.follow()
	eventually(t, "it is subscribed", func() bool { return len(subscriptions(t, unix.NETLINK_ROUTE)) > before })
	<-c
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	must(t, err)
	defer unix.Close(fd)
	for _, a := range subscriptions(t, unix.NETLINK_ROUTE) {
		must(t, unix.Sendto(fd, []byte("short"), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Pid: a.Pid}))
	}
	<-c // a look after the error
	i := &netif{name: testLink}
	_, err = i.ensureLink()
	must(t, err)
	defer keepOnly(i, nil)
	<-c
}

// Reports of nf_tables are of use to iptables-nft alone.
func TestOnlyIptablesNFTHearsOfNFTables(t *testing.T) {
	needRoot(t)
	n := newNode()
	before := len(subscriptions(t, unix.NETLINK_NETFILTER))
	fw := newIPTables(func() {})
	for _, x := range []struct {
		variant string
		want    int
	}{{variantLegacy, 0}, {variantNFT, 1}} {
		n.firewalls = map[string]firewall{backendNFT: newNFT()}
		n.watch()
		fw.families[ipv4].written, fw.families[ipv4].variant = true, x.variant
		n.firewalls[backendIPT] = fw
		n.watch()
		n.watch()
		eventually(t, "links are watched", func() bool { return len(subscriptions(t, unix.NETLINK_ROUTE)) > 0 })
		eventually(t, "nf_tables are watched for iptables-nft only", func() bool { return len(subscriptions(t, unix.NETLINK_NETFILTER)) == before+x.want })
	}
}
