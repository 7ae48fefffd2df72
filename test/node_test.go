// Package e2e tests the real binary with real packets: CoreDNS on a node, queries
// from a pod and from the node itself, and a cluster behind it (package lab).
//
// It takes root, iptables, nftables and iproute2, and the binary that make builds
// (or the one that COREDNS names). LAB_SCALE, 1 by default, scales how many queries
// and reloads there are: an emulated machine wants 0.02.
package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// What the tests' Corefiles bind, unless they are about something else.
const allAddrs = "169.254.20.10 10.96.0.10 fd00:20::10 fd00:96::10"

var addrs = []netip.Addr{lab.LinkLocal, lab.ClusterIP, lab.Local6, lab.ClusterIP6}

const inPlace = "plugin/nodecache: in place"

// A backend is a way to keep rules: a variant of iptables, and the Corefile's word.
type backend struct {
	iptables lab.Iptables
	firewall string
}

func (b backend) String() string { return b.firewall + " on iptables-" + string(b.iptables) }

var (
	iptablesNFT    = backend{lab.NFT, "iptables"}
	iptablesLegacy = backend{lab.Legacy, "iptables"}
	nftables       = backend{lab.NFT, "nftables"}
	backends       = []backend{iptablesNFT, iptablesLegacy, nftables}
)

// forBackends runs a test on a node of its own for each backend.
func forBackends(t *testing.T, test func(n *node)) {
	for _, b := range backends {
		t.Run(strings.ReplaceAll(b.String(), " ", "-"), func(t *testing.T) { test(newNode(t, b)) })
	}
}

// A node is a lab's node, and the test that it is for.
type node struct {
	*lab.Lab
	*testing.T
	backend backend
}

func newNode(t *testing.T, b backend) *node {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces take root: run make e2e as root")
	}
	if b.firewall == nftables.firewall {
		testkit.NeedOwnedTables(t)
	}
	l, err := lab.New(b.iptables)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return &node{Lab: l, T: t, backend: b}
}

// scale is n, or what LAB_SCALE makes of it.
func scale(n int) int {
	s, err := strconv.ParseFloat(os.Getenv("LAB_SCALE"), 64)
	if err != nil {
		return n
	}
	return max(1, int(float64(n)*s))
}

// sub is the same node in a subtest.
func (n *node) sub(name string, test func(n *node)) {
	n.T.Run(name, func(t *testing.T) { test(&node{Lab: n.Lab, T: t, backend: n.backend}) })
}

// must ends the test when there is an error.
func (n *node) must(err error) {
	n.Helper()
	if err != nil {
		n.Fatal(err)
	}
}

// block is a server block with nodecache on the addresses. With LAB_FASTPATH set it has
// fastpath, so that all tests can be run with it.
func (n *node) block(key, bind string, properties ...string) string {
	if os.Getenv("LAB_FASTPATH") != "" && !slices.ContainsFunc(properties, func(p string) bool { return strings.HasPrefix(p, "fastpath") }) {
		properties = append(properties, "fastpath")
	}
	if n.backend.firewall != "" {
		properties = append([]string{"firewall " + n.backend.firewall}, properties...)
	}
	return plainBlock(key, bind, "nodecache {\n        "+strings.Join(properties, "\n        ")+"\n    }")
}

// corefile is a Corefile with the usual addresses.
func (n *node) corefile(properties ...string) string { return n.block(".:53", allAddrs, properties...) }

// plainBlock is a server block that nodecache is no part of.
func plainBlock(key, bind string, lines ...string) string {
	// Slow answers come after lab.SlowFor, and on a busy machine later than forward waits by default.
	forward := "forward . " + lab.DNSAddr.String() + " {\n        read_timeout 4s\n    }"
	lines = append([]string{"bind " + bind, "errors", "cache 30", forward}, lines...)
	return key + " {\n    " + strings.Join(lines, "\n    ") + "\n}\n"
}

// A process is CoreDNS on the node.
type process struct {
	*lab.CoreDNS
	n *node
}

func binary(t *testing.T) string {
	t.Helper()
	path := os.Getenv("COREDNS")
	if path == "" {
		path = filepath.Join("..", "coredns")
	}
	path, err := filepath.Abs(path)
	if err == nil {
		_, err = os.Stat(path)
	}
	if err != nil {
		t.Fatalf("no binary to test: %v; run make, or say where it is in COREDNS", err)
	}
	return path
}

// launch starts CoreDNS and waits for nothing.
func (n *node) launch(corefile string, o lab.Options) *process {
	n.Helper()
	p, err := n.Start(binary(n.T), corefile, o)
	n.must(err)
	n.Cleanup(func() {
		if n.Failed() {
			n.Logf("the Corefile:\n%s\nthe log of process %d:\n%s", corefile, p.Pid, p.Log())
		}
		p.Kill()
	})
	return &process{p, n}
}

// serve starts CoreDNS and waits until it serves with everything in place.
func (n *node) serve(corefile string) *process {
	n.Helper()
	return n.serveWith(corefile, lab.Options{})
}

func (n *node) serveWith(corefile string, o lab.Options) *process {
	n.Helper()
	p := n.launch(corefile, o)
	n.must(p.WaitServing())
	if strings.Contains(corefile, "nodecache") {
		n.must(p.WaitLog(0, inPlace))
	}
	return p
}

// refuse starts CoreDNS, which has to give up, and returns what it said.
func (n *node) refuse(corefile string, o lab.Options) string {
	n.Helper()
	p := n.launch(corefile, o)
	state, err := p.Wait()
	if err != nil {
		n.Fatalf("CoreDNS should have refused to start: %v", err)
	}
	if state.ExitCode() < 1 {
		n.Errorf("ended with %v, want a failure", state)
	}
	return p.Log()
}

// exit ends the process with a signal.
func (p *process) exit(s syscall.Signal) {
	p.n.Helper()
	state, err := p.Stop(s)
	p.n.must(err)
	if !state.Exited() {
		p.n.Errorf("%v: ended with %v", s, state)
	}
}

// reload has to succeed, and everything to be in place.
func (p *process) reload(corefile string) {
	p.n.Helper()
	mark := p.Mark()
	p.n.must(p.Reload(corefile))
	if strings.Contains(corefile, "nodecache") {
		p.n.must(p.WaitLog(mark, inPlace))
	}
}

func (n *node) snapshot() string {
	n.Helper()
	s, err := n.Snapshot()
	n.must(err)
	return s
}

// same compares two snapshots.
func (n *node) same(what, want, got string) {
	n.Helper()
	if d := diff(want, got); d != "" {
		n.Errorf("%s, the node differs:\n%s", what, d)
	}
}

// becomes waits until the node has a snapshot.
func (n *node) becomes(what, want string) {
	n.Helper()
	got := ""
	if !eventually(func() bool { got = n.snapshot(); return got == want }) {
		n.same(what, want, got)
	}
}

// diff says which lines are in one of two texts only, or that the order differs.
func diff(want, got string) string {
	if want == got {
		return ""
	}
	var out strings.Builder
	count, lines := map[string]int{}, 0
	section := ""
	note := func(text string, by int) {
		for line := range strings.Lines(text) {
			if strings.HasPrefix(line, "== ") {
				section = line
			}
			count[section+line] += by
		}
	}
	note(want, -1)
	note(got, 1)
	for _, side := range []struct {
		text, mark string
		is         func(int) bool
	}{
		{want, "- ", func(n int) bool { return n < 0 }},
		{got, "+ ", func(n int) bool { return n > 0 }},
	} {
		for line := range strings.Lines(side.text) {
			if strings.HasPrefix(line, "== ") {
				section = line
			}
			if !side.is(count[section+line]) {
				continue
			}
			if lines++; lines > 60 {
				fmt.Fprintln(&out, "and more")
				return out.String()
			}
			fmt.Fprintf(&out, "%s%s  %s", side.mark, strings.TrimSpace(section), line)
		}
	}
	if out.Len() == 0 {
		w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
		for i := range w {
			if i < len(g) && w[i] != g[i] {
				return fmt.Sprintf("the same lines in another order: in line %d %q instead of %q in\n%s", i, g[i], w[i], got)
			}
		}
	}
	return out.String()
}

// eventually polls for a condition. It is for what can't be waited for otherwise.
func eventually(condition func() bool) bool {
	for late := time.Now().Add(2 * lab.Patience); ; time.Sleep(20 * time.Millisecond) {
		if condition() {
			return true
		}
		if time.Now().After(late) {
			return false
		}
	}
}

// hold takes a port on all addresses of the node, as a program that does not share
// it does, and returns how to let it go.
func (n *node) hold(proto string, port int) (release func()) {
	n.Helper()
	n.must(n.Node.Do(func() error {
		typ := syscall.SOCK_DGRAM
		if proto == "tcp" {
			typ = syscall.SOCK_STREAM
		}
		fd, err := syscall.Socket(syscall.AF_INET6, typ|syscall.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		release = sync.OnceFunc(func() { syscall.Close(fd) })
		n.Cleanup(release)
		err = syscall.Bind(fd, &syscall.SockaddrInet6{Port: port})
		if err == nil && proto == "tcp" {
			err = syscall.Listen(fd, 1)
		}
		return err
	}))
	return release
}

// has checks that a text has all the words.
func (n *node) has(text string, words ...string) {
	n.Helper()
	for _, w := range words {
		if !strings.Contains(text, w) {
			n.Errorf("no %q in\n%s", w, text)
		}
	}
}
