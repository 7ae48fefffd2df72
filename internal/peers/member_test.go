package peers

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

func TestMemberShowsWhatItWantsUntilItHides(t *testing.T) {
	needRoot(t)
	a, b := newMember(), newMember()
	defer b.Hide()
	p := presence{Links: map[string][]netip.Addr{testLink: addrs("169.254.20.10")}, Rules: toShow(dnsOn("fd00:20::10")), Serves: toShow([]desired.Endpoint{extraPort("10.96.0.10", 8080)})}
	ask := func() Others {
		o, err := a.Ask(AskLimit)
		must(t, err)
		return o
	}
	if o := ask(); !o.Wants.Empty() || len(o.Serves) > 0 || o.Unknown {
		t.Errorf("before anybody shows: %+v", o)
	}
	must(t, b.publish(p))
	for range 2 { // an accepted connection is no further member
		o := ask()
		if got := o.Wants.Links[testLink]; list(got) != "169.254.20.10" {
			t.Errorf("wanted on the link are %v", got)
		}
		if got := o.Wants.Rules[testShared]; list(got) != dnsOf("fd00:20::10") {
			t.Errorf("wanted rules are for %v", got)
		}
		if !o.Serves[extraPort("10.96.0.10", 8080)] || len(o.Serves) != 1 || o.Unknown {
			t.Errorf("served are %v, unknown %v", o.Serves, o.Unknown)
		}
	}
	p.LeavingLinks, p.LeavingRules = p.Links, p.Rules[:1]
	must(t, b.publish(p))
	if o := ask(); list(o.Leaving.Rules[testShared]) != list(shown(p.Rules[:1])) || list(o.Stays.Rules[testShared]) != list(shown(p.Rules[1:])) || len(o.Stays.Links) != 0 {
		t.Errorf("while it leaves: %+v", o)
	}
	must(t, b.publish(presence{}))
	if o := ask(); !o.Wants.Empty() || len(o.Serves) > 0 {
		t.Errorf("after it wants nothing: %+v", o)
	}
	b.Hide()
	b.Hide()
	if o := ask(); !o.Wants.Empty() || o.Unknown {
		t.Errorf("after it is gone: %+v", o)
	}
	must(t, b.publish(p))
	if o := ask(); o.Wants.Empty() {
		t.Error("it shows itself again, unseen")
	}
	// To oneself one is no other.
	if o, err := b.Ask(AskLimit); err != nil || !o.Wants.Empty() {
		t.Errorf("it sees itself: %+v, error %v", o, err)
	}
}

// The open copy is what a program has between its fork and its exec.
func TestMemberShowsItselfAgainWhileItsSocketIsOpenElsewhere(t *testing.T) {
	needRoot(t)
	m := newMember()
	defer m.Hide()
	must(t, m.publish(presence{}))
	held, err := m.listener.(*net.UnixListener).File()
	must(t, err)
	m.Hide()
	time.AfterFunc(10*turnPoll, func() { held.Close() })
	must(t, m.publish(presence{}))
}
