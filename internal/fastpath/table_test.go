package fastpath

import (
	"fmt"
	"testing"
	"time"

	"github.com/coredns/coredns/plugin/test"
	"github.com/miekg/dns"
)

// A ready answer's TTL is the cache plugin's at that moment, or the ordinary way is
// taken.
func TestAnswerTTL(t *testing.T) {
	const s = int64(time.Second)
	stored := 7*s + 123456789
	i := &item{}
	a := &answer{source: i, lo: stored + 3*s, hi: stored + 3*s}
	for _, c := range []struct {
		after int64
		want  uint32
	}{{0, 3}, {1, 3}, {s - 1, 3}, {s, 2}, {s + 1, 2}, {2*s - 1, 2}, {2 * s, 1}, {3*s - 1, 1}, {3 * s, 0}, {9 * s, 0}} {
		ttl, ok := a.ttl(stored + c.after)
		if ok != (c.want > 0) || ok && ttl != c.want {
			t.Errorf("after %d ns the TTL is %d, %v; want %d", c.after, ttl, ok, c.want)
		}
	}
	a.hi += 1000
	if _, ok := a.ttl(stored + s + 500); ok {
		t.Error("a TTL is told where it may be one of two")
	}
	if ttl, ok := a.ttl(stored + s/2); !ok || ttl != 3 {
		t.Errorf("between two seconds the TTL is %d, %v; want 3", ttl, ok)
	}
	i.version.Add(1)
	if _, ok := a.ttl(stored); ok {
		t.Error("an answer is good although there is a newer item")
	}
}

func TestAnswerPasses(t *testing.T) {
	a := &answer{every: 1000, urgent: 10_000_000_000}
	passes := func(now int64) bool { return a.pass(now) }
	a.passed.Store(5000)
	for _, c := range []struct {
		now  int64
		want bool
	}{{5001, false}, {5999, false}, {6000, true}, {6001, false}} {
		if got := passes(c.now); got != c.want {
			t.Errorf("at %d it passes: %v, want %v", c.now, got, c.want)
		}
	}
	a.every = int64(time.Hour)
	if passes(a.urgent - 1) {
		t.Error("it passes before it has to")
	}
	if !passes(a.urgent) || passes(a.urgent+1) || !passes(a.urgent+int64(urgentPass)) {
		t.Error("near the end of its TTL it has to pass at once, and then now and then")
	}
}

// entry returns an answer to the n-th of many queries, and that query.
func entry(t testing.TB, n int) (*answer, []byte) {
	q := question(fmt.Sprintf("name-%d.example.org.", n), dns.TypeA)
	r := new(dns.Msg).SetReply(q)
	r.Answer = []dns.RR{test.A(fmt.Sprintf("name-%d.example.org. 30 IN A 192.0.2.1", n))}
	query, wire := packed(t, q), packed(t, r)
	l, ok := layOut(wire)
	if !ok {
		t.Fatal("no TTLs")
	}
	far := sinceEpoch() + int64(time.Hour)
	return &answer{key: query[2:], wire: wire, ttls: l.ttls(), lo: far, hi: far, source: &item{}, counts: &counts{}}, query
}

func TestAnswerTable(t *testing.T) {
	tab := newAnswerTable(800)
	now := sinceEpoch()
	var hot [][]byte
	for n := range 100 {
		a, q := entry(t, n)
		tab.add(a, now)
		hot = append(hot, q)
		tab.get(q)
	}
	for n := range 20_000 {
		a, _ := entry(t, 1000+n)
		tab.add(a, now)
		if tab.get(hot[n%100]) == nil {
			t.Fatalf("query %d is no longer known after %d others", n%100, n)
		}
	}
	if n := tab.entries.Load(); n > 800 || n < 700 {
		t.Errorf("%d entries, want up to 800", n)
	}
	held := int64(0)
	for i := range tab.buckets {
		for j := range tab.buckets[i].answers {
			if a := tab.buckets[i].answers[j].Load(); a != nil {
				held += a.size()
			}
		}
	}
	if held != tab.bytes.Load() || held > tab.room {
		t.Errorf("%d bytes are held, %d counted, of %d", held, tab.bytes.Load(), tab.room)
	}
	// A newer answer to the same query takes the place of the old one.
	before := tab.entries.Load()
	a, _ := entry(t, 0)
	tab.add(a, now)
	if tab.get(hot[0]) != a || tab.entries.Load() != before {
		t.Error("a newer answer does not replace the old one")
	}
}

func TestAnswerTableBoundsBytes(t *testing.T) {
	tab := newAnswerTable(800)
	for n := range 800 {
		a, _ := entry(t, n)
		a.wire = make([]byte, maxWire)
		tab.add(a, 0)
	}
	if tab.bytes.Load() > tab.room || tab.entries.Load() == 0 {
		t.Errorf("%d entries take %d bytes of %d", tab.entries.Load(), tab.bytes.Load(), tab.room)
	}
}

// What has filled the table goes when it is over, and when nobody asks for it any more.
func TestAnswerTableMakesRoom(t *testing.T) {
	for what, size := range map[string]int{"entries": 100, "bytes": maxWire} {
		for _, expired := range []bool{true, false} {
			tab := newAnswerTable(800)
			now := sinceEpoch()
			for n := range 5000 {
				a, q := entry(t, n)
				a.wire = make([]byte, size)
				tab.add(a, now)
				tab.get(q)
			}
			if expired {
				now += int64(2 * time.Hour)
			}
			for n := range 20 {
				a, q := entry(t, 10_000+n)
				a.lo, a.hi = a.lo+int64(4*time.Hour), a.hi+int64(4*time.Hour)
				tries := 0
				for ; tab.get(q) == nil && tries < 1000; tries++ {
					tab.add(a, now)
				}
				if tries == 1000 {
					t.Errorf("a table full of %s that nobody asks for (over: %v) takes no other", what, expired)
					break
				}
			}
			if tab.entries.Load() > tab.most || tab.bytes.Load() > tab.room {
				t.Errorf("%d entries of %d, %d bytes of %d", tab.entries.Load(), tab.most, tab.bytes.Load(), tab.room)
			}
		}
	}
}

// One operation is one look-up.
func BenchmarkLookup(b *testing.B) {
	tab := newAnswerTable(DefaultEntries)
	var queries [][]byte
	for n := range 10_000 {
		a, q := entry(b, n)
		tab.add(a, 0)
		queries = append(queries, q)
	}
	now := sinceEpoch()
	var out [512]byte
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		q := queries[i*7919%len(queries)]
		if a := tab.get(q); a != nil {
			if ttl, ok := a.ttl(now); ok {
				a.put(out[:], q, ttl)
			}
		}
	}
}

// One operation is one look for one of more answers than a CPU's own caches hold.
func BenchmarkGet(b *testing.B) {
	tab := newAnswerTable(1 << 16)
	queries := make([][]byte, 1<<15)
	for i := range queries {
		var a *answer
		a, queries[i] = entry(b, i)
		a.counts = new(counts)
		tab.add(a, sinceEpoch())
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		tab.get(queries[i*7919%len(queries)])
	}
}
