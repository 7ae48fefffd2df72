package nodecache

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

// socket is what CoreDNS would open for one endpoint.
type socket struct {
	e   desired.Endpoint
	udp *net.UDPConn
	tcp net.Listener
}

func (s *socket) Close() {
	if s.udp != nil {
		s.udp.Close()
	} else {
		s.tcp.Close()
	}
}

// reuseport is how CoreDNS opens its sockets.
var reuseport = net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
	if e := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) }); e != nil {
		return e
	}
	return err
}}

// serveOn opens a socket for each endpoint, until the test is over.
func serveOn(t testing.TB, es ...desired.Endpoint) (socks []*socket) {
	t.Helper()
	for _, e := range es {
		s := &socket{e: e}
		at := netip.AddrPortFrom(e.Addr, e.Port).String()
		if e.Proto == "udp" {
			c, err := reuseport.ListenPacket(context.Background(), "udp", at)
			must(t, err)
			s.udp = c.(*net.UDPConn)
		} else {
			l, err := reuseport.Listen(context.Background(), "tcp", at)
			must(t, err)
			s.tcp = l
		}
		socks = append(socks, s)
		t.Cleanup(s.Close)
	}
	return socks
}

// local returns an endpoint on lo that nobody has.
func local(t testing.TB, a, proto string) desired.Endpoint {
	t.Helper()
	e := desired.Endpoint{Addr: addr(a), Proto: proto}
	s := serveOn(t, e)[0]
	if proto == "udp" {
		e.Port = s.udp.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	} else {
		e.Port = s.tcp.Addr().(*net.TCPAddr).AddrPort().Port()
	}
	s.Close()
	return e
}

func dialUDP(t testing.TB, e desired.Endpoint) net.Conn {
	t.Helper()
	c, err := net.Dial("udp", netip.AddrPortFrom(e.Addr, e.Port).String())
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

func TestCounterTellsGenerationsApart(t *testing.T) {
	var c counter
	first := c.begin()
	before := c.turn()
	if n := before(); n != 1 {
		t.Errorf("%d are open of before, want 1", n)
	}
	second := c.begin() // comes later, and is not waited for
	if n := before(); n != 1 {
		t.Errorf("%d are open of before, want 1: what comes later counts there", n)
	}
	first.Add(-1)
	if n := before(); n != 0 {
		t.Errorf("%d are open of before, want none", n)
	}
	next := c.turn()
	if n := next(); n != 1 {
		t.Errorf("%d are open of the second generation, want 1", n)
	}
	second.Add(-1)
	if n := next(); n != 0 {
		t.Errorf("%d are open of the second generation, want none", n)
	}
}

func TestDrainWaitsForOpenAnswers(t *testing.T) {
	var c counter
	open := c.begin()
	type result struct {
		open int64
		err  error
	}
	done := make(chan result, 1)
	go func() {
		n, err := c.drain(nil, time.Hour)
		done <- result{n, err}
	}()
	eventually(t, "the drain waits for answers", func() bool { return c.generation.Load() == 1 })
	later := c.begin()
	select {
	case r := <-done:
		t.Fatalf("the drain has not waited: %+v", r)
	default:
	}
	open.Add(-1)
	if r := <-done; r != (result{}) {
		t.Errorf("the drain returned %+v", r)
	}
	later.Add(-1)
}

func TestDrainIsBounded(t *testing.T) {
	var c counter
	c.begin()
	c.begin()
	if n, err := c.drain(nil, time.Millisecond); n != 2 || err != nil {
		t.Errorf("%d are open, error %v; want 2", n, err)
	}
	e := local(t, "127.0.0.1", "udp")
	s := serveOn(t, e)[0]
	_, err := dialUDP(t, e).Write([]byte("x"))
	must(t, err)
	var d counter
	const limit = 20 * time.Millisecond
	began := time.Now()
	if n, err := d.drain([]desired.Endpoint{e}, limit); n != 0 || err != nil {
		t.Errorf("%d are open, error %v; want none", n, err)
	}
	if took := time.Since(began); took < limit {
		t.Errorf("a datagram that nobody reads is waited for %s, want %s", took, limit)
	}
	_, err = s.udp.Read(make([]byte, 10)) // it is still there: a drain takes nothing
	must(t, err)
}

func TestDrainWaitsForQueuedDatagrams(t *testing.T) {
	for _, a := range []string{"127.0.0.1", "::1"} {
		e := local(t, a, "udp")
		s := serveOn(t, e)[0]
		client := dialUDP(t, e)
		for range 3 {
			_, err := client.Write([]byte("query"))
			must(t, err)
		}
		var c counter
		done := make(chan error, 1)
		go func() { _, err := c.drain([]desired.Endpoint{e}, time.Hour); done <- err }()
		buf := make([]byte, 10)
		for i := range 3 {
			// Not even begun to wait for answers while something is unread.
			if c.generation.Load() != 0 {
				t.Errorf("%s: the drain has gone on with %d queries unread", e, 3-i)
			}
			_, err := s.udp.Read(buf)
			must(t, err)
		}
		must(t, <-done)
		s.Close()
	}
}

// handlerFunc is a plugin of one function.
type handlerFunc func()

func (handlerFunc) Name() string { return "test" }
func (f handlerFunc) ServeDNS(context.Context, dns.ResponseWriter, *dns.Msg) (int, error) {
	f()
	return dns.RcodeRefused, nil
}

func TestHandlerCountsWhatIsBeingAnswered(t *testing.T) {
	n := newNode()
	during := int64(0)
	h := handler{node: n, next: handlerFunc(func() { during = n.answering.open[0].Load() })}
	if code, err := h.ServeDNS(t.Context(), nil, new(dns.Msg)); code != dns.RcodeRefused || err != nil {
		t.Errorf("the next plugin's %d came back as %d, error %v", dns.RcodeRefused, code, err)
	}
	if after := n.answering.open[0].Load(); during != 1 || after != 0 {
		t.Errorf("%d were open while it was answered and %d after, want 1 and 0", during, after)
	}
	// Another plugin may panic, which CoreDNS recovers from.
	h.next = handlerFunc(func() { panic("a bug") })
	func() {
		defer func() { recover() }()
		h.ServeDNS(t.Context(), nil, new(dns.Msg))
	}()
	if after := n.answering.open[0].Load(); after != 0 {
		t.Errorf("%d are open after a panic", after)
	}
	var _ plugin.Handler = h
	if h.Ready() || h.Name() != directiveName {
		t.Errorf("%s is ready before anything", h.Name())
	}
}

func TestOwnSocketsAreFoundByEndpoint(t *testing.T) {
	var es []desired.Endpoint
	for _, a := range []string{"127.0.0.1", "::1"} {
		for _, proto := range []string{"udp", "tcp"} {
			es = append(es, local(t, a, proto))
		}
	}
	if ok, err := listening(es); ok || err != nil {
		t.Errorf("listening on all is %v before any, error %v", ok, err)
	}
	socks := serveOn(t, es...)
	twin := serveOn(t, es[0])[0]
	if ok, err := listening(es); !ok || err != nil {
		t.Errorf("listening on all is %v, error %v", ok, err)
	}
	have, err := ownSockets()
	must(t, err)
	if n := len(have[es[0]]); n != 2 {
		t.Errorf("%d sockets on %s, want 2", n, es[0])
	}
	twin.Close()
	// A connection has its listener's address and is none.
	c, err := net.Dial("tcp", socks[1].tcp.Addr().String())
	must(t, err)
	defer c.Close()
	accepted, err := socks[1].tcp.Accept()
	must(t, err)
	defer accepted.Close()
	socks[1].Close()
	if ok, err := listening(es[1:2]); ok || err != nil {
		t.Errorf("listening on %s is %v with the listener closed, error %v", es[1], ok, err)
	}
	if ok, _ := listening(es[2:]); !ok {
		t.Error("the others are not listened on any more")
	}
}

// parked starts with two processes' sockets on one endpoint, as twins have them,
// and returns ours, which is parked, and the other's.
func parked(t *testing.T, e desired.Endpoint, meanwhile func(ours *socket)) (ours, other *socket) {
	t.Helper()
	ours = serveOn(t, e)[0]
	meanwhile(ours)
	must(t, park([]desired.Endpoint{e}))
	return ours, serveOn(t, e)[0]
}

func TestParkedUDPSocketKeepsWhatArrivedAndGetsNothingNew(t *testing.T) {
	for _, a := range []string{"127.0.0.1", "::1"} {
		e := local(t, a, "udp")
		early := dialUDP(t, e)
		ours, other := parked(t, e, func(*socket) {
			_, err := early.Write([]byte("early"))
			must(t, err)
		})
		// Each client has a port of its own, by which the kernel chooses a socket.
		for range 100 {
			_, err := dialUDP(t, e).Write([]byte("late"))
			must(t, err)
			must(t, other.udp.SetReadDeadline(time.Now().Add(30*time.Second)))
			if _, err := other.udp.Read(make([]byte, 10)); err != nil {
				t.Fatalf("%s: a query did not come to the socket that is left: %v", e, err)
			}
		}
		buf := make([]byte, 10)
		n, from, err := ours.udp.ReadFromUDPAddrPort(buf)
		if err != nil || string(buf[:n]) != "early" {
			t.Fatalf("%s: what had arrived reads %q, error %v", e, buf[:n], err)
		}
		// The answer leaves from the address that was asked.
		_, err = ours.udp.WriteToUDPAddrPort([]byte("answer"), from)
		must(t, err)
		must(t, early.SetReadDeadline(time.Now().Add(30*time.Second)))
		if n, err := early.Read(buf); err != nil || string(buf[:n]) != "answer" {
			t.Errorf("%s: the client got %q, error %v", e, buf[:n], err)
		}
		if fds, err := ownSockets(); err != nil || len(fds[e]) == 0 {
			t.Errorf("%s: no socket left, error %v", e, err)
		}
		ours.Close()
		other.Close()
	}
}

func TestParkedTCPListenerKeepsItsConnections(t *testing.T) {
	for _, a := range []string{"127.0.0.1", "::1"} {
		e := local(t, a, "tcp")
		at := netip.AddrPortFrom(e.Addr, e.Port).String()
		var client, served net.Conn
		ours, other := parked(t, e, func(ours *socket) {
			var err error
			client, err = net.Dial("tcp", at)
			must(t, err)
			served, err = ours.tcp.Accept()
			must(t, err)
		})
		// Its server goes on to accept, and must not end for an error.
		accepted := make(chan error, 1)
		go func() { _, err := ours.tcp.Accept(); accepted <- err }()
		must(t, other.tcp.(*net.TCPListener).SetDeadline(time.Now().Add(30*time.Second)))
		for range 20 {
			c, err := net.Dial("tcp", at)
			must(t, err)
			got, err := other.tcp.Accept()
			must(t, err)
			c.Close()
			got.Close()
		}
		select {
		case err := <-accepted:
			t.Errorf("%s: its server sees the error %v", e, err)
			accepted <- err
		default:
		}
		_, err := client.Write([]byte("query"))
		must(t, err)
		buf := make([]byte, 10)
		if n, err := served.Read(buf); err != nil || string(buf[:n]) != "query" {
			t.Errorf("%s: the open connection reads %q, error %v", e, buf[:n], err)
		}
		client.Close()
		served.Close()
		ours.Close()
		<-accepted // its server can still be stopped
		other.Close()
	}
}

func TestParkOfNothing(t *testing.T) {
	if err := park([]desired.Endpoint{local(t, "127.0.0.1", "udp"), local(t, "::1", "tcp")}); err != nil {
		t.Errorf("parking nothing: %v", err)
	}
}

func TestEndpointsAreSortedUDPFirst(t *testing.T) {
	es := dnsOn("fd00:20::10", "169.254.20.10", "10.96.0.10")
	var got []string
	for _, e := range es {
		got = append(got, e.String())
	}
	want := "10.96.0.10:53/udp 10.96.0.10:53/tcp 169.254.20.10:53/udp 169.254.20.10:53/tcp [fd00:20::10]:53/udp [fd00:20::10]:53/tcp"
	if strings.Join(got, " ") != want || !slices.IsSortedFunc(es, desired.Compare) {
		t.Errorf("got %v, want %s", got, want)
	}
}
