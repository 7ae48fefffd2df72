package upstream

import (
	"bytes"
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

// A query is one that waits for its answer.
type query struct {
	request  *dns.Msg
	framed   []byte // it, with any id
	given    bool   // to the first attempt, whose id it has
	size     int    // how long an answer over UDP may be
	udp      bool   // it has come over UDP
	came     time.Time
	begun    time.Time // when it was first asked for itself, and not waited for with another one
	deadline time.Time
	ctx      context.Context // of dials
	cancel   context.CancelFunc

	// Of slots.
	slotted       bool
	before, after *query
	group         string

	mu     sync.Mutex
	why    error // it is over, and this is why
	open   []*conn
	few    [1]*conn      // of open, nearly always
	ending chan struct{} // closed when it is over
}

var (
	errPatience = errors.New("no answer in time")
	errDone     = errors.New("another one has answered")
)

// begin makes q the query for r.
func (q *query) begin(ctx context.Context, r *dns.Msg, udp bool, size int, patience time.Duration) (err error) {
	if q.framed, err = framed(r); err != nil {
		return err
	}
	q.request, q.size, q.udp, q.ctx = r, size, udp, ctx
	q.came = time.Now()
	q.begun, q.deadline = q.came, q.came.Add(patience)
	if d, ok := ctx.Deadline(); ok && d.Before(q.deadline) {
		q.deadline = d
	}
	return nil
}

// wired is the query with an id that nobody can foresee, for an attempt of its own.
func (q *query) wired() []byte {
	q.mu.Lock()
	defer q.mu.Unlock()
	f := q.framed
	if q.given {
		f = bytes.Clone(f)
	}
	q.given = true
	setID(f)
	return f
}

// uses says that a query waits on a connection until a time, or why it does no more.
func (q *query) uses(c *conn, until time.Time) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.why != nil {
		return q.why
	}
	if q.open == nil {
		q.open = q.few[:0]
	}
	q.open = append(q.open, c)
	return c.SetDeadline(until)
}

// leaves is the end of that.
func (q *query) leaves(c *conn) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if i := slices.Index(q.open, c); i >= 0 {
		q.open = slices.Delete(q.open, i, i+1)
	}
}

// end ends a query's waiting. Only the first reason counts.
func (q *query) end(why error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.why != nil {
		return
	}
	q.why = why
	for _, c := range q.open {
		c.SetDeadline(aLongTimeAgo)
	}
	if q.ending != nil {
		close(q.ending)
		q.cancel()
	}
}

// over is why a query has ended; nil: it has not.
func (q *query) over() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.why
}

// races prepares a query for being asked several times at once: it returns what is closed when
// it is over.
func (q *query) races() <-chan struct{} {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.ending == nil {
		q.ending = make(chan struct{})
		q.ctx, q.cancel = context.WithDeadline(q.ctx, q.deadline)
		if q.why != nil {
			close(q.ending)
			q.cancel()
		}
	}
	return q.ending
}

// An attempt is a query to one server over one connection.
type attempt struct {
	s     *server
	way   way
	anew  bool // over a new connection
	large bool // for an answer that is larger than the client would have it over UDP

	c         *conn
	fresh     bool // the connection is new
	connected atomic.Bool
	sent      time.Time
	late      bool // it has been found to be late

	framed []byte // with the id of this attempt; nil: not sent yet
	buf    []byte // what has come so far
	n      int
	pooled *[usualLen]byte // where buf was at first, if it is from the pool
}

// buffers are for what is received.
var buffers = sync.Pool{New: func() any { return new([usualLen]byte) }}

// receiver returns a buffer of a length for the answer.
func (a *attempt) receiver(size int) []byte {
	if size > usualLen {
		return make([]byte, size)
	}
	a.pooled = buffers.Get().(*[usualLen]byte)
	return a.pooled[:size:size]
}

// done is the end of an attempt that nobody else knows of: what it has received is read.
func (a *attempt) done() {
	if a.pooled != nil {
		buffers.Put(a.pooled)
	}
	a.pooled, a.buf = nil, nil
}

// connect opens the attempt's connection, if there is none yet.
func (q *query) connect(a *attempt) (err error) {
	if a.c == nil {
		a.c, err = a.s.pool.dial(q.ctx, a.way)
	}
	a.connected.Store(err == nil)
	return err
}

// await sends the query, if it has not been sent, and waits for the answer until a time. The
// connection is given back or closed, but for one on which the answer can still come: then the
// error is errLate.
func (q *query) await(a *attempt, until time.Time) ([]byte, error) {
	if err := q.uses(a.c, until); err != nil {
		a.c.Close()
		return nil, err
	}
	msg, err := q.exchange(a)
	q.leaves(a.c)
	if err == nil {
		// Behind one address there may be several servers: the connections to those that fail are
		// not kept, so that in the end all lead to the others.
		if slices.Contains(a.s.opts.failover, int(msg[3]&rcodeMask)) {
			a.c.Close()
		} else {
			a.s.pool.put(a.way, a.c)
		}
		return msg, nil
	}
	why := q.over()
	var p *partial
	if errors.As(err, &p) && errors.Is(err, os.ErrDeadlineExceeded) && why == nil && until.Before(q.deadline) {
		a.buf, a.n = p.buf, p.n
		return nil, errLate
	}
	a.c.Close()
	if why != nil {
		return nil, why
	}
	return nil, err
}

func (q *query) exchange(a *attempt) ([]byte, error) {
	if a.framed == nil {
		size := q.size
		if a.large {
			f, err := q.enlarged()
			if err != nil {
				return nil, err
			}
			setID(f)
			a.framed, size = f, largeUDP
		} else {
			a.framed = q.wired()
		}
		if a.c.stream {
			size = usualLen
		}
		a.buf = a.receiver(size)
		if err := a.c.send(a.framed); err != nil {
			return nil, err
		}
	}
	return a.c.receive(a.framed[frameLen:], a.buf, a.n)
}

// enlarged is the query with room for a larger answer over UDP.
func (q *query) enlarged() ([]byte, error) {
	m := q.request.Copy()
	o := m.IsEdns0()
	if o == nil {
		o = &dns.OPT{Hdr: dns.RR_Header{Name: ".", Rrtype: dns.TypeOPT}}
		m.Extra = append(m.Extra, o)
	}
	o.SetUDPSize(largeUDP)
	return framed(m)
}

// largeUDP is the size of answers over UDP where TCP does not get through.
const largeUDP = 4096

var errLate = errors.New("late")
