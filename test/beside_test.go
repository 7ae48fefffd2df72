package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// nodeCache does to a node what node-cache of kubernetes/dns does with -localip: a link
// with the addresses, rules at the head of the chains, and CoreDNS on the addresses.
type nodeCache struct {
	*process
	addrs []netip.Addr
}

// rules are the commands for its rules. do is -I or -D.
func (c *nodeCache) rules(do string) string {
	var b strings.Builder
	for _, a := range c.addrs {
		for _, proto := range protos {
			for _, r := range []string{
				"raw %s PREROUTING -p %s -d %s --dport 53 -j NOTRACK", "raw %s OUTPUT -p %s -s %s --sport 53 -j NOTRACK",
				"raw %s OUTPUT -p %s -d %s --dport 53 -j NOTRACK", "filter %s INPUT -p %s -d %s --dport 53 -j ACCEPT",
				"filter %s OUTPUT -p %s -s %s --sport 53 -j ACCEPT",
			} {
				what := "skip conntrack"
				if strings.HasPrefix(r, "filter") {
					what = "allow DNS traffic"
				}
				fmt.Fprintf(&b, "iptables -w -t "+r+" -m comment --comment 'NodeLocal DNS Cache: %s'\n", do, proto, a, what)
			}
		}
	}
	return b.String()
}

func (n *node) nodeCache(link string, addrs ...netip.Addr) *nodeCache {
	c := &nodeCache{addrs: addrs}
	n.commands(n.Node, fmt.Sprintf("ip link show %[1]s >/dev/null 2>&1 || ip link add %[1]s type dummy 2>/dev/null || ip tuntap add %[1]s mode tun", link))
	var bind []string
	for _, a := range addrs {
		n.commands(n.Node, fmt.Sprintf("ip addr replace %v/32 dev %s", a, link))
		bind = append(bind, a.String())
	}
	c.process = n.launch(plainBlock(".:53", strings.Join(bind, " ")), lab.Options{})
	n.must(c.WaitServing())
	n.commands(n.Node, c.rules("-I"))
	return c
}

// leave is its way out: the link first, then the rules, then the servers.
func (c *nodeCache) leave(link string) {
	c.n.commands(c.n.Node, "ip link del "+link+"\n"+c.rules("-D"))
	c.exit(syscall.SIGTERM)
}

// whileAsked has the pod ask the addresses meanwhile, and returns how many queries had no right answer.
func (n *node) whileAsked(what string, lossless bool, to []netip.Addr, step func()) (bad int) {
	n.Helper()
	flow := lab.Flow{From: n.Pod, To: to, Rate: 1000, Tag: tag(what)}
	if !lossless {
		flow.Timeout = time.Second // its end waits for what is lost
	}
	f, err := flow.Start()
	n.must(err)
	n.Cleanup(func() { f.Stop() })
	more := func() {
		mark := f.Sent()
		eventually(func() bool { return f.Sent() > mark+300 })
	}
	more()
	step()
	more()
	results, err := f.Stop()
	n.must(err)
	for a, r := range results {
		n.Logf("%s: %v: %d sent, %d lost, %d refused", what, a, r.Sent, r.Lost, r.Refused)
		if bad += r.Bad(); lossless && r.Bad() > 0 {
			n.Errorf("%s: %v: %v", what, a, r.Errors)
		}
	}
	return bad
}

// From node-cache to this cache on one node, and back, while pods ask.
func TestBesideNodeCache(t *testing.T) {
	for _, b := range []backend{iptablesNFT, nftables} {
		t.Run(b.String(), func(t *testing.T) {
			n := newNode(t, b)
			n.warm()
			both := []netip.Addr{lab.ClusterIP, lab.LinkLocal}
			corefile := n.block(".:53", "10.96.0.10 169.254.20.10")
			before := n.snapshot()
			old := n.nodeCache("nodelocaldns", both...)
			var p *process
			n.whileAsked("the start beside node-cache", true, both, func() { p = n.serve(corefile) })
			n.must(p.WaitLog(0, "node-cache's rules"))
			n.whileAsked("node-cache is killed", false, both, func() { old.Kill() })
			n.answersEverybody(false, both...)
			n.commands(n.Node, old.rules("-D"))

			n.whileAsked("back: node-cache starts", false, both, func() { old = n.nodeCache("nodelocaldns", both...) })
			n.whileAsked("node-cache is ended", false, both, func() { old.leave("nodelocaldns") })
			n.answersEverybody(false, both...)
			n.whileAsked("the cache alone", true, both, func() {})
			p.exit(syscall.SIGTERM)
			n.same("after all have left", before, n.snapshot())
		})
	}
}
