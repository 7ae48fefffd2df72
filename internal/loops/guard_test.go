package loops

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/test"
	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
)

// askedFrom is the writer of a query that came over UDP from an address.
type askedFrom struct {
	test.ResponseWriter
	addr net.Addr
}

func (w *askedFrom) RemoteAddr() net.Addr { return w.addr }

func newGuards(count int) []*guard {
	group := &guards{underWay: new(atomic.Int64)}
	for range count {
		group.add("Corefile:1")
	}
	return group.all
}

// A slowUpstream is the plugin behind a guard. It answers when it is told to.
type slowUpstream struct {
	asked  chan *dns.Msg
	answer chan struct{}
}

func newSlowUpstream() *slowUpstream {
	return &slowUpstream{make(chan *dns.Msg, 100), make(chan struct{})}
}

func (*slowUpstream) Name() string { return "forward" }

func (s *slowUpstream) ServeDNS(_ context.Context, _ dns.ResponseWriter, r *dns.Msg) (int, error) {
	s.asked <- r
	<-s.answer
	return dns.RcodeSuccess, nil
}

func query(h plugin.Handler, from, name string, qtype uint16) int {
	addr, err := net.ResolveUDPAddr("udp", from)
	if err != nil {
		panic(err)
	}
	code, _ := h.ServeDNS(context.Background(), &askedFrom{addr: addr}, new(dns.Msg).SetQuestion(name, qtype))
	return code
}

// hang asks a question that stays under way until the upstream answers.
func hang(t *testing.T, wg *sync.WaitGroup, h plugin.Handler, s *slowUpstream, from, name string) {
	t.Helper()
	wg.Go(func() { query(h, from, name, dns.TypeA) })
	late := time.After(30 * time.Second)
	for {
		select {
		case m := <-s.asked:
			if !strings.HasPrefix(m.Question[0].Name, probePrefix) {
				return // and not a probe that it has brought about
			}
		case <-late:
			t.Fatalf("the query for %s from %s did not reach the upstream", name, from)
		}
	}
}

func wantCode(t *testing.T, what string, got, want int) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %s, want %s", what, dns.RcodeToString[got], dns.RcodeToString[want])
	}
}

func wantNothingUnderWay(t *testing.T, gs []*guard) {
	t.Helper()
	for _, g := range gs {
		if n := g.underWay.Load(); n != 0 || len(g.asked) != 0 || len(g.askedBy) != 0 || g.local != 0 || g.self != 0 {
			t.Errorf("%d under way, %v, %v, %d local, %d of this process; want none", n, g.asked, g.askedBy, g.local, g.self)
		}
	}
	if n := gs[0].group.underWay.Load(); n != 0 {
		t.Errorf("%d under way in all, want none", n)
	}
}

// ownSocket opens a socket of this process and returns its name.
func ownSocket(t *testing.T) string {
	t.Helper()
	c, err := net.Dial("udp", "127.0.0.1:9")
	testkit.Must(t, err)
	t.Cleanup(func() { c.Close() })
	return c.LocalAddr().String()
}

func TestGuardForgetsWhatPanics(t *testing.T) {
	gs := newGuards(1)
	h := guarded{gs[0], plugin.HandlerFunc(func(context.Context, dns.ResponseWriter, *dns.Msg) (int, error) { panic("an upstream") })}
	for range 3 {
		func() {
			defer func() { recover() }()
			query(h, "192.0.2.1:1000", "a.test.", dns.TypeA)
		}()
	}
	wantNothingUnderWay(t, gs)
}

func TestGuardBoundsWhatIsUnderWay(t *testing.T) {
	defer func(n int64) { limitUnderWay = n }(limitUnderWay)
	limitUnderWay = 6
	gs, s := newGuards(2), newSlowUpstream()
	one, other := guarded{gs[0], s}, guarded{gs[1], s}
	var wg sync.WaitGroup
	for i := range 3 {
		hang(t, &wg, one, s, "192.0.2.1:1000", fmt.Sprintf("a%d.test.", i))
	}
	wantCode(t, "one more than half in a block", query(one, "192.0.2.1:1000", "more.test.", dns.TypeA), dns.RcodeRefused)
	for i := range 3 {
		hang(t, &wg, other, s, "192.0.2.1:1000", fmt.Sprintf("b%d.test.", i))
	}
	wantCode(t, "one more in all", query(other, "192.0.2.1:1000", "more.test.", dns.TypeA), dns.RcodeRefused)
	close(s.answer)
	wg.Wait()
	wantCode(t, "when all are answered", query(one, "192.0.2.1:1000", "more.test.", dns.TypeA), dns.RcodeSuccess)
	wantNothingUnderWay(t, gs)
}

// What comes back from a socket of this process is refused, and nobody else's.
func TestGuardRefusesWhatThisProcessSends(t *testing.T) {
	gs, s := newGuards(2), newSlowUpstream()
	h := guarded{gs[0], s}
	var wg sync.WaitGroup
	hang(t, &wg, h, s, "192.0.2.1:1000", "a.test.")
	wantCode(t, "the same question from this process", query(h, ownSocket(t), "A.test.", dns.TypeA), dns.RcodeRefused)
	hang(t, &wg, h, s, "127.0.0.1:1", "a.test.") // another program of the node
	hang(t, &wg, h, s, ownSocket(t), "b.test.")  // a name of the process's own
	close(s.answer)
	wg.Wait()
	wantNothingUnderWay(t, gs)
}

// Names that change on the way are no way out.
func TestGuardRefusesGrowingNames(t *testing.T) {
	gs, s := newGuards(1), newSlowUpstream()
	gs[0].group.renames = true
	h := guarded{gs[0], s}
	var wg sync.WaitGroup
	from := ownSocket(t)
	for i := range 2 * manyLocal {
		hang(t, &wg, h, s, from, strings.Repeat("a.", i)+"test.")
	}
	wantCode(t, "one more", query(h, from, strings.Repeat("a.", 100)+"test.", dns.TypeA), dns.RcodeRefused)
	hang(t, &wg, h, s, "127.0.0.1:1", "c.test.")
	close(s.answer)
	wg.Wait()
	wantNothingUnderWay(t, gs)
}

// A block that another block asks gets what that one sends and sends again, but no more.
func TestGuardLetsBlocksAskOneAnother(t *testing.T) {
	gs, s := newGuards(2), newSlowUpstream()
	first, second := guarded{gs[0], s}, guarded{gs[1], s}
	var wg sync.WaitGroup
	hang(t, &wg, first, s, "192.0.2.1:1000", "a.test.")
	for range triesEach + 1 { // the first of a name passes anyway
		hang(t, &wg, second, s, ownSocket(t), "a.test.")
	}
	wantCode(t, "one more", query(second, ownSocket(t), "a.test.", dns.TypeA), dns.RcodeRefused)
	close(s.answer)
	wg.Wait()
	wantNothingUnderWay(t, gs)
}

// While a reload is under way, queries of the old instance come to the blocks of the new one.
func TestGuardLetsTheOldInstanceAsk(t *testing.T) {
	before, after, s := newGuards(2), newGuards(2), newSlowUpstream()
	for _, g := range after {
		g.group.underWay = before[0].group.underWay
	}
	first, second := guarded{before[0], s}, guarded{after[1], s}
	var wg sync.WaitGroup
	hang(t, &wg, first, s, "192.0.2.1:1000", "a.test.")
	hang(t, &wg, second, s, "192.0.2.2:1000", "a.test.")
	hang(t, &wg, second, s, ownSocket(t), "a.test.")
	close(s.answer)
	wg.Wait()
	wantNothingUnderWay(t, before)
	wantNothingUnderWay(t, after)
}

// When one address asks the same again and again a probe is sent, and once that has come
// back from an address, what comes from there and is under way is refused, for a while.
func TestGuardProbes(t *testing.T) {
	gs, s := newGuards(1), newSlowUpstream()
	g := gs[0]
	h := guarded{g, s}
	var wg sync.WaitGroup
	const far, client = "198.51.100.1:53", "192.0.2.1:1000"
	for range suspicious - 1 {
		hang(t, &wg, h, s, far, "a.test.")
	}
	wg.Go(func() { query(h, far, "a.test.", dns.TypeA) })
	var sent *dns.Msg
	for range 2 { // the query and the probe
		if m := <-s.asked; strings.HasPrefix(m.Question[0].Name, probePrefix) {
			sent = m
		}
	}
	if sent == nil || !strings.HasSuffix(sent.Question[0].Name, ".a.test.") {
		t.Fatalf("the probe is %v, want one under a.test", sent)
	}
	wantCode(t, "a probe of another process", query(guarded{g, test.NextHandler(dns.RcodeSuccess, nil)}, far, probePrefix+"x.a.test.", dns.TypeA), dns.RcodeSuccess)
	hang(t, &wg, h, s, far, "a.test.") // nothing is known of it yet
	wantCode(t, "the probe", query(h, far, sent.Question[0].Name, dns.TypeA), dns.RcodeRefused)
	wantCode(t, "a query that is under way, from there", query(h, far, "a.test.", dns.TypeA), dns.RcodeRefused)
	hang(t, &wg, h, s, client, "a.test.")
	hang(t, &wg, h, s, far, "b.test.")
	g.mu.Lock()
	for a := range g.probing.back {
		g.probing.back[a] = time.Now().Add(-knownFor)
	}
	g.mu.Unlock()
	hang(t, &wg, h, s, far, "a.test.") // it does so no more
	close(s.answer)
	wg.Wait()
	wantNothingUnderWay(t, gs)
}

func TestGuardAnswersThePluginLoop(t *testing.T) {
	for name, want := range map[string]bool{
		"3234567890123456789.1234567890123456789.": true,
		"3234567890123456789.12345678.corp.test.":  true,
		"1.2.0.192.in-addr.arpa.":                  false,
		"3234567890123456789.corp.test.":           false,
		"12345678x.12345678.":                      false,
		".":                                        false,
	} {
		if got := fromLoopPlugin(nameType{name, dns.TypeHINFO}); got != want {
			t.Errorf("%s is taken for a query of the plugin loop: %v, want %v", name, got, want)
		}
	}
	if fromLoopPlugin(nameType{"3234567890123456789.1234567890123456789.", dns.TypeA}) {
		t.Error("so is one for an address")
	}
	gs, s := newGuards(1), newSlowUpstream()
	gs[0].loop = true
	for range 5 {
		wantCode(t, "a query of the plugin loop", query(guarded{gs[0], s}, "127.0.0.1:1", "3234567890123456789.1234567890123456789.", dns.TypeHINFO), dns.RcodeRefused)
	}
	if m := <-s.asked; !strings.HasPrefix(m.Question[0].Name, probePrefix) {
		t.Errorf("it got through: %v", m)
	}
	close(s.answer)
	wantNothingUnderWay(t, gs)
}

func FuzzProbeName(f *testing.F) {
	f.Add("a.test.")
	f.Add(".")
	f.Add(strings.Repeat("a.", 126))
	f.Add(strings.Repeat(strings.Repeat("a", 63)+".", 4))
	f.Fuzz(func(t *testing.T, name string) {
		if _, ok := dns.IsDomainName(name); !ok || !dns.IsFqdn(name) {
			return
		}
		got := under(probePrefix+strings.Repeat("x", 26), name)
		if _, ok := dns.IsDomainName(got); !ok || !dns.IsFqdn(got) {
			t.Errorf("the probe for %q is %q", name, got)
		}
		fromLoopPlugin(nameType{name, dns.TypeHINFO})
	})
}

// BenchmarkGuard is what a query that the cache does not know costs more.
func BenchmarkGuard(b *testing.B) {
	for _, from := range []string{"192.0.2.1:1000", "127.0.0.1:1000"} {
		b.Run(from, func(b *testing.B) {
			h := guarded{newGuards(1)[0], test.NextHandler(dns.RcodeSuccess, nil)}
			addr, _ := net.ResolveUDPAddr("udp", from)
			w, m := &askedFrom{addr: addr}, new(dns.Msg).SetQuestion("www.example.org.", dns.TypeA)
			b.ReportAllocs()
			for b.Loop() {
				h.ServeDNS(context.Background(), w, m)
			}
		})
	}
}

// BenchmarkSocketNames is one look at this process's sockets, of which there are many.
func BenchmarkSocketNames(b *testing.B) {
	for range 400 {
		c, err := net.Dial("udp", "127.0.0.1:9")
		if err != nil {
			b.Fatal(err)
		}
		defer c.Close()
	}
	for b.Loop() {
		if _, err := socketNames(); err != nil {
			b.Fatal(err)
		}
	}
}
