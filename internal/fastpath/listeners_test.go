package fastpath

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
)

// A listener that closes answers what its sockets hold, and then ends.
func TestListenerCloses(t *testing.T) {
	needRoot(t)
	for _, a := range []string{"127.0.0.1", "::1"} {
		at := netip.AddrPortFrom(addr(a), 5399)
		var answering sockets.Counter
		l := &listener{at: at}
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
