package nodecache

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/vishvananda/netlink"
)

// ownNamespace marks the process that runs the tests in a network namespace of
// its own.
const ownNamespace = "NODECACHE_TEST_IN_NAMESPACE"

// TestMain runs the tests in a fresh network namespace, so that they can have
// links, rules and port 53 and nothing outside is touched. It takes a process
// of its own: a namespace that is entered later is that of one thread only.
func TestMain(m *testing.M) {
	if os.Getenv(ownNamespace) == "" && os.Geteuid() == 0 {
		code, err := reexec()
		if err == nil {
			os.Exit(code)
		}
		fmt.Fprintf(os.Stderr, "no network namespace for the tests: %v\n", err)
	}
	if os.Getenv(ownNamespace) != "" {
		if err := loopbackUp(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// reexec runs this program again, in a namespace. What it is told to write, such
// as a coverage profile, the second one writes.
func reexec() (code int, err error) {
	runtime.LockOSThread() // Pdeathsig goes by the thread
	defer runtime.UnlockOSThread()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = os.Args
	cmd.Env = append(os.Environ(), ownNamespace+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		return exit.ExitCode(), nil
	}
	if errors.As(err, &exit) {
		return 1, nil // ended by a signal, as the output says
	}
	return 0, err
}

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("setting up lo: %w", err)
	}
	return nil
}

// needRoot skips a test that changes the network where it has none of its own.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Getenv(ownNamespace) == "" {
		t.Skip("needs a network namespace of its own: run as root")
	}
}

// eventually polls until ok holds. The deadline only ends a test that has failed.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

// must is for steps of a test that are not what it tests.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantError fails unless err says text; with text empty, unless err is nil.
func wantError(t testing.TB, err error, text string) {
	t.Helper()
	switch {
	case text == "" && err != nil:
		t.Errorf("got the error %q, want none", err)
	case text != "" && err == nil:
		t.Errorf("got no error, want one that says %q", text)
	case text != "" && !strings.Contains(err.Error(), text):
		t.Errorf("got the error %q, want one that says %q", err, text)
	}
}

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
	ls, err := dumped(netlink.LinkList)
	must(t, err)
	var out []string
	for _, l := range ls {
		as, err := dumped(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_ALL) })
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
	l, err := linkByName(name)
	must(t, err)
	if l == nil {
		return nil
	}
	as, err := dumped(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_ALL) })
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
	if l, err := linkByName(name); err == nil && l != nil {
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
