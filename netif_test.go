package nodecache

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
)

const testLink = "nctest0"

// newTestLink makes the link as another process of ours would have.
func newTestLink(t testing.TB, on ...string) *netif {
	t.Helper()
	needRoot(t)
	cleanLinks(t)
	n := &netif{name: testLink}
	_, err := n.ensure(addrs(on...))
	must(t, err)
	t.Cleanup(func() { removeLink(t, testLink) })
	return n
}

func wantCarried(t testing.TB, link string, want ...string) {
	t.Helper()
	w := addrs(want...)
	slices.SortFunc(w, netip.Addr.Compare)
	if got := carried(t, link); !slices.Equal(got, w) {
		t.Errorf("%s carries %v, want %v", link, got, w)
	}
}

// keepOnly takes all addresses of ours but keep off a link, and the link where there are none.
func keepOnly(n *netif, keep []netip.Addr) error {
	have, err := n.look()
	if err != nil {
		return err
	}
	gone := slices.DeleteFunc(have, func(a netip.Addr) bool { return slices.Contains(keep, a) })
	return n.trim(gone, len(keep) == 0)
}

func TestEnsureMakesLinkWithAddresses(t *testing.T) {
	needRoot(t)
	cleanLinks(t)
	n := &netif{name: testLink}
	missing, err := n.ensure(addrs("169.254.20.10", "10.96.0.10"))
	must(t, err)
	defer removeLink(t, testLink)
	if want := addrs("169.254.20.10", "10.96.0.10"); !slices.Equal(missing, want) {
		t.Errorf("missing were %v, want %v", missing, want)
	}
	if !n.made || n.kind != "dummy" && n.kind != "tun" {
		t.Errorf("made is %v and kind %q", n.made, n.kind)
	}
	wantCarried(t, testLink, "169.254.20.10", "10.96.0.10")
	l, err := nodelinks.ByName(testLink)
	must(t, err)
	list, err := netlink.AddrList(l, netlink.FAMILY_V4)
	must(t, err)
	for _, a := range list {
		if ones, _ := a.Mask.Size(); ones != 32 {
			t.Errorf("%s is not a host address", a.IPNet)
		}
	}
	// What is down, kubelet and other watchers do not take for an address of the node.
	if l.Attrs().RawFlags&syscall.IFF_UP != 0 {
		t.Error("the link is up, which IPv4 does not need")
	}
	if missing, err := n.ensure(addrs("169.254.20.10", "10.96.0.10")); err != nil || len(missing) != 0 {
		t.Errorf("a second apply has put back %v, error %v", missing, err)
	}
}

func TestIPv6AddressIsUsableAtOnce(t *testing.T) {
	newTestLink(t, "fd00:20::10", "169.254.20.10")
	wantCarried(t, testLink, "169.254.20.10", "fd00:20::10") // and no generated fe80::
	l, err := nodelinks.ByName(testLink)
	must(t, err)
	if l.Attrs().RawFlags&syscall.IFF_UP == 0 {
		t.Error("the link is down, and IPv6 does not answer then")
	}
	list, err := netlink.AddrList(l, netlink.FAMILY_V6)
	must(t, err)
	for _, a := range list {
		if a.Flags&syscall.IFA_F_TENTATIVE != 0 || a.Flags&syscall.IFA_F_NODAD == 0 {
			t.Errorf("%s has the flags %#x: bind fails while it is tentative", a.IPNet, a.Flags)
		}
		if ones, _ := a.Mask.Size(); ones != 128 {
			t.Errorf("%s is not a host address", a.IPNet)
		}
	}
	s, err := syscall.Socket(syscall.AF_INET6, syscall.SOCK_DGRAM, 0)
	must(t, err)
	defer syscall.Close(s)
	if err := syscall.Bind(s, &syscall.SockaddrInet6{Port: 5300, Addr: addr("fd00:20::10").As16()}); err != nil {
		t.Errorf("binding to the address: %v", err)
	}
}

// The kernel is late in some of many tries, which is why there are many.
func TestIPv6AddressIsLocalAtOnce(t *testing.T) {
	n := newTestLink(t, "fd00:20::10")
	var added []netip.Addr
	for i := range 200 {
		a := netip.AddrFrom16([16]byte{0: 0xfd, 13: 1, 15: byte(i)})
		added = append(added, a)
		_, err := n.ensure([]netip.Addr{a})
		must(t, err)
		routes, err := netlink.RouteGet(a.AsSlice())
		must(t, err)
		if routes[0].Type != unix.RTN_LOCAL {
			t.Fatalf("try %d: packets to %s take %v", i, a, routes[0])
		}
	}
	must(t, keepOnly(n, addrs("fd00:20::10")))
	l, err := nodelinks.ByName(n.name)
	must(t, err)
	for _, a := range added {
		if has, err := metrics(localRoute(l, a)); err != nil || len(has) > 0 {
			t.Errorf("of %s, which has gone, there are still routes with the metrics %v (error %v)", a, has, err)
		}
	}
}

func TestEnsureAdoptsLinkAndAddsMissingAddress(t *testing.T) {
	newTestLink(t, "169.254.20.10", "10.96.0.10")
	before, err := nodelinks.ByName(testLink)
	must(t, err)

	n := &netif{name: testLink}
	missing, err := n.ensure(addrs("10.96.0.10", "fd00:20::10"))
	must(t, err)
	if n.made {
		t.Error("the link counts as made, though it was there")
	}
	if want := addrs("fd00:20::10"); !slices.Equal(missing, want) {
		t.Errorf("missing were %v, want %v", missing, want)
	}
	after, err := nodelinks.ByName(testLink)
	must(t, err)
	if before.Attrs().Index != after.Attrs().Index {
		t.Error("the link is another one")
	}
	wantCarried(t, testLink, "169.254.20.10", "10.96.0.10", "fd00:20::10") // ensure takes nothing away
}

func TestPruneTakesSurplusAddresses(t *testing.T) {
	n := newTestLink(t, "169.254.20.10", "10.96.0.10", "fd00:20::10", "fd00:20::11")
	must(t, keepOnly(n, addrs("10.96.0.10", "fd00:20::11", "192.0.2.1"))) // adds nothing either
	wantCarried(t, testLink, "10.96.0.10", "fd00:20::11")
}

func TestPruneLeavesAddressesOfAnotherPrefix(t *testing.T) {
	n := newTestLink(t, "169.254.20.10")
	addAddr(t, testLink, "192.0.2.1/24")
	must(t, keepOnly(n, addrs("169.254.20.10")))
	wantCarried(t, testLink, "169.254.20.10", "192.0.2.1")
}

func TestPruneOfEverythingRemovesLink(t *testing.T) {
	n := newTestLink(t, "169.254.20.10", "fd00:20::10")
	must(t, keepOnly(n, nil))
	if got := carried(t, testLink); got != nil {
		t.Errorf("the link is still there, with %v", got)
	}
	if err := keepOnly(n, nil); err != nil {
		t.Errorf("removing it again: %v", err)
	}
}

func TestRemoveOfAddressThatIsGone(t *testing.T) {
	n := newTestLink(t, "169.254.20.10")
	l, err := nodelinks.ByName(testLink)
	must(t, err)
	must(t, n.remove(l, addrs("10.96.0.10", "169.254.20.10")))
	wantCarried(t, testLink)
}

func TestEnsureSetsLinkUpAgain(t *testing.T) {
	n := newTestLink(t, "fd00:20::10")
	l, err := nodelinks.ByName(testLink)
	must(t, err)
	must(t, netlink.LinkSetDown(l)) // the kernel takes the IPv6 addresses away then
	_, err = n.ensure(addrs("fd00:20::10"))
	must(t, err)
	wantCarried(t, testLink, "fd00:20::10")
	l, err = nodelinks.ByName(testLink)
	must(t, err)
	if l.Attrs().RawFlags&syscall.IFF_UP == 0 {
		t.Error("the link is still down")
	}
}

func TestEnsureGivesRenamedLinkItsNameBack(t *testing.T) {
	n := newTestLink(t, "169.254.20.10", "fd00:20::10")
	l, err := nodelinks.ByName(testLink)
	must(t, err)
	must(t, netlink.LinkSetDown(l))
	must(t, netlink.LinkSetName(l, "nctest9"))
	must(t, netlink.LinkSetUp(l))
	_, err = n.ensure(addrs("169.254.20.10", "fd00:20::10"))
	must(t, err)
	wantCarried(t, testLink, "169.254.20.10", "fd00:20::10")
	again, err := nodelinks.ByName(testLink)
	must(t, err)
	if again.Attrs().Index != l.Attrs().Index {
		t.Error("the link is another one")
	}
	removeLink(t, "nctest9") // fails the test through cleanLinks if it were there
}

// newOtherLink makes a link of a type that can't be ours. A TAP device stands in
// where the kernel has no bridges.
func newOtherLink(t testing.TB, name string) {
	t.Helper()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs})
	if errors.Is(err, syscall.EOPNOTSUPP) {
		err = netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TAP, Flags: netlink.TUNTAP_DEFAULTS | netlink.TUNTAP_NO_PI})
	}
	must(t, err)
	t.Cleanup(func() { removeLink(t, name) })
}

func TestLinkOfAnotherTypeIsRefused(t *testing.T) {
	needRoot(t)
	cleanLinks(t)
	newOtherLink(t, testLink)
	before := links(t)
	n := &netif{name: testLink}
	_, err := n.ensure(addrs("169.254.20.10"))
	wantError(t, err, "interface nctest0: a link of this name exists and is of the type")
	var typed typedError
	if !errors.As(err, &typed) || typed.errortype != errInterfaceCheck {
		t.Errorf("the error counts as %q, want %q", typed.errortype, errInterfaceCheck)
	}
	wantError(t, checkLink(testLink, false), "a link of this name exists")
	wantError(t, checkLink("lo", false), "a link of this name exists")
	wantError(t, checkLink("nctest8", false), "")
	for _, keep := range [][]netip.Addr{nil, addrs("10.96.0.10")} {
		if err := keepOnly(n, keep); err != nil {
			t.Errorf("prune: %v", err)
		}
	}
	if after := links(t); !slices.Equal(before, after) {
		t.Errorf("the links read %q, and %q before", after, before)
	}
}

func TestAddressIsLeftToWhoWasFaster(t *testing.T) {
	n := newTestLink(t, "169.254.20.10")
	// With another prefix: not in the list of ours, and EEXIST for IPv6.
	addAddr(t, testLink, "fd00:20::10/64")
	missing, err := n.ensure(addrs("fd00:20::10"))
	if err != nil || len(missing) != 0 {
		t.Errorf("put back %v, error %v", missing, err)
	}
}

func TestAddressOfAnotherPrefixIsNotTakenForOurs(t *testing.T) {
	n := newTestLink(t, "169.254.20.10")
	addAddr(t, testLink, "192.0.2.1/24") // its owner may take it away
	missing, err := n.ensure(addrs("192.0.2.1"))
	must(t, err)
	if want := addrs("192.0.2.1"); !slices.Equal(missing, want) {
		t.Errorf("missing were %v, want %v", missing, want)
	}
	wantCarried(t, testLink, "169.254.20.10", "192.0.2.1", "192.0.2.1")
}

func TestIPv6SwitchedOffIsNamed(t *testing.T) {
	needRoot(t)
	cleanLinks(t)
	sysctl(t, "net/ipv6/conf/default/disable_ipv6", "1")
	n := &netif{name: testLink}
	missing, err := n.ensure(addrs("169.254.20.10", "fd00:20::10"))
	defer removeLink(t, testLink)
	wantError(t, err, "net.ipv6.conf.nctest0.disable_ipv6")
	if want := addrs("169.254.20.10"); !slices.Equal(missing, want) {
		t.Errorf("added were %v, want %v: a start that fails has to take them back", missing, want)
	}
}

// The node's own programs send to an address from another one while it is being
// left, and from itself again when it is not; afterwards no route of it is there.
func TestUnpreferAndPrefer(t *testing.T) {
	n := newTestLink(t, "169.254.20.10", "fd00:20::10")
	l, err := nodelinks.ByName(testLink)
	must(t, err)
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	for address, all := range map[string]string{"192.0.2.7/32": "0.0.0.0/0", "2001:db8::7/128": "::/0"} {
		addAddr(t, "lo", address)
		defer delAddr(t, "lo", address)
		p := netip.MustParsePrefix(all)
		src := netip.MustParsePrefix(address).Addr()
		r := &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(0, p.Addr().BitLen())}, Src: src.AsSlice()}
		must(t, netlink.RouteAdd(r))
		defer netlink.RouteDel(r)
	}
	own := addrs("169.254.20.10", "fd00:20::10")
	source := func(a netip.Addr) string {
		t.Helper()
		routes, err := netlink.RouteGet(a.AsSlice())
		must(t, err)
		return routes[0].Src.String()
	}
	want := func(when string, v4, v6 string) {
		t.Helper()
		if a, b := source(own[0]), source(own[1]); a != v4 || b != v6 {
			t.Errorf("%s the node sends from %s and %s, want %s and %s", when, a, b, v4, v6)
		}
	}
	want("at first", "169.254.20.10", "fd00:20::10")
	eventually(t, "the kernel has made its own local route", func() bool {
		has, err := metrics(localRoute(l, own[1]))
		return err == nil && slices.Contains(has, 0)
	})
	routes := func() int {
		list, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: 255, LinkIndex: l.Attrs().Index, Type: 2}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_OIF|netlink.RT_FILTER_TYPE)
		must(t, err)
		return len(list)
	}
	n.prefer(own)
	if k := routes(); k != len(own)+1 {
		t.Errorf("there are %d local routes, want the kernel's %d and ours for IPv6", k, len(own))
	}
	for range 2 {
		n.unprefer(own)
		n.unprefer(own)
		want("while it leaves", "192.0.2.7", "2001:db8::7")
		n.prefer(own)
		want("when it stays after all", "169.254.20.10", "fd00:20::10")
	}
	n.unprefer(own)
	must(t, n.remove(l, own))
	if k := routes(); k != 0 {
		t.Errorf("%d local routes are left", k)
	}
}
