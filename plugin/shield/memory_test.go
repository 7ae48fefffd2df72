package shield

import (
	"fmt"
	"testing"
	"time"

	"github.com/miekg/dns"
)

func remembering(entries int) *memory {
	return newMemory(settings{time.Second, 30 * time.Second, time.Hour, entries, nil})
}

// pauses has a question fail again and again, each time as soon as it is asked, and returns
// how long it is not asked after each.
func pauses(m *memory, k key, said bool, between func(now time.Time)) (all []time.Duration) {
	now := time.Now()
	for range 8 {
		if _, held := m.held(k, now); held {
			return append(all, -1)
		}
		began := now
		if _, held := m.held(k, now); !held && len(all) > 0 {
			return append(all, -2) // two ask at once
		}
		now = now.Add(10 * time.Millisecond)
		between(now)
		m.fail(k, dns.RcodeServerFailure, nil, said, began, now.Add(time.Millisecond))
		failed := now.Add(time.Millisecond)
		for now = failed; ; now = now.Add(100 * time.Millisecond) {
			m.mu.Lock()
			until := m.failures.young[k].until
			m.mu.Unlock()
			if !now.Before(until) {
				break
			}
			if _, held := m.held(k, now); !held {
				return append(all, -3)
			}
		}
		all = append(all, now.Sub(failed))
	}
	return all
}

func TestPausesGrowWhileOthersAreAnswered(t *testing.T) {
	const s = time.Second
	grow := []time.Duration{s, 2 * s, 4 * s, 8 * s, 16 * s, 30 * s, 30 * s, 30 * s}
	same := []time.Duration{s, s, s, s, s, s, s, s}
	k, other := key{name: "dead.", qtype: 1, qclass: 1}, key{name: "fine.", qtype: 1, qclass: 1}
	answer := new(dns.Msg)
	for _, c := range []struct {
		name  string
		said  bool
		other bool
		want  []time.Duration
	}{
		{"silence, as to all", false, false, same},
		{"silence, and others are answered", false, true, grow},
		{"the upstream says so", true, false, grow},
	} {
		m := remembering(100)
		got := pauses(m, k, c.said, func(now time.Time) {
			if c.other {
				m.note(other, answer, now)
			}
		})
		if fmt.Sprint(got) != fmt.Sprint(c.want) {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
}

func TestPausesStartAnew(t *testing.T) {
	m, k, now := remembering(100), key{name: "dead."}, time.Now()
	for range 5 {
		m.fail(k, dns.RcodeServerFailure, nil, true, now, now)
	}
	now = now.Add(2 * time.Minute)
	m.fail(k, dns.RcodeServerFailure, nil, true, now, now)
	if _, held := m.held(k, now.Add(time.Second)); held {
		t.Error("a failure of two minutes ago counts")
	}
	m.fail(k, dns.RcodeServerFailure, nil, true, now, now)
	m.note(k, new(dns.Msg), now)
	if _, held := m.held(k, now); held {
		t.Error("a failure before an answer counts")
	}
}

// A memory does not grow with what is asked.
func TestMemoryIsBounded(t *testing.T) {
	m, now := remembering(50), time.Now()
	zero := new(dns.Msg)
	zero.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Rrtype: dns.TypeA}}}
	gone := new(dns.Msg)
	gone.Rcode = dns.RcodeNameError
	gone.Ns = []dns.RR{&dns.SOA{Hdr: dns.RR_Header{Rrtype: dns.TypeSOA, Ttl: 5}}}
	for i := range 1000 {
		k := key{name: fmt.Sprint(i), qtype: dns.TypeA}
		m.note(k, zero, now)
		m.note(k, gone, now)
		k.do = true
		m.note(k, zero, now)
		m.fail(k, dns.RcodeServerFailure, nil, true, now, now)
	}
	for what, n := range map[string]int{"failures": m.failures.len(), "denials": m.denials.len(), "answered": m.answered.len(), "uncached": m.uncached.len()} {
		if n > 100 {
			t.Errorf("%d %s, want 100 at most", n, what)
		}
	}
	if !m.past(key{name: "999", qtype: dns.TypeA, do: true}) || m.past(key{name: "0", qtype: dns.TypeA, do: true}) {
		t.Error("the last one is not known, or the first one still is")
	}
}

// A denial is answered again for a bounded time, and only where it was checked as the client
// wants it.
func TestDenialIsBounded(t *testing.T) {
	m, now := remembering(50), time.Now()
	k := key{name: "gone.", qtype: dns.TypeA, do: true}
	had := new(dns.Msg)
	had.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Rrtype: dns.TypeA, Ttl: 5}}}
	gone := new(dns.Msg)
	gone.Rcode = dns.RcodeNameError
	gone.AuthenticatedData = true
	gone.Ns = []dns.RR{
		&dns.SOA{Hdr: dns.RR_Header{Rrtype: dns.TypeSOA, Ttl: 300}, Minttl: 300}, &dns.NSEC{Hdr: dns.RR_Header{Rrtype: dns.TypeNSEC, Ttl: 300}},
	}
	m.note(k, gone, now)
	if m.denied(k, now) != nil {
		t.Error("a denial is kept of what had no answer")
	}
	m.note(k, had, now)
	m.note(k, gone, now)
	if d := m.denied(k, now.Add(time.Hour)); d == nil || len(d.Ns) != 2 || d.Ns[0].Header().Ttl != staleTTL || !d.AuthenticatedData {
		t.Errorf("within the time: %v", d)
	}
	if d := m.denied(k, now.Add(time.Hour+1)); d != nil {
		t.Errorf("after the time: %v", d)
	}
	k.do = false
	if d := m.denied(k, now); d == nil || len(d.Ns) != 1 || d.AuthenticatedData {
		t.Errorf("without DO: %v", d)
	}
	k.cd = true
	if m.denied(k, now) == nil {
		t.Error("what was checked is not good for a client that does not check")
	}
	m.note(k, had, now)
	m.note(k, gone, now)
	m.note(key{name: "gone.", qtype: dns.TypeA}, had, now)
	if k.cd = false; m.denied(k, now) != nil {
		t.Error("what is there again is denied")
	}
	k.cd = true
	m.note(k, gone, now)
	if k.cd = false; m.denied(k, now) != nil {
		t.Error("what was not checked is denied to a client that checks")
	}
}
