package fastpath

import (
	"net/netip"
	"runtime"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
)

// The kernel's array of struct mmsghdr has no gaps.
func TestMmsghdr(t *testing.T) {
	if got, want := unsafe.Sizeof(mmsghdr{}), unsafe.Sizeof(unix.Msghdr{})+unsafe.Sizeof(uintptr(0)); got != want {
		t.Errorf("a mmsghdr has %d bytes, want %d", got, want)
	}
}

// A drain waits for what was handed on, however late the DNS library reads it.
func TestDrainKnowsOfMisses(t *testing.T) {
	var answering sockets.Counter
	v := &serving{table: newAnswerTable(64), misses: &missConn{queries: make(chan *query, batch)}}
	s := &socket{fd: -1}
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

func hits(t testing.TB) float64 { return counted(t, "coredns_nodecache_fastpath_hits_total") }

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
	s, err := openSocket(netip.AddrPortFrom(addr("127.0.0.1"), 0))
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
	hit := hitter(t, &serving{table: newAnswerTable(DefaultEntries)}, fullCounts())
	if n := testing.AllocsPerRun(100, hit); n != 0 {
		t.Errorf("%v allocations for %d hits", n, batch)
	}
}

// One operation is one hit, with its part of a system call that sends. With -cpu 1,2
// the ratio is what a second CPU brings: each has a worker, and the table, its answers
// and the counters are everyone's.
func BenchmarkHit(b *testing.B) {
	v, count := &serving{table: newAnswerTable(DefaultEntries)}, fullCounts()
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
