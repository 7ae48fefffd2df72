package nodecache

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
)

// fakeFirewall notes what it is told and what the link carried then.
type fakeFirewall struct {
	t  testing.TB
	mu sync.Mutex
	// calls are such as "ensure 10.96.0.10:53/udp,10.96.0.10:53/tcp on 10.96.0.10".
	calls  []string
	rules  []desired.Endpoint // as ensured
	served []desired.Endpoint
	lost   int // how many the next ensure finds missing
	heeded standing
	fault  func(call string) error
	during func(call string)
}

func (f *fakeFirewall) call(what string, es []desired.Endpoint) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, fmt.Sprintf("%s %s on %s", what, list(es), list(carried(f.t, testLink))))
	if f.during != nil {
		f.during(what)
	}
	if f.fault != nil {
		return f.fault(what)
	}
	return nil
}

func (f *fakeFirewall) ensure(_ context.Context, own []desired.Endpoint, o standing) (int, error) {
	if err := f.call("ensure", own); err != nil {
		return 0, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.lost
	es := slices.Clone(own)
	if o.unknown {
		es = desired.State{Rules: map[string][]desired.Endpoint{"": append(es, f.rules...)}}.Sorted().Rules[""]
	}
	f.rules, f.lost, f.heeded = es, 0, o
	return n, nil
}

func (f *fakeFirewall) serve(es []desired.Endpoint) {
	f.call("serve", es)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.served = slices.Clone(es)
}

func (f *fakeFirewall) leave(_ context.Context, gone []desired.Endpoint) error {
	return f.call("leave", gone)
}

func (f *fakeFirewall) String() string { return "fake" }

// stand returns what is ensured and what is served.
func (f *fakeFirewall) stand() (rules, served []desired.Endpoint) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.rules), slices.Clone(f.served)
}

// keeps returns what the last ensure was told that others want.
func (f *fakeFirewall) keeps() []desired.Endpoint {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.heeded.others
}

// heard returns and forgets the calls.
func (f *fakeFirewall) heard() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls := f.calls
	f.calls = nil
	return calls
}

// say sets what happens at the next calls.
func (f *fakeFirewall) say(set func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	set()
}

func list[T fmt.Stringer](vs []T) string {
	var s []string
	for _, v := range vs {
		s = append(s, v.String())
	}
	return strings.Join(s, ",")
}

// newTestNode returns what one process has, with a fake firewall. Its link is
// a real one. It leaves when the test is over, and the links have to be as before.
func newTestNode(t *testing.T) (*node, *fakeFirewall) {
	t.Helper()
	needRoot(t)
	cleanLinks(t)
	n, fw := newNode(), &fakeFirewall{t: t}
	n.firewalls[backendIPT] = fw
	t.Cleanup(n.exit)
	return n, fw
}

// demand is what a Corefile asks for that binds to the addresses.
func demand(t testing.TB, arguments, properties string, addresses ...string) *config {
	t.Helper()
	in := corefile{
		directive: fmt.Sprintf("nodecache %s {\ninterface %s\nfirewall iptables\n%s\n}", arguments, testLink, properties),
		hosts:     strings.Join(addresses, " "),
		keys:      dns53,
	}
	cfg, err := read(in)
	must(t, err)
	return cfg
}

func dnsOf(addresses ...string) string { return list(dnsOn(addresses...)) }

// up starts cfg as the process's first and waits until it is complete.
func up(t *testing.T, n *node, cfg *config) []*socket {
	t.Helper()
	must(t, n.start(cfg))
	socks := serveOn(t, cfg.listeners()...)
	eventually(t, "the start is complete", n.ready.Load)
	return socks
}

func closeAll(socks []*socket) {
	for _, s := range socks {
		s.Close()
	}
}

func wantCalls(t *testing.T, fw *fakeFirewall, want ...string) {
	t.Helper()
	if got := fw.heard(); !slices.Equal(got, want) {
		t.Errorf("the firewall heard\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestStartPutsAddressesBeforeRulesAndServesWhenListening(t *testing.T) {
	n, fw := newTestNode(t)
	cfg := demand(t, "", "", "169.254.20.10", "10.96.0.10", "fd00:20::10")
	es := dnsOf("10.96.0.10", "169.254.20.10", "fd00:20::10")
	must(t, n.start(cfg))
	wantCarried(t, testLink, "10.96.0.10", "169.254.20.10", "fd00:20::10")
	wantCalls(t, fw, "ensure "+es+" on 10.96.0.10,169.254.20.10,fd00:20::10")

	// One socket is missing yet: nothing may be in force.
	ls := cfg.listeners()
	serveOn(t, ls[1:]...)
	if n.ready.Load() || len(fw.heard()) != 0 {
		t.Error("it is complete before CoreDNS listens everywhere")
	}
	serveOn(t, ls[0])
	eventually(t, "the start is complete", n.ready.Load)
	wantCalls(t, fw, "serve "+es+" on 10.96.0.10,169.254.20.10,fd00:20::10")
}

func TestExitTakesRulesBeforeAddresses(t *testing.T) {
	n, fw := newTestNode(t)
	up(t, n, demand(t, "", "", "169.254.20.10", "fd00:20::10"))
	es := dnsOf("169.254.20.10", "fd00:20::10")
	fw.heard()
	n.exit()
	// Before the listening sockets go the node's own programs go elsewhere.
	wantCalls(t, fw, "leave "+es+" on 169.254.20.10,fd00:20::10", "serve  on 169.254.20.10,fd00:20::10", "ensure  on 169.254.20.10,fd00:20::10")
	if got := carried(t, testLink); got != nil {
		t.Errorf("the link is left, with %v", got)
	}
	if n.ready.Load() {
		t.Error("it is still ready")
	}
	n.exit()
	if err := n.start(demand(t, "", "", "169.254.20.10")); err == nil {
		t.Error("a start after the exit")
	}
	wantCalls(t, fw)
}

func TestExitWithoutStart(t *testing.T) {
	n, fw := newTestNode(t)
	n.exit()
	wantCalls(t, fw)
}

func TestExitBeforeListening(t *testing.T) {
	n, fw := newTestNode(t)
	must(t, n.start(demand(t, "", "", "169.254.20.10")))
	n.exit()
	if rules, _ := fw.stand(); len(rules) != 0 || carried(t, testLink) != nil {
		t.Errorf("left are the rules %v and %v on the link", rules, carried(t, testLink))
	}
}

func TestExitAnswersWhatHasArrived(t *testing.T) {
	n, fw := newTestNode(t)
	// Link-local: no cluster would answer it. The other one goes to the cluster.
	cfg := demand(t, "", "", "169.254.20.10", "10.96.0.10")
	socks := up(t, n, cfg)
	fw.heard()
	open := n.answering.Begin()
	for _, s := range socks {
		if s.UDP != nil {
			_, err := dialUDP(t, s.E).Write([]byte("query"))
			must(t, err)
		}
	}
	done := make(chan bool)
	go func() { n.exit(); close(done) }()
	buf := make([]byte, 10)
	for _, s := range socks {
		if s.UDP != nil {
			must(t, s.UDP.SetReadDeadline(time.Now().Add(5*time.Second)))
			if _, err := s.UDP.Read(buf); err != nil {
				t.Errorf("%s: what had arrived is lost: %v", s.E, err)
			}
		}
	}
	eventually(t, "the drain waits for answers", func() bool { return n.answering.Generation() > 0 })
	wantCarried(t, testLink, "169.254.20.10", "10.96.0.10")
	wantCalls(t, fw, "leave "+dnsOf("10.96.0.10", "169.254.20.10")+" on 10.96.0.10,169.254.20.10")
	select {
	case <-done:
		t.Error("it has left with a query unanswered")
	default:
	}
	open.Add(-1)
	<-done
	if got := carried(t, testLink); got != nil {
		t.Errorf("the link is left, with %v", got)
	}
}

// running returns how many goroutines are in one of node's methods.
func running(method string) int {
	stacks := make([]byte, 1<<20)
	return strings.Count(string(stacks[:runtime.Stack(stacks, true)]), "nodecache.(*node)."+method+"(")
}

func TestSecondExitWaitsForFirst(t *testing.T) {
	n, fw := newTestNode(t)
	up(t, n, demand(t, "", "", "169.254.20.10"))
	entered, release := make(chan bool), make(chan bool)
	var once sync.Once
	fw.say(func() {
		fw.during = func(what string) {
			if what == "leave" {
				once.Do(func() { close(entered) })
				<-release
			}
		}
	})
	var returned atomic.Int32
	var both sync.WaitGroup
	exit := func() { n.exit(); returned.Add(1) }
	both.Go(exit)
	<-entered
	both.Go(exit)
	eventually(t, "the second one waits, or has returned", func() bool { return returned.Load() > 0 || running("exit") == 2 })
	if returned.Load() > 0 {
		t.Error("the second exit has not waited")
	}
	close(release)
	both.Wait()
}

func TestSkipteardownKeepsItsBlocksOnly(t *testing.T) {
	n, fw := newTestNode(t)
	cfg, err := read(
		corefile{"nodecache skipteardown {\ninterface nctest0\nfirewall iptables\n}", "169.254.20.10", dns53},
		corefile{"nodecache {\ninterface nctest0\nfirewall iptables\n}", "10.96.0.10", dns53},
	)
	must(t, err)
	up(t, n, cfg)
	fw.heard()
	n.exit()
	defer removeLink(t, testLink)
	both := " on 10.96.0.10,169.254.20.10"
	// The node's own programs go elsewhere at once, though the rules stay.
	wantCalls(t, fw, "leave "+dnsOf("10.96.0.10")+both, "serve "+both, "ensure "+dnsOf("169.254.20.10")+both)
	wantCarried(t, testLink, "169.254.20.10")
}

func TestStartAdoptsWhatKilledProcessHasLeft(t *testing.T) {
	n, _ := newTestNode(t)
	_, err := (&netif{name: testLink}).ensure(addrs("169.254.20.10", "192.0.2.99"))
	must(t, err)
	before, err := nodelinks.ByName(testLink)
	must(t, err)
	must(t, n.start(demand(t, "", "", "169.254.20.10", "fd00:20::10")))
	// Until it serves, nothing goes that somebody may use.
	wantCarried(t, testLink, "169.254.20.10", "192.0.2.99", "fd00:20::10")
	serveOn(t, dnsOn("169.254.20.10", "fd00:20::10")...)
	eventually(t, "the surplus address is gone", func() bool { return len(carried(t, testLink)) == 2 })
	wantCarried(t, testLink, "169.254.20.10", "fd00:20::10")
	after, err := nodelinks.ByName(testLink)
	must(t, err)
	if before.Attrs().Index != after.Attrs().Index {
		t.Error("the link is another one")
	}
}

// watchAddrs notes every address that goes, until the function it returns is called.
func watchAddrs(t *testing.T) (gone func() []string) {
	t.Helper()
	updates, done := make(chan netlink.AddrUpdate, 1000), make(chan struct{})
	must(t, netlink.AddrSubscribe(updates, done))
	return func() (list []string) {
		// An address of the test's own marks the end of what was reported.
		addAddr(t, "lo", "192.0.2.254/32")
		delAddr(t, "lo", "192.0.2.254/32")
		for {
			select {
			case u := <-updates:
				if u.NewAddr {
					continue
				}
				if u.LinkAddress.IP.String() == "192.0.2.254" {
					close(done)
					return list
				}
				list = append(list, u.LinkAddress.IP.String())
			case <-time.After(30 * time.Second):
				t.Fatal("no report of an address within 30 s")
			}
		}
	}
}

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
	wantCalls(t, fw, "ensure "+allDNS+" on "+all, "leave "+dnsOf("169.254.20.10")+" on "+all,
		"serve "+dnsOf("10.96.0.10", "fd00:20::10")+" on "+all)
	serveOn(t, next.listeners()...)
	var calls []string
	eventually(t, "the reload is complete", func() bool { calls = append(calls, fw.heard()...); return len(calls) > 0 })
	if want := []string{"serve " + dnsOf("10.96.0.10", "fd00:20::10", "fd00:20::11") + " on " + all}; !slices.Equal(calls, want) {
		t.Errorf("the firewall heard %q, want %q", calls, want)
	}
	closeAll(oldSocks)
	n.replaced(old)
	wantCarried(t, testLink, "10.96.0.10", "fd00:20::10", "fd00:20::11")
	rest := dnsOf("10.96.0.10", "fd00:20::10", "fd00:20::11")
	wantCalls(t, fw, "ensure "+rest+" on "+all, "serve "+rest+" on 10.96.0.10,fd00:20::10,fd00:20::11")
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
		return slices.ContainsFunc(fw.heard(), func(c string) bool { return strings.HasPrefix(c, "serve") })
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

// freebind opens sockets on addresses that are not on the node.
var freebind = net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
	if e := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1) }); e != nil {
		return e
	}
	return err
}}

func TestFailedStartLeavesEverythingAsBefore(t *testing.T) {
	type fault struct {
		name      string
		bring     func(t *testing.T, fw *fakeFirewall) // what will make it fail
		shouldErr string
	}
	faults := []fault{
		{"UDP port taken", func(t *testing.T, fw *fakeFirewall) {
			c, err := freebind.ListenPacket(t.Context(), "udp", "10.96.0.10:53")
			must(t, err)
			t.Cleanup(func() { c.Close() })
		}, "Testfile:1 - Error during parsing: 10.96.0.10:53/udp is taken by "},
		{"TCP port taken", func(t *testing.T, fw *fakeFirewall) {
			l, err := freebind.Listen(t.Context(), "tcp", "10.96.0.10:53")
			must(t, err)
			t.Cleanup(func() { l.Close() })
		}, "Testfile:1 - Error during parsing: 10.96.0.10:53/tcp is taken by "},
		{"IPv6 switched off", func(t *testing.T, fw *fakeFirewall) {
			sysctl(t, "net/ipv6/conf/default/disable_ipv6", "1")
			if l, _ := nodelinks.ByName(testLink); l != nil {
				t.Skip("the link has its own switch, which takes its addresses")
			}
		}, "IPv6 is switched off here"},
		{"no firewall", func(t *testing.T, fw *fakeFirewall) {
			failed := false
			fw.say(func() {
				fw.fault = func(what string) error {
					if what == "ensure" && !failed {
						failed = true
						return setupError(errFirewall, errors.New("no rules today"))
					}
					return nil
				}
			})
		}, "no rules today"},
	}
	for _, f := range faults {
		for _, reload := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, reload=%v", f.name, reload), func(t *testing.T) {
				n, fw := newTestNode(t)
				var want []desired.Endpoint
				old := demand(t, "", "", "127.0.0.53", "fd00:20::9")
				if reload {
					up(t, n, old)
					want = dnsOn("127.0.0.53", "fd00:20::9")
				}
				f.bring(t, fw)
				before, linksBefore := links(t), n.links()
				wantBefore, errorsBefore := n.want, metric(t, "coredns_nodecache_setup_errors_total", errFirewall)
				if reload {
					n.restarting(old, true)
				}
				err := n.start(demand(t, "", "", "10.96.0.10", "fd00:20::10"))
				wantError(t, err, f.shouldErr)
				if after := links(t); !slices.Equal(before, after) {
					t.Errorf("the links read %q, want %q", after, before)
				}
				if after := n.links(); !slices.Equal(linksBefore, after) {
					t.Errorf("links of ours are %v, want %v", after, linksBefore)
				}
				if rules, served := fw.stand(); list(rules) != list(want) || list(served) != list(want) {
					t.Errorf("rules are for %v, in force for %v, want %v", rules, served, want)
				}
				if fmt.Sprint(n.want) != fmt.Sprint(wantBefore) {
					t.Errorf("wanted is %v, want %v", n.want, wantBefore)
				}
				if f.name == "no firewall" {
					if after := metric(t, "coredns_nodecache_setup_errors_total", errFirewall); after != errorsBefore+1 {
						t.Errorf("the metric of errors went from %v to %v", errorsBefore, after)
					}
				}
				if n.ready.Load() != reload {
					t.Errorf("ready is %v", n.ready.Load())
				}
				if reload { // as caddy does then
					n.restarting(old, false)
					n.revert(old)
					wantCarried(t, testLink, "127.0.0.53", "fd00:20::9")
				}
			})
		}
	}
}

func TestFailedStartBesideForeignLink(t *testing.T) {
	n, fw := newTestNode(t)
	newOtherLink(t, testLink)
	before := links(t)
	err := n.start(demand(t, "", "", "169.254.20.10"))
	wantError(t, err, "a link of this name exists")
	if after := links(t); !slices.Equal(before, after) {
		t.Errorf("the links read %q, want %q", after, before)
	}
	if rules, _ := fw.stand(); len(rules) > 0 {
		t.Errorf("rules stand for %v", rules)
	}
	if names := n.links(); len(names) != 0 {
		t.Errorf("%v count as ours", names)
	}
}

func TestFailedUndoIsReported(t *testing.T) {
	n, fw := newTestNode(t)
	fw.say(func() { fw.fault = func(string) error { return errors.New("never") } })
	err := n.start(demand(t, "", "", "169.254.20.10"))
	wantError(t, err, "never; and taking back what had been done: never")
	if carried(t, testLink) != nil {
		t.Error("the link is left")
	}
	fw.say(func() { fw.fault = nil })
}

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
		if strings.HasPrefix(c, "ensure") {
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

func TestNothingIsRepairedAfterExit(t *testing.T) {
	n, fw := newTestNode(t)
	up(t, n, demand(t, "skipteardown", "sync 100ms", "169.254.20.10"))
	n.exit()
	fw.heard()
	removeLink(t, testLink)
	n.do(func() error { n.repair(false, "a test"); n.repair(true, "a test"); return nil })
	wantCalls(t, fw)
	if carried(t, testLink) != nil {
		t.Error("the link is back")
	}
}

// With the real backends: rules, link and sockets of one process.
func TestNodeWithRealFirewall(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		n, _ := newTestNode(t)
		delete(n.firewalls, backendIPT)
		up(t, n, demand(t, "", "", "169.254.20.10", "fd00:20::10"))
		fw := n.firewalls[backendIPT].(*iptables)
		whole := func() bool {
			text := v.rules(t)
			return strings.Contains(text, "queries of this node to 169.254.20.10:53/udp") && strings.Contains(text, "queries of this node to [fd00:20::10]:53/tcp")
		}
		if !whole() {
			t.Fatalf("rules are missing:\n%s", v.rules(t))
		}
		for _, program := range []string{"iptables", "ip6tables"} {
			before := repaired(t, objectRule)
			v.run(t, program, "-t", "raw", "-F")
			eventually(t, "flushed rules are counted", grown(t, objectRule, before)) // the sync of a minute is too late
			eventually(t, "they are back", whole)
		}
		for f, x := range fw.families {
			wantRules(t, v, x, ofFamily(dnsOn("169.254.20.10", "fd00:20::10"), f))
		}
		n.exit()
	})
}

func TestAutoFallsBackToNFTables(t *testing.T) {
	n, _ := newTestNode(t)
	delete(n.firewalls, backendIPT)
	dir := t.TempDir()
	for _, p := range programs {
		must(t, os.WriteFile(dir+"/"+p, []byte("#!/bin/sh\necho broken >&2\nexit 1\n"), 0o755))
	}
	t.Setenv("PATH", dir)
	cfg, err := read(corefile{"nodecache {\ninterface nctest0\n}", "169.254.20.10", dns53})
	must(t, err)
	up(t, n, cfg)
	if fw := n.firewalls[backendNFT]; fw == nil || n.firewalls[backendIPT] != nil {
		t.Errorf("the firewalls are %v", n.firewalls)
	}
	// Who asks for iptables gets it, or an error.
	m := newNode()
	defer m.exit()
	err = m.start(demand(t, "", "", "10.96.0.10"))
	wantError(t, err, "running iptables --version: exit status 1: broken")
}

func TestConfigs(t *testing.T) {
	same := func(b string) string { return b }
	a := demand(t, "", "sync 5s", "169.254.20.10")
	b := demand(t, "skipteardown", "", "169.254.20.10", "fd00:20::10")
	if got := a.sync(); got != 5*time.Second {
		t.Errorf("sync is %s", got)
	}
	if got := b.sync(); got != defaultSync {
		t.Errorf("sync is %s", got)
	}
	if u, w := a.state(false, same).Union(b.state(false, same)), b.state(false, same); fmt.Sprint(u) != fmt.Sprint(w) {
		t.Errorf("the union is %v, want %v", u, w)
	}
	if gone := b.state(false, same).Minus(a.state(false, same)); list(gone.Rules[backendIPT]) != dnsOf("fd00:20::10") || list(gone.Links[testLink]) != "fd00:20::10" {
		t.Errorf("gone are %v", gone)
	}
	if !a.state(true, same).Empty() || b.state(true, same).Empty() {
		t.Error("only the second one is kept")
	}
	var none *config
	if !none.state(false, same).Empty() {
		t.Error("no config wants something")
	}
	if a.auto() {
		t.Error("a has no auto")
	}
	if got := orNone(nil, "nothing") + orNone([]string{"a", "b"}, ""); got != "nothinga, b" {
		t.Errorf("got %q", got)
	}
}
