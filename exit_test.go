package nodecache

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
)

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
		if strings.HasPrefix(call, "ensure") {
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
