package fastpath

import (
	"net/netip"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coredns/coredns/core/dnsserver"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
)

// A drain does not end before what a worker has received is answered, while goroutines that
// compute have all of the CPUs.
func TestDrainWaitsForWhatIsReceived(t *testing.T) {
	needRoot(t)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	var stop atomic.Bool
	defer stop.Store(true)
	for range 4 {
		go func() {
			for x := 0; !stop.Load(); x++ {
			}
		}()
	}
	at := netip.AddrPortFrom(addr("127.0.0.1"), 5398)
	var answering sockets.Counter
	l := &listener{at: at}
	v := newServing(&dnsserver.Server{Addr: "dns://" + at.String()}, at, 64)
	a, q := entry(t, 1) // a hit
	a.counts = new(counts)
	v.table.add(a, sinceEpoch())
	l.serving.Store(v)
	must(t, l.open(1, &answering))
	defer l.close()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	defer unix.Close(fd)
	must(t, unix.Connect(fd, &unix.SockaddrInet4{Addr: at.Addr().As4(), Port: int(at.Port())}))
	es := []desired.Endpoint{endpoint(at)}
	const rounds = 15
	late := 0
	for range rounds {
		must(t, unix.Send(fd, q, 0))
		open, err := answering.Drain(es, time.Minute)
		must(t, err)
		if open != 0 {
			t.Fatalf("%d queries are open after a minute", open)
		}
		b := make([]byte, 512)
		if _, _, err := unix.Recvfrom(fd, b, unix.MSG_DONTWAIT); err != nil {
			late++
			_, _, err := unix.Recvfrom(fd, b, 0)
			must(t, err)
		}
	}
	if late > 0 {
		t.Errorf("of %d queries %d were not answered when the drain had ended", rounds, late)
	}
}
