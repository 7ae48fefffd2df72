package e2e

import (
	"strings"
	"syscall"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// A link that somebody else has an address on is not taken at a start, and not removed
// at an exit.
func TestLinkOfSomebodyElseStays(t *testing.T) {
	n := newNode(t, nftables)
	n.commands(n.Node, "ip tuntap add vpn0 mode tun\nip addr add 10.77.0.1/24 dev vpn0")
	before := n.snapshot()
	said := n.refuse(n.corefile("interface vpn0"), lab.Options{})
	n.has(said, "Corefile:", "interface vpn0: a link of this name exists and carries 10.77.0.1/24 of somebody else")
	n.same("after the refusal", before, n.snapshot())

	p := n.serve(n.corefile())
	n.commands(n.Node, "ip addr add 10.78.0.1/24 dev nodelocaldns")
	p.reload(n.corefile("sync 1s")) // it is in use
	n.answersEverybody(false, addrs...)
	p.exit(syscall.SIGTERM)
	n.has(p.Log(), "the link nodelocaldns stays, as it carries 10.78.0.1/24 of somebody else")
	left, err := n.Node.Run("ip", "-o", "addr", "show", "dev", "nodelocaldns")
	n.must(err)
	if !strings.Contains(left, "10.78.0.1/24") || strings.Contains(left, "169.254.20.10") {
		t.Errorf("the link carries %s", left)
	}
	// The next start takes it over, as does one after a crash.
	p = n.serve(n.corefile())
	n.answersEverybody(false, addrs...)
	p.Kill()
	p = n.serve(n.corefile())
	n.answersEverybody(false, addrs...)
	p.exit(syscall.SIGTERM)
	n.commands(n.Node, "ip link del nodelocaldns")
	n.same("after the exit", before, n.snapshot())
}
