package upstream

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// A gathering has clients who ask the same thing at the same time asked for but once. The others
// take no place of slots.
type gathering struct {
	limit int // of those that wait; 0: none

	mu      sync.Mutex
	asked   map[string]*asked
	waiting int
}

// asked is a query that is under way, and what has become of it.
type asked struct {
	over    chan struct{} // nil: nobody waits
	waiting int

	m    *dns.Msg // nobody changes it
	by   *server
	err  error
	took time.Duration
	cut  cut
}

// A cut is why a race has ended before it was known what comes of it.
type cut int

const (
	uncut cut = iota
	gone      // who has asked does not wait any more
	late      // his patience is over
)

const (
	// longTry is how long a try has to have lasted for one of those who have waited for it to try
	// again: what fails at once fails for all of them.
	longTry = time.Second
	// longLeft is what has to be left of his patience, or a quarter where that is less.
	longLeft = time.Second
)

// isLeft tells whether enough is left of a query's patience to ask once more.
func (q *query) isLeft() bool {
	return time.Until(q.deadline) >= min(longLeft, q.deadline.Sub(q.came)/4)
}

// key is the query but for its id, and the way that it has come: who asks with other flags or
// options, for a larger answer or in other letters, may get another answer.
func (q *query) key() string {
	way := "t"
	if q.udp {
		way = "u"
	}
	return way + string(q.framed[4:])
}

// join returns a query that is under way for the same. If it is the first, the caller asks and then
// calls end. It returns nil where too many wait: then the caller asks alone, but for a question that
// half of them wait for.
func (g *gathering) join(key string) (a *asked, first bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if a = g.asked[key]; a == nil {
		if g.asked == nil {
			g.asked = map[string]*asked{}
		}
		a = &asked{}
		g.asked[key] = a
		return a, true
	}
	if g.limit > 0 && g.waiting >= g.limit {
		return nil, a.waiting < g.limit/2
	}
	g.waiting++
	a.waiting++
	if a.over == nil {
		a.over = make(chan struct{})
	}
	return a, false
}

// end tells those who wait what has come of it.
func (g *gathering) end(key string, a *asked, m *dns.Msg, by *server, err error, c *race) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.asked, key)
	if a.over == nil {
		return
	}
	a.by, a.err, a.took, a.cut = by, err, time.Since(c.q.begun), c.cut
	if m != nil {
		a.m = m.Copy() // the plugins that m goes to may change it
	}
	close(a.over)
}

// wait is for what comes of a query of somebody else's.
func (g *gathering) wait(ctx context.Context, a *asked, q *query) error {
	late := time.NewTimer(time.Until(q.deadline))
	defer late.Stop()
	defer func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.waiting--
		a.waiting--
	}()
	select {
	case <-a.over:
		q.begun = time.Now() // what it asks itself from here on: slots are not to take it for an old one
		return nil
	case <-late.C:
		return errPatience
	case <-ctx.Done():
		return ctx.Err()
	}
}

// once asks for what others do not ask for already, or waits with them.
func (u *Upstream) once(ctx context.Context, c *race) (m *dns.Msg, by *server, err error) {
	q := &c.q
	key := q.key()
	for {
		a, first := u.same.join(key)
		if a == nil && first {
			return u.ask(c)
		}
		if first {
			err = errDone // where it panics
			defer func() { u.same.end(key, a, m, by, err, c) }()
			return u.ask(c)
		}
		if a == nil {
			return nil, nil, errFull
		}
		if err := u.same.wait(ctx, a, q); err != nil {
			return nil, nil, err
		}
		switch {
		case a.cut == gone: // one of those who wait goes on, whatever was known so far
		case a.m != nil && isForOne(a.m):
			return u.ask(c)
		case a.m != nil:
			gathered.Inc()
			m = a.m.Copy()
			m.Id = q.request.Id
			return m, a.by, nil
		case !q.isLeft() || a.cut == uncut && (a.took < longTry || errors.Is(a.err, errCrowded)):
			gathered.Inc()
			return nil, nil, a.err
		}
	}
}

// isForOne tells whether an answer is for the one alone who has asked, as no cache may keep it: one
// of TTL 0, or an alias that leads nowhere.
func isForOne(m *dns.Msg) bool {
	kept := m.Rcode != dns.RcodeSuccess || len(m.Answer) == 0
	for _, rr := range slices.Concat(m.Answer, m.Ns) {
		soa, isSOA := rr.(*dns.SOA)
		if rr.Header().Ttl == 0 || isSOA && soa.Minttl == 0 {
			return true
		}
		kept = kept || isSOA || rr.Header().Rrtype == m.Question[0].Qtype || m.Question[0].Qtype == dns.TypeANY
	}
	return !kept
}
