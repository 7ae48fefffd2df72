package e2e

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// claim shows a nodecache process's wants on the node, as any process of root's can.
func (n *node) claim(text string) (end func()) {
	n.Helper()
	var l net.Listener
	n.must(n.Node.Do(func() (err error) {
		l, err = net.Listen("unix", "@nodecache/member/0123456789abcdef")
		return err
	}))
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Write([]byte(text))
			c.Close()
		}
	}()
	n.Cleanup(func() { l.Close() })
	return func() { l.Close() }
}

// What another process says that it wants opens no firewall.
func TestNothingIsWrittenForOthers(t *testing.T) {
	for _, b := range []backend{iptablesNFT, iptablesLegacy} {
		t.Run(string(b.iptables), func(t *testing.T) {
			t.Parallel()
			n := newNode(t, b)
			before := n.snapshot()
			end := n.claim(`{"links":{},"rules":[{"addr":"10.250.0.2","proto":"tcp","port":22},{"addr":"fd00:99::2","proto":"udp","port":161}],
				"serves":[{"addr":"10.250.0.2","proto":"tcp","port":22}]}`)
			p := n.serve(n.corefile("sync 1s"))
			nothing := func(when string) {
				n.Helper()
				if s := n.snapshot(); strings.Contains(s, "10.250.0.2") || strings.Contains(s, "fd00:99::2") {
					n.Errorf("%s rules stand for what another process says:\n%s", when, s)
				}
			}
			nothing("at the start")
			mark := p.Mark()
			n.runs("iptables -t raw -F NODECACHE-OUTPUT")
			n.must(p.WaitLog(mark, "put back"))
			nothing("after a repair")
			n.answersEverybody(false, addrs...)
			p.exit(syscall.SIGTERM)
			nothing("after the exit")
			end()
			p = n.serve(n.corefile())
			p.exit(syscall.SIGTERM)
			n.same("after the exit", before, n.snapshot())
		})
	}
}

// without returns an environment in which one of the iptables programs fails.
func (n *node) without(program, says string) []string {
	n.Helper()
	dir := n.TempDir()
	script := fmt.Sprintf("#!/bin/sh\necho \"%s: %s\" >&2\nexit 3\n", program, says)
	n.must(os.WriteFile(filepath.Join(dir, program), []byte(script), 0o755))
	return []string{"PATH=" + dir + ":" + filepath.Join(n.Dir, "bin") + ":/usr/sbin:/usr/bin:/sbin:/bin"}
}

// A node without IPv6 has a cache for IPv4, with iptables too.
func TestNodeWithoutIPv6Tables(t *testing.T) {
	for _, b := range []backend{iptablesNFT, iptablesLegacy} {
		t.Run(string(b.iptables), func(t *testing.T) {
			t.Parallel()
			n := newNode(t, b)
			before := n.snapshot()
			four := n.block(".:53", "169.254.20.10 10.96.0.10", "sync 1s")
			env := lab.Options{Env: n.without("ip6tables-save", "can't initialize ip6tables table 'raw': Address family not supported by protocol")}
			p := n.serveWith(four, env)
			mark := p.Mark()
			n.runs("iptables -t raw -F NODECACHE-OUTPUT")
			n.must(p.WaitLog(mark, "put back"))
			p.reload(n.block(".:53", "169.254.20.10"))
			n.answersEverybody(false, lab.LinkLocal)
			p.exit(syscall.SIGTERM)
			if strings.Contains(p.Log(), "[ERROR]") || !strings.Contains(p.Log(), "nothing of nodecache is on the node any more") {
				n.Errorf("it says\n%s", p.Log())
			}
			n.same("after the exit", before, n.snapshot())
			n.has(n.refuse(n.corefile(), env), "Address family not supported by protocol")
			n.same("after a start that failed", before, n.snapshot())
		})
	}
}

// mix puts a rule into a chain of iptables-nft that its programs can't print, and
// returns what takes it away.
func (n *node) mix() (unmix func()) {
	n.Helper()
	n.runs("nft add rule ip filter INPUT ct state new accept")
	return func() {
		n.Helper()
		out, err := n.Node.Run("nft", "-a", "list", "chain", "ip", "filter", "INPUT")
		n.must(err)
		m := regexp.MustCompile(`ct state new accept # handle (\d+)`).FindStringSubmatch(out)
		if m == nil {
			n.Fatalf("the rule is gone from\n%s", out)
		}
		n.runs("nft delete rule ip filter INPUT handle " + m[1])
	}
}

// Where nft has put rules into a table of iptables-nft, so that this can't print it,
// nothing piles up, and nothing is left.
func TestTableThatIPTablesCannotRead(t *testing.T) {
	n := newNode(t, iptablesNFT)
	n.runs("iptables -A INPUT -s 10.1.0.0/16 -j ACCEPT")
	before := n.snapshot()
	n.sub("at the start", func(n *node) {
		unmix := n.mix()
		mixed := n.snapshot()
		n.has(n.refuse(n.corefile(), lab.Options{}), "iptables can't read the table filter", "use firewall nftables")
		n.same("after a start that failed", mixed, n.snapshot())
		auto := &node{Lab: n.Lab, T: n.T, backend: backend{lab.NFT, "auto"}}
		p := auto.serve(auto.corefile())
		n.has(p.Log(), "iptables does not work here, trying nftables", "out of connection tracking by nftables")
		n.answersEverybody(false, addrs...)
		p.exit(syscall.SIGTERM)
		n.same("after the exit", mixed, n.snapshot())
		unmix()
	})
	n.sub("later", func(n *node) {
		p := n.serve(n.corefile("sync 1s"))
		stood := n.snapshot()
		unmix := n.mix()
		mixed, err := n.Node.Run("nft", "list", "ruleset")
		n.must(err)
		for range 2 {
			n.must(p.WaitLog(p.Mark(), "can't read the table filter"))
		}
		counters := regexp.MustCompile(`packets \d+ bytes \d+`)
		plain := func(s string) string { return counters.ReplaceAllString(s, "") }
		now, err := n.Node.Run("nft", "list", "ruleset")
		n.must(err)
		if plain(now) != plain(mixed) {
			n.Errorf("the rules read\n%s\nwant\n%s", now, mixed)
		}
		n.answersEverybody(false, addrs...)
		unmix()
		mark := p.Mark()
		n.runs("iptables -F NODECACHE-INPUT")
		n.must(p.WaitLog(mark, "put back"))
		n.becomes("once the table can be read", stood)
		unmix = n.mix()
		p.exit(syscall.SIGTERM)
		n.has(p.Log(), "nothing of nodecache is on the node any more")
		unmix()
		n.same("after the exit", before, n.snapshot())
	})
}

// programsOf returns an environment in which iptables is that variant.
func (n *node) programsOf(v lab.Iptables) lab.Options {
	n.Helper()
	dir := n.TempDir()
	for _, ipt := range []string{"iptables", "ip6tables"} {
		for _, what := range []string{"", "-save", "-restore"} {
			n.must(os.Symlink("/usr/sbin/"+ipt+"-"+string(v)+what, filepath.Join(dir, ipt+what)))
		}
	}
	return lab.Options{Env: []string{"PATH=" + dir + ":/usr/sbin:/usr/bin:/sbin:/bin"}}
}

// When an update changes the variant of iptables, the rules in the old one go with the
// old process, killed or not.
func TestChangeOfVariantLeavesNothing(t *testing.T) {
	for _, was := range []lab.Iptables{lab.NFT, lab.Legacy} {
		is := map[lab.Iptables]lab.Iptables{lab.NFT: lab.Legacy, lab.Legacy: lab.NFT}[was]
		for _, end := range []string{"SIGTERM", "SIGKILL", "SIGKILL first"} {
			t.Run(fmt.Sprintf("%s to %s, %s", was, is, end), func(t *testing.T) {
				t.Parallel()
				n := newNode(t, backend{is, "iptables"})
				before := n.snapshot()
				next := n.serve(n.corefile("sync 1s"))
				alone := n.snapshot()
				next.exit(syscall.SIGTERM)

				old := n.serveWith(n.corefile(), n.programsOf(was))
				if end == "SIGKILL first" {
					old.Kill()
				}
				next = n.serve(n.corefile("sync 1s"))
				switch end {
				case "SIGTERM":
					old.exit(syscall.SIGTERM)
				case "SIGKILL":
					old.Kill()
				}
				n.becomes("after the old one has left", alone)
				n.must(n.FlushConntrack())
				n.answersEverybody(false, addrs...)
				n.untracked()
				next.exit(syscall.SIGTERM)
				n.same("after both have left", before, n.snapshot())
			})
		}
	}
}
