package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Names is which names a load asks for.
type Names int

// The kinds of names.
const (
	Hits   Names = iota // sixteen names again and again
	Misses              // each name once
	Slow                // each name once, and the cluster takes its time for it
)

// SlowFor is how long the cluster takes for a slow name.
const SlowFor = 1500 * time.Millisecond

// A Load is queries: where from, where to, how many, how fast. A query is sent once,
// and its answer is awaited before the same socket sends the next one.
type Load struct {
	From    *Namespace       // nil: where this process is
	Proto   string           // "udp" or "tcp"
	To      []netip.AddrPort // one query each, in turn
	Names   Names
	Tag     string        // makes the names those of this load only
	Zone    string        // what the names end in; empty: lab.
	Count   int           // how many in all
	Rate    int           // how many a second; 0: as fast as they are answered
	Workers int           // how many at a time; 0: 4
	Keep    bool          // keep a socket for many queries, instead of one each
	Timeout time.Duration // when a query counts as lost; 0: 5 s
}

// A Result is what became of a load.
type Result struct {
	Tally
	Retried   int // sent again, for the server closed the TCP connection first
	latencies []time.Duration
}

// Latency is the time in which a share of the answers came, 0.5 for the median.
func (r *Result) Latency(share float64) time.Duration {
	if len(r.latencies) == 0 {
		return 0
	}
	slices.Sort(r.latencies)
	return r.latencies[int(share*float64(len(r.latencies)-1))]
}

func (r *Result) String() string {
	s := fmt.Sprintf("%d sent, %d answered (%d by the cluster itself), %d lost, %d refused, %d wrong, %d retried; "+
		"median %v, 99 %% within %v, at most %v; longest gap %v", r.Sent, r.Answered, r.FromCluster, r.Lost,
		r.Refused, r.Wrong, r.Retried, r.Latency(.5).Round(time.Microsecond), r.Latency(.99).Round(time.Microsecond),
		r.Latency(1).Round(time.Microsecond), r.Gap.Round(time.Millisecond))
	return strings.Join(append([]string{s}, r.Errors...), "\n\t")
}

// AllAnswered says whether every query was answered, and by the cache or by the
// cluster itself as asked.
func (r *Result) AllAnswered(byCluster bool) bool {
	from := 0
	if byCluster {
		from = r.Answered
	}
	return r.Sent > 0 && r.Answered == r.Sent && r.FromCluster == from
}

func (r *Result) add(o *Result) {
	r.Tally.Add(&o.Tally)
	r.Retried += o.Retried
	r.latencies = append(r.latencies, o.latencies...)
}

// Run runs the load to its end.
func (l Load) Run() (*Result, error) {
	r, err := l.Start()
	if err != nil {
		return nil, err
	}
	return r.Wait()
}

// A Running load.
type Running struct {
	load    Load
	next    atomic.Int64 // the number of the next query
	stop    chan struct{}
	stopped sync.Once
	begun   time.Time
	last    atomic.Int64 // when the last answer came, since begun
	gap     atomic.Int64
	wg      sync.WaitGroup

	mu     sync.Mutex
	result Result
	err    error
}

// Start starts the load.
func (l Load) Start() (*Running, error) {
	if l.Count <= 0 || len(l.To) == 0 {
		return nil, errors.New("starting a load: how many queries, and where to?")
	}
	if l.Workers == 0 {
		l.Workers = 4
	}
	if l.Timeout == 0 {
		l.Timeout = 5 * time.Second
	}
	if l.Zone == "" {
		l.Zone = "lab."
	}
	r := &Running{load: l, stop: make(chan struct{}), begun: time.Now()}
	for range l.Workers {
		r.wg.Go(func() {
			w := &worker{running: r, fd: -1}
			err := l.From.Do(w.run)
			r.mu.Lock()
			defer r.mu.Unlock()
			r.result.add(&w.result)
			r.err = errors.Join(r.err, err)
		})
	}
	return r, nil
}

// Wait waits until every query has been sent and answered, or given up.
func (r *Running) Wait() (*Result, error) {
	r.wg.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.result.Gap = time.Duration(r.gap.Load())
	return &r.result, r.err
}

// Stop sends no further query, and waits for the answers to those that are out.
func (r *Running) Stop() (*Result, error) {
	r.stopped.Do(func() { close(r.stop) })
	return r.Wait()
}

// Sent says how many queries have been sent so far.
func (r *Running) Sent() int { return int(min(r.next.Load(), int64(r.load.Count))) }

// ticket hands out the number of the next query when it is time for it.
func (r *Running) ticket() (int, bool) {
	select {
	case <-r.stop:
		return 0, false
	default:
	}
	n := int(r.next.Add(1)) - 1
	if n >= r.load.Count {
		return 0, false
	}
	if r.load.Rate > 0 {
		due := r.begun.Add(time.Duration(n) * time.Second / time.Duration(r.load.Rate))
		if d := time.Until(due); d > 0 {
			time.Sleep(d)
		}
	}
	return n, true
}

func (r *Running) answered() {
	now := int64(time.Since(r.begun))
	gap := now - r.last.Swap(now)
	for {
		longest := r.gap.Load()
		if gap <= longest || r.gap.CompareAndSwap(longest, gap) {
			return
		}
	}
}

// A worker has one socket at a time, and blocks its thread on it: a thread in a
// namespace runs nothing else anyway, and this is cheaper than the runtime's poller.
type worker struct {
	running *Running
	result  Result
	fd      int
	to      netip.AddrPort // of fd
	used    int            // queries on fd
	id      uint16
	buf     [4096]byte
	query   [300]byte
}

// keptFor is how many queries a kept socket is good for: CoreDNS closes a TCP
// connection after 128.
const keptFor = 100

func (w *worker) run() error {
	defer w.close()
	l := w.running.load
	for {
		n, ok := w.running.ticket()
		if !ok {
			return nil
		}
		w.result.Sent++
		w.id++
		q, err := w.pack(n)
		if err != nil {
			return err
		}
		// With as many addresses as workers each worker could have one address only.
		if err := w.ask(l.To[n%len(l.To)], q); err != nil {
			w.close()
			w.result.failed(fmt.Errorf("query %d to %v over %s, %v after the start: %w",
				n, l.To[n%len(l.To)], l.Proto, time.Since(w.running.begun).Round(time.Millisecond), err))
		}
		if !l.Keep {
			w.close()
		}
	}
}

// pack makes the n-th query. The two bytes in front are for TCP.
func (w *worker) pack(n int) ([]byte, error) {
	l := w.running.load
	q, err := appendQuery(append(w.query[:0], 0, 0), w.id, l.Names.name(n, l.Tag, l.Zone), n)
	if err != nil {
		return nil, err
	}
	binary.BigEndian.PutUint16(q, uint16(len(q)-2))
	return q, nil
}

var errClosed = errors.New("the server closed the connection")

func (w *worker) ask(to netip.AddrPort, q []byte) error {
	begun := time.Now()
	answer, err := w.try(to, q)
	if errors.Is(err, errClosed) {
		// A server may close a connection between two queries, and one that shuts
		// down does: the client is to try again (RFC 7766, 6.2.4).
		w.result.Retried++
		w.close()
		answer, err = w.try(to, q)
	}
	if err != nil {
		return err
	}
	ttl, err := check(q[2:], answer)
	if err != nil {
		return err
	}
	w.result.answered(ttl)
	w.result.latencies = append(w.result.latencies, time.Since(begun))
	w.running.answered()
	return nil
}

func (w *worker) try(to netip.AddrPort, q []byte) ([]byte, error) {
	if err := w.connect(to); err != nil {
		return nil, err
	}
	return w.exchange(q)
}

// connect makes sure of a socket to an address.
func (w *worker) connect(to netip.AddrPort) (err error) {
	if w.fd >= 0 && w.to == to && w.used < keptFor {
		w.used++
		return nil
	}
	w.close()
	l := w.running.load
	typ := unix.SOCK_DGRAM
	if l.Proto == "tcp" {
		typ = unix.SOCK_STREAM
	}
	var addr unix.Sockaddr
	if w.fd, addr, err = openSocket(typ, to); err != nil {
		return err
	}
	w.to, w.used = to, 1
	timeout := unix.NsecToTimeval(l.Timeout.Nanoseconds())
	for _, opt := range []int{unix.SO_RCVTIMEO, unix.SO_SNDTIMEO} {
		if err := unix.SetsockoptTimeval(w.fd, unix.SOL_SOCKET, opt, &timeout); err != nil {
			return fmt.Errorf("setting a timeout: %w", err)
		}
	}
	switch err := retry(func() error { return unix.Connect(w.fd, addr) }); {
	case errors.Is(err, unix.ECONNRESET): // the server has closed it before it accepted it
		return errClosed
	case err != nil:
		return fmt.Errorf("connecting: %w", err)
	}
	return nil
}

func (w *worker) close() {
	if w.fd >= 0 {
		unix.Close(w.fd)
		w.fd = -1
	}
}

// exchange sends a query and returns the answer to it.
func (w *worker) exchange(q []byte) ([]byte, error) {
	tcp := w.running.load.Proto == "tcp"
	id := q[2:4]
	if !tcp {
		q = q[2:]
	}
	deadline := time.Now().Add(w.running.load.Timeout)
	err := retry(func() error {
		_, err := unix.Write(w.fd, q)
		return err
	})
	if tcp && (errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET)) {
		return nil, errClosed
	}
	if err != nil {
		return nil, fmt.Errorf("sending: %w", err)
	}
	for {
		var answer []byte
		if tcp {
			answer, err = w.readTCP()
		} else {
			var n int
			err = retry(func() (err error) {
				n, err = unix.Read(w.fd, w.buf[:])
				return err
			})
			answer = w.buf[:max(n, 0)]
		}
		if err != nil {
			return nil, fmt.Errorf("receiving: %w", err)
		}
		// A late answer to an earlier query is none to this one.
		if len(answer) >= 2 && string(answer[:2]) == string(id) {
			return answer, nil
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("receiving: %w", unix.EAGAIN)
		}
	}
}

func (w *worker) readTCP() ([]byte, error) {
	have, want := 0, 2
	for have < want {
		var n int
		err := retry(func() (err error) {
			n, err = unix.Read(w.fd, w.buf[have:want])
			return err
		})
		if errors.Is(err, unix.ECONNRESET) || err == nil && n == 0 {
			return nil, errClosed
		}
		if err != nil {
			return nil, err
		}
		have += n
		if have == 2 && want == 2 {
			want = 2 + min(int(binary.BigEndian.Uint16(w.buf[:2])), len(w.buf)-2)
		}
	}
	return w.buf[2:want], nil
}
