package nodecache

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/vishvananda/netlink"

	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
)

// What the tests of all packages share, by short names.
var (
	needRoot   = testkit.NeedRoot
	eventually = testkit.Eventually
	must       = testkit.Must
	wantError  = testkit.WantError
	serveOn    = testkit.ServeOn
	dialUDP    = testkit.DialUDP
	dnsOn      = testkit.DNSOn
)

type socket = testkit.Socket

func TestMain(m *testing.M) { os.Exit(testkit.Main(m)) }

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func addrs(list ...string) (as []netip.Addr) {
	for _, s := range list {
		as = append(as, addr(s))
	}
	return as
}

// links returns what a person sees of the node's links: their names, types and
// addresses, with the state of IPv6 addresses.
func links(t testing.TB) []string {
	t.Helper()
	ls, err := nodelinks.Dumped(netlink.LinkList)
	must(t, err)
	var out []string
	for _, l := range ls {
		as, err := nodelinks.Dumped(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_ALL) })
		must(t, err)
		line := l.Attrs().Name + " " + l.Type()
		var on []string
		for _, a := range as {
			on = append(on, a.IPNet.String())
		}
		slices.Sort(on)
		out = append(out, strings.Join(append([]string{line}, on...), " "))
	}
	slices.Sort(out)
	return out
}

// carried returns the addresses on the link, or nil where there is no such link.
func carried(t testing.TB, name string) []netip.Addr {
	t.Helper()
	l, err := nodelinks.ByName(name)
	must(t, err)
	if l == nil {
		return nil
	}
	as, err := nodelinks.Dumped(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_ALL) })
	must(t, err)
	out := []netip.Addr{}
	for _, a := range as {
		ip, _ := netip.AddrFromSlice(a.IP)
		out = append(out, ip.Unmap())
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

// removeLink takes a link away, if it is there.
func removeLink(t testing.TB, name string) {
	t.Helper()
	if l, err := nodelinks.ByName(name); err == nil && l != nil {
		must(t, netlink.LinkDel(l))
	}
}

// cleanLinks checks, when the test is over, that the links read as now.
func cleanLinks(t testing.TB) {
	t.Helper()
	before := links(t)
	t.Cleanup(func() {
		if after := links(t); !slices.Equal(before, after) {
			t.Errorf("the links read %q after the test, and %q before", after, before)
			for _, line := range after {
				if name, _, _ := strings.Cut(line, " "); !slices.Contains(before, line) && name != "lo" {
					removeLink(t, name)
				}
			}
		}
	})
}

// addAddr puts an address on a link as somebody else would.
func addAddr(t testing.TB, link, prefix string) {
	t.Helper()
	l, err := netlink.LinkByName(link)
	must(t, err)
	a, err := netlink.ParseAddr(prefix)
	must(t, err)
	if a.IP.To4() == nil {
		a.Flags = syscall.IFA_F_NODAD
	}
	must(t, netlink.AddrAdd(l, a))
}

func delAddr(t testing.TB, link, prefix string) {
	t.Helper()
	l, err := netlink.LinkByName(link)
	must(t, err)
	a, err := netlink.ParseAddr(prefix)
	must(t, err)
	must(t, netlink.AddrDel(l, a))
}

// sysctl sets a value for the rest of the test.
func sysctl(t testing.TB, path, value string) {
	t.Helper()
	file := "/proc/sys/" + path
	old, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		t.Skipf("this kernel has no %s", file)
	}
	must(t, err)
	must(t, os.WriteFile(file, []byte(value), 0))
	t.Cleanup(func() { os.WriteFile(file, old, 0) })
}

// metric returns the value of one of the plugin's counters.
func metric(t testing.TB, name, label string) float64 {
	t.Helper()
	families, err := prometheus.DefaultGatherer.Gather()
	must(t, err)
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			if m.GetLabel()[0].GetValue() == label {
				return m.GetCounter().GetValue()
			}
		}
	}
	t.Fatalf("there is no metric %s with the label %s", name, label)
	return 0
}
