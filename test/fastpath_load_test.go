package e2e

import (
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// Floods of names that nobody knows, whose upstream is silent, take no ready answer away,
// and those that come in no form at all neither.
func TestFastpathFloodOfNewNamesTakesNoReadyAnswer(t *testing.T) {
	n := newNode(t, backend{lab.NFT, ""})
	n.must(n.DNS.Do(func() error { // takes queries, and answers none
		c, err := net.ListenPacket("udp", "10.0.2.2:5300")
		if err == nil {
			t.Cleanup(func() { c.Close() })
		}
		return err
	}))
	n.serve(`.:53 {
    bind 169.254.20.10
    nodecache {
        fastpath
    }
    prometheus 169.254.20.10:9253
    errors
    cache 3600
    template IN A known.test {
        answer "{{ .Name }} 3600 IN A 192.0.2.1"
    }
    forward . 10.0.2.2:5300 {
        max_concurrent 1000
        max_fails 0
    }
}
`)
	a, err := n.asker(on(lab.LinkLocal)[0])
	n.must(err)
	q := message(dns.Question{Name: "a.known.test.", Qtype: dns.TypeA, Qclass: 1}, func(*dns.Msg) {})
	const hits = "coredns_nodecache_fastpath_hits_total"
	if !eventually(func() bool {
		_, err := a.ask(10*time.Second, q)
		n.must(err)
		return n.fastNumber(hits) > 0
	}) {
		t.Fatal("there is no ready answer")
	}
	before := n.fastNumber(hits)
	flood, err := n.asker(on(lab.LinkLocal)[0])
	n.must(err)
	const rounds, many = 100, 60
	for i := range rounds {
		for j := range many {
			name := fmt.Sprintf("n%d.flood.test.", i*many+j)
			flood.conn.Write(message(dns.Question{Name: name, Qtype: dns.TypeA, Qclass: 1}, func(*dns.Msg) {}))
			flood.conn.Write([]byte(name)[:j%14]) // an empty one among them
		}
		got, err := a.ask(10*time.Second, q)
		n.must(err)
		if got[0] == nil {
			t.Fatalf("after %d queries for new names a known one was not answered", (i+1)*many)
		}
	}
	if ready := n.fastNumber(hits) - before; ready < rounds*3/4 {
		t.Errorf("%.0f ready answers to %d queries", ready, rounds)
	}
}
