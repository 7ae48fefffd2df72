package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// descriptors is how many file descriptors the process has open.
func (p *process) descriptors() int {
	p.n.Helper()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.Pid))
	p.n.must(err)
	return len(fds)
}

// idle opens TCP connections from a namespace, which send nothing, and returns those
// that came about.
func idle(from *lab.Namespace, to netip.AddrPort, count int) (conns []net.Conn) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	const workers = 8
	for range workers {
		wg.Go(func() {
			from.Do(func() error {
				for range count / workers {
					if c, err := net.DialTimeout("tcp", to.String(), time.Second); err == nil {
						mu.Lock()
						conns = append(conns, c)
						mu.Unlock()
					}
				}
				return nil
			})
		})
	}
	wg.Wait()
	return conns
}

func closeAll(conns []net.Conn) {
	for _, c := range conns {
		c.Close()
	}
}

// A pod with thousands of idle TCP connections takes nothing from others.
func TestIdleTCPClientsTakeNothingFromOthers(t *testing.T) {
	for _, limit := range []string{"1024", "16384"} {
		t.Run(limit+"-descriptors", func(t *testing.T) {
			n := newNode(t, nftables)
			p := n.serveWith(n.monitored(9253), lab.Options{Via: []string{"prlimit", "--nofile=" + limit + ":" + limit}})
			if low := strings.Contains(p.Log(), "may have only 1024 file descriptors open"); low != (limit == "1024") {
				t.Errorf("with %s descriptors, that they are few is said: %v", limit, low)
			}
			before := p.descriptors()
			running := n.start(
				lab.Load{From: n.Pod, Proto: "udp", To: on(lab.LinkLocal, lab.ClusterIP6), Count: 1e6, Rate: 200},
				lab.Load{From: n.Node, Proto: "udp", To: on(lab.ClusterIP, lab.Local6), Names: lab.Misses, Count: 1e6, Rate: 200},
				lab.Load{From: n.Node, Proto: "tcp", To: on(lab.LinkLocal, lab.ClusterIP), Count: 1e6, Rate: 50})
			n.sent(running, 50)
			var most int
			for range 3 { // CoreDNS itself closes what has sent nothing for 3 s
				conns := idle(n.Pod, on(lab.LinkLocal)[0], 5000)
				most = max(most, p.descriptors())
				n.sent(running, 50)
				closeAll(conns)
			}
			n.stop(running)
			t.Logf("%d descriptors before, %d at most", before, most)
			if closed := n.metrics("127.0.0.1:9253")["tcp_clients_closed_total"]; closed < 1000 {
				t.Errorf("%v connections were closed", closed)
			}
			n.has(p.Log(), "TCP connections open, more than", "of 10.0.1.2, which has the most")
			if !eventually(func() bool { return p.descriptors() < before+50 }) {
				t.Errorf("%d descriptors are open, %d were before", p.descriptors(), before)
			}
			p.exit(syscall.SIGTERM)
		})
	}
}

// What a client with too many connections still waits for, it gets.
func TestQueryInWorkOutlivesItsClientsIdleConnections(t *testing.T) {
	n := newNode(t, nftables)
	n.serveWith(n.monitored(9253), lab.Options{Via: []string{"prlimit", "--nofile=1024:1024"}})
	asked := n.Cluster.Queries()
	var asking []*dns.Conn
	n.must(n.Pod.Do(func() error {
		for i := range 5 {
			c, err := dns.Dial("tcp", "169.254.20.10:53")
			if err != nil {
				return err
			}
			t.Cleanup(func() { c.Close() })
			asking = append(asking, c)
			if err := c.WriteMsg(new(dns.Msg).SetQuestion(fmt.Sprintf("slow-3s-%d.lab.", i), dns.TypeA)); err != nil {
				return err
			}
		}
		return nil
	}))
	if !eventually(func() bool { return n.Cluster.Queries() >= asked+5 }) {
		t.Fatal("the cluster was not asked")
	}
	conns := idle(n.Pod, on(lab.LinkLocal)[0], 1000)
	defer closeAll(conns)
	if !eventually(func() bool { return n.metrics("127.0.0.1:9253")["tcp_clients_closed_total"] > 100 }) {
		t.Error("no connection was closed")
	}
	for _, c := range asking {
		if r, err := c.ReadMsg(); err != nil || len(r.Answer) != 1 {
			t.Errorf("a query in work was answered with %v, error %v", r, err)
		}
	}
}

// hanging has an upstream that never answers over TCP, and returns server blocks that
// forward to it as much as the manifests let them.
func (n *node) hanging() (blocks string) {
	n.Helper()
	// Nobody accepts, so that the kernel does and nothing comes back.
	n.must(n.DNS.Do(func() error {
		l, err := net.Listen("tcp", "10.0.2.2:5300")
		if err == nil {
			n.Cleanup(func() { l.Close() })
		}
		return err
	}))
	for _, zone := range []string{"a.hang.:53", "b.hang.:53"} {
		blocks += strings.ReplaceAll(n.block(zone, allAddrs, "sync 1s"), "forward . 10.0.2.2 {",
			"forward . 10.0.2.2:5300 {\n        force_tcp\n        max_concurrent 1000\n        max_fails 0")
	}
	return blocks
}

// askHanging asks for names that get no answer, until it is stopped.
func (n *node) askHanging() (stop func()) {
	ended := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		n.Pod.Do(func() error {
			c, err := net.Dial("udp", "169.254.20.10:53")
			if err != nil {
				return err
			}
			defer c.Close()
			pace := time.NewTicker(5 * time.Millisecond)
			defer pace.Stop()
			for i := 0; ; i++ {
				m, _ := new(dns.Msg).SetQuestion(fmt.Sprintf("n%d.%c.hang.", i, 'a'+i%2), dns.TypeA).Pack()
				c.Write(m)
				if i%10 != 0 {
					continue
				}
				select {
				case <-ended:
					return nil
				case <-pace.C:
				}
			}
		})
	})
	return sync.OnceFunc(func() { close(ended); wg.Wait() })
}

// Upstreams that never answer hold as many descriptors as there may be queries under
// way, and take nothing from others. A process with so many, more than 1,024, looks at
// the node, repairs, reloads and leaves as any other.
func TestHangingUpstreamsTakeNothingFromOthers(t *testing.T) {
	for _, b := range []backend{iptablesNFT, nftables} {
		t.Run(strings.ReplaceAll(b.String(), " ", "-"), func(t *testing.T) {
			n := newNode(t, b)
			before := n.snapshot()
			corefile := n.corefile("sync 1s") + n.hanging()
			p := n.serve(corefile)
			running := n.start(
				lab.Load{From: n.Pod, Proto: "udp", To: on(addrs...), Count: 1e6, Rate: 200},
				lab.Load{From: n.Node, Proto: "udp", To: on(lab.LinkLocal, lab.Local6), Names: lab.Misses, Count: 1e6, Rate: 50})
			n.sent(running, 50)
			stop := n.askHanging()
			defer stop()
			if !eventually(func() bool { return p.descriptors() > 1900 }) {
				t.Fatalf("only %d descriptors are open", p.descriptors())
			}
			n.sent(running, 50)
			mark := p.Mark()
			p.reload(corefile + "x.lab {\n bind 127.0.0.1\n}\n")
			n.must(p.WaitLog(mark, "looked for what commonly goes wrong"))
			n.sent(running, 50)
			if b == iptablesNFT {
				mark = p.Mark()
				n.commands(n.Node, "iptables -t raw -F")
				n.must(p.WaitLog(mark, "put back what another program had removed"))
			}
			if open := p.descriptors(); open < 1100 {
				t.Errorf("only %d descriptors are open", open)
			}
			n.stop(running)
			p.exit(syscall.SIGTERM)
			if strings.Contains(p.Log(), "a fault of this program") {
				t.Error("a look panicked")
			}
			n.same("after the exit", before, n.snapshot())
		})
	}
}

// What a process takes at the limits that it is built for. make limits prints it.
func TestLimits(t *testing.T) {
	if os.Getenv("LAB_LIMITS") == "" {
		t.Skip("measures: run make limits")
	}
	for _, b := range []backend{iptablesNFT, nftables} {
		t.Run(b.firewall, func(t *testing.T) { limits(newNode(t, b)) })
	}
}

func limits(n *node) {
	const at = "127.0.0.1:9253"
	const monitor = "lab.test {\n bind 127.0.0.1\n prometheus " + at + "\n}\n"
	n.Logf("| | Descriptors | Goroutines | Memory |")
	show := func(what string) {
		m := n.metrics(at)
		n.Logf("| %s | %.0f | %.0f | %.1f MiB |", what, m["process_open_fds"], m["go_goroutines"], m["process_resident_memory_bytes"]/(1<<20))
	}
	p := n.serve(n.corefile("sync 1s") + n.hanging() + monitor)
	show("at rest")
	conns := idle(n.Pod, on(lab.LinkLocal)[0], 5000)
	show(fmt.Sprintf("%d idle TCP connections", len(conns)))
	eventually(func() bool { return p.descriptors() < 4200 })
	show("what is left of them")
	closeAll(conns)
	eventually(func() bool { return p.descriptors() < 100 })
	stop := n.askHanging()
	eventually(func() bool { return p.descriptors() > 2000 })
	show("2000 hanging queries")
	stop()
	p.exit(syscall.SIGTERM)

	bind := make([]string, 1000)
	for i := range bind {
		bind[i] = fmt.Sprintf("169.254.%d.%d", 64+i/200, 1+i%200)
	}
	p = n.serve(n.block(".:53", strings.Join(bind, " "), "sync 10s") + monitor)
	eventually(func() bool { return strings.Contains(p.Log(), "looked for what commonly goes wrong") })
	show("1000 addresses")
	const cpu, synced = "process_cpu_seconds_total", "last_sync_success_timestamp_seconds"
	before, checks := n.metrics(at), 0
	last := before
	eventually(func() bool {
		time.Sleep(time.Second) // to ask costs too
		now := n.metrics(at)
		if now[synced] != last[synced] {
			checks++
			last = now
		}
		return checks == 3
	})
	n.Logf("a check of 1000 addresses: %.0f ms of CPU", (last[cpu]-before[cpu])/float64(checks)*1000)
}
