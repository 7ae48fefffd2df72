package nodecache

import (
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
)

// A link with somebody else's address, such as a VPN's, is not taken.
func TestLinkWithForeignAddressIsRefused(t *testing.T) {
	newTestLink(t, "169.254.20.10", "fd00:20::10")
	l, err := nodelinks.ByName(testLink)
	must(t, err)
	if l.Attrs().Alias != "nodecache" {
		t.Errorf("the link has the mark %q", l.Attrs().Alias)
	}
	must(t, netlink.LinkSetAlias(l, ""))
	must(t, checkLink(testLink, false))
	addAddr(t, testLink, "fe80::1/64") // as the kernel generates
	must(t, checkLink(testLink, false))
	addAddr(t, testLink, "10.77.0.1/24")
	wantError(t, checkLink(testLink, false), "carries 10.77.0.1/24 of somebody else")
	wantError(t, checkLink(testLink, true), "")
	in := corefile{"nodecache {\ninterface " + testLink + "\n}", "169.254.20.10", dns53}
	_, err = checked(t, in)
	wantError(t, err, "Testfile:2 - Error during parsing: interface "+testLink+": a link of this name exists and carries 10.77.0.1/24 of somebody else")
	_, err = checked(t, in, testLink)
	wantError(t, err, "")
	// What a process of ours has made and could not remove is not lost to the next one.
	must(t, netlink.LinkSetAlias(l, "nodecache"))
	must(t, checkLink(testLink, false))
}

// A TUN device that a program holds is that program's, whatever it carries.
func TestLinkOfRunningProgramIsRefused(t *testing.T) {
	needRoot(t)
	cleanLinks(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = testLink
	tun := &netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TUN, Flags: netlink.TUNTAP_MULTI_QUEUE_DEFAULTS, Queues: 1, NonPersist: true}
	must(t, netlink.LinkAdd(tun))
	defer func() {
		for _, f := range tun.Fds {
			f.Close()
		}
	}()
	addAddr(t, testLink, "10.77.0.1/32")
	wantError(t, checkLink(testLink, false), "belongs to a running program")
}

func TestForeignAddressKeepsItsLink(t *testing.T) {
	n := newTestLink(t, "169.254.20.10", "fd00:20::10")
	addAddr(t, testLink, "10.77.0.1/24")
	addAddr(t, testLink, "fd00:77::1/64")
	must(t, keepOnly(n, nil))
	wantCarried(t, testLink, "10.77.0.1", "fd00:77::1")
	must(t, keepOnly(n, nil)) // again
	l, err := nodelinks.ByName(testLink)
	must(t, err)
	for _, address := range []string{"10.77.0.1/24", "fd00:77::1/64"} {
		a, err := netlink.ParseAddr(address)
		must(t, err)
		must(t, netlink.AddrDel(l, a))
	}
	must(t, keepOnly(n, nil))
	if l, err := nodelinks.ByName(testLink); err != nil || l != nil {
		t.Errorf("the link %v is left, error %v", l, err)
	}
}
