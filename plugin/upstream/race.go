package upstream

import (
	"errors"
	"slices"
	"time"

	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/internal/outlive"
)

const (
	// againAfter is when a query is sent again in any case: a datagram can get lost.
	againAfter = time.Second
	// connectedAfter is how long a connection is waited for before another one is tried: behind one
	// address may be a server that is gone and one that is not. Where nobody answers any query, the
	// pause doubles with each attempt from the fourth of a server on.
	connectedAfter = 300 * time.Millisecond
	quickPauses    = 3
	// fewAttempts are made of a query whose answer is late; more where there are more servers.
	fewAttempts = 3
	// mostFailed is how many attempts may fail at once, with growing pauses, before the query does,
	// unless a server has answered lately: that one may well be back while the client still waits.
	mostFailed = 7
	lately     = 30 * time.Second
	// lookBack is how often a query that has been asked often enough looks whether a server is back.
	lookBack     = 500 * time.Millisecond
	firstPause   = 10 * time.Millisecond
	longestPause = 500 * time.Millisecond
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
	q       query
	first   attempt
	lone    [1]runner // of runners, where there is one server
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
	cut     cut

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
	a := c.pick(&c.first)
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
	} else {
		m := c.take(outcome{a, msg, err})
		a.done()
		if m != nil {
			return m, nil
		}
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
		c.due = a.sent.Add(min(a.s.late(), connectedAfter) << c.fruitless())
	case c.made > 2:
		c.due = a.sent.Add(againAfter)
	}
	q, results := &c.q, c.results
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
	why := c.q.over()
	switch {
	case why != nil: // by somebody else
	case !time.Now().Before(c.q.deadline):
		c.cut = late
	case c.q.ctx.Err() != nil:
		c.cut = gone
	}
	if c.best != nil {
		return c.best, nil
	}
	if why != nil {
		return nil, why
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
		if !c.connecting() && len(c.open) >= max(fewAttempts, 2*len(c.runners)) && !c.mayBeBack() {
			if c.heardLately() {
				c.due = time.Now().Add(lookBack)
			}
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
		a = c.pick(new(attempt))
	}
	c.begins(a)
	c.launch(a)
}

// connecting tells whether an attempt has not even got a connection: what is sent there leads
// nowhere.
func (c *race) connecting() bool {
	return slices.ContainsFunc(c.open, func(a *attempt) bool { return !a.connected.Load() })
}

// fruitless is how often the pause between attempts has doubled: not at all while a server that
// can't be connected to answers other queries.
func (c *race) fruitless() int {
	for _, a := range c.open {
		if !a.connected.Load() && a.s.heardSince(c.q.begun) {
			return 0
		}
	}
	return max(0, len(c.open)-quickPauses*len(c.runners))
}

// mayBeBack tells whether a server was there lately and has answered nobody since it was asked
// last, or is back since then. One that goes on to answer others is slow for this name, and
// works on it.
func (c *race) mayBeBack() bool {
	a := c.latest()
	if a == nil || !c.heardLately() {
		return false
	}
	return a.s.backSince(a.sent) || !a.s.heardSince(a.sent) && time.Since(a.sent) >= againAfter
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
func (c *race) pick(a *attempt) *attempt {
	var best *runner
	for i := range c.runners {
		if r := &c.runners[i]; best == nil || r.cost() < best.cost() {
			best = r
		}
	}
	a.s, a.way, a.anew = best.server, best.usualWay(&c.q), best.asked > 0
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
	case slow:
		n++
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
