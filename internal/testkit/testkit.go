// Package testkit is what the tests of several packages need: a network namespace of their
// own, and sockets as CoreDNS opens them.
package testkit

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

// ownNamespace marks the process that runs the tests in a network namespace of
// its own.
const ownNamespace = "NODECACHE_TEST_IN_NAMESPACE"

// Main runs the tests in a fresh network namespace, so that they can have
// links, rules and port 53 and nothing outside is touched. It takes a process
// of its own: a namespace that is entered later is that of one thread only.
func Main(m *testing.M) int {
	if os.Getenv(ownNamespace) == "" && os.Geteuid() == 0 {
		code, err := reexec()
		if err == nil {
			return code
		}
		fmt.Fprintf(os.Stderr, "no network namespace for the tests: %v\n", err)
	}
	if os.Getenv(ownNamespace) != "" {
		if err := loopbackUp(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	return m.Run()
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

// NeedRoot skips a test that changes the network where it has none of its own.
func NeedRoot(t testing.TB) {
	t.Helper()
	if os.Getenv(ownNamespace) == "" {
		t.Skip("needs a network namespace of its own: run as root")
	}
}

// NeedOwnedTables skips a test where nf_tables has no tables that belong to a process: before
// Linux 5.12.
func NeedOwnedTables(t testing.TB) {
	t.Helper()
	if !Kernel(t, 5, 12) {
		t.Skip("needs the flag owner of nf_tables, which Linux has since 5.12")
	}
}

// Kernel tells whether the one that runs is of that version or newer.
func Kernel(t testing.TB, major, minor int) bool {
	t.Helper()
	var u unix.Utsname
	Must(t, unix.Uname(&u))
	var is [2]int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &is[0], &is[1]); err != nil {
		t.Fatalf("reading the version of the kernel: %v", err)
	}
	return slices.Compare(is[:], []int{major, minor}) >= 0
}

// As does something as a user.
func As(t testing.TB, user int, do func()) {
	t.Helper()
	NeedRoot(t)
	// The user is this thread's alone. The saved one stays root, for the way back.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	become := func(user int) {
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(user), uintptr(user), ^uintptr(0)); errno != 0 {
			panic(errno) // the thread must not be used with the wrong user
		}
	}
	become(user)
	defer become(0)
	do()
}

// Eventually polls until ok holds. The deadline only ends a test that has failed.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

// Must is for steps of a test that are not what it tests.
func Must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Counted is the value of a counter without labels.
func Counted(t testing.TB, name string) float64 {
	t.Helper()
	families, err := prometheus.DefaultGatherer.Gather()
	Must(t, err)
	for _, f := range families {
		if f.GetName() == name {
			return f.GetMetric()[0].GetCounter().GetValue()
		}
	}
	t.Fatalf("no counter %s", name)
	return 0
}

// WantError fails unless err says text; with text empty, unless err is nil.
func WantError(t testing.TB, err error, text string) {
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

// Socket is what CoreDNS would open for one endpoint.
type Socket struct {
	E   desired.Endpoint
	UDP *net.UDPConn
	TCP net.Listener
}

func (s *Socket) Close() {
	if s.UDP != nil {
		s.UDP.Close()
	} else {
		s.TCP.Close()
	}
}

// ReusePort is how CoreDNS opens its sockets.
var ReusePort = net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
	if e := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) }); e != nil {
		return e
	}
	return err
}}

// ServeOn opens a socket for each endpoint, until the test is over.
func ServeOn(t testing.TB, es ...desired.Endpoint) (socks []*Socket) {
	t.Helper()
	for _, e := range es {
		s := &Socket{E: e}
		at := netip.AddrPortFrom(e.Addr, e.Port).String()
		if e.Proto == "udp" {
			c, err := ReusePort.ListenPacket(context.Background(), "udp", at)
			Must(t, err)
			s.UDP = c.(*net.UDPConn)
		} else {
			l, err := ReusePort.Listen(context.Background(), "tcp", at)
			Must(t, err)
			s.TCP = l
		}
		socks = append(socks, s)
		t.Cleanup(s.Close)
	}
	return socks
}

// Local returns an endpoint on lo that nobody has.
func Local(t testing.TB, a, proto string) desired.Endpoint {
	t.Helper()
	e := desired.Endpoint{Addr: netip.MustParseAddr(a), Proto: proto}
	s := ServeOn(t, e)[0]
	if proto == "udp" {
		e.Port = s.UDP.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	} else {
		e.Port = s.TCP.Addr().(*net.TCPAddr).AddrPort().Port()
	}
	s.Close()
	return e
}

func DialUDP(t testing.TB, e desired.Endpoint) net.Conn {
	t.Helper()
	c, err := net.Dial("udp", netip.AddrPortFrom(e.Addr, e.Port).String())
	Must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// HandOver leaves f, a socket's, to another process that calls itself name.
func HandOver(t testing.TB, name string, f *os.File) (pid int) {
	t.Helper()
	script := filepath.Join(t.TempDir(), name)
	Must(t, os.WriteFile(script, []byte("#!/bin/sh\nread line\n"), 0o755))
	cmd := exec.Command(script)
	cmd.ExtraFiles = []*os.File{f}
	in, err := cmd.StdinPipe()
	Must(t, err)
	Must(t, cmd.Start())
	t.Cleanup(func() { in.Close(); cmd.Wait() })
	f.Close()
	return cmd.Process.Pid
}

// DNSOn returns the endpoints of DNS on addresses, in order.
func DNSOn(list ...string) (es []desired.Endpoint) {
	for _, s := range list {
		a := netip.MustParseAddr(s)
		es = append(es, desired.Endpoint{Addr: a, Proto: "udp", Port: 53}, desired.Endpoint{Addr: a, Proto: "tcp", Port: 53})
	}
	slices.SortFunc(es, desired.Compare)
	return es
}

// Link makes a link of this name that carries addresses, until the test is over: a dummy,
// or a TUN device where the kernel has no dummy driver.
func Link(t testing.TB, name string, on ...string) {
	t.Helper()
	NeedRoot(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	var l netlink.Link = &netlink.Dummy{LinkAttrs: attrs}
	err := netlink.LinkAdd(l)
	if errors.Is(err, unix.EOPNOTSUPP) {
		l = &netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TUN, Flags: netlink.TUNTAP_DEFAULTS | netlink.TUNTAP_NO_PI}
		err = netlink.LinkAdd(l)
	}
	Must(t, err)
	t.Cleanup(func() { netlink.LinkDel(l) })
	Must(t, netlink.LinkSetUp(l))
	for _, s := range on {
		a := &netlink.Addr{IPNet: netlink.NewIPNet(netip.MustParseAddr(s).AsSlice()), Flags: unix.IFA_F_NODAD}
		Must(t, netlink.AddrAdd(l, a))
	}
}

// Sections splits a file of test data: the text below each line `-- NAME --`.
func Sections(text string) map[string]string {
	sections, name := map[string]string{}, ""
	for line := range strings.Lines(text) {
		if n, ok := strings.CutPrefix(line, "-- "); ok && strings.HasSuffix(n, " --\n") {
			name = strings.TrimSuffix(n, " --\n")
			continue
		}
		sections[name] += line
	}
	return sections
}
