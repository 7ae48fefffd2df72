package nodelinks

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
)

var (
	must = testkit.Must
	addr = netip.MustParseAddr
)

const testLink = "nctest0"

func TestMain(m *testing.M) { os.Exit(testkit.Main(m)) }

func TestAddressCarriersNamesAllLinks(t *testing.T) {
	testkit.Link(t, testLink, "169.254.20.10", "fd00:20::10")
	lo, err := netlink.LinkByName("lo")
	must(t, err)
	also, err := netlink.ParseAddr("169.254.20.10/32")
	must(t, err)
	must(t, netlink.AddrAdd(lo, also))
	defer func() { must(t, netlink.AddrDel(lo, also)) }()
	carriers, err := Carriers()
	must(t, err)
	got := carriers[addr("169.254.20.10")]
	slices.Sort(got)
	if want := []string{"lo", testLink}; !slices.Equal(got, want) {
		t.Errorf("169.254.20.10 is carried by %v, want %v", got, want)
	}
	if got := carriers[addr("fd00:20::10")]; !slices.Equal(got, []string{testLink}) {
		t.Errorf("fd00:20::10 is carried by %v", got)
	}
	if got := carriers[addr("127.0.0.1")]; !slices.Equal(got, []string{"lo"}) {
		t.Errorf("127.0.0.1 is carried by %v", got)
	}
}

func TestInterruptedDumpIsRepeated(t *testing.T) {
	for _, test := range []struct {
		fails, calls int
		err          error
	}{{0, 1, nil}, {3, 4, nil}, {100, 11, netlink.ErrDumpInterrupted}} {
		calls := 0
		_, err := Dumped(func() (int, error) {
			if calls++; calls <= test.fails {
				return 0, fmt.Errorf("dump: %w", netlink.ErrDumpInterrupted)
			}
			return 1, nil
		})
		if calls != test.calls || !errors.Is(err, test.err) {
			t.Errorf("after %d failures: %d calls and the error %v, want %d and %v", test.fails, calls, err, test.calls, test.err)
		}
	}
	other := errors.New("other")
	calls := 0
	if _, err := Dumped(func() (int, error) { calls++; return 0, other }); calls != 1 || err != other {
		t.Errorf("another error: %d calls and the error %v", calls, err)
	}
}
