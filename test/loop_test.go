package e2e

import (
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// A resolver is one that asks another server and hands back what that says.
type resolver struct {
	ns      *lab.Namespace
	to      atomic.Pointer[string]
	queries atomic.Int64
}

const resolverAt = "10.0.2.2:5399"

// resolver starts one beside the cluster's DNS, which asks the node's cache.
func (n *node) resolver() *resolver {
	n.Helper()
	_, err := n.DNS.Run("ip", "route", "add", lab.LinkLocal.String(), "via", "10.0.2.1")
	n.must(err)
	r := &resolver{ns: n.DNS}
	r.asks(linkLocal53)
	n.must(n.DNS.Do(func() error {
		packets, err := net.ListenPacket("udp", resolverAt)
		if err != nil {
			return err
		}
		listener, err := net.Listen("tcp", resolverAt)
		if err != nil {
			return err
		}
		for _, s := range []*dns.Server{{PacketConn: packets, Handler: r}, {Listener: listener, Handler: r, MaxTCPQueries: -1}} {
			n.Cleanup(func() { packets.Close(); listener.Close() })
			go s.ActivateAndServe()
		}
		return nil
	}))
	return r
}

func (r *resolver) asks(at string) { r.to.Store(&at) }

// ServeDNS implements dns.Handler.
func (r *resolver) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	r.queries.Add(1)
	m := new(dns.Msg).SetRcode(q, dns.RcodeServerFailure)
	r.ns.Do(func() error {
		answer, _, err := (&dns.Client{Net: w.RemoteAddr().Network(), Timeout: lab.Patience}).Exchange(q.Copy(), *r.to.Load())
		if err == nil {
			m = answer
		}
		return err
	})
	m.Id = q.Id
	w.WriteMsg(m)
}

// burst asks for so many names, all at the same time, each of which has to get an answer
// that says it can't be had.
func (n *node) burst(proto string, count int, tag string) {
	n.Helper()
	var wg sync.WaitGroup
	var mu sync.Mutex
	codes := map[int]int{}
	for i := range count {
		wg.Go(func() {
			code := exchange(n.Pod, proto, linkLocal53, fmt.Sprintf("x%d.%s.loop.test.", i, tag), lab.Patience)
			mu.Lock()
			defer mu.Unlock()
			codes[code]++
		})
	}
	wg.Wait()
	if codes[dns.RcodeRefused]+codes[dns.RcodeServerFailure] != count {
		n.Errorf("%d queries into a loop were answered %v (by code; -1: not at all)", count, codes)
	}
}

// cameTo returns how many queries have come to the server block for loop.test of the
// process with these metrics.
func (n *node) cameTo(at string) (sum float64) {
	n.Helper()
	for series, v := range n.metrics(at) {
		if strings.HasPrefix(series, "coredns_dns_requests_total{") && strings.Contains(series, `zone="loop.test."`) {
			sum += v
		}
	}
	return sum
}

// A loop that no Corefile shows costs a handful of packets for each query, however it comes
// about: past an address that is translated, or through another server. The process goes on,
// other names are answered, and those in the loop are when it ends.
func TestLoopAtRunTime(t *testing.T) {
	const natted = "192.0.2.53"
	for _, c := range []struct{ name, upstream, forward, other, property string }{
		{name: "own-socket", upstream: natted},
		{name: "own-socket-tcp", upstream: natted, forward: "force_tcp"},
		{name: "own-socket-max-concurrent", upstream: natted, forward: "max_concurrent 1000"},
		{name: "own-socket-loop", upstream: natted, other: "loop"},
		{name: "own-socket-cache", upstream: natted, other: "cache 30"},
		{name: "own-socket-fastpath", upstream: natted, other: "cache 30", property: "fastpath"},
		{name: "own-socket-growing-names", upstream: natted, other: "rewrite name suffix .loop.test. .a.loop.test."},
		{name: "own-socket-busy", upstream: natted}, // in another block
		{name: "resolver", upstream: resolverAt},
		{name: "resolver-tcp", upstream: resolverAt, forward: "force_tcp"},
		{name: "resolver-max-concurrent", upstream: resolverAt, forward: "max_concurrent 1000"},
		{name: "resolver-loop", upstream: resolverAt, other: "loop"},
		{name: "resolver-fastpath", upstream: resolverAt, other: "cache 30", property: "fastpath"},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t, backend{lab.NFT, "none"}) // untracked answers would not be translated back
			properties := []string{"firewall none"}
			if c.property != "" {
				properties = append(properties, c.property)
			}
			forward := "forward . " + c.upstream + " {\nexpire 1ms\nmax_fails 0\n" + c.forward + "\n}"
			corefile := n.block(".:53", allAddrs) + "loop.test:53 {\nbind " + allAddrs + "\nprometheus 127.0.0.1:9253\nerrors\n" + c.other + "\nnodecache {\n" + strings.Join(properties, "\n") + "\n}\n" + forward + "\n}\n"
			line := fmt.Sprintf("Corefile:%d: ", strings.Count(strings.Split(corefile, forward)[0], "\n")+1)

			var r *resolver
			if c.upstream == resolverAt {
				r = n.resolver()
			} else {
				n.translate(natted)
			}
			p := n.serve(corefile)
			if c.other == "loop" {
				n.must(p.WaitLog(0, line+"an upstream leads back to this cache")) // without a query
			}
			if strings.HasSuffix(c.name, "busy") {
				slow := n.start(lab.Load{From: n.Pod, Proto: "udp", To: on(lab.LinkLocal), Names: lab.Slow, Workers: 50, Count: endless})
				n.sent(slow, 50)
				defer slow[0].Stop()
			}
			proto := "udp"
			if strings.Contains(c.name, "tcp") {
				proto = "tcp"
			}
			n.burst(proto, 1, "first")
			before := n.cameTo("127.0.0.1:9253")
			const count = 200
			n.burst(proto, count, "more")
			most := 12.0 * count
			if r == nil && !strings.HasSuffix(c.name, "busy") {
				most = 4 * count
			}
			if c.name == "own-socket-growing-names" {
				most = 40 * count
			}
			if came := n.cameTo("127.0.0.1:9253") - before; came > most {
				n.Errorf("%d queries into a loop made %v", count, came)
			} else {
				n.Logf("%d queries into a loop made %v", count, came)
			}
			n.has(p.Log(), line+"an upstream leads back to this cache")
			if said := strings.Count(p.Log(), "an upstream leads back to this cache"); said > 2 {
				n.Errorf("said %d times", said)
			}
			if n.metrics("127.0.0.1:9253")[`refused_total{reason="loop"}`] == 0 {
				n.Error("nothing refused, by the metrics")
			}
			if g := n.metrics("127.0.0.1:9253")["go_goroutines"]; g > 500 {
				n.Errorf("%v goroutines", g)
			}
			n.answersEverybody(false, lab.LinkLocal, lab.Local6)

			if r != nil {
				r.asks("10.0.2.2:53")
			} else {
				for _, proto := range []string{"udp", "tcp"} {
					_, err := n.Node.Run("iptables", "-t", "nat", "-R", "OUTPUT", map[string]string{"tcp": "1", "udp": "2"}[proto], "-d", natted, "-p", proto, "--dport", "53", "-j", "DNAT", "--to-destination", "10.0.2.2:53")
					n.must(err)
				}
			}
			if !eventually(func() bool {
				return exchange(n.Pod, proto, linkLocal53, "after.loop.test.", lab.Patience) == dns.RcodeSuccess
			}) {
				n.Error("no answer when the loop has ended")
			}
			p.exit(syscall.SIGTERM)
		})
	}
}

// Two blocks of a Corefile ask one another, of which it shows one half only.
func TestLoopThroughAnotherBlock(t *testing.T) {
	n := newNode(t, backend{lab.NFT, "none"})
	n.translate("192.0.2.53")
	p := n.serve(n.block(".:53", allAddrs) + "loop.test:53 {\nbind " + allAddrs + "\nprometheus 127.0.0.1:9253\nnodecache {\nfirewall none\n}\n" +
		"forward . 127.0.0.1:5301 {\nexpire 1ms\nmax_fails 0\n}\n}\n" +
		".:5301 {\nbind 127.0.0.1\nforward . 192.0.2.53 {\nexpire 1ms\nmax_fails 0\n}\n}\n")
	n.burst("udp", 1, "first")
	const count = 200
	before := n.cameTo("127.0.0.1:9253")
	n.burst("udp", count, "more")
	if came := n.cameTo("127.0.0.1:9253") - before; came > 12*count {
		n.Errorf("%d queries into a loop made %v", count, came)
	} else {
		n.Logf("%d queries into a loop made %v", count, came)
	}
	n.answersEverybody(false, lab.LinkLocal, lab.Local6)
	p.exit(syscall.SIGTERM)
}

// translate has what is sent to an address come to the cache.
func (n *node) translate(addr string) {
	n.Helper()
	for _, proto := range []string{"udp", "tcp"} {
		_, err := n.Node.Run("iptables", "-t", "nat", "-I", "OUTPUT", "-d", addr, "-p", proto, "--dport", "53", "-j", "DNAT", "--to-destination", linkLocal53)
		n.must(err)
	}
}

// Two processes share an address, so that what one sends comes back to either.
func TestLoopThroughATwin(t *testing.T) {
	n := newNode(t, backend{lab.NFT, "none"})
	n.translate("192.0.2.53")
	corefile := func(port int) string {
		return n.block(".:53", allAddrs) + fmt.Sprintf("loop.test:53 {\nbind %s\nprometheus 127.0.0.1:%d\nnodecache {\nfirewall none\n}\nforward . 192.0.2.53 {\nexpire 1ms\nmax_fails 0\n}\n}\n", allAddrs, port)
	}
	p, twin := n.serve(corefile(9253)), n.serve(corefile(9254))
	n.burst("udp", 1, "first")
	const count = 200
	n.burst("udp", count, "more")
	came := n.cameTo("127.0.0.1:9253") + n.cameTo("127.0.0.1:9254")
	n.Logf("%d queries into a loop made %v", count, came)
	if came > 20*count {
		n.Errorf("%d queries into a loop made %v", count, came)
	}
	n.answersEverybody(false, lab.LinkLocal, lab.Local6)
	p.exit(syscall.SIGTERM)
	twin.exit(syscall.SIGTERM)
}

// The plugin loop ends no process either from a server block without nodecache.
func TestPluginLoopElsewhere(t *testing.T) {
	n := newNode(t, backend{lab.NFT, "none"})
	n.translate("192.0.2.53")
	p := n.serve(n.block(".:53", allAddrs) + "loop.test:53 {\nbind 169.254.20.10\nloop\nforward . 192.0.2.53\n}\n")
	n.must(p.WaitLog(0, "an upstream leads back to this cache"))
	n.burst("udp", 20, "more")
	n.answersEverybody(false, lab.LinkLocal, lab.Local6)
	p.exit(syscall.SIGTERM)
}
