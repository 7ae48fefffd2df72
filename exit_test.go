package nodecache

import (
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
)

func TestExitTakesRulesBeforeAddresses(t *testing.T) {
	n, fw := newTestNode(t)
	up(t, n, demand(t, "", "", "169.254.20.10", "fd00:20::10"))
	es := dnsOf("169.254.20.10", "fd00:20::10")
	fw.heard()
	n.exit()
	// Before the listening sockets go the node's own programs go elsewhere.
	wantCalls(t, fw, "withdraw "+es+" on 169.254.20.10,fd00:20::10", "enforce  on 169.254.20.10,fd00:20::10", "apply  on 169.254.20.10,fd00:20::10")
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
	wantCalls(t, fw, "withdraw "+dnsOf("10.96.0.10", "169.254.20.10")+" on 10.96.0.10,169.254.20.10")
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

func TestSecondExitWaitsForFirst(t *testing.T) {
	n, fw := newTestNode(t)
	up(t, n, demand(t, "", "", "169.254.20.10"))
	entered, release := make(chan bool), make(chan bool)
	var once sync.Once
	fw.say(func() {
		fw.during = func(what string) {
			if what == "withdraw" {
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
	wantCalls(t, fw, "withdraw "+dnsOf("10.96.0.10")+both, "enforce "+both, "apply "+dnsOf("169.254.20.10")+both)
	wantCarried(t, testLink, "169.254.20.10")
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

// A lameduck may have taken all the time of an exit: what has arrived is answered still.
func TestExitAfterLongLameduckAnswersWhatHasArrived(t *testing.T) {
	n, _ := newTestNode(t)
	up(t, n, demand(t, "", "", "169.254.20.10"))
	must(t, n.do(func() error { n.exitBegan = time.Now().Add(-2 * exitLimit); return nil }))
	open := n.answering.Begin()
	before := metric(t, "coredns_nodecache_drains_total", "cut_short")
	time.AfterFunc(100*time.Millisecond, func() { open.Add(-1) })
	n.exit()
	if after := metric(t, "coredns_nodecache_drains_total", "cut_short"); after != before {
		t.Error("the query was given up")
	}
}

// The time of an exit begins with the signal, not when a repair under way has ended.
func TestExitBeginsWithSignal(t *testing.T) {
	n, _ := newTestNode(t)
	cfg := demand(t, "", "", "169.254.20.10")
	up(t, n, cfg)
	busy, release := make(chan bool), make(chan bool)
	go n.do(func() error { close(busy); <-release; return nil })
	<-busy
	told := make(chan bool)
	go func() { n.replaced(cfg); close(told) }()
	eventually(t, "the exit waits", func() bool { return running("replaced") > 0 && running("do") > 1 })
	released := time.Now()
	close(release)
	<-told
	must(t, n.do(func() error {
		if n.exitBegan.IsZero() || n.exitBegan.After(released) {
			t.Errorf("it begins %s after the repair", n.exitBegan.Sub(released))
		}
		return nil
	}))
}

// To wait for a table to become readable would keep this process for all of an exit's time.
func TestExitDoesNotWaitForTableThatCannotBeRead(t *testing.T) {
	n, fw := newTestNode(t)
	up(t, n, demand(t, "", "", "169.254.20.10"))
	fw.heard()
	fw.say(func() {
		fw.fault = func(string) error {
			return setupError(errFirewall, unreadableError{errors.New("iptables can't read the table filter")})
		}
	})
	n.exit()
	tries := 0
	for _, call := range fw.heard() {
		if strings.HasPrefix(call, "apply") {
			tries++
		}
	}
	if tries != 1 {
		t.Errorf("the rules were tried %d times", tries)
	}
	if carried(t, testLink) != nil {
		t.Error("the link is left")
	}
}

// endsMeanwhile is a plugin in whose setup the signal to end comes: a reload is under way.
const endsMeanwhile = "endsmeanwhile"

func init() {
	plugin.Register(endsMeanwhile, func(*caddy.Controller) error {
		for _, i := range caddy.Instances() {
			i.ShutdownCallbacks()
		}
		theNode.exit()
		return errors.New("the process ends")
	})
}

func TestExitDuringReload(t *testing.T) {
	c := newCoreDNS(t)
	dnsserver.Directives = []string{"bind", "nodecache", endsMeanwhile, "whoami"}
	must(t, c.start(serverBlock("example.org", "skipteardown", "169.254.20.10")))
	defer removeLink(t, testLink)
	wantError(t, c.reload(strings.Replace(serverBlock("example.org", "skipteardown", "169.254.20.10"), "whoami", endsMeanwhile, 1)), "the process ends")
	wantCarried(t, testLink, "169.254.20.10")
	theNode.firewalls[backendNFT].(*nft).close() // which goes with the process
}
