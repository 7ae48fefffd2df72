package nodecache

import (
	"errors"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
)

// grown tells whether the counter of repairs has grown since, by at least one.
func grown(t *testing.T, object string, before float64) func() bool {
	return func() bool { return metric(t, "coredns_nodecache_repairs_total", object) > before }
}

func repaired(t *testing.T, object string) float64 {
	return metric(t, "coredns_nodecache_repairs_total", object)
}

func TestRemovedAddressComesBack(t *testing.T) {
	n, fw := newTestNode(t)
	up(t, n, demand(t, "", "", "169.254.20.10", "fd00:20::10")) // the sync of a minute is too late
	fw.heard()
	for _, prefix := range []string{"169.254.20.10/32", "fd00:20::10/128"} {
		before := repaired(t, objectAddress)
		delAddr(t, testLink, prefix)
		eventually(t, prefix+" is counted", grown(t, objectAddress, before))
		wantCarried(t, testLink, "169.254.20.10", "fd00:20::10")
	}
	for _, c := range fw.heard() {
		if strings.HasPrefix(c, "apply") {
			t.Error("an address is no reason to run a program: ", c)
		}
	}
}

func TestRemovedLinkComesBack(t *testing.T) {
	n, _ := newTestNode(t)
	up(t, n, demand(t, "", "", "169.254.20.10", "fd00:20::10"))
	before := repaired(t, objectLink)
	removeLink(t, testLink)
	eventually(t, "the link is counted", grown(t, objectLink, before))
	wantCarried(t, testLink, "169.254.20.10", "fd00:20::10")
}

func TestLinkSetDownComesBack(t *testing.T) {
	n, _ := newTestNode(t)
	up(t, n, demand(t, "", "", "169.254.20.10", "fd00:20::10"))
	l, err := nodelinks.ByName(testLink)
	must(t, err)
	must(t, netlink.LinkSetDown(l))
	eventually(t, "the link is up, with its addresses", func() bool {
		l, err := nodelinks.ByName(testLink)
		return err == nil && l != nil && l.Attrs().RawFlags&syscall.IFF_UP != 0 && len(carried(t, testLink)) == 2
	})
}

func TestRemovedRulesComeBackWithSync(t *testing.T) {
	n, fw := newTestNode(t)
	up(t, n, demand(t, "", "sync 100ms", "169.254.20.10"))
	before := repaired(t, objectRule)
	fw.say(func() { fw.lost = 3 })
	eventually(t, "the rules are counted", func() bool { return repaired(t, objectRule) == before+3 })
}

func TestPokedNodeLooksAtRules(t *testing.T) {
	n, fw := newTestNode(t)
	up(t, n, demand(t, "", "", "169.254.20.10"))
	before := repaired(t, objectRule)
	fw.say(func() { fw.lost = 1 })
	poke(n.poked)
	poke(n.poked) // is not waited for
	eventually(t, "the rules are counted", func() bool { return repaired(t, objectRule) == before+1 })
}

func TestReadyFollowsLastLook(t *testing.T) {
	n, fw := newTestNode(t)
	up(t, n, demand(t, "", "sync 100ms", "169.254.20.10"))
	before := metric(t, "coredns_nodecache_setup_errors_total", errFirewall)
	fw.say(func() { fw.fault = func(string) error { return setupError(errFirewall, errors.New("no rules today")) } })
	eventually(t, "it is not ready", func() bool { return !n.ready.Load() })
	eventually(t, "the error is counted", func() bool { return metric(t, "coredns_nodecache_setup_errors_total", errFirewall) > before })
	fw.say(func() { fw.fault = nil })
	eventually(t, "it is ready again", n.ready.Load)
}

func TestFightIsFoughtSlowly(t *testing.T) {
	n, _ := newTestNode(t)
	up(t, n, demand(t, "", "", "169.254.20.10"))
	fighting := func() (yes bool) {
		n.do(func() error { yes = n.fighting; return nil })
		return yes
	}
	for i := 0; !fighting(); i++ {
		if i == 100 {
			t.Fatal("100 repairs in a row are not slowed down")
		}
		delAddr(t, testLink, "169.254.20.10/32")
		eventually(t, "the address is back", func() bool { return len(carried(t, testLink)) == 1 })
	}
}

func TestSurplusAddressGoesWithSync(t *testing.T) {
	n, _ := newTestNode(t)
	up(t, n, demand(t, "", "sync 100ms", "169.254.20.10"))
	addAddr(t, testLink, "192.0.2.9/32")
	eventually(t, "the surplus address is gone", func() bool { return len(carried(t, testLink)) == 1 })
}

// However often something fails meanwhile, one try is to come.
func TestRetriesDoNotPileUp(t *testing.T) {
	cleanLinks(t)
	synctest.Test(t, func(t *testing.T) {
		n := newNode()
		defer n.beginExit()
		n.retry = make(chan struct{}, 100)
		n.firewalls[backendIPT] = &fakeFirewall{t: t, fault: func(string) error { return errors.New("not now") }}
		n.want = desired.State{Rules: map[string][]desired.Endpoint{backendIPT: dnsOn("169.254.20.10")}}
		n.reduceTo(desired.State{})
		for range 20 {
			n.repair(false, "a check")
		}
		time.Sleep(n.pause + retryFirst)
		if len(n.retry) != 1 {
			t.Errorf("%d tries are due", len(n.retry))
		}
	})
}

// Of a program that does not cease to change the node the reports do not pile up.
func TestReportsDoNotPileUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode()
		defer n.beginExit()
		for n.calm.Allow() {
		}
		c := make(chan struct{}, 100)
		for range 20 {
			n.onReport(c, true)
		}
		time.Sleep(2 * time.Second)
		if len(c) != 1 {
			t.Errorf("%d reports wait to be looked at", len(c))
		}
	})
}

// While rules can't be taken away, a check must not put them in force again: nobody
// listens there any more.
func TestCheckServesWhatIsListenedOnOnly(t *testing.T) {
	n, fw := newTestNode(t)
	old := demand(t, "", "", "169.254.20.10", "10.96.0.10")
	oldSocks := up(t, n, old)
	next := demand(t, "", "", "169.254.20.10")
	n.restarting(old, true)
	must(t, n.start(next))
	serveOn(t, next.listeners()...)
	closeAll(oldSocks)
	fw.say(func() { fw.fault = func(string) error { return errors.New("not now") } })
	n.replaced(old)
	for _, links := range []bool{false, true} {
		must(t, n.do(func() error { n.repair(links, "a test"); return nil }))
		if _, served := fw.stand(); !slices.Equal(served, dnsOn("169.254.20.10")) {
			t.Errorf("in force are rules for %v", served)
		}
	}
	fw.say(func() { fw.fault = nil })
	eventually(t, "it has gone", func() bool { return slices.Equal(carried(t, testLink), addrs("169.254.20.10")) })
}
