package upstream

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// blackHole returns an address where SYNs are dropped and datagrams stay without an answer.
func blackHole(t *testing.T) string {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	at := fmt.Sprintf("127.0.0.1:%d", name.(*unix.SockaddrInet4).Port)
	// Nobody accepts: with its queue full the kernel drops what more comes.
	for range 3 {
		if c, err := net.DialTimeout("tcp", at, 300*time.Millisecond); err == nil {
			t.Cleanup(func() { c.Close() })
		}
	}
	p, err := net.ListenPacket("udp", at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return at
}

// raceFor prepares what ServeDNS does for a query.
func raceFor(t *testing.T, u *Upstream, name string) *race {
	t.Helper()
	list := u.servers.now()
	c := &race{u: u, runners: u.order(list.all, nil), changed: list.over}
	if err := c.q.begin(context.Background(), new(dns.Msg).SetQuestion(name, dns.TypeA), true, leastLen, u.opts.patience); err != nil {
		t.Fatal(err)
	}
	return c
}

// Each attempt at a server that takes nothing leaves an entry in the table of tracked
// connections: there are few.
func TestBlackHoleGetsFewAttempts(t *testing.T) {
	u := start(t, "upstream . "+blackHole(t)+" {\nforce_tcp\n}")
	c := raceFor(t, u, "n.example.")
	if m, err := c.run(); m != nil || err == nil {
		t.Fatal(m, err)
	}
	if c.made < fewAttempts || c.made > 7 {
		t.Errorf("%d attempts", c.made)
	}
}

// With max_fails 0 a server that was silent once is asked again as soon as it answers.
func TestMaxFailsZeroRetiresNobody(t *testing.T) {
	a, b := serve(t, false, silence), serve(t, false, answerWith("192.0.2.2"))
	u := start(t, "upstream . "+a.at+" "+b.at+" {\npolicy sequential\nhealth_check 50ms\nmax_fails 0\nprefer_udp\n}")
	first := u.servers.now().all[0]
	ask(u, "n.example.")
	eventually(t, "probes stay without an answer", func() bool {
		first.mu.Lock()
		defer first.mu.Unlock()
		return first.failed > 0
	})
	if s := first.standing(0); s != doubted {
		t.Errorf("a silent one is %d, want %d", s, doubted)
	}
	a.is(answerWith("192.0.2.1"))
	i := 0
	eventually(t, "it is asked again", func() bool {
		i++
		return address1(ask(u, fmt.Sprintf("n%d.example.", i))) == "192.0.2.1"
	})
}

// A server that is much slower than another is asked first once in a while only.
func TestSlowServerIsAskedSeldom(t *testing.T) {
	a, b := serve(t, false, answerWith("192.0.2.1")), serve(t, false, answerWith("192.0.2.2"))
	u := start(t, "upstream . "+a.at+" "+b.at+" {\nprefer_udp\n}")
	all := u.servers.now().all
	all[0].answered(900 * time.Millisecond)
	all[1].answered(time.Millisecond)
	first := 0
	for range 320 {
		c := &race{u: u, q: query{udp: true}, runners: u.order(all, nil)}
		if c.pick(new(attempt)).s == all[0] {
			first++
		}
	}
	if first > 320/lookAgain {
		t.Errorf("the slow one is asked first by %d of 320 queries", first)
	}
}

// A query that makes room for others is counted as what it is: as one that was given up, or where
// it had not waited for long as one that was refused, which says nothing of its name.
func TestQueriesThatMakeRoom(t *testing.T) {
	f := serve(t, false, silence)
	u := start(t, "upstream . "+f.at)
	for why, begun := range map[string]time.Time{reasonCrowded: time.Now().Add(-time.Hour), reasonFull: time.Now().Add(time.Hour)} {
		s := slots{limit: 2}
		c, other := raceFor(t, u, "a.dead.test."), raceFor(t, u, "b.dead.test.")
		c.q.begun, other.q.begun = begun, begun
		if err := errors.Join(s.enter(&c.q), s.enter(&other.q), s.enter(&raceFor(t, u, "c.good.example.").q)); err != nil {
			t.Fatal(err)
		}
		// It is at its first attempt still.
		if _, err := c.run(); reason(err) != why {
			t.Errorf("%v, want %s", err, why)
		}
	}
}

// Only the letters of the name may differ between a query and its answer.
func TestTypeAndClassAreNotFolded(t *testing.T) {
	q := new(dns.Msg).SetQuestion("www.example.org.", 0x0141)
	query, err := q.Pack()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		qtype uint16
		want  bool
	}{{"WWW.example.org.", 0x0141, true}, {"www.example.org.", 0x0161, false}} {
		m := new(dns.Msg).SetQuestion(c.name, c.qtype)
		m.Id, m.Response = q.Id, true
		wire, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		if got := answers(wire, query); got != c.want {
			t.Errorf("%s %#x: %v", c.name, c.qtype, got)
		}
	}
}

// A socket at which much comes that is no answer is given up for another one, of another port.
func TestSocketWithManyForgeriesIsGivenUp(t *testing.T) {
	f := serve(t, true, nil)
	var from atomic.Pointer[string]
	f.is(func(w dns.ResponseWriter, r *dns.Msg) {
		port := w.RemoteAddr().String()
		if from.CompareAndSwap(nil, &port) {
			forged := r.Copy()
			forged.Id++
			for range 10 * mostWrong {
				answerWith("203.0.113.1")(w, forged)
			}
			return
		}
		if *from.Load() != port {
			answerWith("192.0.2.1")(w, r)
		}
	})
	u := start(t, "upstream . "+f.at)
	c := raceFor(t, u, "n.example.")
	m, err := c.run()
	if address1(m) != "192.0.2.1" {
		t.Fatal(m, err)
	}
	if !errors.Is(c.err, errNotOurs) {
		t.Errorf("the first attempt has failed with %v", c.err)
	}
}

// A socket for datagrams is not kept for long however busy it is: its port is half of what a
// forger has to guess.
func TestDatagramSocketsDoNotGetOld(t *testing.T) {
	f := serve(t, false, answerWith("192.0.2.1"))
	u := start(t, "upstream . "+f.at)
	ask(u, "n.example.")
	p := &u.servers.now().all[0].pool
	c := p.take(overUDP)
	if c == nil {
		t.Fatal("none is kept")
	}
	c.born = c.born.Add(-2 * udpMaxAge)
	p.put(overUDP, c)
	if p.take(overUDP) != nil {
		t.Error("an old one is kept")
	}
	c, err := p.dial(context.Background(), overTCP)
	if err != nil {
		t.Fatal(err)
	}
	c.born = c.born.Add(-2 * udpMaxAge)
	p.put(overTCP, c)
	if p.take(overTCP) == nil {
		t.Error("an old connection is not kept, though max_age does not say so")
	}
}

// A lone server that is gone for a moment, and refuses meanwhile, is waited for if it has answered
// lately. One that has not fails a query soon.
func TestServerThatWasThereIsWaitedFor(t *testing.T) {
	a := serve(t, false, answerWith("192.0.2.1"))
	at, err := net.ResolveUDPAddr("udp", a.at)
	if err != nil {
		t.Fatal(err)
	}
	u := start(t, "upstream . "+a.at+" {\nprefer_udp\nmax_fails 0\n}")
	if got := address1(ask(u, "n.example.")); got != "192.0.2.1" {
		t.Fatal(got)
	}
	a.udpSrv.Shutdown()
	server := u.servers.now().all[0]
	c := raceFor(t, u, "m.example.")
	done := make(chan error, 1)
	var m *dns.Msg
	go func() {
		var err error
		m, err = c.run()
		done <- err
	}()
	// Longer than one waits for a server that was never there.
	eventually(t, "it is tried again and again", func() bool {
		server.mu.Lock()
		defer server.mu.Unlock()
		return time.Since(c.q.begun) > 2*time.Second || len(done) > 0
	})
	p, err := net.ListenUDP("udp", at)
	if err != nil {
		t.Fatal(err)
	}
	back := &dns.Server{PacketConn: p, Handler: dns.HandlerFunc(answerWith("192.0.2.2"))}
	go back.ActivateAndServe()
	t.Cleanup(func() { p.Close() })
	if err := <-done; err != nil || address1(m) != "192.0.2.2" {
		t.Errorf("after %d attempts: %v, %v", c.made, m, err)
	}
	back.Shutdown()

	server.mu.Lock()
	server.heard = time.Now().Add(-time.Hour)
	server.mu.Unlock()
	c = raceFor(t, u, "o.example.")
	if m, err := c.run(); m != nil || err == nil || c.made > mostFailed+2 {
		t.Errorf("gone for an hour, and after %d attempts: %v, %v", c.made, m, err)
	}
}

// Queries whose attempts got lost while a server was gone for a moment are sent again when it is back.
func TestServerThatIsBackIsAskedAgain(t *testing.T) {
	a := serve(t, false, answerWith("192.0.2.1"))
	u := start(t, "upstream . "+a.at+" {\nprefer_udp\nhealth_check 1m\n}")
	if got := address1(ask(u, "n.example.")); got != "192.0.2.1" {
		t.Fatal(got)
	}
	a.is(silence)
	had, answers := a.udp.Load(), make(chan string, 20)
	for i := range cap(answers) {
		go func() { answers <- address1(ask(u, fmt.Sprintf("n%d.example.", i))) }()
	}
	server := u.servers.now().all[0]
	eventually(t, "each is sent as often as one whose answer is late", func() bool {
		return a.udp.Load() >= had+int64(fewAttempts*cap(answers)) && !server.heardSince(time.Now().Add(-backAfter))
	})
	a.is(answerWith("192.0.2.2"))
	for range cap(answers) {
		if got := <-answers; got != "192.0.2.2" {
			t.Fatal(got)
		}
	}
}
