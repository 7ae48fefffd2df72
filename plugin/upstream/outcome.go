package upstream

import (
	"fmt"
	"slices"
	"time"

	"github.com/miekg/dns"
)

// What becomes of a race when one of its attempts ends.

// take takes in how an attempt has ended, and returns the answer if that is it.
func (c *race) take(o outcome) *dns.Msg {
	if o.err != nil {
		c.fails(o.a, o.err)
		return nil
	}
	r, took := c.runner(o.a), time.Since(o.a.sent)
	o.a.s.answered(took)
	switch {
	case o.a.way == overTCP:
		r.tcp = false
	case r.tcp:
		r.doubtTCP()
	}
	m, err := c.unpack(o)
	if err != nil {
		// It would not be another answer for being asked again.
		c.err, r.refuses = err, true
		if c.others() {
			c.due, c.because = time.Now(), becauseFailed
		}
		return nil
	}
	o.a.s.observe(m.Rcode, took)
	for _, other := range c.open {
		if other.s != o.a.s {
			c.isLate(other)
		}
	}
	switch {
	case m.Truncated && o.a.way == overUDP && c.wantsWhole(r):
		c.truncated(r, m)
	case slices.Contains(c.u.opts.failover, m.Rcode):
		c.refuses(r, m, took)
	default:
		c.answered = o.a.s
		return m
	}
	return nil
}

// fails notes an attempt that brought nothing, and has another one made.
func (c *race) fails(a *attempt, err error) {
	if c.q.over() != nil {
		return
	}
	c.err = fmt.Errorf("asking %s over %s: %w", a.s.name, a.way, err)
	attemptFailures.WithLabelValues(a.s.name, reason(err)).Inc()
	if !a.fresh {
		// Closed or reset since it was used last, which says nothing of a new one.
		c.next = &attempt{s: a.s, way: a.way, anew: true, large: a.large}
		c.due, c.because = time.Now(), becauseFailed
		return
	}
	c.failed++
	a.s.doubt()
	if c.partial {
		if r := c.runner(a); a.way == overTCP {
			r.doubtTCP()
			c.large(r)
		}
		return
	}
	if c.failed > mostFailed*len(c.runners) && !c.heardLately() {
		c.due = time.Time{}
		return
	}
	pause := time.Duration(0)
	if n := c.failed - len(c.runners); n > 0 {
		pause = min(firstPause<<min(n-1, mostFailed), longestPause)
	}
	// With none under way no answer can be late.
	if at := time.Now().Add(pause); len(c.open) == 0 || c.due.IsZero() || at.Before(c.due) {
		c.due, c.because = at, becauseFailed
	}
}

// heardLately tells whether a server has answered anybody shortly before the query began, or since.
func (c *race) heardLately() bool {
	return slices.ContainsFunc(c.runners, func(r runner) bool { return r.heardSince(c.q.begun.Add(-lately)) })
}

// wantsWhole tells whether a truncated answer is not what the client gets at once. Over UDP it
// can ask again itself.
func (c *race) wantsWhole(r *runner) bool {
	o := c.u.opts
	return (o.forceTCP || o.preferUDP || !c.q.udp) && !(r.large && !r.hasTCP())
}

// truncated keeps what has come of an answer, and asks for the whole of it.
func (c *race) truncated(r *runner, m *dns.Msg) {
	if !c.partial {
		c.best, c.partial = m, true
		c.whole = time.Now().Add(wholeFor)
	}
	if r.hasTCP() {
		c.next = &attempt{s: r.server, way: overTCP}
		c.due, c.because = time.Now(), becauseTruncated
		return
	}
	c.large(r)
}

// large asks for a large answer over UDP, once.
func (c *race) large(r *runner) {
	if r.large {
		return
	}
	r.large = true
	c.next = &attempt{s: r.server, way: overUDP, anew: true, large: true}
	c.due, c.because = time.Now(), becauseTruncated
}

// refuses keeps an answer that another server may have better, and asks it. A lone server
// may be several behind one address, of which another one answers: that is tried once for each
// query, which is not much, as failures are few and the plugins cache and shield remember them.
func (c *race) refuses(r *runner, m *dns.Msg, took time.Duration) {
	if c.best == nil {
		c.best = m
	}
	r.refuses = true
	if c.others() || took < quickly && (c.made == 1 || c.made < fewAttempts && c.u.hedges.take()) {
		c.due, c.because = time.Now(), becauseRcode
		return
	}
	c.due = time.Time{}
}

// others tells whether there is a server that has not been asked.
func (c *race) others() bool {
	return slices.ContainsFunc(c.runners, func(r runner) bool { return !r.refuses && r.rank < down && r.asked == 0 })
}

// unpack reads an answer. One that a datagram could not hold is as good as truncated.
func (c *race) unpack(o outcome) (*dns.Msg, error) {
	m, err := unpack(o.msg)
	if err != nil && o.a.way == overUDP && (o.msg[2]&bitTC != 0 || len(o.msg) == cap(o.a.buf)) {
		return c.emptied(o.msg), nil
	}
	if err != nil {
		return nil, fmt.Errorf("its answer can't be read: %w", err)
	}
	if len(m.Question) == 0 {
		m.Question = slices.Clone(c.q.request.Question)
	}
	if o.a.large && c.q.request.IsEdns0() == nil {
		m.Extra = slices.DeleteFunc(m.Extra, func(rr dns.RR) bool { return rr.Header().Rrtype == dns.TypeOPT })
	}
	m.Id = c.q.request.Id
	return m, nil
}

// emptied is the head of an answer that says no more than that there is more of it.
func (c *race) emptied(msg []byte) *dns.Msg {
	m := new(dns.Msg)
	m.SetReply(c.q.request)
	m.Rcode = int(msg[3] & rcodeMask)
	m.Authoritative, m.RecursionAvailable = msg[2]&0x04 != 0, msg[3]&0x80 != 0
	m.Truncated = true
	m.Id = c.q.request.Id
	return m
}
