package e2e

import (
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

const (
	triesAgain = "and the configuration before it stays in force; trying again in "
	metricsAt  = "127.0.0.1:9253"
)

// corefileInForce returns the series that says which Corefile is in force.
func (n *node) corefileInForce() (hash string) {
	n.Helper()
	for name := range n.metrics(metricsAt) {
		if strings.HasPrefix(name, "corefile_info{") {
			if hash != "" {
				n.Errorf("two Corefiles are in force: %s, %s", hash, name)
			}
			hash = name
		}
	}
	if hash == "" {
		n.Error("no Corefile is said to be in force")
	}
	return hash
}

// A reload that fails for a reason that passes is tried again by itself; until then, and
// where it is taken back, what is in force is what is shown.
func TestReloadIsTriedAgain(t *testing.T) {
	monitored := func(n *node, corefile string) string {
		return corefile + "lab.test {\n bind 127.0.0.1\n prometheus " + metricsAt + "\n}\n"
	}
	// A port that is not free, and a lock that another program has.
	port := func(n *node) (after string, pass func()) {
		return n.corefile() + plainBlock("late.test:5300", "10.0.1.1"), n.hold("tcp", 5300)
	}
	lock := func(n *node) (after string, pass func()) {
		return n.block(".:53", allAddrs+" 10.96.0.53"), n.lock()
	}
	for _, c := range []struct {
		name   string
		reason func(*node) (after string, pass func())
		b      backend
		by     string
	}{
		{"port-by-signal", port, nftables, "signal"},
		{"port-by-plugin", port, nftables, "plugin"},
		{"lock-by-plugin", lock, iptablesLegacy, "plugin"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, c.b)
			empty := n.snapshot()
			before := monitored(n, n.corefile())
			if c.by == "plugin" {
				before = reloading(before)
			}
			p := n.serve(before)
			loads := n.start(n.everywhere(100, addrs...)...)
			old := n.corefileInForce()
			was := n.snapshot()
			n.shows(metricsAt, map[string]float64{"reload_pending": 0})

			after, pass := c.reason(n)
			after = monitored(n, after)
			if c.by == "plugin" {
				after = reloading(after)
			}
			mark := p.Mark()
			n.must(p.Configure(after))
			if c.by == "signal" {
				n.must(p.Signal(syscall.SIGUSR1))
			}
			// Twice, with a longer pause.
			n.must(p.WaitLog(mark, triesAgain+"1s"))
			n.must(p.WaitLog(mark, triesAgain+"2s"))
			n.shows(metricsAt, map[string]float64{"reload_pending": 1})
			if now := n.corefileInForce(); now != old {
				t.Errorf("%s is said to be in force, want %s", now, old)
			}
			pass()
			n.must(p.WaitLog(mark, "the Corefile is in force now, after "))
			n.must(p.WaitLog(mark, inPlace))
			n.shows(metricsAt, map[string]float64{"reload_pending": 0})
			if now := n.corefileInForce(); now == old {
				t.Errorf("%s is still said to be in force", now)
			}

			// The next one is none the worse for it, by the plugin too.
			mark = p.Mark()
			n.must(p.Configure(before))
			if c.by == "signal" {
				n.must(p.Signal(syscall.SIGUSR1))
			}
			n.must(p.WaitReload(mark))
			n.must(p.WaitLog(mark, inPlace))
			n.becomes("after the Corefile is as it was", was)
			if now := n.corefileInForce(); now != old {
				t.Errorf("%s is said to be in force, want %s", now, old)
			}
			n.stop(loads)
			p.exit(syscall.SIGTERM)
			n.becomes("after the exit", empty)
		})
	}
}

// A Corefile that is mended, or is again as it was, is not tried any more; and an exit waits
// for no try.
func TestReloadIsNotTriedForEver(t *testing.T) {
	n := newNode(t, nftables)
	empty := n.snapshot()
	good := n.corefile() + "lab.test {\n bind 127.0.0.1\n prometheus " + metricsAt + "\n}\n"
	p := n.serve(good)
	release := n.hold("tcp", 5300)
	bad := good + plainBlock("late.test:5300", "10.0.1.1")

	mark := p.Mark()
	if err := p.Reload(bad); err == nil {
		t.Fatal("the reload succeeded")
	}
	n.must(p.Configure(good)) // and no signal
	n.must(p.WaitLog(mark, "the Corefile is again the one that is in force"))
	n.shows(metricsAt, map[string]float64{"reload_pending": 0})

	// What is plainly wrong takes its time, and is over when a good one comes.
	mark = p.Mark()
	if err := p.Reload(good + "wrong.test {\n nonsense\n}\n"); err == nil {
		t.Fatal("the reload succeeded")
	}
	n.has(p.Log()[mark:], triesAgain+"30s")
	n.shows(metricsAt, map[string]float64{"reload_pending": 1})
	p.reload(good + "# mended\n")
	n.shows(metricsAt, map[string]float64{"reload_pending": 0})

	if err := p.Reload(bad); err == nil {
		t.Fatal("the reload succeeded")
	}
	p.exit(syscall.SIGTERM)
	release()
	n.becomes("after the exit", empty)
}

// A signal and the reload plugin can be there at the same time. Each replaces what the other
// has brought, not what that has replaced.
func TestReloadsAtOnce(t *testing.T) {
	n := newNode(t, nftables)
	empty := n.snapshot()
	p := n.serve(reloading(n.corefile()))
	loads := n.start(n.everywhere(200, addrs...)...)
	for i := range scale(30) {
		mark := p.Mark()
		n.must(p.Configure(reloading(n.corefile()) + strings.Repeat("#", i) + plainBlock("a.test:54", "10.0.1.1")))
		n.must(p.Signal(syscall.SIGUSR1))
		n.must(p.Signal(syscall.SIGUSR1))
		n.must(p.WaitLog(mark, inPlace))
	}
	n.sent(loads, 5)
	n.stop(loads)
	p.exit(syscall.SIGTERM)
	n.becomes("after the exit", empty)
}

// A reload that brings the directive to a Corefile without it is tried again too.
func TestReloadThatBringsTheDirectiveIsTriedAgain(t *testing.T) {
	n := newNode(t, nftables)
	p := n.serve(plainBlock(".:53", "10.0.1.1"))
	release := n.hold("tcp", 5300)
	mark := p.Mark()
	if err := p.Reload(n.corefile() + plainBlock("late.test:5300", "10.0.1.1")); err == nil {
		t.Fatal("the reload succeeded")
	}
	n.must(p.WaitLog(mark, triesAgain+"1s"))
	release()
	n.must(p.WaitLog(mark, inPlace))
	n.run(lab.Load{From: n.Pod, Proto: "udp", To: on(lab.ClusterIP), Count: 5}, false)
}

// After a reload by the signal the reload plugin goes on to look at the file. In CoreDNS itself
// it does not.
func TestReloadPluginSurvivesTheSignal(t *testing.T) {
	n := newNode(t, nftables)
	p := n.serve(reloading(n.corefile()))
	p.reload(reloading(n.corefile()))
	for i := range 2 {
		mark := p.Mark()
		n.must(p.Configure(reloading(n.corefile()) + plainBlock(fmt.Sprintf("a%d.test:54", i), "10.0.1.1")))
		n.must(p.WaitReload(mark))
	}
}
