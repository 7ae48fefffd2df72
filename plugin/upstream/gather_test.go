package upstream

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coredns/coredns/plugin/pkg/dnstest"
	ctest "github.com/coredns/coredns/plugin/test"
	"github.com/miekg/dns"
)

// together asks the same question so many times while the first of them is under way, and returns
// what each got.
func together(u *Upstream, count int, underWay func() bool, name string) []*dns.Msg {
	answers := make([]*dns.Msg, count)
	var wg sync.WaitGroup
	for i := range answers {
		wg.Go(func() { answers[i] = ask(u, name) })
		for i == 0 && !underWay() {
			time.Sleep(time.Millisecond)
		}
	}
	wg.Wait()
	return answers
}

// What many ask at once is asked for once, whatever comes of it.
func TestAsksOnceForMany(t *testing.T) {
	for name, do := range map[string]func(w dns.ResponseWriter, r *dns.Msg){
		"NOERROR": answerWith("192.0.2.1"), "SERVFAIL": code(dns.RcodeServerFailure), "NXDOMAIN": code(dns.RcodeNameError),
	} {
		t.Run(name, func(t *testing.T) {
			f := serve(t, true, nil)
			u := start(t, "upstream . "+f.at)
			all := func() bool {
				u.same.mu.Lock()
				defer u.same.mu.Unlock()
				return u.same.waiting == 199
			}
			f.is(func(w dns.ResponseWriter, r *dns.Msg) {
				for !all() {
					time.Sleep(time.Millisecond)
				}
				do(w, r)
			})
			for _, m := range together(u, 200, func() bool { return f.udp.Load() > 0 }, "n.example.") {
				if dns.RcodeToString[m.Rcode] != name {
					t.Fatal(m)
				}
			}
			if n := f.udp.Load(); n != 1 && (n > fewAttempts || name != "SERVFAIL") { // which is tried again
				t.Errorf("the server was asked %d times", n)
			}
			if n := u.slots.taken(); n != 0 || u.same.waiting != 0 || len(u.same.asked) != 0 {
				t.Errorf("%d places, %d waiting, %d asked", n, u.same.waiting, len(u.same.asked))
			}
		})
	}
}

// A name whose servers are silent costs as much as one query, and each client waits for its own
// patience and no longer.
func TestSilentNameTakesOnePlace(t *testing.T) {
	f := serve(t, true, silence)
	u := start(t, "upstream . "+f.at+" {\npatience 2s\nmax_concurrent 100\n}")
	var wg sync.WaitGroup
	var wrong atomic.Int64
	for range 90 {
		wg.Go(func() {
			began := time.Now()
			if m := ask(u, "n.example."); m.Rcode != dns.RcodeServerFailure || time.Since(began) > 10*time.Second {
				wrong.Add(1)
			}
		})
		if n := u.slots.taken(); n > 1 {
			t.Fatalf("%d places are taken", n)
		}
		time.Sleep(10 * time.Millisecond)
	}
	wg.Wait()
	if n := f.udp.Load(); n > 20 || wrong.Load() > 0 {
		t.Errorf("the server was asked %d times, and %d got something else", n, wrong.Load())
	}
}

// Who asks later than another one waits longer, and gets what comes then.
func TestPatienceIsOnesOwn(t *testing.T) {
	f := serve(t, true, silence)
	u := start(t, "upstream . "+f.at+" {\npatience 3s\nhealth_check 50ms\n}")
	first := make(chan *dns.Msg)
	go func() { first <- ask(u, "n.example.") }()
	for f.udp.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(1500 * time.Millisecond)
	second := make(chan *dns.Msg)
	go func() { second <- ask(u, "n.example.") }()
	if m := <-first; m.Rcode != dns.RcodeServerFailure {
		t.Error(m)
	}
	f.is(answerWith("192.0.2.1"))
	if m := <-second; address1(m) != "192.0.2.1" {
		t.Error(m)
	}
}

// With other flags or letters, or from one who has more room, it is another question; an answer of
// TTL 0 is for one; and no more wait than max_concurrent.
func TestAsksForEachWhatIsNotForAll(t *testing.T) {
	f := serve(t, true, nil)
	u := start(t, "upstream . "+f.at+" {\nmax_concurrent 50\n}")
	slow := func(ttl uint32) func(w dns.ResponseWriter, r *dns.Msg) {
		return func(w dns.ResponseWriter, r *dns.Msg) {
			time.Sleep(200 * time.Millisecond)
			m := new(dns.Msg)
			m.SetReply(r)
			m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: ttl}, A: net.IPv4(192, 0, 2, 1)}}
			w.WriteMsg(m)
		}
	}
	f.is(slow(0))
	together(u, 20, func() bool { return f.udp.Load() > 0 }, "zero.example.")
	if n := f.udp.Load(); n < 20 {
		t.Errorf("for 20 queries with answers of TTL 0 it was asked %d times", n)
	}
	f.is(slow(30))
	f.udp.Store(0)
	refused := 0
	for _, m := range together(u, 200, func() bool { return f.udp.Load() > 0 }, "many.example.") {
		if m.Rcode == dns.RcodeRefused {
			refused++
		}
	}
	if n := f.udp.Load(); n != 1 || refused != 149 {
		t.Errorf("of 200 queries %d were asked and %d refused, want 1 and 149", n, refused)
	}
	keys := map[string]bool{}
	for i, change := range []func(m *dns.Msg){
		func(*dns.Msg) {}, func(m *dns.Msg) { m.CheckingDisabled = true }, func(m *dns.Msg) { m.SetEdns0(1232, false) }, func(m *dns.Msg) { m.SetEdns0(1232, true) },
		func(m *dns.Msg) { m.Question[0].Name = "N.example." }, func(m *dns.Msg) { m.RecursionDesired = false },
	} {
		m := new(dns.Msg).SetQuestion("n.example.", dns.TypeA)
		change(m)
		for _, udp := range []bool{true, false} {
			var q query
			if err := q.begin(t.Context(), m, udp, 512, time.Second); err != nil {
				t.Fatal(err)
			}
			keys[q.key()] = true
		}
		if want := 2 * (i + 1); len(keys) != want {
			t.Errorf("change %d is no other question: %v", i, fmt.Sprint(len(keys)))
		}
	}
}

// Those who wait for a name whose servers are silent keep nobody from waiting for another one.
func TestSilentNameKeepsNobodyWaiting(t *testing.T) {
	f := serve(t, true, nil)
	f.is(func(w dns.ResponseWriter, r *dns.Msg) {
		if r.Question[0].Name != "dead.test." {
			time.Sleep(100 * time.Millisecond)
			answerWith("192.0.2.1")(w, r)
		}
	})
	u := start(t, "upstream . "+f.at+" {\nmax_concurrent 20\n}")
	over := make(chan bool)
	go func() {
		together(u, 21, func() bool { return f.udp.Load() > 0 }, "dead.test.")
		close(over)
	}()
	for full := false; !full; time.Sleep(time.Millisecond) {
		u.same.mu.Lock()
		full = u.same.waiting == 20
		u.same.mu.Unlock()
	}
	asked := f.udp.Load()
	for _, m := range together(u, 5, func() bool { return f.udp.Load() > asked }, "good.example.") {
		if address1(m) != "192.0.2.1" {
			t.Error(m)
		}
	}
	<-over
}

// behind has the first of some clients, who asks with a context, be joined by so many others, and
// returns what these get once the server has been told to go on, and what the first one gets.
func behind(t *testing.T, ctx context.Context, u *Upstream, f *fake, others int, then func()) (first *dns.Msg, answers []*dns.Msg) {
	t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() {
		rec := dnstest.NewRecorder(&ctest.ResponseWriter{})
		u.ServeDNS(ctx, rec, new(dns.Msg).SetQuestion("n.example.", dns.TypeA))
		first = rec.Msg
	})
	eventually(t, "the first one asks", func() bool { return f.udp.Load() > 0 })
	answers = make([]*dns.Msg, others)
	for i := range answers {
		wg.Go(func() { answers[i] = ask(u, "n.example.") })
	}
	eventually(t, "the others wait", func() bool {
		u.same.mu.Lock()
		defer u.same.mu.Unlock()
		return u.same.waiting == others
	})
	then()
	wg.Wait()
	return first, answers
}

// Who hangs up takes nobody's answer away: another one of those who wait asks, and one alone.
func TestOthersOutliveTheFirst(t *testing.T) {
	for name, silent := range map[string]bool{"that is silent": true, "that fails": false} {
		t.Run(name, func(t *testing.T) {
			f := serve(t, true, silence)
			u := start(t, "upstream . "+f.at+" {\npatience 30s\n}")
			ctx, hangUp := context.WithCancel(t.Context())
			var before int64
			first, answers := behind(t, ctx, u, f, 20, func() {
				before = f.udp.Load()
				f.is(answerWith("192.0.2.1"))
				if !silent {
					f.is(code(dns.RcodeServerFailure))
				}
				hangUp()
			})
			for _, m := range answers {
				if want := map[bool]int{true: dns.RcodeSuccess, false: dns.RcodeServerFailure}[silent]; m.Rcode != want || silent && address1(m) != "192.0.2.1" {
					t.Fatal(m)
				}
			}
			if first != nil {
				t.Errorf("for who has hung up something is written that others may be given: %v", first)
			}
			if n := f.udp.Load() - before; n < 1 || n > 2*fewAttempts { // the first one may ask again before it hangs up
				t.Errorf("for the others the server was asked %d times", n)
			}
		})
	}
}

// One whose time is short, as by the plugin cancel, does not make it short for the others.
func TestShortPatienceIsOnesOwn(t *testing.T) {
	f := serve(t, true, silence)
	u := start(t, "upstream . "+f.at+" {\npatience 30s\n}")
	ctx, cancel := context.WithTimeout(t.Context(), 800*time.Millisecond)
	defer cancel()
	_, answers := behind(t, ctx, u, f, 20, func() {
		<-ctx.Done()
		f.is(answerWith("192.0.2.1"))
	})
	for _, m := range answers {
		if address1(m) != "192.0.2.1" {
			t.Fatal(m)
		}
	}
}

// Who has waited for an answer that was for another one alone is new among those who wait for
// servers, so that he is not the first to make room; his patience counts from when he came.
func TestIsNewWhereItAsksItself(t *testing.T) {
	f := serve(t, true, silence)
	u := start(t, "upstream . "+f.at+" {\npatience 30s\n}")
	hold := make(chan bool)
	f.is(func(w dns.ResponseWriter, r *dns.Msg) {
		<-hold
		m := new(dns.Msg).SetReply(r)
		m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.IPv4(192, 0, 2, 1)}}
		w.WriteMsg(m)
	})
	came := time.Now()
	var let time.Time
	behind(t, t.Context(), u, f, 1, func() {
		f.is(silence)
		let = time.Now()
		close(hold)
		eventually(t, "the other one asks", func() bool {
			u.slots.mu.Lock()
			defer u.slots.mu.Unlock()
			q := u.slots.first
			if q == nil || q != u.slots.last || q.begun.Before(let) {
				return false
			}
			if late := q.deadline.Sub(let); late >= 30*time.Second || q.deadline.Before(came.Add(30*time.Second)) {
				t.Errorf("patience is over in %s", late)
			}
			return true
		})
		f.is(answerWith("192.0.2.1"))
	})
}
