package nodecache

import (
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/internal/peers"
	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
)

// newTwin returns another process's part, as newTestNode.
func newTwin(t *testing.T) (*node, *fakeFirewall) {
	t.Helper()
	n, fw := newNode(), &fakeFirewall{t: t}
	n.firewalls[backendIPT] = fw
	t.Cleanup(n.exit)
	return n, fw
}

// wantRulesOf checks what addresses a firewall makes rules for, and for which it leaves
// others' standing.
func wantRulesOf(t *testing.T, who string, fw *fakeFirewall, own, others string) {
	t.Helper()
	of := func(addresses string) string {
		if addresses == "" {
			return ""
		}
		return dnsOf(strings.Split(addresses, ",")...)
	}
	rules, _ := fw.stand()
	if list(rules) != of(own) || list(fw.keeps()) != of(others) {
		t.Errorf("%s has rules for %v and leaves standing those for %v; want %s and %s", who, rules, fw.keeps(), own, others)
	}
}

func TestLastOneOutTearsDown(t *testing.T) {
	a, aFW := newTestNode(t)
	b, bFW := newTwin(t)
	up(t, a, demand(t, "", "", "169.254.20.10", "10.96.0.10"))
	up(t, b, demand(t, "", "", "169.254.20.10", "fd00:20::10"))
	// The chains are the same: each writes its own rules, and leaves the other's standing.
	wantRulesOf(t, "the second one", bFW, "169.254.20.10,fd00:20::10", "10.96.0.10,169.254.20.10")
	aFW.heard()
	a.exit()
	wantCarried(t, testLink, "169.254.20.10", "fd00:20::10")
	// A report of the kernel's on the addresses may have it look after its rules first.
	calls := aFW.heard()
	if !slices.ContainsFunc(calls, func(c string) bool { return strings.HasPrefix(c, "withdraw "+dnsOf("10.96.0.10")+" on") }) {
		t.Errorf("the first one leaves more than what is its own: %q", calls)
	}
	wantRulesOf(t, "the first one, which has left,", aFW, "", "169.254.20.10,fd00:20::10")
	b.exit()
	if rules, _ := bFW.stand(); len(rules) != 0 || carried(t, testLink) != nil {
		t.Errorf("the last one has left rules for %v, and %v on the link", rules, carried(t, testLink))
	}
}

func TestReloadKeepsTwinsAddress(t *testing.T) {
	a, fw := newTestNode(t)
	b, _ := newTwin(t)
	old := demand(t, "", "", "169.254.20.10", "10.96.0.10")
	socks := up(t, a, old)
	up(t, b, demand(t, "", "", "10.96.0.10"))
	gone := watchAddrs(t)
	next := demand(t, "", "", "fd00:20::10")
	a.restarting(old, true)
	must(t, a.start(next))
	serveOn(t, next.listeners()...)
	fw.heard()
	eventually(t, "the reload is complete", func() bool { return len(fw.heard()) > 0 })
	closeAll(socks)
	a.replaced(old)
	wantCarried(t, testLink, "10.96.0.10", "fd00:20::10")
	if got := gone(); !slices.Equal(got, []string{"169.254.20.10"}) {
		t.Errorf("gone, if only for a moment, are %v", got)
	}
	wantRulesOf(t, "after the reload it", fw, "fd00:20::10", "10.96.0.10")
}

func TestFailedStartKeepsTwinsAddress(t *testing.T) {
	a, _ := newTestNode(t)
	up(t, a, demand(t, "", "", "169.254.20.10"))
	before := links(t)
	b, fw := newTwin(t)
	c, err := freebind.ListenPacket(t.Context(), "udp", "10.96.0.10:53")
	must(t, err)
	defer c.Close()
	wantError(t, b.start(demand(t, "", "", "169.254.20.10", "10.96.0.10")), "10.96.0.10:53/udp is taken")
	if after := links(t); !slices.Equal(before, after) {
		t.Errorf("the links read %q, want %q", after, before)
	}
	wantRulesOf(t, "the one that failed", fw, "", "169.254.20.10")
	// It shows nothing any more: the first one is the last one out.
	a.exit()
	if carried(t, testLink) != nil {
		t.Error("the link is left")
	}
}

// stuck is a process that answers what it wants with text, or not at all.
func stuck(t *testing.T, text string) (end func()) {
	t.Helper()
	l, err := net.Listen("unix", "@nodecache/member/0000000000000001")
	must(t, err)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if text != "" {
				c.Write([]byte(text))
				c.Close()
			}
		}
	}()
	return func() { l.Close() }
}

// While it runs: at its exit the sockets that others have tell what they serve.
func TestNothingIsTakenFromWhoDoesNotAnswer(t *testing.T) {
	for name, text := range map[string]string{"stopped": "", "garbled": "{]"} {
		t.Run(name, func(t *testing.T) {
			n, fw := newTestNode(t)
			old, next := demand(t, "", "", "169.254.20.10", "10.96.0.10"), demand(t, "", "", "169.254.20.10")
			socks := up(t, n, old)
			end := stuck(t, text)
			n.restarting(old, true)
			must(t, n.start(next))
			serveOn(t, next.listeners()...)
			eventually(t, "the reload is complete", n.ready.Load)
			closeAll(socks)
			n.replaced(old)
			wantCarried(t, testLink, "10.96.0.10", "169.254.20.10")
			if !fw.heeded.Unknown {
				t.Error("the firewall does not know that somebody is silent")
			}
			addAddr(t, testLink, "192.0.2.9/32") // the silent one's
			eventually(t, "no program on its way to its exec has what was closed", func() bool { return len(sockets.Strangers(dnsOn("169.254.20.10"))) == 0 })
			n.exit()
			defer removeLink(t, testLink)
			wantCarried(t, testLink, "10.96.0.10", "192.0.2.9")
			if got := fw.heeded.Alone; list(got) != dnsOf("169.254.20.10") {
				t.Errorf("the firewall is told that it has served alone %v", got)
			}
			end()
		})
	}
}

// While one process leaves what only it wants, the other does not write the rules
// for it again; and of what both want neither leaves anything as long as one stays.
func TestTwinHeedsWhoLeaves(t *testing.T) {
	a, aFW := newTestNode(t)
	b, bFW := newTwin(t)
	up(t, a, demand(t, "", "", "169.254.20.10", "10.96.0.10"))
	up(t, b, demand(t, "", "", "169.254.20.10", "fd00:20::10"))
	open := a.answering.Begin() // a query that keeps the exit waiting
	left := make(chan bool)
	aFW.heard()
	go func() { a.exit(); close(left) }()
	eventually(t, "the first one leaves", func() bool { return strings.Contains(strings.Join(aFW.heard(), " "), "withdraw ") })
	must(t, b.do(func() error { b.repair(false, "this test"); return nil }))
	wantRulesOf(t, "while the first one leaves, the second one", bFW, "169.254.20.10,fd00:20::10", "10.96.0.10,169.254.20.10")
	o, err := b.member.Ask(peers.AskLimit)
	must(t, err)
	if len(o.Serves) != 0 {
		t.Errorf("the one that leaves shows that it serves %v", o.Serves)
	}
	open.Add(-1)
	<-left
	must(t, b.do(func() error { b.repair(false, "this test"); return nil }))
	wantRulesOf(t, "after the first one has left, the second one", bFW, "169.254.20.10,fd00:20::10", "")
}

// listenAs listens on a unix socket as a user's process, and shows there that it wants rules.
func listenAs(t *testing.T, user int, name string) {
	t.Helper()
	var l net.Listener
	testkit.As(t, user, func() {
		var err error
		l, err = net.Listen("unix", name)
		must(t, err)
	})
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Write([]byte(`{"links":{"` + testLink + `":["10.9.9.9"]},"rules":[{"addr":"10.9.9.9","proto":"tcp","port":22}],"serves":[{"addr":"10.9.9.9","proto":"tcp","port":22}]}`))
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close() })
}

// A process of another user can't have rules written for what it likes, or keep
// anything from being taken away.
func TestOtherUsersAreIgnored(t *testing.T) {
	a, fw := newTestNode(t)
	listenAs(t, 65534, "@nodecache/member/0000000000000002")
	o, err := a.member.Ask(peers.AskLimit)
	must(t, err)
	if o.Unknown || !o.Wants.Empty() || len(o.Serves) > 0 || len(o.States) > 0 {
		t.Errorf("of another user's process it takes %+v", o)
	}
	up(t, a, demand(t, "", "", "169.254.20.10"))
	if rules, _ := fw.stand(); list(rules) != dnsOf("169.254.20.10") {
		t.Errorf("rules stand for %v", rules)
	}
	a.exit()
	if rules, _ := fw.stand(); len(rules) != 0 || carried(t, testLink) != nil {
		t.Errorf("left are rules for %v, and %v on the link", rules, carried(t, testLink))
	}
}

func TestRootsProcessIsAsked(t *testing.T) {
	a, _ := newTestNode(t)
	listenAs(t, 0, "@nodecache/member/0000000000000003")
	o, err := a.member.Ask(peers.AskLimit)
	must(t, err)
	if o.Wants.Empty() || o.States[peers.Serving] != 1 {
		t.Errorf("of root's process it takes %+v", o)
	}
}
