package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// autoCorefile has three server blocks with fastpath auto on one address: one that allows it, one
// that logs each query, and one without cache.
func autoCorefile(logs string) string {
	block := func(zone, number, lines string) string {
		return fmt.Sprintf("%s:53 {\n    bind %s\n    nodecache {\n        fastpath auto\n    }\n    prometheus 169.254.20.10:9253\n    errors\n%s    template IN A {\n        answer \"{{ .Name }} 3600 IN A 192.0.2.%s\"\n    }\n}\n",
			zone, lab.LinkLocal, lines, number)
	}
	return block("fast.test", "1", "    cache 3600\n") + block("logged.test", "2", logs+"    cache 3600\n") + block("plain.test", "3", "")
}

// fastpath auto is in force where the plugins allow it, and elsewhere the log says why not; each
// query is answered as ever, and what has to be logged is.
func TestFastpathAuto(t *testing.T) {
	n := newNode(t, backend{lab.NFT, ""})
	p := n.serve(autoCorefile("    log\n"))
	for _, why := range []string{"fastpath can't go with the plugin log", "fastpath needs the plugin cache"} {
		if got := strings.Count(p.Log(), "the server block goes without fastpath, which is no fault: "+why); got != 1 {
			n.Errorf("%q is in the log %d times, want once:\n%s", why, got, p.Log())
		}
	}
	a, err := n.asker(on(lab.LinkLocal)[0])
	n.must(err)
	defer a.conn.Close()
	ask := func(times int, zone, want string) {
		n.Helper()
		for range times {
			got, err := a.ask(10*time.Second, message(dns.Question{Name: "www." + zone + ".", Qtype: dns.TypeA, Qclass: 1}, func(*dns.Msg) {}))
			n.must(err)
			var m dns.Msg
			if got[0] == nil || m.Unpack(append([]byte{0, 0}, got[0]...)) != nil || len(m.Answer) != 1 || !strings.HasSuffix(m.Answer[0].String(), want) {
				n.Fatalf("%s: got %x, want %s", zone, got[0], want)
			}
		}
	}
	ready := func(zone, want string) {
		n.Helper()
		n.readySoon(func() { ask(1, zone, want) })
		n.readyAnswers(10, func() { ask(10, zone, want) })
	}
	ready("fast.test", "192.0.2.1")
	n.readyAnswers(0, func() {
		ask(10, "logged.test", "192.0.2.2")
		ask(10, "plain.test", "192.0.2.3")
	})
	if !eventually(func() bool { return strings.Count(p.Log(), `"A IN www.logged.test. udp `) == 10 }) {
		n.Errorf("not 10 lines for 10 queries:\n%s", p.Log())
	}

	// A reload that takes the obstacle away brings it, and one that brings it back takes it.
	p.reload(autoCorefile(""))
	ready("logged.test", "192.0.2.2")
	p.reload(autoCorefile("    log\n"))
	n.readyAnswers(0, func() { ask(10, "logged.test", "192.0.2.2") })
}

// readyAnswers checks how many ready answers there are while something is done.
func (n *node) readyAnswers(want float64, do func()) {
	n.Helper()
	const hits = "coredns_nodecache_fastpath_hits_total"
	before := n.fastNumber(hits)
	do()
	if got := n.fastNumber(hits) - before; got != want {
		n.Errorf("%.0f ready answers, want %.0f", got, want)
	}
}

// readySoon asks a question until its answer is a ready one, and returns how often. That is a few
// times: the client has its answer a moment before it is kept, and may ask again before that.
func (n *node) readySoon(ask func()) (times int) {
	n.Helper()
	const hits = "coredns_nodecache_fastpath_hits_total"
	for before := n.fastNumber(hits); n.fastNumber(hits) == before; times++ {
		if times == 30 {
			n.Fatalf("no ready answer after asking %d times", times)
		}
		ask()
	}
	return times
}

// Where no server block allows it, CoreDNS's own sockets serve alone.
func TestFastpathAutoWithoutAny(t *testing.T) {
	n := newNode(t, backend{lab.NFT, ""})
	p := n.serve(strings.Replace(n.corefile("fastpath auto"), "    errors\n", "    errors\n    acl {\n        allow\n    }\n", 1))
	n.has(p.Log(), "the server block goes without fastpath, which is no fault: fastpath can't go with the plugin acl")
	a, err := n.asker(on(lab.LinkLocal)[0])
	n.must(err)
	defer a.conn.Close()
	for range 5 {
		got, err := a.ask(10*time.Second, message(dns.Question{Name: "www.example.org.", Qtype: dns.TypeA, Qclass: 1}, func(*dns.Msg) {}))
		n.must(err)
		if got[0] == nil {
			n.Fatal("no answer")
		}
	}
	out, err := n.Node.Run("ss", "-Hlun", "src", lab.LinkLocal.String())
	n.must(err)
	if got := strings.Count(out, lab.LinkLocal.String()+":53"); got != 1 {
		n.Errorf("%d UDP sockets, want CoreDNS's one:\n%s", got, out)
	}
}
