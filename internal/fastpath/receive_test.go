package fastpath

import (
	"net"
	"net/netip"
	"runtime"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/vishvananda/netlink"
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
	w := &worker{}
	p := newPackets()
	p.recv[0].len = uint32(copy(p.in[0][:], packed(t, question("example.org.", dns.TypeA))))
	open := answering.Begin()
	left := answering.Turn() // between its read and its turn
	v.using.Add(1)
	w.serve(v, p, 1, sinceEpoch(), open, 0)
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
	_, hit := batchOf(t, v, count, "127.0.0.1", unix.RawSockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: uint16(sa.(*unix.SockaddrInet4).Port)})
	before := hits(t)
	hit()
	if n := hits(t) - before; n != batch {
		t.Fatalf("%v hits of %d", n, batch)
	}
	return hit
}

// batchOf returns a worker on an address, and a function that has it answer a batch of
// packets of this client, whose port is in the order of this machine, from v's table.
func batchOf(t testing.TB, v *serving, count *counts, at string, client unix.RawSockaddrInet4) (*worker, func()) {
	s, err := openSocket(netip.AddrPortFrom(addr(at), 0))
	must(t, err)
	t.Cleanup(s.close)
	client.Family, client.Port = unix.AF_INET, client.Port>>8|client.Port<<8
	p, w := newPackets(), &worker{socket: s}
	for i := range batch {
		a, q := entry(t, i)
		a.counts = count
		v.table.add(a, sinceEpoch())
		p.recv[i].len = uint32(copy(p.in[i][:], q))
		*(*unix.RawSockaddrInet4)(unsafe.Pointer(&p.from[i])) = client
		p.recv[i].hdr.Namelen = unix.SizeofSockaddrInet4
	}
	var open atomic.Int64
	return w, func() { v.using.Add(1); w.serve(v, p, batch, sinceEpoch(), &open, uintptr(s.fd)) }
}

// What a slow client's link holds of answers stops nobody for good.
func TestSlowClientDoesNotStopTheWorker(t *testing.T) {
	needRoot(t)
	pod := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "nctest0"}, PeerName: "nctest1"}
	must(t, netlink.LinkAdd(pod))
	t.Cleanup(func() { netlink.LinkDel(pod) })
	link, err := netlink.LinkByName("nctest0")
	must(t, err)
	peer, err := netlink.LinkByName("nctest1")
	must(t, err)
	must(t, netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(192, 0, 2, 1), Mask: net.CIDRMask(24, 32)}}))
	must(t, netlink.LinkSetUp(peer))
	must(t, netlink.LinkSetUp(link))
	must(t, netlink.NeighAdd(&netlink.Neigh{
		LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: net.IPv4(192, 0, 2, 9), HardwareAddr: peer.Attrs().HardwareAddr,
	}))
	// As the plugin bandwidth of CNI has it, for a pod.
	err = netlink.QdiscAdd(&netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		Rate:       1000, Buffer: netlink.Xmittime(1000, 1600), Limit: 64 << 20,
	})
	if err != nil {
		t.Skipf("this kernel has no tbf: %v", err)
	}
	w, hit := batchOf(t, &serving{table: newAnswerTable(DefaultEntries)}, new(counts), "192.0.2.1", unix.RawSockaddrInet4{Addr: [4]byte{192, 0, 2, 9}, Port: 9})
	batches := 0
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ; !w.stuck && batches < 1000; batches++ {
			hit()
		}
		hit() // and this one finds no room either
	}()
	eventually(t, "the worker goes on", func() bool {
		select {
		case <-done:
			return true
		default:
			return false
		}
	})
	if !w.stuck {
		t.Errorf("%d answers to a link that takes a thousand bytes a second had room", batches*batch)
	}
	if batches < 2000/batch {
		t.Errorf("there is room for %d answers that are on their way", batches*batch)
	}
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
