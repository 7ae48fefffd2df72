package shield

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/pkg/dnstest"
	"github.com/coredns/coredns/plugin/test"
	"github.com/coredns/coredns/request"
	"github.com/miekg/dns"
)

// An upstream answers as it is told, and keeps what it was asked last.
type upstream struct {
	answer func(m *dns.Msg)
	code   int // returned instead, where there is no answer
	asked  *dns.Msg
	times  int
}

func (u *upstream) Name() string { return "upstream" }

func (u *upstream) ServeDNS(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	u.asked, u.times = r, u.times+1
	if u.answer == nil {
		return u.code, errors.New("no answer")
	}
	m := new(dns.Msg).SetReply(r)
	u.answer(m)
	w.WriteMsg(m)
	return m.Rcode, nil
}

// around is the two halves of shield, with nothing between them.
func around(u *upstream) plugin.Handler {
	m := remembering(100)
	return &Front{Next: back{next: u, memory: m}, memory: m}
}

func ask(t *testing.T, h plugin.Handler, r *dns.Msg) (*dns.Msg, int) {
	t.Helper()
	w := dnstest.NewRecorder(&test.ResponseWriter{})
	code, _ := h.ServeDNS(t.Context(), w, r)
	return w.Msg, code
}

func rr(t *testing.T, text string) dns.RR {
	t.Helper()
	r, err := dns.NewRR(text)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func withEDNS(name string) *dns.Msg {
	r := new(dns.Msg).SetQuestion(name, dns.TypeA)
	return r.SetEdns0(1232, false)
}

// causes are the extended errors of a response.
func causes(m *dns.Msg) (codes []uint16) {
	if o := m.IsEdns0(); o != nil {
		for _, option := range o.Option {
			if e, ok := option.(*dns.EDNS0_EDE); ok {
				codes = append(codes, e.InfoCode)
			}
		}
	}
	return codes
}

func TestEverybodyAsksInOneForm(t *testing.T) {
	u := &upstream{answer: func(m *dns.Msg) { m.Answer = []dns.RR{rr(t, "www.example.org. 60 IN A 192.0.2.1")} }}
	r := withEDNS("WwW.example.ORG.")
	r.RecursionDesired = false
	r.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: []byte{192, 0, 2, 0}}}
	m, _ := ask(t, around(u), r)
	if q := u.asked; q.Question[0].Name != "www.example.org." || !q.RecursionDesired || len(q.IsEdns0().Option) > 0 {
		t.Errorf("the upstream is asked %v", q)
	}
	if m.Question[0].Name != "WwW.example.ORG." || m.Answer[0].Header().Name != "WwW.example.ORG." || m.RecursionDesired {
		t.Errorf("the client is answered %v", m)
	}
	if r.IsEdns0() == nil || len(r.IsEdns0().Option) != 1 {
		t.Error("the client's own query is changed")
	}
	transfer := new(dns.Msg).SetAxfr("Example.org.")
	ask(t, around(u), transfer)
	if u.asked != transfer {
		t.Errorf("a transfer goes on as %v", u.asked)
	}
}

// Flags of EDNS that have no meaning yet are not sent back (RFC 6891, section 6.1.4).
func TestFlagsAreNotSentBack(t *testing.T) {
	u := &upstream{answer: func(m *dns.Msg) { m.Answer = []dns.RR{rr(t, "www.example.org. 60 IN A 192.0.2.1")} }}
	for _, do := range []bool{false, true} {
		r := withEDNS("www.example.org.")
		r.IsEdns0().SetDo(do)
		r.IsEdns0().Hdr.Ttl |= 0x7fff
		w := dnstest.NewRecorder(&test.ResponseWriter{})
		around(u).ServeDNS(t.Context(), request.NewScrubWriter(r, w), r)
		if o := w.Msg.IsEdns0(); o == nil || o.Hdr.Ttl&0x7fff != 0 || o.Do() != do {
			t.Errorf("the answer has %v", o)
		}
	}
}

func TestFailureIsRemembered(t *testing.T) {
	for name, u := range map[string]*upstream{
		"SERVFAIL":  {answer: func(m *dns.Msg) { m.Rcode = dns.RcodeServerFailure }},
		"no answer": {code: dns.RcodeServerFailure},
	} {
		h := around(u)
		for range 3 {
			if m, code := ask(t, h, withEDNS("dead.test.")); code != dns.RcodeServerFailure && (m == nil || m.Rcode != dns.RcodeServerFailure) {
				t.Errorf("%s: the answer is %v, code %d", name, m, code)
			}
		}
		if u.times != 1 {
			t.Errorf("%s: the upstream is asked %d times", name, u.times)
		}
		if m, _ := ask(t, h, withEDNS("dead.test.")); m == nil || !slices.Contains(causes(m), dns.ExtendedErrorCodeCachedError) {
			t.Errorf("%s: the client is not told why: %v", name, m)
		}
		ask(t, h, withEDNS("other.test."))
		if u.times != 2 {
			t.Errorf("%s: another name is not asked for", name)
		}
	}
}

// What the upstream has told of its failure is passed on.
func TestCauseOfAFailure(t *testing.T) {
	u := &upstream{answer: func(m *dns.Msg) {
		m.Rcode = dns.RcodeServerFailure
		m.SetEdns0(1232, false)
		m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_EDE{InfoCode: dns.ExtendedErrorCodeDNSBogus}}
	}}
	h := around(u)
	for range 2 {
		if m, _ := ask(t, h, withEDNS("bogus.test.")); m == nil || !slices.Contains(causes(m), dns.ExtendedErrorCodeDNSBogus) {
			t.Errorf("the client is told %v", m)
		}
	}
}

// A name that had an answer, is denied, and whose servers then fail stays gone.
func TestDenialIsGivenInPlaceOfAFailure(t *testing.T) {
	soa := rr(t, "test. 300 IN SOA ns.test. host.test. 1 3600 600 86400 20")
	u := &upstream{answer: func(m *dns.Msg) { m.Answer = []dns.RR{rr(t, "gone.test. 60 IN A 192.0.2.1")} }}
	h := around(u)
	ask(t, h, withEDNS("gone.test."))
	u.answer = func(m *dns.Msg) { m.Rcode, m.Ns = dns.RcodeNameError, []dns.RR{soa} }
	m, _ := ask(t, h, withEDNS("gone.test."))
	if m.Rcode != dns.RcodeNameError || m.Ns[0].Header().Ttl != 20 || soa.Header().Ttl != 300 {
		t.Errorf("the denial is %v", m)
	}
	u.answer, u.code = nil, dns.RcodeServerFailure
	for range 2 {
		m, _ = ask(t, h, withEDNS("gone.test."))
		if m == nil || m.Rcode != dns.RcodeNameError || !slices.Contains(causes(m), dns.ExtendedErrorCodeStaleNXDOMAINAnswer) {
			t.Fatalf("while its servers fail the name gets %v", m)
		}
	}
}

func TestDenialAtTheEndOfAnAlias(t *testing.T) {
	u := &upstream{answer: func(m *dns.Msg) {
		m.Rcode = dns.RcodeNameError
		m.Answer = []dns.RR{rr(t, "alias.test. 60 IN CNAME nowhere.test.")}
		m.Ns = []dns.RR{rr(t, "test. 10 IN SOA ns.test. host.test. 1 3600 600 86400 20")}
	}}
	m, _ := ask(t, around(u), withEDNS("alias.test."))
	if len(m.Answer) != 1 || len(m.Ns) != 1 || m.Rcode != dns.RcodeNameError {
		t.Errorf("the client is answered %v", m)
	}
}

// failedBefore has a question have failed, so long ago that the next one who asks tries again.
func failedBefore(h plugin.Handler, r *dns.Msg) {
	then := time.Now().Add(-2 * time.Second)
	h.(*Front).fail(keyOf(r), dns.RcodeServerFailure, nil, true, then, then)
}

// Queries that fail while others like them are under way are one try, and one pause.
func TestFailuresAtOnceAreOne(t *testing.T) {
	u, r := new(upstream), withEDNS("dead.test.")
	h := around(u)
	u.answer = func(m *dns.Msg) {
		if u.times < 8 {
			ask(t, h, r)
		}
		m.Rcode = dns.RcodeServerFailure
	}
	ask(t, h, r)
	if u.times != 8 {
		t.Fatalf("%d queries are under way at once", u.times)
	}
	if f, _ := h.(*Front).failures.get(keyOf(r)); f.times != 1 || time.Until(f.until) > time.Second {
		t.Errorf("they count as %d tries, with a pause of %v", f.times, time.Until(f.until))
	}
	if m := h.(*Front).memory; len(m.asking) > 0 {
		t.Errorf("%d questions are under way at the end", len(m.asking))
	}
}

// A failure says nothing where another one who asked later has had an answer meanwhile.
func TestLateFailureDoesNotCount(t *testing.T) {
	for name, answer := range map[string]func(m *dns.Msg){
		"answer":    func(m *dns.Msg) { m.Answer = []dns.RR{rr(t, "slow.test. 60 IN A 192.0.2.1")} },
		"denial":    func(m *dns.Msg) { m.Rcode = dns.RcodeNameError },
		"truncated": func(m *dns.Msg) { m.Truncated = true },
	} {
		u, r := new(upstream), withEDNS("slow.test.")
		h := around(u)
		u.answer = func(m *dns.Msg) {
			u.answer = answer
			ask(t, h, r)
			m.Rcode = dns.RcodeServerFailure
		}
		ask(t, h, r)
		if ask(t, h, r); u.times != 3 {
			t.Errorf("%s: the upstream is asked %d times, want 3", name, u.times)
		}
	}
}

// A truncated answer, which is not kept, is one all the same: the client asks again over TCP.
func TestTruncatedAnswerEndsAFailure(t *testing.T) {
	for _, rcode := range []int{dns.RcodeSuccess, dns.RcodeNameError} {
		u, r := new(upstream), withEDNS("big.test.")
		h := around(u)
		failedBefore(h, r)
		u.answer = func(m *dns.Msg) { m.Rcode, m.Truncated = rcode, true }
		if m, _ := ask(t, h, r); m == nil || !m.Truncated {
			t.Fatalf("over UDP: %v", m)
		}
		u.answer = func(m *dns.Msg) { m.Answer = []dns.RR{rr(t, "big.test. 60 IN A 192.0.2.1")} }
		if m, _ := ask(t, h, r); m == nil || len(m.Answer) != 1 {
			t.Errorf("over TCP, after a truncated %s: %v", dns.RcodeToString[rcode], m)
		}
		if h.(*Front).answeredAt.Load() == 0 {
			t.Error("no upstream has answered anything")
		}
	}
}

// A try from which nothing is learned of the name does not keep others from trying.
func TestTryThatComesToNothing(t *testing.T) {
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	for name, c := range map[string]struct {
		ctx  context.Context
		code int
		say  func(m *dns.Msg)
	}{
		"refused here":      {t.Context(), dns.RcodeRefused, nil},
		"the client's gone": {gone, dns.RcodeServerFailure, nil},
		"FORMERR":           {t.Context(), 0, func(m *dns.Msg) { m.Rcode = dns.RcodeFormatError }},
		"FORMERR from here": {t.Context(), dns.RcodeFormatError, nil},
	} {
		u, r := &upstream{code: c.code, answer: c.say}, withEDNS("back.test.")
		h := around(u)
		failedBefore(h, r)
		h.ServeDNS(c.ctx, dnstest.NewRecorder(&test.ResponseWriter{}), r)
		u.answer = func(m *dns.Msg) { m.Answer = []dns.RR{rr(t, "back.test. 60 IN A 192.0.2.1")} }
		if m, _ := ask(t, h, r); m == nil || len(m.Answer) != 1 || u.times != 2 {
			t.Errorf("%s: then the client is answered %v, and the upstream asked %d times", name, m, u.times)
		}
	}
}
