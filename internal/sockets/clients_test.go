package sockets

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

func connsOf(client string, count int, idle time.Duration) (conns []clientConn) {
	for i := range count {
		conns = append(conns, clientConn{connID: connID{peer: netip.AddrPortFrom(addr(client), uint16(i+1))}, idle: idle + time.Duration(i)})
	}
	return conns
}

func TestClientsWithTheMostLoseTheirs(t *testing.T) {
	for _, x := range []struct {
		have  map[string]int
		limit int
		lose  map[string]int
	}{
		{map[string]int{"10.0.0.1": 50, "10.0.0.2": 3}, 40, map[string]int{"10.0.0.1": 13}},
		{map[string]int{"10.0.0.1": 50, "10.0.0.2": 30, "10.0.0.3": 5}, 45, map[string]int{"10.0.0.1": 30, "10.0.0.2": 10}},
		{map[string]int{"10.0.0.1": 5, "10.0.0.2": 3}, 8, map[string]int{}},
		{map[string]int{"10.0.0.1": 9, "fd00::2": 1, "fd00::3": 1}, 2, map[string]int{"10.0.0.1": 8, "one of the three": 1}},
		{nil, 8, map[string]int{}},
	} {
		var conns []clientConn
		want := 0
		for client, n := range x.have {
			conns = append(conns, connsOf(client, n, 0)...)
		}
		got := map[string]int{}
		going := beyond(conns, x.limit)
		for _, c := range going {
			got[c.peer.Addr().String()]++
		}
		for client, n := range x.lose {
			want += n
			if _, ok := x.have[client]; ok && got[client] != n && got[client] != n+1 {
				t.Errorf("of %v with room for %d, %s loses %d, want %d", x.have, x.limit, client, got[client], n)
			}
		}
		if len(going) != want {
			t.Errorf("of %v with room for %d, %v go, want %v", x.have, x.limit, got, x.lose)
		}
	}
}

func TestIdlestConnectionsGoFirst(t *testing.T) {
	conns := connsOf("10.0.0.1", 10, time.Second)
	conns[9].asking = true // the longest without a packet, but it waits for an answer
	for i, c := range beyond(conns, 6) {
		if want := uint16(9 - i); c.peer.Port() != want {
			t.Errorf("the %d. to go is %s, want port %d", i+1, c.peer, want)
		}
	}
}

// The connections of clients are told from others, and end as their server sees it.
func TestClientConnsAreFoundAndShut(t *testing.T) {
	needRoot(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	before, _, err := clientConns()
	must(t, err)
	out, err := net.Dial("tcp", l.Addr().String())
	must(t, err)
	defer out.Close()
	in, err := l.Accept()
	must(t, err)
	defer in.Close()
	conns, _, err := clientConns()
	must(t, err)
	if len(conns) != len(before)+1 {
		t.Fatalf("%d connections, want %d", len(conns), len(before)+1)
	}
	for _, c := range conns {
		if c.peer.String() != out.LocalAddr().String() {
			continue
		}
		c.judge()
		if c.asking {
			t.Error("it is asking, but has sent nothing")
		}
		out.Write([]byte("?"))
		eventually(t, "it is asking", func() bool { c.judge(); return c.asking })
		other := c
		other.peer = netip.AddrPortFrom(other.peer.Addr(), 1)
		if err := other.shut(); err != errReused {
			t.Errorf("another's connection is shut: %v", err)
		}
		must(t, c.shut())
		buf := make([]byte, 2)
		in.Read(buf)
		if _, err := in.Read(buf); err == nil {
			t.Error("the server does not see the end")
		}
		if _, err := in.Write([]byte("!")); err != nil {
			t.Errorf("the answer can't be sent: %v", err)
		}
		if n, err := out.Read(buf); n != 1 || err != nil {
			t.Errorf("the answer did not come: %v", err)
		}
	}
}

// What this process listens on is known when there is no descriptor left, and a look
// that could not be is not taken for one that found nobody.
func TestSocketsAreFoundWithoutDescriptors(t *testing.T) {
	needRoot(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	e := desired.Endpoint{Addr: addr("127.0.0.1"), Proto: "tcp", Port: uint16(l.Addr().(*net.TCPAddr).Port)}
	_, err = Own() // as at the start
	must(t, err)
	var had unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &had))
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1, Max: had.Max}))
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &had)
	if _, err := os.Open("/dev/null"); err == nil {
		t.Fatal("there are descriptors left")
	}
	if ok, err := Listening([]desired.Endpoint{e}); !ok || err != nil {
		t.Errorf("listening on %s: %v, %v", e, ok, err)
	}
	if n, err := descriptorsOpen(); n < 3 || err != nil {
		t.Errorf("%d descriptors, %v", n, err)
	}
}

func BenchmarkClientConns(b *testing.B) {
	needRoot(b)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(b, err)
	defer l.Close()
	const count = 2000
	for range count {
		out, err := net.Dial("tcp", l.Addr().String())
		must(b, err)
		defer out.Close()
		in, err := l.Accept()
		must(b, err)
		defer in.Close()
	}
	b.Run(fmt.Sprintf("%d-connections", count), func(b *testing.B) {
		for b.Loop() {
			clientConns()
		}
	})
	b.Run("look", func(b *testing.B) {
		for b.Loop() {
			descriptorsOpen()
		}
	})
}
