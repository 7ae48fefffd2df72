package upstream

import (
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
	wire     []byte // it, with any id
	size     int    // how long an answer over UDP may be
	udp      bool   // it has come over UDP
	begun    time.Time
	deadline time.Time
	ctx      context.Context // of dials
	cancel   context.CancelFunc

	// Of slots.
	slotted       bool
	before, after *query
	group         string

	mu     sync.Mutex
	why    error // it is over, and this is why
	open   map[*conn]struct{}
	ending chan struct{} // closed when it is over
}

var (
	errPatience = errors.New("no answer in time")
	errDone     = errors.New("another one has answered")
)

func newQuery(ctx context.Context, r *dns.Msg, udp bool, size int, patience time.Duration) (*query, error) {
	wire, err := r.Pack()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	q := &query{request: r, wire: wire, size: size, udp: udp, begun: now, deadline: now.Add(patience), ctx: ctx}
	if d, ok := ctx.Deadline(); ok && d.Before(q.deadline) {
		q.deadline = d
	}
	return q, nil
}

// uses says that a query waits on a connection until a time, or why it does no more.
func (q *query) uses(c *conn, until time.Time) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.why != nil {
		return q.why
	}
	if q.open == nil {
		q.open = map[*conn]struct{}{}
	}
	q.open[c] = struct{}{}
	return c.SetDeadline(until)
}

// leaves is the end of that.
func (q *query) leaves(c *conn) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.open, c)
}

// end ends a query's waiting. Only the first reason counts.
func (q *query) end(why error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.why != nil {
		return
	}
	q.why = why
	for c := range q.open {
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

	wire []byte // with the id of this attempt; nil: not sent yet
	buf  []byte // what has come so far
	n    int
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
	if a.wire == nil {
		plain, size := q.wire, q.size
		if a.large {
			var err error
			if plain, err = q.enlarged(); err != nil {
				return nil, err
			}
			size = largeUDP
		}
		if a.c.stream {
			size = usualLen
		}
		a.wire, a.buf = withID(plain), make([]byte, size)
		if err := a.c.send(a.wire); err != nil {
			return nil, err
		}
	}
	return a.c.receive(a.wire, a.buf, a.n)
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
	return m.Pack()
}

// largeUDP is the size of answers over UDP where TCP does not get through.
const largeUDP = 4096

var errLate = errors.New("late")
