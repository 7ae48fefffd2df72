package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

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
	n.same("after the refusal", before, n.snapshot())
	p := n.serve(n.block(".:53", allAddrs, "firewall auto"))
	n.has(p.Log(), "out of connection tracking by iptables")
	n.answersEverybody(false, addrs...)
	p.exit(syscall.SIGTERM)
	n.same("after the exit", before, n.snapshot())
}
