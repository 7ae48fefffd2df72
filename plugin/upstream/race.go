package upstream

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/internal/outlive"
)

const (
	// againAfter is when a query is sent again in any case: a datagram can get lost.
	againAfter = time.Second
	// connectedAfter is how long a connection is waited for before another one is tried: behind one
	// address may be a server that is gone and one that is not.
	connectedAfter = 300 * time.Millisecond
	// fewAttempts are made of a query whose answer is late; more where there are more servers.
	fewAttempts = 3
	// mostFailed is how many attempts may fail at once, with growing pauses, before the query does.
	mostFailed   = 8
	firstPause   = 10 * time.Millisecond
	longestPause = 200 * time.Millisecond
	// mostAttempts bounds all of them.
	mostAttempts = 48
	// wholeFor is how long the whole of a truncated answer is waited for.
	wholeFor = 2 * time.Second
	// quickly is what a failure comes within that another try may mend: that of a name whose
	// servers fail comes later.
	quickly = 100 * time.Millisecond
)

// Why another attempt is made.
const (
	becauseLate      = "late"
	becauseFailed    = "failed"
	becauseRcode     = "rcode"
	becauseTruncated = "truncated"
)

// A race is what is done for one query until there is an answer: one attempt, which nearly
// always is all, and others when it is late or fails.
type race struct {
	u       *Upstream
	q       *query
	runners []runner
	changed <-chan struct{} // closed when there are other servers
	results chan outcome
	open    []*attempt
	made    int       // attempts so far
	failed  int       // of which so many failed at once, in a row
	due     time.Time // when the next one is made; zero: none is
	because string
	next    *attempt // that one, if it is settled

	best    *dns.Msg // of which there may be a better one
	partial bool     // it is truncated, else it is a failure
	whole   time.Time
	err     error

	answered *server // whose answer it is
}

// A runner is a server, and what has become of this query there.
type runner struct {
	*server
	rank    standing
	asked   int
	tcp     bool // it has been asked over TCP, on a new connection, and has not answered
	last    *attempt
	refuses bool // it has answered with one of failover's codes
	large   bool // it has been asked for a large answer over UDP
}

type outcome struct {
	a   *attempt
	msg []byte
	err error
}

// run returns the answer, or why there is none.
func (c *race) run() (*dns.Msg, error) {
	a := c.pick()
	c.begins(a)
	if a.c == nil && a.way != overUDP {
		c.launch(a)
		return c.loop()
	}
	// With a connection at hand it takes no goroutine.
	due := a.sent.Add(a.s.late())
	err := c.q.connect(a)
	var msg []byte
	if err == nil {
		msg, err = c.q.await(a, earlier(due, c.q.deadline))
	}
	if errors.Is(err, errLate) {
		c.launch(a)
		c.due = time.Now()
	} else if m := c.take(outcome{a, msg, err}); m != nil {
		return m, nil
	}
	return c.loop()
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// begins counts an attempt, and finds it a connection if there is one.
func (c *race) begins(a *attempt) {
	c.made++
	a.sent = time.Now()
	if !a.anew {
		a.c = a.s.pool.take(a.way)
	}
	a.fresh = a.c == nil
	r := c.runner(a)
	r.asked++
	r.last = a
	r.tcp = r.tcp || a.fresh && a.way == overTCP
}

// launch goes on with an attempt beside others.
func (c *race) launch(a *attempt) {
	if c.results == nil {
		c.results = make(chan outcome, mostAttempts)
		c.q.races()
	}
	c.open = append(c.open, a)
	c.due, c.because = a.sent.Add(a.s.late()), becauseLate
	switch {
	case a.fresh && a.way != overUDP || c.connecting():
		c.due = a.sent.Add(min(a.s.late(), connectedAfter))
	case c.made > 2:
		c.due = a.sent.Add(againAfter)
	}
	q, results := c.q, c.results
	go func() {
		defer outlive.Panic("asking an upstream")
		o := outcome{a: a}
		if o.err = q.connect(a); o.err == nil {
			o.msg, o.err = q.await(a, q.deadline)
		}
		results <- o
	}()
}

// loop makes further attempts when they are due, until there is an answer or no time left.
func (c *race) loop() (*dns.Msg, error) {
	ending := c.q.races()
	defer c.q.end(errDone)
	for len(c.open) > 0 || !c.due.IsZero() {
		until := c.q.deadline
		for _, t := range []time.Time{c.due, c.whole} {
			if !t.IsZero() {
				until = earlier(until, t)
			}
		}
		timer := time.NewTimer(time.Until(until))
		select {
		case o := <-c.results:
			if i := slices.Index(c.open, o.a); i >= 0 {
				c.open = slices.Delete(c.open, i, i+1)
			}
			if m := c.take(o); m != nil {
				timer.Stop()
				return m, nil
			}
		case <-c.changed:
			c.join()
		case <-ending:
			timer.Stop()
			return c.best, c.q.over()
		case <-c.q.ctx.Done():
			timer.Stop()
			return c.end()
		case <-timer.C:
			now := time.Now()
			switch {
			case !now.Before(c.q.deadline) || !c.whole.IsZero() && !now.Before(c.whole):
				return c.end()
			case !c.due.IsZero() && !now.Before(c.due):
				c.again()
			}
		}
		timer.Stop()
	}
	return c.end()
}

// join has servers that have come since the query began asked, now.
func (c *race) join() {
	list := c.u.servers.now()
	c.changed = list.over
	for _, s := range list.all {
		if !slices.ContainsFunc(c.runners, func(r runner) bool { return r.server == s }) {
			c.runners = append(c.runners, runner{server: s})
			c.due, c.because, c.next = time.Now(), becauseFailed, nil
		}
	}
}

// end is the best that is known when there is no time left, or nothing more to try.
func (c *race) end() (*dns.Msg, error) {
	for _, a := range c.open {
		c.isLate(a)
	}
	if c.best != nil {
		return c.best, nil
	}
	if c.err == nil {
		c.err = errPatience
	}
	return nil, c.err
}

// again makes an attempt that is due, if it may be made.
func (c *race) again() {
	c.due = time.Time{}
	if c.made >= mostAttempts {
		return
	}
	if c.because == becauseLate {
		first := false
		for _, a := range c.open {
			first = first || !a.late
			c.isLate(a)
			if c.partial && a.way == overTCP {
				c.large(c.runner(a))
			}
		}
		if c.next != nil {
			c.due = time.Time{}
			c.another(becauseTruncated)
			return
		}
		if !c.connecting() && c.made >= max(fewAttempts, 2*len(c.runners)) {
			return
		}
		// A server that answers others is asked a second time so soon only for a few.
		if a := c.latest(); first && a != nil && a.connected.Load() && a.s.heardSince(a.sent) && !c.u.hedges.take() {
			c.due = a.sent.Add(againAfter)
			return
		}
	}
	c.another(c.because)
}

// another makes the next attempt.
func (c *race) another(because string) {
	askedAgain.WithLabelValues(because).Inc()
	a := c.next
	if c.next = nil; a == nil {
		a = c.pick()
	}
	c.begins(a)
	c.launch(a)
}

// connecting tells whether an attempt has not even got a connection: what is sent there leads
// nowhere.
func (c *race) connecting() bool {
	return slices.ContainsFunc(c.open, func(a *attempt) bool { return !a.connected.Load() })
}

// latest is the attempt that was begun last of those under way.
func (c *race) latest() *attempt {
	if len(c.open) == 0 {
		return nil
	}
	return c.open[len(c.open)-1]
}

// isLate notes that an attempt has no answer yet.
func (c *race) isLate(a *attempt) {
	if !a.late {
		a.late = true
		a.s.silent(a.sent)
	}
}

// pick chooses the server and the way of the next attempt.
func (c *race) pick() *attempt {
	var best *runner
	for i := range c.runners {
		if r := &c.runners[i]; best == nil || r.cost() < best.cost() {
			best = r
		}
	}
	a := &attempt{s: best.server, way: best.usualWay(c.q), anew: best.asked > 0}
	// What did not get through by TCP may by UDP. A connection that had been used before
	// shows nothing of a new one.
	if last := best.last; a.way == overTCP && best.tcp && last.way == overTCP && last.fresh {
		a.way = overUDP
	}
	return a
}

// cost orders servers by how often they have been asked, and how they are.
func (r *runner) cost() int {
	n := 2 * r.asked
	switch r.rank {
	case doubted:
		n += 3
	case down:
		n += 5
	}
	if r.refuses {
		n += mostAttempts
	}
	return n
}

// runner returns what is kept of an attempt's server.
func (c *race) runner(a *attempt) *runner {
	return &c.runners[slices.IndexFunc(c.runners, func(r runner) bool { return r.server == a.s })]
}

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
	observe(o.a.s.name, m.Rcode, took)
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
	if c.failed > mostFailed*len(c.runners) {
		c.due = time.Time{}
		return
	}
	pause := time.Duration(0)
	if n := c.failed - len(c.runners); n > 0 {
		pause = min(firstPause<<(n-1), longestPause)
	}
	if at := time.Now().Add(pause); c.due.IsZero() || at.Before(c.due) {
		c.due, c.because = at, becauseFailed
	}
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
	m := new(dns.Msg)
	err := m.Unpack(o.msg)
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
