package nodecache

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

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
