package nodecache

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/cache"
	"github.com/coredns/coredns/plugin/metrics/vars"
	"github.com/coredns/coredns/plugin/test"
	"github.com/coredns/coredns/request"
	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"

	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
)

func packed(t testing.TB, m *dns.Msg) []byte {
	t.Helper()
	b, err := m.Pack()
	must(t, err)
	return b
}

func question(name string, qtype uint16) *dns.Msg { return new(dns.Msg).SetQuestion(name, qtype) }

func TestPlainQuery(t *testing.T) {
	edns := func(change func(o *dns.OPT)) []byte {
		m := question("example.org.", dns.TypeA).SetEdns0(1232, true)
		change(m.IsEdns0())
		return packed(t, m)
	}
	changed := func(at int, v byte) []byte {
		q := packed(t, question("example.org.", dns.TypeA))
		q[at] = v
		return q
	}
	plain := packed(t, question("example.org.", dns.TypeA))
	for _, c := range []struct {
		what string
		q    []byte
		want bool
	}{
		{"plain", plain, true},
		{"the root", packed(t, question(".", dns.TypeNS)), true},
		{"all flags but QR and opcode", changed(3, 0xff), true},
		{"EDNS", edns(func(*dns.OPT) {}), true},
		{"EDNS with a cookie", edns(func(o *dns.OPT) { o.Option = append(o.Option, &dns.EDNS0_COOKIE{Code: 10, Cookie: "0011223344556677"}) }), false},
		{"EDNS of version 1", edns(func(o *dns.OPT) { o.SetVersion(1) }), false},
		{"EDNS with an extended rcode", func() []byte {
			q := edns(func(*dns.OPT) {})
			q[len(q)-6] = 1
			return q
		}(), false},
		{"a response", changed(2, 0x80), false},
		{"another opcode", changed(2, 0x10), false},
		{"two questions", changed(5, 2), false},
		{"an answer", changed(7, 1), false},
		{"an authority", changed(9, 1), false},
		{"an additional that is not there", changed(11, 1), false},
		{"a compressed name", changed(12, 0xc0), false},
		{"another class", changed(len(plain)-1, 3), false},
		{"a byte too many", append(bytes.Clone(plain), 0), false},
		{"a byte too few", plain[:len(plain)-1], false},
		{"nothing", nil, false},
		{"no end of the name", append(bytes.Clone(plain[:12]), bytes.Repeat([]byte{1, 'a'}, 200)...), false},
	} {
		if got := plainQuery(c.q); got != c.want {
			t.Errorf("%s: plain is %v, want %v", c.what, got, c.want)
		}
	}
}

// What is taken for a plain query is one to the DNS library too.
func FuzzPlainQuery(f *testing.F) {
	f.Add(packed(f, question("example.org.", dns.TypeA)))
	f.Add(packed(f, question(".", dns.TypeNS).SetEdns0(1232, true)))
	f.Fuzz(func(t *testing.T, q []byte) {
		if !plainQuery(q) {
			return
		}
		var m dns.Msg
		if err := m.Unpack(q); err != nil {
			t.Fatalf("%x is no message: %v", q, err)
		}
		o := m.IsEdns0()
		if m.Response || m.Opcode != dns.OpcodeQuery || len(m.Question) != 1 || m.Question[0].Qclass != dns.ClassINET ||
			len(m.Answer)+len(m.Ns) > 0 || len(m.Extra) > 1 || (o == nil) != (len(m.Extra) == 0) ||
			o != nil && (len(o.Option) > 0 || o.Version() != 0) || m.Len() != len(q) {
			t.Fatalf("%x is not plain: %v", q, &m)
		}
	})
}

// In what the DNS library packs, changing the bytes that ttlOffsets names changes the
// TTLs and nothing else.
func FuzzTTLOffsets(f *testing.F) {
	m := question("example.org.", dns.TypeMX).SetEdns0(1232, true)
	m.Answer = []dns.RR{test.MX("example.org. 30 IN MX 10 mail.example.org.")}
	m.Extra = append(m.Extra, test.A("mail.example.org. 30 IN A 192.0.2.1"))
	m.Compress = true
	f.Add(packed(f, m))
	f.Fuzz(func(t *testing.T, b []byte) {
		ttlOffsets(b)
		var before, after dns.Msg
		if before.Unpack(b) != nil {
			return
		}
		before.Compress = len(b)%2 == 0
		b, err := before.Pack()
		if err != nil || before.Unpack(b) != nil {
			return
		}
		ttls, ok := ttlOffsets(b)
		if !ok {
			t.Fatalf("%x has records whose TTLs are not found", b)
		}
		const ttl = 0x01020304
		a := answer{wire: b, ttls: ttls}
		out := make([]byte, len(b))
		a.put(out, b, ttl)
		if err := after.Unpack(out); err != nil {
			t.Fatalf("%x has become %x: %v", b, out, err)
		}
		for _, section := range [][]dns.RR{before.Answer, before.Ns, before.Extra} {
			for _, rr := range section {
				if rr.Header().Rrtype != dns.TypeOPT {
					rr.Header().Ttl = ttl
				}
			}
		}
		if before.String() != after.String() {
			t.Fatalf("%x has become %x", b, out)
		}
	})
}

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

// known is what the cache plugin has stored, for tests.
func known(at int64, ttl uint32, answers int) *stored {
	s := &stored{lo: at, hi: at, ttl: ttl}
	s.answering, s.answer = answers > 0, answers
	if answers == 0 {
		s.soa, s.ns = true, 1
	}
	return s
}

func TestItems(t *testing.T) {
	const s = int64(time.Second)
	it := newItems(100, 0)
	const key = 5
	store := func(new *stored) { it.end(key, it.begin(key), new) }
	confirm := func(answers int, ttl uint32, now int64) bool {
		i, version := it.look(key)
		if i == nil {
			return false
		}
		sh := shape{answering: answers > 0, answer: answers}
		if answers == 0 {
			sh.ns = 1
		}
		_, _, ok := it.confirm(key, i, version, sh, ttl, false, now, now)
		return ok
	}
	if confirm(1, 30, 0) {
		t.Error("confirmed what was never stored")
	}
	store(known(0, 30, 1))
	if !confirm(1, 30, s/2) || !confirm(1, 29, s+s/2) {
		t.Error("not confirmed what was stored")
	}
	for what, ok := range map[string]bool{
		"another TTL": confirm(1, 30, s+s/2), "another number of records": confirm(2, 29, s+s/2), "a denial": confirm(0, 29, s+s/2), "what is over": confirm(1, 0, 30*s),
	} {
		if ok {
			t.Errorf("confirmed %s", what)
		}
	}
	// Answers that were made before a newer item are good no more.
	i, version := it.look(key)
	store(known(s, 30, 1))
	if _, _, ok := it.confirm(key, i, version, shape{answering: true, answer: 1}, 29, false, s, s); ok {
		t.Error("confirmed an answer from before")
	}
	// While one is being stored it is not known which is answered from.
	j := it.begin(key)
	if confirm(1, 29, 2*s) {
		t.Error("confirmed while another is being stored")
	}
	it.end(key, j, nil) // it was not: the old one is answered from
	if !confirm(1, 29, 2*s) {
		t.Error("not confirmed what an answer that was not stored has left in place")
	}
	// A denial beside an answer: either may be answered from.
	store(known(3*s, 5, 0))
	if confirm(0, 5, 3*s) || confirm(1, 27, 4*s) {
		t.Error("confirmed one of two different items")
	}
	store(known(40*s, 30, 1))
	if !confirm(1, 30, 40*s) {
		t.Error("not confirmed when both were over")
	}
	// Two at the same time: which has replaced which is not known.
	a, b := it.begin(key), it.begin(key)
	it.end(key, a, known(50*s, 30, 1))
	it.end(key, b, known(50*s+10, 30, 1))
	i, version = it.look(key)
	if got, _, ok := it.confirm(key, i, version, shape{answering: true, answer: 1}, 30, false, 51*s, 51*s); !ok || got.lo != 50*s || got.hi != 50*s+10 {
		t.Errorf("of two at the same time: %+v, %v", got, ok)
	}
	a, b = it.begin(key), it.begin(key)
	it.end(key, a, known(60*s, 30, 1))
	it.end(key, b, known(60*s+10, 29, 1))
	if confirm(1, 30, 60*s+20) || confirm(1, 29, 60*s+20) {
		t.Error("confirmed one of two that differ")
	}
}

// The items of names that are asked for once do not drive out those in use, and their
// number is bounded.
func TestItemsAreBounded(t *testing.T) {
	it := newItems(1600, 0)
	now := sinceEpoch()
	hour := func(n int) *stored { return known(now, 3600, n) }
	for key := range uint64(160) {
		it.end(key, it.begin(key), hour(1))
		i, version := it.look(key)
		it.confirm(key, i, version, shape{answering: true, answer: 1}, 3600, false, now, now)
	}
	for key := range uint64(100_000) {
		it.end(key+1000, it.begin(key+1000), hour(1))
	}
	total, kept := 0, 0
	for i := range it.shards {
		total += len(it.shards[i].m)
	}
	for key := range uint64(160) {
		if i, _ := it.look(key); i != nil {
			kept++
		}
	}
	if total > 1600 || kept < 150 {
		t.Errorf("%d items, want at most 1600; of 160 in use %d are left", total, kept)
	}
}

// entry returns an answer to the n-th of many queries, and that query.
func entry(t testing.TB, n int) (*answer, []byte) {
	q := question(fmt.Sprintf("name-%d.example.org.", n), dns.TypeA)
	r := new(dns.Msg).SetReply(q)
	r.Answer = []dns.RR{test.A(fmt.Sprintf("name-%d.example.org. 30 IN A 192.0.2.1", n))}
	query, wire := packed(t, q), packed(t, r)
	ttls, ok := ttlOffsets(wire)
	if !ok {
		t.Fatal("no TTLs")
	}
	far := sinceEpoch() + int64(time.Hour)
	return &answer{key: query[2:], wire: wire, ttls: ttls, lo: far, hi: far, source: &item{}, counts: &counts{}}, query
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
		for j := range tab.buckets[i] {
			if a := tab.buckets[i][j].Load(); a != nil {
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

// The kernel's array of struct mmsghdr has no gaps.
func TestMmsghdr(t *testing.T) {
	if got, want := unsafe.Sizeof(mmsghdr{}), unsafe.Sizeof(unix.Msghdr{})+unsafe.Sizeof(uintptr(0)); got != want {
		t.Errorf("a mmsghdr has %d bytes, want %d", got, want)
	}
}

// What a plugin asks on the way, and a prefetch asks meanwhile, is not the query.
func TestEnterTakesTheQueryOnly(t *testing.T) {
	b := &fastBlock{items: newItems(64, 0)}
	asked, other := question("a.example.org.", dns.TypeA), question("b.example.org.", dns.TypeA)
	for _, r := range []*dns.Msg{asked, other} {
		key := b.items.key(r)
		b.items.end(key, b.items.begin(key), known(sinceEpoch(), 30, 1))
	}
	q := &fastQuery{plain: true, asked: asked.Question[0]}
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
	c := &missConn{queries: make(chan *fastQuery, 1), past: make(chan struct{})}
	c.queries <- &fastQuery{raw: make([]byte, 12), open: new(atomic.Int64)}
	c.SetReadDeadline(time.Now().Add(-time.Nanosecond))
	select {
	case <-c.past:
		t.Error("a deadline that has just passed shuts it down")
	default:
	}
	c.SetReadDeadline(time.Unix(1, 0))
	<-c.past
}

// A drain waits for what was handed on, however late the DNS library reads it.
func TestDrainKnowsOfMisses(t *testing.T) {
	var answering sockets.Counter
	v := &serving{table: newAnswerTable(64), misses: &missConn{queries: make(chan *fastQuery, batch)}}
	s := &fastSocket{fd: -1}
	p := newPackets(-1)
	p.recv[0].len = uint32(copy(p.in[0][:], packed(t, question("example.org.", dns.TypeA))))
	open := answering.Begin()
	left := answering.Turn() // between its read and its turn
	v.using.Add(1)
	s.serve(v, p, 1, sinceEpoch(), open)
	open.Add(-1)
	var b [512]byte
	if _, _, err := v.misses.ReadFrom(b[:]); err != nil {
		t.Fatal(err)
	}
	if left() != 1 {
		t.Error("a query that has been read and not answered does not count")
	}
}

// Types without a label of their own share what they are counted in.
func TestCountsAreBounded(t *testing.T) {
	v := &serving{server: &dnsserver.Server{Addr: "dns://192.0.2.1:53"}, counts: map[countsKey]*counts{}}
	b := &fastBlock{}
	for n := range 1000 {
		q := &fastQuery{block: b}
		v.countsFor(q, question("example.org.", uint16(1000+n)), true)
	}
	if len(v.counts) > 1 {
		t.Errorf("%d kinds of counts for types that CoreDNS calls other", len(v.counts))
	}
}

func hits(t testing.TB) float64 { return counted(t, "coredns_nodecache_fastpath_hits_total") }

// counted is the value of a counter without labels.
func counted(t testing.TB, name string) float64 {
	t.Helper()
	families, err := prometheus.DefaultGatherer.Gather()
	must(t, err)
	for _, f := range families {
		if f.GetName() == name {
			return f.GetMetric()[0].GetCounter().GetValue()
		}
	}
	t.Fatalf("no counter %s", name)
	return 0
}

// A listener that closes answers what its sockets hold, and then ends.
func TestFastListenerCloses(t *testing.T) {
	needRoot(t)
	for _, a := range []string{"127.0.0.1", "::1"} {
		at := netip.MustParseAddrPort(netip.AddrPortFrom(addr(a), 5399).String())
		var answering sockets.Counter
		l := &fastListener{at: desired.Endpoint{Addr: at.Addr(), Proto: "udp", Port: at.Port()}}
		l.serving.Store(newServing(&dnsserver.Server{Addr: "dns://" + at.String()}, at, 64))
		must(t, l.open(2, &answering))
		c, err := net.Dial("udp", at.String())
		must(t, err)
		defer c.Close()
		for range 20 {
			_, err := c.Write(packed(t, question("example.org.", dns.TypeA)))
			must(t, err)
		}
		must(t, l.park(true))
		closed := make(chan struct{})
		go func() { l.close(); close(closed) }()
		// The server has no zone, so that it refuses.
		b := make([]byte, 512)
		c.SetReadDeadline(time.Now().Add(30 * time.Second))
		for i := range 20 {
			if n, err := c.Read(b); err != nil || n < 12 || b[3]&15 != dns.RcodeRefused {
				t.Fatalf("%s: answer %d is %x, %v", a, i, b[:n], err)
			}
		}
		eventually(t, "the listener on "+a+" closes", func() bool {
			select {
			case <-closed:
				return true
			default:
				return false
			}
		})
		if answering.Turn()() != 0 {
			t.Errorf("%s: queries are counted that are answered", a)
		}
		if _, err := c.Write([]byte("x")); err == nil {
			if _, err = c.Read(b); err == nil {
				t.Errorf("%s: somebody still answers", a)
			}
		}
	}
}

// hitter returns a function that has a worker of its own answer a batch of packets from
// v's table. The answers go to a socket that nobody reads.
func hitter(t testing.TB, v *serving, count *counts) func() {
	sink, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	t.Cleanup(func() { unix.Close(sink) })
	must(t, unix.Bind(sink, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	sa, err := unix.Getsockname(sink)
	must(t, err)
	port := sa.(*unix.SockaddrInet4).Port
	s, err := openSocket(desired.Endpoint{Addr: netip.MustParseAddr("127.0.0.1"), Proto: "udp"})
	must(t, err)
	t.Cleanup(s.close)
	p := newPackets(s.fd)
	for i := range batch {
		a, q := entry(t, i)
		a.counts = count
		v.table.add(a, sinceEpoch())
		p.recv[i].len = uint32(copy(p.in[i][:], q))
		*(*unix.RawSockaddrInet4)(unsafe.Pointer(&p.from[i])) = unix.RawSockaddrInet4{
			Family: unix.AF_INET, Addr: [4]byte{127, 0, 0, 1}, Port: uint16(port>>8) | uint16(port)<<8,
		}
		p.recv[i].hdr.Namelen = unix.SizeofSockaddrInet4
	}
	var open atomic.Int64
	hit := func() { v.using.Add(1); s.serve(v, p, batch, sinceEpoch(), &open) }
	before := hits(t)
	hit()
	if n := hits(t) - before; n != batch {
		t.Fatalf("%v hits of %d", n, batch)
	}
	return hit
}

// fullCounts returns as many counters and histograms as a block with cache and prometheus has.
func fullCounts() *counts {
	c := new(counts)
	for range 4 {
		c.counters = append(c.counters, prometheus.NewCounter(prometheus.CounterOpts{Name: "x"}))
	}
	for _, o := range []*prometheus.Observer{&c.duration, &c.requestSize, &c.responseSize} {
		*o = prometheus.NewHistogram(prometheus.HistogramOpts{Name: "x", Buckets: prometheus.ExponentialBuckets(1, 2, 16)})
	}
	return c
}

func TestHitAllocatesNothing(t *testing.T) {
	hit := hitter(t, &serving{table: newAnswerTable(defaultEntries)}, fullCounts())
	if n := testing.AllocsPerRun(100, hit); n != 0 {
		t.Errorf("%v allocations for %d hits", n, batch)
	}
}

// One operation is one hit, with its part of a system call that sends. With -cpu 1,2
// the ratio is what a second CPU brings: each has a worker, and the table, its answers
// and the counters are everyone's.
func BenchmarkHit(b *testing.B) {
	v, count := &serving{table: newAnswerTable(defaultEntries)}, fullCounts()
	var workers []func()
	for range runtime.GOMAXPROCS(0) {
		workers = append(workers, hitter(b, v, count))
	}
	var next atomic.Int32
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		hit := workers[next.Add(1)-1]
		for i := 0; pb.Next(); i++ {
			if i%batch == 0 {
				hit()
			}
		}
	})
}

// One operation is one look-up.
func BenchmarkLookup(b *testing.B) {
	tab := newAnswerTable(defaultEntries)
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

// The fields of CoreDNS that are read are where they are thought to be.
func TestLayout(t *testing.T) {
	if _, err := layout(); err != nil {
		t.Fatal(err)
	}
	if _, ok := lastItem(&cache.ResponseWriter{}); ok {
		t.Error("there is an item where none was stored")
	}
	s, err := readSettings(cache.New())
	if err != nil || s.percentage != 10 || s.duration != time.Minute {
		t.Errorf("the settings are %+v, %v", s, err)
	}
}

// What is read as the item is what the cache plugin has stored.
func TestLastItem(t *testing.T) {
	var got []stored
	c := cache.New()
	c.Next = plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
		m := new(dns.Msg).SetReply(r)
		m.Answer = []dns.RR{test.A(r.Question[0].Name + " 300 IN A 192.0.2.1"), test.A(r.Question[0].Name + " 77 IN A 192.0.2.2")}
		to := cacheWriter(w)
		if to == nil {
			t.Fatalf("%T does not lead to the cache plugin's writer", w)
		}
		w.WriteMsg(m)
		if s, ok := lastItem(to); ok {
			got = append(got, s)
		}
		return dns.RcodeSuccess, nil
	})
	before := sinceEpoch()
	_, err := c.ServeDNS(t.Context(), &test.ResponseWriter{}, question("example.org.", dns.TypeA))
	must(t, err)
	after := sinceEpoch()
	if len(got) != 1 || got[0].ttl != 77 || got[0].answer != 2 || !got[0].answering || got[0].rcode != 0 || got[0].lo < before || got[0].lo > after {
		t.Errorf("stored is %+v, between %d and %d", got, before, after)
	}
}

// A hit is counted under the type under which prometheus would.
func TestTypeLabels(t *testing.T) {
	labels := func() map[string]float64 {
		families, err := prometheus.DefaultGatherer.Gather()
		must(t, err)
		values := map[string]float64{}
		for _, f := range families {
			if f.GetName() != "coredns_dns_requests_total" {
				continue
			}
			for _, m := range f.GetMetric() {
				for _, l := range m.GetLabel() {
					if l.GetName() == "type" {
						values[l.GetValue()] += m.GetCounter().GetValue()
					}
				}
			}
		}
		return values
	}
	for typ := range uint16(300) {
		before := labels()
		r := request.Request{W: &test.ResponseWriter{}, Req: question("example.org.", typ)}
		vars.Report("test", r, ".", "", "NOERROR", "", 0, time.Now())
		want := typeLabel(typ)
		after := labels()
		if after[want] != before[want]+1 {
			t.Errorf("type %d is not counted as %s", typ, want)
		}
	}
}
