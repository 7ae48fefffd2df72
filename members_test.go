package nodecache

import (
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
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
	if !slices.ContainsFunc(calls, func(c string) bool { return strings.HasPrefix(c, "leave "+dnsOf("10.96.0.10")+" on") }) {
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
	l, err := net.Listen("unix", memberPrefix+"0000000000000001")
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
			if !fw.heeded.unknown {
				t.Error("the firewall does not know that somebody is silent")
			}
			addAddr(t, testLink, "192.0.2.9/32") // the silent one's
			n.exit()
			defer removeLink(t, testLink)
			wantCarried(t, testLink, "10.96.0.10", "192.0.2.9")
			if got := fw.heeded.alone; list(got) != dnsOf("169.254.20.10") {
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
	eventually(t, "the first one leaves", func() bool { return strings.Contains(strings.Join(aFW.heard(), " "), "leave ") })
	must(t, b.do(func() error { b.repair(false, "this test"); return nil }))
	wantRulesOf(t, "while the first one leaves, the second one", bFW, "169.254.20.10,fd00:20::10", "10.96.0.10,169.254.20.10")
	o, err := b.member.ask(askLimit)
	must(t, err)
	if len(o.serves) != 0 {
		t.Errorf("the one that leaves shows that it serves %v", o.serves)
	}
	open.Add(-1)
	<-left
	must(t, b.do(func() error { b.repair(false, "this test"); return nil }))
	wantRulesOf(t, "after the first one has left, the second one", bFW, "169.254.20.10,fd00:20::10", "")
}

func TestMemberShowsWhatItWantsUntilItHides(t *testing.T) {
	needRoot(t)
	a, b := newMember(), newMember()
	defer b.hide()
	p := presence{Links: map[string][]netip.Addr{testLink: addrs("169.254.20.10")}, Rules: show(dnsOn("fd00:20::10")), Serves: show([]desired.Endpoint{extraPort("10.96.0.10", 8080)})}
	ask := func() others {
		o, err := a.ask(askLimit)
		must(t, err)
		return o
	}
	if o := ask(); !o.wants.Empty() || len(o.serves) > 0 || o.unknown {
		t.Errorf("before anybody shows: %+v", o)
	}
	must(t, b.show(p))
	for range 2 { // an accepted connection is no further member
		o := ask()
		if got := o.wants.Links[testLink]; list(got) != "169.254.20.10" {
			t.Errorf("wanted on the link are %v", got)
		}
		if got := o.wants.Rules[backendIPT]; list(got) != dnsOf("fd00:20::10") {
			t.Errorf("wanted rules are for %v", got)
		}
		if !o.serves[extraPort("10.96.0.10", 8080)] || len(o.serves) != 1 || o.unknown {
			t.Errorf("served are %v, unknown %v", o.serves, o.unknown)
		}
	}
	p.LeavingLinks, p.LeavingRules = p.Links, p.Rules[:1]
	must(t, b.show(p))
	if o := ask(); list(o.leaving.Rules[backendIPT]) != list(shown(p.Rules[:1])) || list(o.stays.Rules[backendIPT]) != list(shown(p.Rules[1:])) || len(o.stays.Links) != 0 {
		t.Errorf("while it leaves: %+v", o)
	}
	must(t, b.show(presence{}))
	if o := ask(); !o.wants.Empty() || len(o.serves) > 0 {
		t.Errorf("after it wants nothing: %+v", o)
	}
	b.hide()
	b.hide()
	if o := ask(); !o.wants.Empty() || o.unknown {
		t.Errorf("after it is gone: %+v", o)
	}
	must(t, b.show(p))
	if o := ask(); o.wants.Empty() {
		t.Error("it shows itself again, unseen")
	}
	// To oneself one is no other.
	if o, err := b.ask(askLimit); err != nil || !o.wants.Empty() {
		t.Errorf("it sees itself: %+v, error %v", o, err)
	}
}

// The open copy is what a program has between its fork and its exec.
func TestMemberShowsItselfAgainWhileItsSocketIsOpenElsewhere(t *testing.T) {
	needRoot(t)
	m := newMember()
	defer m.hide()
	must(t, m.show(presence{}))
	held, err := m.listener.(*net.UnixListener).File()
	must(t, err)
	m.hide()
	time.AfterFunc(10*turnPoll, func() { held.Close() })
	must(t, m.show(presence{}))
}

func TestTurnsDoNotOverlap(t *testing.T) {
	needRoot(t)
	end, err := turn(t.Context(), turnLimit)
	must(t, err)
	second := make(chan func(), 1)
	asked := make(chan bool)
	go func() {
		close(asked)
		end, err := turn(t.Context(), turnLimit)
		if err != nil {
			t.Error(err)
		}
		second <- end
	}()
	<-asked
	if l, err := net.Listen("unix", lockNames[0]); err == nil {
		l.Close()
		t.Error("the turn is nobody's")
	}
	select {
	case <-second:
		t.Error("two have a turn at once")
	default:
	}
	end()
	(<-second)()
	end, err = turn(t.Context(), turnLimit)
	must(t, err)
	end()
}

// as does something as a user.
func as(t *testing.T, user int, do func()) {
	t.Helper()
	needRoot(t)
	// The user is this thread's alone. The saved one stays root, for the way back.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	become := func(user int) {
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(user), uintptr(user), ^uintptr(0)); errno != 0 {
			panic(errno) // the thread must not be used with the wrong user
		}
	}
	become(user)
	defer become(0)
	do()
}

// listenAs listens on a unix socket as a user's process, and shows there that it wants rules.
func listenAs(t *testing.T, user int, name string) {
	t.Helper()
	var l net.Listener
	as(t, user, func() {
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
	listenAs(t, 65534, memberPrefix+"0000000000000002")
	o, err := a.member.ask(askLimit)
	must(t, err)
	if o.unknown || !o.wants.Empty() || len(o.serves) > 0 || len(o.states) > 0 {
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
	listenAs(t, 0, memberPrefix+"0000000000000003")
	o, err := a.member.ask(askLimit)
	must(t, err)
	if o.wants.Empty() || o.states[processServing] != 1 {
		t.Errorf("of root's process it takes %+v", o)
	}
}

// Only what root says, or this process's own user, is counted.
func TestLastWordsOfOtherUsersAreIgnored(t *testing.T) {
	needRoot(t)
	const listener = "0000000000000004"
	c, err := hearLastWords(listener)
	must(t, err)
	defer c.Close()
	const givenUp = "coredns_nodecache_drain_queries_given_up_total"
	before := counted(t, givenUp)
	as(t, 65534, func() { lastWords{GivenUp: 1000}.send(lastWordsPrefix + listener) })
	as(t, 0, func() { lastWords{GivenUp: 1}.send(lastWordsPrefix + listener) })
	eventually(t, "root's are counted", func() bool { return counted(t, givenUp) != before })
	if got := counted(t, givenUp) - before; got != 1 {
		t.Errorf("counted %v queries, want 1", got)
	}
}

// A datagram leaves its receiver in another state than it has found it (unix_dgram_connect,
// Linux 6.18).
func TestLastWordsAreHeardMoreThanOnce(t *testing.T) {
	needRoot(t)
	c, err := hearLastWords("0000000000000005")
	must(t, err)
	defer c.Close()
	const givenUp = "coredns_nodecache_drain_queries_given_up_total"
	before := counted(t, givenUp)
	for k := range 3 {
		lastWords{GivenUp: 1}.tell("0000000000000006") // which counts them too
		eventually(t, fmt.Sprintf("exit %d is counted twice", k), func() bool { return counted(t, givenUp) == before+2*float64(k+1) })
	}
}
