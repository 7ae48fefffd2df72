package sockets

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

func TestCounterTellsGenerationsApart(t *testing.T) {
	var c Counter
	first := c.Begin()
	before := c.Turn()
	if n := before(); n != 1 {
		t.Errorf("%d are open of before, want 1", n)
	}
	second := c.Begin() // comes later, and is not waited for
	if n := before(); n != 1 {
		t.Errorf("%d are open of before, want 1: what comes later counts there", n)
	}
	first.Add(-1)
	if n := before(); n != 0 {
		t.Errorf("%d are open of before, want none", n)
	}
	next := c.Turn()
	if n := next(); n != 1 {
		t.Errorf("%d are open of the second generation, want 1", n)
	}
	second.Add(-1)
	if n := next(); n != 0 {
		t.Errorf("%d are open of the second generation, want none", n)
	}
}

func TestDrainWaitsForOpenAnswers(t *testing.T) {
	var c Counter
	open := c.Begin()
	type result struct {
		open int64
		err  error
	}
	done := make(chan result, 1)
	go func() {
		n, err := c.Drain(nil, time.Hour)
		done <- result{n, err}
	}()
	eventually(t, "the drain waits for answers", func() bool { return c.generation.Load() == 1 })
	later := c.Begin()
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
	var c Counter
	c.Begin()
	c.Begin()
	if n, err := c.Drain(nil, time.Millisecond); n != 2 || err != nil {
		t.Errorf("%d are open, error %v; want 2", n, err)
	}
	e := local(t, "127.0.0.1", "udp")
	s := serveOn(t, e)[0]
	_, err := dialUDP(t, e).Write([]byte("x"))
	must(t, err)
	var d Counter
	const limit = 20 * time.Millisecond
	began := time.Now()
	if n, err := d.Drain([]desired.Endpoint{e}, limit); n != 0 || err != nil {
		t.Errorf("%d are open, error %v; want none", n, err)
	}
	if took := time.Since(began); took < limit {
		t.Errorf("a datagram that nobody reads is waited for %s, want %s", took, limit)
	}
	_, err = s.UDP.Read(make([]byte, 10)) // it is still there: a drain takes nothing
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
		var c Counter
		done := make(chan error, 1)
		go func() { _, err := c.Drain([]desired.Endpoint{e}, time.Hour); done <- err }()
		buf := make([]byte, 10)
		for i := range 3 {
			// Not even begun to wait for answers while something is unread.
			if c.generation.Load() != 0 {
				t.Errorf("%s: the drain has gone on with %d queries unread", e, 3-i)
			}
			_, err := s.UDP.Read(buf)
			must(t, err)
		}
		must(t, <-done)
		s.Close()
	}
}

// An empty datagram hides nothing that is behind it.
func TestQueuedSeesEmptyDatagrams(t *testing.T) {
	e := local(t, "127.0.0.1", "udp")
	s := serveOn(t, e)[0]
	client := dialUDP(t, e)
	for _, text := range []string{"", "query"} {
		_, err := client.Write([]byte(text))
		must(t, err)
	}
	raw, err := s.UDP.SyscallConn()
	must(t, err)
	for left := 2; left >= 0; left-- {
		must(t, raw.Control(func(fd uintptr) {
			if queued := Queued(int(fd)); queued != (left > 0) {
				t.Errorf("with %d datagrams unread it is said that there are some: %v", left, queued)
			}
		}))
		if left > 0 {
			_, err := s.UDP.Read(make([]byte, 10))
			must(t, err)
		}
	}
}

func TestOwnSocketsAreFoundByEndpoint(t *testing.T) {
	var es []desired.Endpoint
	for _, a := range []string{"127.0.0.1", "::1"} {
		for _, proto := range []string{"udp", "tcp"} {
			es = append(es, local(t, a, proto))
		}
	}
	if ok, err := Listening(es); ok || err != nil {
		t.Errorf("listening on all is %v before any, error %v", ok, err)
	}
	socks := serveOn(t, es...)
	twin := serveOn(t, es[0])[0]
	if ok, err := Listening(es); !ok || err != nil {
		t.Errorf("listening on all is %v, error %v", ok, err)
	}
	have, err := Own()
	must(t, err)
	if n := len(have[es[0]]); n != 2 {
		t.Errorf("%d sockets on %s, want 2", n, es[0])
	}
	twin.Close()
	// A connection has its listener's address and is none.
	c, err := net.Dial("tcp", socks[1].TCP.Addr().String())
	must(t, err)
	defer c.Close()
	accepted, err := socks[1].TCP.Accept()
	must(t, err)
	defer accepted.Close()
	socks[1].Close()
	if ok, err := Listening(es[1:2]); ok || err != nil {
		t.Errorf("listening on %s is %v with the listener closed, error %v", es[1], ok, err)
	}
	if ok, _ := Listening(es[2:]); !ok {
		t.Error("the others are not listened on any more")
	}
}

// parked starts with two processes' sockets on one endpoint, as twins have them,
// and returns ours, which is parked, and the other's.
func parked(t *testing.T, e desired.Endpoint, meanwhile func(ours *socket)) (ours, other *socket) {
	t.Helper()
	ours = serveOn(t, e)[0]
	meanwhile(ours)
	must(t, Park([]desired.Endpoint{e}))
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
			must(t, other.UDP.SetReadDeadline(time.Now().Add(30*time.Second)))
			if _, err := other.UDP.Read(make([]byte, 10)); err != nil {
				t.Fatalf("%s: a query did not come to the socket that is left: %v", e, err)
			}
		}
		buf := make([]byte, 10)
		n, from, err := ours.UDP.ReadFromUDPAddrPort(buf)
		if err != nil || string(buf[:n]) != "early" {
			t.Fatalf("%s: what had arrived reads %q, error %v", e, buf[:n], err)
		}
		// The answer leaves from the address that was asked.
		_, err = ours.UDP.WriteToUDPAddrPort([]byte("answer"), from)
		must(t, err)
		must(t, early.SetReadDeadline(time.Now().Add(30*time.Second)))
		if n, err := early.Read(buf); err != nil || string(buf[:n]) != "answer" {
			t.Errorf("%s: the client got %q, error %v", e, buf[:n], err)
		}
		if fds, err := Own(); err != nil || len(fds[e]) == 0 {
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
			served, err = ours.TCP.Accept()
			must(t, err)
		})
		// Its server goes on to accept, and must not end for an error.
		accepted := make(chan error, 1)
		go func() { _, err := ours.TCP.Accept(); accepted <- err }()
		must(t, other.TCP.(*net.TCPListener).SetDeadline(time.Now().Add(30*time.Second)))
		for range 20 {
			c, err := net.Dial("tcp", at)
			must(t, err)
			got, err := other.TCP.Accept()
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
	if err := Park([]desired.Endpoint{local(t, "127.0.0.1", "udp"), local(t, "::1", "tcp")}); err != nil {
		t.Errorf("parking nothing: %v", err)
	}
}
