package nodecache

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
)

func TestReloadAddsFirstAndReducesLast(t *testing.T) {
	n, fw := newTestNode(t)
	old := demand(t, "", "", "169.254.20.10", "10.96.0.10", "fd00:20::10")
	oldSocks := up(t, n, old)
	fw.heard()
	gone := watchAddrs(t)

	next := demand(t, "", "", "10.96.0.10", "fd00:20::10", "fd00:20::11")
	all := "10.96.0.10,169.254.20.10,fd00:20::10,fd00:20::11"
	allDNS := dnsOf("10.96.0.10", "169.254.20.10", "fd00:20::10", "fd00:20::11")
	n.restarting(old, true)
	must(t, n.start(next))
	// What goes is left while the old servers still read, and what stays goes on.
	wantCalls(t, fw, "apply "+allDNS+" on "+all, "withdraw "+dnsOf("169.254.20.10")+" on "+all,
		"enforce "+dnsOf("10.96.0.10", "fd00:20::10")+" on "+all)
	serveOn(t, next.listeners()...)
	var calls []string
	eventually(t, "the reload is complete", func() bool { calls = append(calls, fw.heard()...); return len(calls) > 0 })
	if want := []string{"enforce " + dnsOf("10.96.0.10", "fd00:20::10", "fd00:20::11") + " on " + all}; !slices.Equal(calls, want) {
		t.Errorf("the firewall heard %q, want %q", calls, want)
	}
	closeAll(oldSocks)
	n.replaced(old)
	wantCarried(t, testLink, "10.96.0.10", "fd00:20::10", "fd00:20::11")
	rest := dnsOf("10.96.0.10", "fd00:20::10", "fd00:20::11")
	wantCalls(t, fw, "apply "+rest+" on "+all, "enforce "+rest+" on 10.96.0.10,fd00:20::10,fd00:20::11")
	if got := gone(); !slices.Equal(got, []string{"169.254.20.10"}) {
		t.Errorf("gone, if only for a moment, are %v; want 169.254.20.10 alone", got)
	}
	if !n.ready.Load() {
		t.Error("it is not ready")
	}
	// What has stopped is the old one: an exit hereafter goes by the new one.
	n.replaced(old)
	wantCarried(t, testLink, "10.96.0.10", "fd00:20::10", "fd00:20::11")
}

func TestReloadOfSameTouchesNothing(t *testing.T) {
	n, fw := newTestNode(t)
	old, next := demand(t, "", "", "169.254.20.10", "fd00:20::10"), demand(t, "", "", "169.254.20.10", "fd00:20::10")
	oldSocks := up(t, n, old)
	fw.heard()
	before, err := nodelinks.ByName(testLink)
	must(t, err)
	gone := watchAddrs(t)
	n.restarting(old, true)
	must(t, n.start(next))
	serveOn(t, next.listeners()...)
	eventually(t, "the reload is complete", func() bool {
		return slices.ContainsFunc(fw.heard(), func(c string) bool { return strings.HasPrefix(c, "enforce") })
	})
	closeAll(oldSocks)
	n.replaced(old)
	if got := gone(); len(got) > 0 {
		t.Errorf("gone, if only for a moment, are %v", got)
	}
	after, err := nodelinks.ByName(testLink)
	must(t, err)
	if before.Attrs().Index != after.Attrs().Index {
		t.Error("the link is another one")
	}
	if rules, served := fw.stand(); list(rules) != list(dnsOn("169.254.20.10", "fd00:20::10")) || list(served) != list(rules) {
		t.Errorf("rules are for %v, in force for %v", rules, served)
	}
}

func TestFailedReloadLeavesWhatOldNeeds(t *testing.T) {
	for _, listened := range []bool{false, true} {
		t.Run(fmt.Sprintf("listened=%v", listened), func(t *testing.T) {
			n, fw := newTestNode(t)
			old := demand(t, "", "", "169.254.20.10", "fd00:20::10")
			up(t, n, old)
			before := links(t)
			gone := watchAddrs(t)
			next := demand(t, "", "", "10.96.0.10", "fd00:20::10")
			n.restarting(old, true)
			must(t, n.start(next))
			if listened { // and another plugin failed then
				fw.heard()
				closeAll(serveOn(t, next.listeners()...))
			}
			n.restarting(old, false)
			n.revert(old)
			if after := links(t); !slices.Equal(before, after) {
				t.Errorf("the links read %q, want %q", after, before)
			}
			want := dnsOn("169.254.20.10", "fd00:20::10")
			if rules, served := fw.stand(); list(rules) != list(want) || list(served) != list(want) {
				t.Errorf("rules are for %v, in force for %v, want %v", rules, served, want)
			}
			if got := gone(); !slices.Equal(got, []string{"10.96.0.10"}) {
				t.Errorf("gone, if only for a moment, are %v", got)
			}
			if !n.ready.Load() {
				t.Error("it is not ready")
			}
			n.revert(old) // a second time there is nothing to do
			n.replaced(old)
			wantCarried(t, testLink, "169.254.20.10", "fd00:20::10")
		})
	}
}

func TestReloadWithoutDirectiveTakesEverythingBack(t *testing.T) {
	n, fw := newTestNode(t)
	old := demand(t, "skipteardown", "", "169.254.20.10", "fd00:20::10")
	socks := up(t, n, old)
	n.restarting(old, true)
	closeAll(socks)
	n.replaced(old)
	if rules, served := fw.stand(); len(rules) != 0 || len(served) != 0 || carried(t, testLink) != nil {
		t.Errorf("left are the rules %v, served %v, and %v on the link", rules, served, carried(t, testLink))
	}
	if n.ready.Load() {
		t.Error("it is still ready")
	}
	// And back again.
	must(t, n.start(demand(t, "", "", "169.254.20.10")))
	serveOn(t, dnsOn("169.254.20.10")...)
	eventually(t, "the start is complete", n.ready.Load)
	wantCarried(t, testLink, "169.254.20.10")
}

func TestReloadBeforeFirstIsUp(t *testing.T) {
	n, fw := newTestNode(t)
	first, next := demand(t, "", "", "169.254.20.10"), demand(t, "", "", "10.96.0.10")
	must(t, n.start(first))
	n.restarting(first, true)
	must(t, n.start(next))
	serveOn(t, next.listeners()...)
	n.replaced(first)
	eventually(t, "the new one is complete", n.ready.Load)
	eventually(t, "nobody waits for the first one any more", func() bool { return running("await") == 0 })
	wantCarried(t, testLink, "10.96.0.10")
	if rules, _ := fw.stand(); list(rules) != dnsOf("10.96.0.10") {
		t.Errorf("the rules are for %v", rules)
	}
}

func TestShutdownThatIsNoReloadChangesNothing(t *testing.T) {
	n, fw := newTestNode(t)
	cfg := demand(t, "", "", "169.254.20.10")
	up(t, n, cfg)
	fw.heard()
	n.replaced(cfg) // its servers still answer; exit follows
	wantCalls(t, fw)
	wantCarried(t, testLink, "169.254.20.10")
}
