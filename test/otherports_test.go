package e2e

import (
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
	"github.com/vishvananda/netlink"
)

// occupy listens on an address of the node as a program does that shares it with nobody.
func (n *node) occupy(at string) (free func()) {
	n.Helper()
	var l net.Listener
	n.must(n.Node.Do(func() (err error) { l, err = net.Listen("tcp", at); return err }))
	n.Cleanup(func() { l.Close() })
	return func() { l.Close() }
}

// Where another plugin or another block fails to start, nobody calls nodecache back. What
// can be known before is told before, and in any case the node is as it was.
func TestStartFailsInAnotherPlugin(t *testing.T) {
	for name, broken := range map[string]struct {
		corefile string
		said     string // beside the log's last line, that of CoreDNS
	}{
		"port-of-health-taken":             {plainBlock("health.:5400", "10.0.1.1", "health 10.0.1.1:5300"), "health: 10.0.1.1:5300/tcp is taken by "},
		"port-of-health-taken-everywhere":  {plainBlock("health.:5400", "10.0.1.1", "health :5300"), "health: [::]:5300/tcp is taken by "},
		"port-of-another-block-taken":      {plainBlock("other.:5300", "10.0.1.1"), "10.0.1.1:5300/udp is taken by "},
		"port-of-block-for-all-taken":      {"other.:5300 {\n whoami\n}\n", "[::]:5300/tcp is taken by "},
		"port-of-loopback-taken":           {plainBlock("tls://other.:5300", "127.0.0.1"), "127.0.0.1:5300/tcp is taken by "},
		"address-of-health-nowhere":        {plainBlock("health.:5400", "10.0.1.1", "health 203.0.113.1:5400"), ""},
		"address-of-another-block-nowhere": {plainBlock("other.:5400", "203.0.113.1"), ""},
		"bad-block-below":                  {plainBlock("other.:5400", "10.0.1.1", "nonsense"), ""},
	} {
		t.Run(name, func(t *testing.T) {
			forBackends(t, func(n *node) {
				n.furnish()
				for _, proto := range protos {
					n.hold(proto, 5300)
				}
				before := n.snapshot()
				said := n.refuse(n.corefile()+broken.corefile, lab.Options{})
				n.same("after a start that failed", before, n.snapshot())
				if broken.said != "" {
					n.has(said, "/Corefile:", broken.said, fmt.Sprintf("(process %d, bound to [::]:5300)", os.Getpid()))
				}
				p := n.serve(n.corefile())
				n.answersEverybody(false, addrs...)
				p.exit(syscall.SIGTERM)
				n.same("after the next exit", before, n.snapshot())
			})
		})
	}
}

// A failed start leaves to another process what that has on the node.
func TestFailedStartSparesAnotherProcess(t *testing.T) {
	forBackends(t, func(n *node) {
		before := n.snapshot()
		p := n.serve(n.corefile())
		served := n.snapshot()
		n.refuse(n.corefile()+plainBlock("other.:5400", "203.0.113.1"), lab.Options{})
		n.becomes("beside a start that failed", served)
		n.answersEverybody(false, addrs...)
		p.exit(syscall.SIGTERM)
		n.same("after the exit", before, n.snapshot())
	})
}

// A signal that ends the process while it starts leaves nothing on the node either.
func TestSignalWhileStarting(t *testing.T) {
	forBackends(t, func(n *node) {
		before := n.snapshot()
		for range scale(5) {
			p := n.launch(n.corefile(), lab.Options{})
			if !eventually(func() bool {
				return n.Node.Do(func() error { _, err := netlink.LinkByName("nodelocaldns"); return err }) == nil
			}) {
				n.Fatal("there is no link")
			}
			if _, err := p.Stop(syscall.SIGTERM); err != nil {
				n.Fatal(err)
			}
			n.same("after a start that was ended", before, n.snapshot())
		}
	})
}

// latePlugin is one without which DNS is served.
type latePlugin struct {
	name, line string
	path, page string // what it has to say, once it listens
}

var latePlugins = []latePlugin{
	{"ready", "ready 127.0.0.1:5301", "/ready", "OK"},
	{"prometheus", "prometheus 127.0.0.1:5301", "/metrics", "coredns_nodecache_ready 1"},
	{"pprof", "pprof 127.0.0.1:5301", "/debug/pprof/", "goroutine"},
}

func (n *node) withLate(l latePlugin, properties ...string) string {
	return n.corefile(properties...) + plainBlock("late.:5400", "10.0.1.1", l.line)
}

// listens waits until the plugin has its port.
func (n *node) listens(p *process, l latePlugin) {
	n.Helper()
	n.must(p.WaitLog(0, "plugin/nodecache: "+l.name+" listens now"))
	page, err := get(n.Node, "http://127.0.0.1:5301"+l.path)
	n.must(err)
	n.has(page, l.page)
}

// A plugin that DNS can do without does not keep the cache from starting, and listens as
// soon as its port is free.
func TestPortOfOtherPluginTaken(t *testing.T) {
	for _, l := range latePlugins {
		for _, at := range []string{"127.0.0.1:5301", "0.0.0.0:5301"} {
			t.Run(l.name+" "+at, func(t *testing.T) {
				n := newNode(t, nftables)
				before := n.snapshot()
				free := n.occupy(at)
				p := n.serve(n.withLate(l))
				bound := strings.Replace(at, "0.0.0.0", "[::]", 1)
				n.has(p.Log(), "/Corefile:19 - ", l.name+": 127.0.0.1:5301/tcp is taken by ", fmt.Sprintf("(process %d, bound to %s)", os.Getpid(), bound), "DNS is served all the same")
				n.answersEverybody(false, addrs...)
				free()
				n.listens(p, l)
				p.reload(n.withLate(l, "sync 10s"))
				page, err := get(n.Node, "http://127.0.0.1:5301"+l.path)
				n.must(err)
				n.has(page, l.page)
				p.exit(syscall.SIGTERM)
				n.same("after the exit", before, n.snapshot())
			})
		}
	}
}

// dnstap's port can't even be shared with another cache.
func TestPortOfDnstapTaken(t *testing.T) {
	n := newNode(t, nftables)
	with := n.corefile() + plainBlock("late.:5400", "10.0.1.1", "dnstap listen tcp://127.0.0.1:5301 full")
	first := n.serve(with)
	second := n.serve(with)
	n.has(second.Log(), "dnstap: 127.0.0.1:5301/tcp is taken by ", fmt.Sprintf("(process %d, bound to 127.0.0.1:5301)", first.Pid))
	first.exit(syscall.SIGTERM)
	n.must(second.WaitLog(0, "plugin/nodecache: dnstap listens now"))
	n.must(n.Node.Do(func() error {
		c, err := net.Dial("tcp", "127.0.0.1:5301")
		if err == nil {
			err = c.Close()
		}
		return err
	}))
}

// Reloads that succeed and that fail meanwhile change nothing about that.
func TestPortOfOtherPluginTakenThroughReloads(t *testing.T) {
	for _, l := range latePlugins {
		t.Run(l.name, func(t *testing.T) {
			n := newNode(t, nftables)
			free := n.occupy("127.0.0.1:5301")
			p := n.serve(n.withLate(l))
			if err := p.Reload(n.withLate(l) + plainBlock("other.:5400", "203.0.113.1")); err == nil {
				n.Fatal("a listener on an address that is nowhere")
			}
			p.reload(n.withLate(l, "sync 10s"))
			if err := p.Reload(n.withLate(l) + plainBlock("other.:5400", "203.0.113.1")); err == nil {
				n.Fatal("a listener on an address that is nowhere")
			}
			n.answersEverybody(false, addrs...)
			free()
			n.listens(p, l)
			p.exit(syscall.SIGTERM)
		})
	}
}

// What a reload brings is tried as well, and what is in force goes on.
func TestReloadToTakenPortOfHealth(t *testing.T) {
	n := newNode(t, nftables)
	n.occupy("127.0.0.1:5301")
	p := n.serve(n.corefile() + plainBlock("health.:5400", "10.0.1.1", "health 127.0.0.1:5302"))
	served := n.snapshot()
	err := p.Reload(n.corefile() + plainBlock("health.:5400", "10.0.1.1", "health 127.0.0.1:5301"))
	if err == nil {
		n.Fatal("the reload went well")
	}
	n.has(err.Error(), "health: 127.0.0.1:5301/tcp is taken by ")
	n.becomes("after the reload", served)
	page, err := get(n.Node, "http://127.0.0.1:5302/health")
	n.must(err)
	n.has(page, "OK")
}

// How many plugins wait for their ports is exported.
func TestMetricOfTakenPorts(t *testing.T) {
	n := newNode(t, nftables)
	free := n.occupy("127.0.0.1:5301")
	n.serve(n.corefile() + plainBlock("late.:5400", "10.0.1.1", "ready 127.0.0.1:5301", "prometheus 127.0.0.1:5302"))
	n.shows("127.0.0.1:5302", map[string]float64{"ports_taken": 1})
	free()
	n.shows("127.0.0.1:5302", map[string]float64{"ports_taken": 0})
}

// A plugin of which one port is taken listens on the others.
func TestOnePortOfSeveralTaken(t *testing.T) {
	n := newNode(t, nftables)
	free := n.occupy("127.0.0.1:5301")
	n.occupy("127.0.0.1:5303")
	var collector net.Listener
	n.must(n.Node.Do(func() (err error) { collector, err = net.Listen("tcp", "127.0.0.1:5304"); return err }))
	n.Cleanup(func() { collector.Close() })
	p := n.serve(n.corefile() + plainBlock("late.:5400", "10.0.1.1", "prometheus 127.0.0.1:5301") +
		plainBlock("other.:5400", "10.0.1.1", "prometheus 127.0.0.1:5302", "dnstap listen tcp://127.0.0.1:5303", "dnstap tcp://127.0.0.1:5304"))
	n.shows("127.0.0.1:5302", map[string]float64{"ports_taken": 2})
	c, err := collector.Accept()
	n.must(err)
	c.Close()
	free()
	n.listens(p, latePlugins[1])
	n.shows("127.0.0.1:5302", map[string]float64{"ports_taken": 1})
}

// Who else has a port of untracked is told at the start. With a plugin that is to listen there
// it is the plugin's error, and a twin's is nobody else's.
func TestPortOfUntrackedTaken(t *testing.T) {
	n := newNode(t, nftables)
	n.occupy("0.0.0.0:5301")
	p := n.serve(n.corefile("untracked 5301 5302"))
	n.has(p.Log(), "/Corefile:8 - untracked: ", "10.96.0.10:5301/tcp is taken by ", fmt.Sprintf("(process %d, bound to [::]:5301)", os.Getpid()), "no plugin listens there")
	if strings.Count(p.Log(), "untracked: ") != 1 {
		n.Errorf("want one line for one port:\n%s", p.Log())
	}
	n.answersEverybody(false, addrs...)
	p.exit(syscall.SIGTERM)

	with := strings.Replace(n.corefile("untracked 5302"), "errors", "errors\n    health 169.254.20.10:5302", 1)
	first := n.serve(with)
	second := n.serve(with)
	for _, p := range []*process{first, second} {
		if strings.Contains(p.Log(), "is taken by") {
			n.Errorf("a twin is taken for somebody else:\n%s", p.Log())
		}
	}
	n.occupy("0.0.0.0:5303")
	said := n.refuse(strings.ReplaceAll(with, "5302", "5303"), lab.Options{})
	n.has(said, "health: 169.254.20.10:5303/tcp is taken by ")
}
