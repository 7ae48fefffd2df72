package upstream

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/plugin/pkg/dnstest"
	ctest "github.com/coredns/coredns/plugin/test"
	"github.com/miekg/dns"
)

// A fake is a server whose behaviour can be changed while it runs.
type fake struct {
	at       string
	udp, tcp atomic.Int64 // queries so far
	do       atomic.Pointer[func(w dns.ResponseWriter, r *dns.Msg)]
	udpSrv   *dns.Server
	tcpSrv   *dns.Server
}

func answerWith(ip string) func(w dns.ResponseWriter, r *dns.Msg) {
	return func(w dns.ResponseWriter, r *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(r)
		if r.Question[0].Qtype == dns.TypeA {
			m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: net.ParseIP(ip)}}
		}
		w.WriteMsg(m)
	}
}

func code(rcode int) func(w dns.ResponseWriter, r *dns.Msg) {
	return func(w dns.ResponseWriter, r *dns.Msg) {
		m := new(dns.Msg)
		m.SetRcode(r, rcode)
		w.WriteMsg(m)
	}
}

func silence(dns.ResponseWriter, *dns.Msg) {}

func isTCP(w dns.ResponseWriter) bool { _, ok := w.RemoteAddr().(*net.TCPAddr); return ok }

// serve starts a fake on an address of its own, over UDP and, unless udpOnly, TCP.
func serve(t *testing.T, udpOnly bool, do func(w dns.ResponseWriter, r *dns.Msg)) *fake {
	t.Helper()
	f := &fake{}
	f.is(do)
	p, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f.at = p.LocalAddr().String()
	h := dns.HandlerFunc(func(w dns.ResponseWriter, r *dns.Msg) {
		if isTCP(w) {
			f.tcp.Add(1)
		} else {
			f.udp.Add(1)
		}
		(*f.do.Load())(w, r)
	})
	f.udpSrv = &dns.Server{PacketConn: p, Handler: h}
	go f.udpSrv.ActivateAndServe()
	t.Cleanup(func() { p.Close() })
	if !udpOnly {
		l, err := net.Listen("tcp", f.at)
		if err != nil {
			t.Fatal(err)
		}
		f.tcpSrv = &dns.Server{Listener: l, Handler: h, MaxTCPQueries: -1}
		go f.tcpSrv.ActivateAndServe()
		t.Cleanup(func() { l.Close() })
	}
	return f
}

func (f *fake) is(do func(w dns.ResponseWriter, r *dns.Msg)) { f.do.Store(&do) }

// start starts a stanza.
func start(t *testing.T, stanza string) *Upstream {
	t.Helper()
	all, err := parseAll(caddy.NewTestController("dns", stanza))
	if err != nil {
		t.Fatal(err)
	}
	u := all[0]
	u.servers.start()
	t.Cleanup(u.servers.close)
	return u
}

// ask asks it, as a client over UDP.
func ask(u *Upstream, name string) *dns.Msg {
	return askFor(u, new(dns.Msg).SetQuestion(name, dns.TypeA))
}

func askFor(u *Upstream, m *dns.Msg) *dns.Msg {
	rec := dnstest.NewRecorder(&ctest.ResponseWriter{})
	if code, _ := u.ServeDNS(context.Background(), rec, m); rec.Msg == nil {
		return new(dns.Msg).SetRcode(m, code)
	}
	return rec.Msg
}

func address1(m *dns.Msg) string {
	if m == nil || len(m.Answer) == 0 {
		return ""
	}
	return m.Answer[0].(*dns.A).A.String()
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for late := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(late) {
			t.Fatalf("never: %s", what)
		}
	}
}

func TestAnswers(t *testing.T) {
	f := serve(t, false, answerWith("192.0.2.1"))
	for _, options := range []string{"", "force_tcp", "prefer_udp"} {
		u := start(t, "upstream . "+f.at+" {\n"+options+"\n}")
		for i := range 20 {
			m := ask(u, fmt.Sprintf("N%d.Example.", i))
			if address1(m) != "192.0.2.1" || m.Question[0].Name != fmt.Sprintf("N%d.Example.", i) {
				t.Fatalf("%s: %v", options, m)
			}
		}
	}
	if f.udp.Load() != 40 || f.tcp.Load() != 20 {
		t.Errorf("%d over UDP and %d over TCP, want 40 and 20", f.udp.Load(), f.tcp.Load())
	}
}

// What is answered has the id of the query and is for its question, whatever else comes.
func TestForgedAnswersAreLeftAlone(t *testing.T) {
	f := serve(t, true, nil)
	f.is(func(w dns.ResponseWriter, r *dns.Msg) {
		forged := r.Copy()
		forged.Id++
		answerWith("203.0.113.1")(w, forged)
		other := r.Copy()
		other.Question[0].Name = "other.example."
		answerWith("203.0.113.2")(w, other)
		w.Write([]byte{1, 2, 3})
		answerWith("192.0.2.1")(w, r)
	})
	u := start(t, "upstream . "+f.at)
	for i := range 5 {
		if m := ask(u, fmt.Sprintf("n%d.example.", i)); address1(m) != "192.0.2.1" {
			t.Fatal(m)
		}
	}
}

// The second of two servers is asked when the first fails, in whatever way.
func TestOtherServerIsAsked(t *testing.T) {
	for name, do := range map[string]func(w dns.ResponseWriter, r *dns.Msg){
		"silent": silence, "servfail": code(dns.RcodeServerFailure), "refused": code(dns.RcodeRefused), "notimp": code(dns.RcodeNotImplemented),
		"closes": func(w dns.ResponseWriter, _ *dns.Msg) { w.Close() },
		"slow":   func(w dns.ResponseWriter, r *dns.Msg) { time.Sleep(3 * time.Second); answerWith("192.0.2.2")(w, r) },
		"empty":  func(w dns.ResponseWriter, _ *dns.Msg) { w.Write(nil) },
		"unreadable": func(w dns.ResponseWriter, r *dns.Msg) {
			m := new(dns.Msg)
			m.SetReply(r)
			m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: "n.example.", Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.IPv4(192, 0, 2, 9)}}
			wire, _ := m.Pack()
			w.Write(wire[:len(wire)-1])
		},
	} {
		for _, option := range []string{"prefer_udp", "force_tcp"} {
			t.Run(name+"-"+option, func(t *testing.T) {
				t.Parallel()
				bad, good := serve(t, false, do), serve(t, false, answerWith("192.0.2.1"))
				u := start(t, "upstream . "+bad.at+" "+good.at+" {\npolicy sequential\n"+option+"\n}")
				for i := range 5 {
					if m := ask(u, fmt.Sprintf("n%d.example.", i)); address1(m) != "192.0.2.1" {
						t.Fatal(m)
					}
				}
				if bad.udp.Load()+bad.tcp.Load() == 0 {
					t.Error("the first was never asked")
				}
			})
		}
	}
}

// If all fail the client gets what they said.
func TestFailureOfAll(t *testing.T) {
	a, b := serve(t, false, code(dns.RcodeServerFailure)), serve(t, false, code(dns.RcodeRefused))
	u := start(t, "upstream . "+a.at+" "+b.at+" {\npolicy sequential\n}")
	if m := ask(u, "n.example."); m.Rcode != dns.RcodeServerFailure {
		t.Error(m)
	}
}

// Behind one address may be several servers, of which one fails.
func TestOneOfSeveralBehindAnAddressFails(t *testing.T) {
	for _, option := range []string{"prefer_udp", "force_tcp"} {
		var mu sync.Mutex
		bad := map[string]bool{} // by the client's address
		f := serve(t, false, nil)
		f.is(func(w dns.ResponseWriter, r *dns.Msg) {
			mu.Lock()
			from := w.RemoteAddr().String()
			if _, seen := bad[from]; !seen {
				bad[from] = len(bad)%2 == 0
			}
			fails := bad[from]
			mu.Unlock()
			if fails {
				code(dns.RcodeServerFailure)(w, r)
				return
			}
			answerWith("192.0.2.1")(w, r)
		})
		u := start(t, "upstream . "+f.at+" {\n"+option+"\n}")
		for i := range 50 {
			if m := ask(u, fmt.Sprintf("n%d.example.", i)); address1(m) != "192.0.2.1" {
				t.Fatal(option, i, m)
			}
		}
		if n := f.udp.Load() + f.tcp.Load(); n > 60 {
			t.Errorf("%s: %d queries were sent for 50", option, n)
		}
	}
}

// A silent server costs no more than the patience, and the client is told why.
func TestPatience(t *testing.T) {
	f := serve(t, false, silence)
	for _, option := range []string{"prefer_udp", "force_tcp"} {
		u := start(t, "upstream . "+f.at+" {\npatience 700ms\n"+option+"\n}")
		began := time.Now()
		m := askFor(u, new(dns.Msg).SetQuestion("n.example.", dns.TypeA).SetEdns0(1232, true))
		if m.Rcode != dns.RcodeServerFailure || extended(m) != dns.ExtendedErrorCodeNetworkError {
			t.Error(m)
		}
		if d := time.Since(began); d < 600*time.Millisecond || d > 5*time.Second {
			t.Errorf("after %v", d)
		}
	}
}

func extended(m *dns.Msg) uint16 {
	for _, o := range m.IsEdns0().Option {
		if e, ok := o.(*dns.EDNS0_EDE); ok {
			return e.InfoCode
		}
	}
	return 0xffff
}

// Connections that were closed or reset while nobody used them fail no query.
func TestConnectionsThatWereReset(t *testing.T) {
	for _, linger := range []int{-1, 0} { // closed, reset
		var mu sync.Mutex
		var open []net.Conn
		f := serve(t, false, answerWith("192.0.2.1"))
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go (&dns.Server{Listener: keeping{l, func(c net.Conn) { mu.Lock(); open = append(open, c); mu.Unlock() }}, Handler: dns.HandlerFunc(*f.do.Load())}).ActivateAndServe()
		u := start(t, "upstream . "+l.Addr().String()+" {\nforce_tcp\n}")
		for round := range 5 {
			var wg sync.WaitGroup
			for i := range 20 {
				wg.Go(func() {
					if m := ask(u, fmt.Sprintf("n%d-%d.example.", round, i)); address1(m) != "192.0.2.1" {
						t.Error(m)
					}
				})
			}
			wg.Wait()
			mu.Lock()
			for _, c := range open {
				if linger == 0 {
					c.(*net.TCPConn).SetLinger(0)
				}
				c.Close()
			}
			open = nil
			mu.Unlock()
		}
	}
}

// keeping hands out what it accepts.
type keeping struct {
	net.Listener
	keep func(net.Conn)
}

func (k keeping) Accept() (net.Conn, error) {
	c, err := k.Listener.Accept()
	if err == nil {
		k.keep(c)
	}
	return c, err
}

// A server that refuses TCP, or leaves it without an answer, is asked over UDP until it answers
// over TCP.
func TestTCPDoesNotGetThrough(t *testing.T) {
	for name, udpOnly := range map[string]bool{"refused": true, "silent": false} {
		t.Run(name, func(t *testing.T) {
			f := serve(t, udpOnly, nil)
			f.is(func(w dns.ResponseWriter, r *dns.Msg) {
				if !isTCP(w) {
					answerWith("192.0.2.1")(w, r)
				}
			})
			u := start(t, "upstream . "+f.at+" {\nforce_tcp\n}")
			if m := ask(u, "first.example."); address1(m) != "192.0.2.1" {
				t.Fatal(m)
			}
			s := u.servers.now().all[0]
			eventually(t, "it is learnt", func() bool { return !s.tcpKnown() })
			tcp := f.tcp.Load()
			for i := range 50 {
				if m := ask(u, fmt.Sprintf("n%d.example.", i)); address1(m) != "192.0.2.1" {
					t.Fatal(m)
				}
			}
			if f.tcp.Load() != tcp {
				t.Errorf("%d queries over TCP since it is known", f.tcp.Load()-tcp)
			}
			if udpOnly {
				return
			}
			// It is tried again in the background; here at once.
			f.is(answerWith("192.0.2.1"))
			if !s.tcpIs(s.ping(overTCP)) || !s.tcpKnown() {
				t.Error("it is not known that TCP gets through again")
			}
		})
	}
}

// A truncated answer is asked for over TCP, and where that does not get through as a large one
// over UDP; what there is goes to the client when nothing is better.
func TestTruncated(t *testing.T) {
	long := func(w dns.ResponseWriter, r *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(r)
		for i := range 60 {
			m.Answer = append(m.Answer, &dns.A{Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: net.IPv4(192, 0, 2, byte(i))})
		}
		if !isTCP(w) {
			size := 512
			if o := r.IsEdns0(); o != nil {
				size = int(o.UDPSize())
				m.SetEdns0(4096, false)
			}
			m.Truncate(size)
		}
		w.WriteMsg(m)
	}
	never := func(w dns.ResponseWriter, r *dns.Msg) {
		m := new(dns.Msg)
		m.SetReply(r)
		m.Truncated = true
		w.WriteMsg(m)
	}
	for _, c := range []struct {
		name    string
		udpOnly bool
		do      func(w dns.ResponseWriter, r *dns.Msg)
		answers int
	}{
		{"tcp", false, long, 60}, {"large", true, long, 60}, {"nothing", true, never, 0},
		{"large-where-tcp-is-silent", false, func(w dns.ResponseWriter, r *dns.Msg) {
			if !isTCP(w) {
				long(w, r)
			}
		}, 60},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := serve(t, c.udpOnly, c.do)
			u := start(t, "upstream . "+f.at+" {\nprefer_udp\n}")
			for i := range 3 {
				m := ask(u, fmt.Sprintf("n%d.example.", i))
				if m.Rcode != dns.RcodeSuccess || len(m.Answer) != c.answers || m.Truncated != (c.answers == 0) || m.IsEdns0() != nil {
					t.Fatal(m)
				}
			}
		})
	}
	// Without prefer_udp the client gets it at once, and asks over TCP itself.
	f := serve(t, false, long)
	if m := ask(start(t, "upstream . "+f.at), "n.example."); !m.Truncated || f.tcp.Load() != 0 {
		t.Error(m)
	}
}

// A server that has died is found out, and is asked again when it is back.
func TestServerDiesAndComesBack(t *testing.T) {
	a, b := serve(t, false, answerWith("192.0.2.1")), serve(t, false, answerWith("192.0.2.2"))
	u := start(t, "upstream . "+a.at+" "+b.at+" {\npolicy sequential\nhealth_check 50ms\nmax_fails 0\n}")
	if m := ask(u, "n.example."); address1(m) != "192.0.2.1" {
		t.Fatal(m)
	}
	u.opts.maxFails = 1
	a.is(silence)
	first := u.servers.now().all[0]
	i := 0
	eventually(t, "it is down", func() bool {
		if i++; address1(ask(u, fmt.Sprintf("n%d.example.", i))) != "192.0.2.2" {
			t.Fatal("not answered by the other")
		}
		return first.standing(0) == down
	})
	n := a.udp.Load()
	for i := range 20 {
		ask(u, fmt.Sprintf("m%d.example.", i))
	}
	if got := a.udp.Load() - n; got > 5 {
		t.Errorf("it was asked %d times while it was down", got)
	}
	a.is(answerWith("192.0.2.1"))
	eventually(t, "it is back", func() bool { return first.standing(0) == good })
}

// Names whose servers are silent take no place from others, and none is refused.
func TestSilentNamesBesideGood(t *testing.T) {
	f := serve(t, true, nil)
	f.is(func(w dns.ResponseWriter, r *dns.Msg) {
		if !strings.HasSuffix(r.Question[0].Name, "dead.test.") {
			answerWith("192.0.2.1")(w, r)
		}
	})
	u := start(t, "upstream . "+f.at+" {\nmax_concurrent 50\n}")
	var dead sync.WaitGroup
	var refused atomic.Int64
	for i := range 400 {
		dead.Go(func() {
			if m := ask(u, fmt.Sprintf("d%d.dead.test.", i)); m.Rcode == dns.RcodeRefused {
				refused.Add(1)
			}
		})
		if i%10 == 0 {
			if m := ask(u, fmt.Sprintf("g%d.good.test.", i)); address1(m) != "192.0.2.1" {
				t.Fatal(m)
			}
		}
		time.Sleep(2 * time.Millisecond)
		if n := u.slots.taken(); n > 50 {
			t.Fatalf("%d wait", n)
		}
	}
	dead.Wait()
	if u.slots.taken() != 0 || u.slots.first != nil {
		t.Errorf("%d places are still taken", u.slots.taken())
	}
	if refused.Load() > 0 {
		t.Logf("%d of the silent names were refused", refused.Load())
	}
}
