package e2e

import (
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// A reload takes away what it no longer needs once it can, and the next reloads come by
// themselves all the same.
func TestReloadWhileTheLockIsHeld(t *testing.T) {
	n := newNode(t, iptablesLegacy)
	watched := func(bind string) string {
		return strings.Replace(n.block(".:53", bind), "errors", "errors\n    reload 2s 0s\n    health 127.0.0.1:8085", 1)
	}
	p := n.serve(watched(allAddrs))
	release := n.lock()
	mark := p.Mark()
	n.must(p.Configure(watched("10.96.0.10 fd00:20::10 fd00:96::10")))
	n.must(p.WaitReload(mark))
	release()
	mark = p.Mark()
	last := watched("10.96.0.10 fd00:96::10")
	n.must(p.Configure(last))
	n.must(p.WaitReload(mark))
	n.run(lab.Load{From: n.Pod, Proto: "udp", To: on(clusterIPs...), Count: 20}, false)

	fresh := newNode(t, iptablesLegacy)
	fresh.serve(last)
	n.becomes("after reloads with the lock held", fresh.snapshot())
	p.exit(syscall.SIGTERM)
}

// listen takes a name in the node's abstract namespace as root's process that never
// answers; with backlog -1 it does not even listen.
func (n *node) listen(name string, backlog int) {
	n.Helper()
	n.must(n.Node.Do(func() error {
		fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		n.Cleanup(func() { syscall.Close(fd) })
		if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: "@" + name}); err != nil || backlog < 0 {
			return err
		}
		return syscall.Listen(fd, backlog)
	}))
}

// The last one out leaves nothing although everything that it may have to wait for is
// stuck: the lock of iptables, a twin that has been stopped, one that only pretends to be
// one, and the turn. What the stopped twin serves stays, also where it has never said what
// that is.
func TestExitBesideWhatIsStuck(t *testing.T) {
	for _, first := range []string{"stopped-later", "stopped-before"} {
		t.Run(first, func(t *testing.T) { exitBesideWhatIsStuck(newNode(t, iptablesLegacy), first == "stopped-before") })
	}
}

func exitBesideWhatIsStuck(n *node, stoppedBefore bool) {
	twin := n.serve(n.block(".:53", "10.96.0.10"))
	if stoppedBefore {
		n.must(twin.Signal(syscall.SIGSTOP))
	}
	p := n.serve(n.corefile())
	n.must(twin.Signal(syscall.SIGSTOP))
	n.listen("nodecache/member/0123456789abcdef", 5)
	n.listen("nodecache/lock", 5)
	release := n.lock()
	mark := p.Mark()
	began := time.Now()
	n.must(p.Signal(syscall.SIGTERM))
	n.must(p.WaitLog(mark, "xtables lock"))
	time.AfterFunc(12*time.Second, release) // longer than a whole exit would wait for it once
	_, err := p.Wait()
	n.must(err)
	n.Logf("the exit took %s, of which the lock was held for 12 s", time.Since(began).Round(time.Millisecond))
	if strings.Contains(p.Log()[mark:], "not all of nodecache is off the node") {
		n.Error("something has stayed")
	}
	left := n.snapshot()
	for _, gone := range []string{"169.254.20.10", "fd00:20::10", "fd00:96::10"} {
		for line := range strings.Lines(left) {
			if strings.Contains(line, gone) && (strings.Contains(line, "inet") || strings.Contains(line, "NODECACHE")) {
				n.Errorf("left is %s", line)
			}
		}
	}
	n.has(left, "10.96.0.10/32")
	n.must(twin.Signal(syscall.SIGCONT))
	n.run(lab.Load{From: n.Pod, Proto: "udp", To: on(lab.ClusterIP), Count: 20}, false)
}

// A signal ends a start that waits for the lock of iptables, which leaves nothing.
func TestExitOfStartThatWaitsForLock(t *testing.T) {
	n := newNode(t, iptablesLegacy)
	before := n.snapshot()
	defer n.lock()()
	p := n.launch(n.corefile(), lab.Options{})
	n.must(p.WaitLog(0, "xtables lock"))
	mark := p.Mark()
	p.exit(syscall.SIGTERM)
	if said := p.Log()[mark:]; strings.Contains(said, "still running") {
		n.Errorf("it has gone on to wait:\n%s", said)
	}
	n.same("after the exit", before, n.snapshot())
}
