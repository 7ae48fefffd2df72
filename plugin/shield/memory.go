package shield

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

const (
	// A try that nothing has come of holds back the others for so long.
	patience = 5 * time.Second
	// staleTTL is what a denial is answered again with at most, RFC 8767 section 5.
	staleTTL = 30
)

// A memory is what is known of questions. It is bounded: each part forgets what has not been
// asked for while so many others were.
type memory struct {
	settings

	uncachedCount atomic.Int64 // of uncached, so that an empty one costs nothing
	answeredAt    atomic.Int64 // when an upstream has last answered anything, in Unix ns

	mu       sync.Mutex
	failures recent[key, failure]
	denials  recent[key, denial]   // do is false: they are for both
	answered recent[key, struct{}] // what has had an answer, do is false
	uncached recent[key, struct{}] // what was last answered with something that can't be kept
	asking   map[key]tries         // what upstreams are being asked now
}

// A failure is the last one to resolve a question.
type failure struct {
	rcode int
	cause *dns.EDNS0_EDE // the upstream's, if it gave one
	at    time.Time
	until time.Time // when it may be asked again
	times int       // in a row
}

// tries are the queries for one question that are under way.
type tries struct {
	n        int
	answered time.Time // when the last answer came to one of them
}

// A denial is the upstreams' last word on a question that had an answer before.
type denial struct {
	m  *dns.Msg // nobody changes it
	at time.Time
	do bool // it has the records of DNSSEC
}

func newMemory(s settings) *memory {
	m := &memory{settings: s, asking: map[key]tries{}}
	m.failures.most, m.denials.most, m.answered.most, m.uncached.most = s.entries, s.entries, s.entries, s.entries
	return m
}

// held returns the failure that is remembered for a question, if it is not to be asked now.
// If it is, this one is the only one to ask for a while, and calls end with the same arguments
// when it is done.
func (m *memory) held(k key, now time.Time) (f failure, held bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f, ok := m.failures.get(k)
	if ok && now.Before(f.until) {
		return f, true
	}
	if ok {
		f.until = now.Add(patience)
		m.failures.put(k, f)
	}
	t := m.asking[k]
	t.n++
	m.asking[k] = t
	return f, false
}

// end is for a query for which held was called at began, and that has come to its end. If
// nothing was learned of the question, the next one may ask.
func (m *memory) end(k key, began time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if t := m.asking[k]; t.n > 1 {
		t.n--
		m.asking[k] = t
	} else {
		delete(m.asking, k)
	}
	if f, ok := m.failures.get(k); ok && f.until.Equal(began.Add(patience)) {
		f.until = began
		m.failures.put(k, f)
	}
}

// fail remembers that a question that was asked at began could not be resolved. What has
// failed or was answered since then is newer: queries under way at the same time are one try.
func (m *memory) fail(k key, rcode int, cause *dns.EDNS0_EDE, ofTheName bool, began, now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	last, ok := m.failures.get(k)
	if began.Before(last.at) || began.Before(m.asking[k].answered) {
		return
	}
	f := failure{rcode: rcode, cause: cause, at: now, times: 1}
	switch {
	case !ok || now.Sub(last.until) > m.longest:
		// It is the first, or the one before was long ago.
	case ofTheName || m.answeredAt.Load() > began.UnixNano():
		f.times = min(last.times+1, 30)
	default:
		// Nothing has been answered meanwhile: it is not for the name, and is over for all
		// names at once.
	}
	f.until = now.Add(min(m.shortest<<(f.times-1), m.longest))
	m.failures.put(k, f)
}

// note remembers what an upstream has answered. Of a truncated answer that is only that there
// is one.
func (m *memory) note(k key, r *dns.Msg, now time.Time) {
	m.answeredAt.Store(now.UnixNano())
	keep := keepable(r, k.qtype)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.failures.drop(k)
	if t, ok := m.asking[k]; ok {
		t.answered = now
		m.asking[k] = t
	}
	if r.Truncated {
		return
	}
	if keep {
		m.uncached.drop(k)
	} else {
		m.uncached.put(k, struct{}{})
	}
	m.uncachedCount.Store(int64(m.uncached.len()))

	both := k
	both.do = false
	if !denies(r, k.qtype) {
		m.answered.put(both, struct{}{})
		m.denials.drop(both)
		if both.cd = true; !k.cd {
			m.denials.drop(both) // an answer that was checked is one for those who don't check too
		}
		return
	}
	if _, had := m.answered.get(both); had && keep && m.keepDenials > 0 {
		m.denials.put(both, denial{m: r.Copy(), at: now, do: k.do})
	} else if !keep {
		m.denials.drop(both)
	}
}

// denied returns the denial that is answered while a question can't be resolved, or nil.
func (m *memory) denied(k key, now time.Time) *dns.Msg {
	do := k.do
	k.do = false
	m.mu.Lock()
	d, ok := m.denials.get(k)
	if !ok && k.cd {
		k.cd = false
		d, ok = m.denials.get(k)
	}
	m.mu.Unlock()
	if !ok || now.Sub(d.at) > m.keepDenials {
		return nil
	}
	r := d.m.Copy()
	r.Authoritative = false
	if d.do != do {
		r.AuthenticatedData = false
		r.Answer, r.Ns = unsigned(r.Answer), unsigned(r.Ns)
	}
	for _, section := range [][]dns.RR{r.Answer, r.Ns, r.Extra} {
		for _, rr := range section {
			rr.Header().Ttl = min(rr.Header().Ttl, staleTTL)
		}
	}
	return r
}

// unsigned returns what a client without DNSSEC gets to see.
func unsigned(rrs []dns.RR) (left []dns.RR) {
	for _, rr := range rrs {
		switch rr.Header().Rrtype {
		case dns.TypeRRSIG, dns.TypeNSEC, dns.TypeNSEC3:
		default:
			left = append(left, rr)
		}
	}
	return left
}

// past tells whether a question goes past the cache plugin.
func (m *memory) past(k key) bool {
	if m.uncachedCount.Load() == 0 {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	_, ok := m.uncached.get(k)
	return ok
}

// recent is a map that holds most entries at least, and forgets those that have not been
// looked at for the longest before it holds twice as many.
type recent[K comparable, V any] struct {
	most       int
	young, old map[K]V
}

func (r *recent[K, V]) get(k K) (v V, ok bool) {
	if v, ok = r.young[k]; ok {
		return v, true
	}
	if v, ok = r.old[k]; ok {
		r.put(k, v)
	}
	return v, ok
}

func (r *recent[K, V]) put(k K, v V) {
	delete(r.old, k)
	if _, there := r.young[k]; !there && len(r.young) >= r.most {
		r.old, r.young = r.young, nil
	}
	if r.young == nil {
		r.young = map[K]V{}
	}
	r.young[k] = v
}

func (r *recent[K, V]) drop(k K) {
	delete(r.young, k)
	delete(r.old, k)
}

func (r *recent[K, V]) len() int { return len(r.young) + len(r.old) }
