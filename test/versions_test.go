package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// otherXtables is the folder of an iptables of another version, as test/xtables lays it out.
// make test-kernels has it.
func otherXtables(t *testing.T) string {
	dir := os.Getenv("LAB_OTHER_XTABLES")
	if dir == "" {
		t.Skip("LAB_OTHER_XTABLES names no folder with another iptables: make test-kernels does")
	}
	return dir
}

// Another program on the node, such as kube-proxy in its image, has an iptables of another
// version than ours: it reads our rules, writes its own beside them and flushes what it
// likes, and each survives the other.
func TestBesideOtherIptables(t *testing.T) {
	for _, variant := range []lab.Iptables{lab.NFT, lab.Legacy} {
		t.Run(string(variant), func(t *testing.T) {
			dir := otherXtables(t)
			n := newNode(t, backend{variant, "iptables"})
			other := func(name string) string {
				family, what, _ := strings.Cut(name, "-")
				if what != "" {
					what = "-" + what
				}
				return filepath.Join(dir, family+"-"+string(variant)+what)
			}
			n.runs(other("iptables") + " -t raw -N THEIRS")
			n.runs(other("iptables") + " -t raw -A PREROUTING -j THEIRS")
			n.runs(other("ip6tables") + " -t raw -A PREROUTING -p udp --dport 9 -j ACCEPT")
			before := n.snapshot()
			p := n.serve(n.corefile())

			for _, family := range []string{"iptables", "ip6tables"} {
				seen, err := n.Node.Run(other(family+"-save"), "-t", "raw")
				n.must(err)
				n.has(seen, "-j NODECACHE-PREROUTING", "nodecache: queries to")
				// What it has read it can write, as a tool that restores a saved state does.
				_, err = n.Node.RunInput(seen, other(family+"-restore"), "--test")
				n.must(err)
				_, err = n.Node.RunInput("*raw\n:THEIRS - [0:0]\n-A THEIRS -p udp --dport 11 -j RETURN\nCOMMIT\n", other(family+"-restore"), "--noflush")
				n.must(err)
				n.runs(other(family) + " -t raw -F THEIRS")
				if family == "ip6tables" {
					n.runs(other(family) + " -t raw -X THEIRS")
				}
			}
			n.answersEverybody(false, addrs...)

			mark := p.Mark()
			n.runs(other("iptables") + " -t raw -F NODECACHE-OUTPUT")
			n.must(p.WaitLog(mark, "put back"))
			n.answersEverybody(false, addrs...)
			p.reload(n.block(".:53", "169.254.20.10 10.96.0.10"))
			p.Kill()
			n.clusterAnswers()
			p = n.serve(n.corefile())
			n.answersEverybody(false, addrs...)
			p.exit(syscall.SIGTERM)
			n.quiet(p.Log())
			n.same("after the exit", before, n.snapshot())
		})
	}
}

// Two caches of one node have iptables of two versions, as while an image is updated whose
// Debian is another: they read each other's rules, and neither takes them for changed.
func TestTwinsOfTwoIptables(t *testing.T) {
	for _, variant := range []lab.Iptables{lab.NFT, lab.Legacy} {
		t.Run(string(variant), func(t *testing.T) {
			dir := otherXtables(t)
			n := newNode(t, backend{variant, "iptables"})
			bin := n.MakeDir()
			for _, family := range []string{"iptables", "ip6tables"} {
				for _, what := range []string{"", "-save", "-restore"} {
					n.must(os.Symlink(filepath.Join(dir, family+"-"+string(variant)+what), filepath.Join(bin, family+what)))
				}
			}
			before := n.snapshot()
			sync := "sync 1s"
			if os.Getenv("LAB_SCALE") != "" {
				sync = "sync 20s" // in emulation a check takes seconds
			}
			counted := func(at string) string {
				return strings.Replace(n.corefile(sync), "errors", "errors\n    prometheus "+at, 1)
			}
			first := n.serve(counted("127.0.0.1:9253"))
			second := n.serveWith(counted("127.0.0.1:9254"), lab.Options{Env: []string{"PATH=" + bin + ":" + os.Getenv("PATH")}})
			for range scale(4) {
				for _, at := range []string{"127.0.0.1:9253", "127.0.0.1:9254"} {
					last := n.metrics(at)["last_sync_success_timestamp_seconds"]
					if !eventually(func() bool { return n.metrics(at)["last_sync_success_timestamp_seconds"] > last }) {
						t.Fatal("no check after the last one")
					}
				}
			}
			for _, p := range []*process{first, second} {
				if strings.Contains(p.Log(), "put back") {
					t.Errorf("one writes what the other has written:\n%s", p.Log())
				}
			}
			n.answersEverybody(false, addrs...)
			first.exit(syscall.SIGTERM)
			n.answersEverybody(false, addrs...)
			second.exit(syscall.SIGTERM)
			n.same("after both have left", before, n.snapshot())
		})
	}
}

// Before Linux 5.12 a table of nf_tables cannot belong to a process: the backend nftables says
// so and leaves nothing, and auto takes iptables.
func TestKernelWithoutOwnedTables(t *testing.T) {
	if testkit.Kernel(t, 5, 12) {
		t.Skip("this kernel has the flag owner: make test-kernels has one without")
	}
	n := newNode(t, backend{iptables: lab.NFT})
	before := n.snapshot()
	n.has(n.refuse(n.block(".:53", allAddrs, "firewall nftables"), lab.Options{}), "firewall nftables needs Linux 5.12 or newer")
	n.has(n.refuse(n.block(".:53", allAddrs, "firewall auto"), lab.Options{Env: withoutPrograms}), "firewall nftables needs Linux 5.12 or newer")
	n.same("after both refusals", before, n.snapshot())
	p := n.serve(n.block(".:53", allAddrs, "firewall auto"))
	n.has(p.Log(), "out of connection tracking by iptables")
	n.answersEverybody(false, addrs...)
	p.exit(syscall.SIGTERM)
	n.same("after the exit", before, n.snapshot())
}

// withoutPrograms is an environment in which no iptables is found.
var withoutPrograms = []string{"PATH=/nonexistent"}

// A life in short, on any kernel: a start, a reload, a twin, an exit and a crash, with queries
// from pod and host over UDP and TCP and both families after each.
func TestLifeOnThisKernel(t *testing.T) {
	forBackends(t, func(n *node) {
		before := n.snapshot()
		p := n.serve(n.corefile())
		n.answersEverybody(false, addrs...)
		n.must(n.FlushConntrack())
		n.answersEverybody(false, addrs...)
		n.untracked()
		another := netip.MustParseAddr("169.254.20.11")
		p.reload(n.block(".:53", allAddrs+" "+another.String()))
		n.answersEverybody(false, append([]netip.Addr{another}, addrs...)...)
		twin := n.serve(n.corefile())
		p.exit(syscall.SIGTERM)
		n.answersEverybody(false, addrs...)
		twin.Kill()
		n.clusterAnswers()
		p = n.serve(n.corefile())
		n.answersEverybody(false, addrs...)
		p.exit(syscall.SIGTERM)
		n.clusterAnswers()
		n.same("after the exit", before, n.snapshot())
	})
}

// What the running kernel has of what this cache does differently without: a row of the table
// of make test-kernels.
func TestWhatThisKernelHas(t *testing.T) {
	n := newNode(t, backend{iptables: lab.NFT})
	takes := func(firewall string, env []string) string {
		const by = "out of connection tracking by "
		p := n.launch(n.block(".:53", allAddrs, "firewall "+firewall), lab.Options{Env: env})
		if err := p.WaitLog(0, by); errors.Is(err, lab.ErrExited) {
			return "refused"
		} else if err != nil {
			t.Fatal(err)
		}
		_, backend, _ := strings.Cut(p.Log(), by)
		backend, _, _ = strings.Cut(backend, "\n")
		p.exit(syscall.SIGTERM)
		return backend
	}
	owner := "yes"
	if takes("nftables", nil) == "refused" {
		owner = "no"
	}
	auto, without := takes("auto", nil), takes("auto", withoutPrograms)
	if !strings.HasPrefix(auto, "iptables") {
		t.Errorf("auto takes %s where iptables works", auto)
	}
	if (owner == "yes") != (without == "nftables") {
		t.Errorf("the backend nftables works: %s, and without programs auto takes %s", owner, without)
	}
	t.Logf("has: %s | %s | %s | %s", owner, auto, without, n.incomingCPU())
}

// incomingCPU tells whether the kernel directs a packet to the socket of a group that wants
// those of its CPU (SO_INCOMING_CPU with SO_REUSEPORT).
func (n *node) incomingCPU() string {
	n.Helper()
	const cpus, packets = 2, 64
	if runtime.NumCPU() < cpus {
		return "one CPU"
	}
	right := 0
	n.must(n.Node.Do(func() error {
		var socks [cpus]int
		at := &unix.SockaddrInet4{Port: 5399, Addr: [4]byte{127, 0, 0, 1}}
		for cpu := range socks {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			socks[cpu] = fd
			if err := errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1),
				unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_INCOMING_CPU, cpu), unix.Bind(fd, at)); err != nil {
				return err
			}
		}
		for i := range packets {
			// On lo a packet comes in on the CPU that sends it. The thread ends with this function.
			var on unix.CPUSet
			on.Set(i % cpus)
			if err := unix.SchedSetaffinity(0, &on); err != nil {
				return err
			}
			from, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			err = unix.Sendto(from, []byte{1}, 0, at)
			unix.Close(from)
			if err != nil {
				return err
			}
			came := [cpus]unix.PollFd{{Fd: int32(socks[0]), Events: unix.POLLIN}, {Fd: int32(socks[1]), Events: unix.POLLIN}}
			if _, err := unix.Poll(came[:], int(lab.Patience.Milliseconds())); err != nil && err != unix.EINTR {
				return err
			}
			for cpu, c := range came {
				if c.Revents == 0 {
					continue
				}
				if _, _, err := unix.Recvfrom(socks[cpu], make([]byte, 1), unix.MSG_DONTWAIT); err != nil {
					return err
				}
				if cpu == i%cpus {
					right++
				}
			}
		}
		return nil
	}))
	if right == packets {
		return "heeded"
	}
	return fmt.Sprintf("ignored (%d of %d)", right, packets)
}
