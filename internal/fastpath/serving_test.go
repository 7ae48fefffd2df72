package fastpath

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// What a plugin asks on the way, and a prefetch asks meanwhile, is not the query.
func TestEnterTakesTheQueryOnly(t *testing.T) {
	b := &Block{items: newItems(64, 0)}
	asked, other := question("a.example.org.", dns.TypeA), question("b.example.org.", dns.TypeA)
	for _, r := range []*dns.Msg{asked, other} {
		key := b.items.key(r)
		b.items.end(key, b.items.begin(key), known(sinceEpoch(), 30, 1))
	}
	q := &query{plain: true, asked: asked.Question[0]}
	q.enter(b, other)
	if q.item != nil {
		t.Error("another question is taken for the query")
	}
	q.enter(b, asked)
	if q.item == nil {
		t.Error("the query is not taken")
	}
}

// A process that was stopped for longer than a read's deadline reads on.
func TestMissConnOutlivesAPause(t *testing.T) {
	c := &missConn{queries: make(chan *query, 1), past: make(chan struct{})}
	c.queries <- &query{raw: make([]byte, 12), open: new(atomic.Int64)}
	c.SetReadDeadline(time.Now().Add(-time.Nanosecond))
	select {
	case <-c.past:
		t.Error("a deadline that has just passed shuts it down")
	default:
	}
	c.SetReadDeadline(time.Unix(1, 0))
	<-c.past
}
