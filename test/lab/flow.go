package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// A Flow is UDP queries at a rate that no lost query slows down: a worker of a Load
// waits for its answer, and so a Load sends least just when most is lost. One thread
// sends and receives for all sockets of a flow.
type Flow struct {
	From    *Namespace
	To      []netip.Addr // one query each, in turn
	Rate    int          // queries a second
	Sockets int          // how many sockets are kept for many queries; 0: each query has a new one
	Misses  int          // percent of queries for a name that nobody has asked for
	Slow    int          // percent of those for which the cluster takes SlowFor
	Tag     string       // makes the missed names those of this flow only
	Timeout time.Duration
}

// A FlowResult is what became of the queries to one address.
type FlowResult struct {
	Tally
	// Entered is how many of the bad ones were sent after Mark.
	Entered  int
	FirstBad time.Time // when the first query was sent that got no right answer
	LastBad  time.Time
	lastCame time.Time
}

// Add adds another's numbers.
func (r *FlowResult) Add(o *FlowResult) {
	r.Tally.Add(&o.Tally)
	r.Entered += o.Entered
	if r.FirstBad.IsZero() || !o.FirstBad.IsZero() && o.FirstBad.Before(r.FirstBad) {
		r.FirstBad = o.FirstBad
	}
	if o.LastBad.After(r.LastBad) {
		r.LastBad = o.LastBad
	}
}

// A Flowing flow.
type Flowing struct {
	flow    Flow
	stop    chan struct{}
	stopped sync.Once
	done    chan struct{}
	sent    atomic.Int64
	open    atomic.Int64
	mark    atomic.Int64 // UnixNano

	results map[netip.Addr]*FlowResult
	err     error
}

// Start starts the flow.
func (f Flow) Start() (*Flowing, error) {
	if f.Rate <= 0 || len(f.To) == 0 {
		return nil, errors.New("starting a flow: how fast, and where to?")
	}
	if f.Timeout == 0 {
		f.Timeout = 5 * time.Second
	}
	r := &Flowing{flow: f, stop: make(chan struct{}), done: make(chan struct{}), results: map[netip.Addr]*FlowResult{}}
	for _, a := range f.To {
		r.results[a] = new(FlowResult)
	}
	ready := make(chan error, 1)
	go func() {
		defer close(r.done)
		r.err = f.From.Do(func() error {
			p, err := newPump(r)
			ready <- err
			if err != nil {
				return err
			}
			defer p.close()
			return p.run()
		})
		select {
		case ready <- r.err: // the namespace could not be entered
		default:
		}
	}()
	return r, <-ready
}

// Sent says how many queries have been sent so far.
func (r *Flowing) Sent() int { return int(r.sent.Load()) }

// Open says how many queries are out, neither answered nor given up.
func (r *Flowing) Open() int { return int(r.open.Load()) }

// Mark begins to count what goes wrong with queries sent from now on as Entered.
func (r *Flowing) Mark() { r.mark.Store(time.Now().UnixNano()) }

// Stop sends no further query, waits for the answers to those that are out, and
// returns what became of them by address.
func (r *Flowing) Stop() (map[netip.Addr]*FlowResult, error) {
	r.stopped.Do(func() { close(r.stop) })
	<-r.done
	return r.results, r.err
}

// pump is the one thread of a flow.
type pump struct {
	*Flowing
	epoll  int
	begun  time.Time
	n      int                  // how many were sent
	bySock map[int]*asked       // by file descriptor
	idle   map[netip.Addr][]int // kept sockets that wait for no answer, longest idle first
	kept   map[int]netip.Addr   // all kept sockets
	made   map[netip.Addr]int   // how many those are
	out    []*asked             // oldest first; those answered stay until they are first
	buf    [4096]byte
	events [256]unix.EpollEvent
}

// asked is one query that is out.
type asked struct {
	fd    int
	to    netip.Addr
	query []byte
	at    time.Time
	over  bool
}

func newPump(r *Flowing) (*pump, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("making an epoll descriptor: %w", err)
	}
	return &pump{Flowing: r, epoll: fd, begun: time.Now(), bySock: map[int]*asked{}, idle: map[netip.Addr][]int{}, kept: map[int]netip.Addr{}, made: map[netip.Addr]int{}}, nil
}

func (p *pump) close() {
	for fd := range p.kept {
		unix.Close(fd)
	}
	for fd := range p.bySock {
		if _, kept := p.kept[fd]; !kept {
			unix.Close(fd)
		}
	}
	unix.Close(p.epoll)
}

// maxLate is how late a query is sent, at most: when this program has had no CPU for
// longer, fewer queries are sent.
const maxLate = 20 * time.Millisecond

func (p *pump) run() error {
	every := time.Second / time.Duration(p.flow.Rate)
	for _, r := range p.results {
		r.lastCame = p.begun
	}
	sending := true
	for {
		if sending {
			select {
			case <-p.stop:
				sending = false
				// What never came back has no gap after it.
				for _, r := range p.results {
					r.came(time.Now())
				}
			default:
			}
		}
		wait := 10 * time.Millisecond
		if sending {
			for {
				due := p.begun.Add(time.Duration(p.n) * every)
				if late := time.Since(due); late > maxLate {
					// To catch up would be a burst that fills the server's sockets.
					p.begun = p.begun.Add(late)
					due = due.Add(late)
				}
				if wait = time.Until(due); wait > 0 {
					break
				}
				if err := p.send(); err != nil {
					return err
				}
			}
		} else if len(p.bySock) == 0 {
			return nil
		}
		if err := p.receive(min(wait, 10*time.Millisecond), sending); err != nil {
			return err
		}
		p.expire()
	}
}

// send sends the next query.
func (p *pump) send() error {
	n, f := p.n, p.flow
	p.n++
	to := f.To[n%len(f.To)]
	q, err := p.pack(n / len(f.To))
	if err != nil {
		return err
	}
	fd, err := p.socket(to)
	if err != nil {
		return err
	}
	a := &asked{fd: fd, to: to, query: q, at: time.Now()}
	p.results[to].Sent++
	p.sent.Add(1)
	p.open.Add(1)
	p.bySock[fd] = a
	p.out = append(p.out, a)
	if err := retry(func() error { _, err := unix.Write(fd, q); return err }); err != nil {
		p.over(a, fmt.Errorf("sending: %w", err))
	}
	return nil
}

// pack makes the query number n of an address.
func (p *pump) pack(n int) ([]byte, error) {
	f := p.flow
	kind, k := Hits, n
	// 37 has no divisor in common with 100, so that the kinds are spread evenly.
	switch share := n * 37 % 100; {
	case share < f.Slow:
		kind, k = Slow, p.n
	case share < f.Slow+f.Misses:
		kind, k = Misses, p.n
	}
	return appendQuery(make([]byte, 0, 280), uint16(p.n), kind.name(k, f.Tag, "lab."), n)
}

// socket returns a socket to an address on which no answer is awaited.
func (p *pump) socket(to netip.Addr) (int, error) {
	if idle := p.idle[to]; len(idle) > 0 && p.made[to] >= p.flow.Sockets {
		p.idle[to] = idle[1:]
		return idle[0], nil
	}
	fd, addr, err := openSocket(unix.SOCK_DGRAM|unix.SOCK_NONBLOCK, netip.AddrPortFrom(to, 53))
	if err != nil {
		return 0, err
	}
	// Where there is no route, sending will say so too.
	connected := unix.Connect(fd, addr) == nil
	if err := unix.EpollCtl(p.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}); err != nil {
		unix.Close(fd)
		return 0, fmt.Errorf("waiting for a socket: %w", err)
	}
	// While many answers are slow there are more, so that nobody waits for a socket.
	if p.flow.Sockets > 0 && connected {
		p.kept[fd] = to
		p.made[to]++
	}
	return fd, nil
}

// receive waits for answers.
func (p *pump) receive(wait time.Duration, sending bool) error {
	n, err := unix.EpollWait(p.epoll, p.events[:], int((max(wait, 0)+time.Millisecond-1)/time.Millisecond))
	if err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("waiting for answers: %w", err)
	}
	for _, e := range p.events[:max(n, 0)] {
		p.read(int(e.Fd), sending)
	}
	return nil
}

func (p *pump) read(fd int, sending bool) {
	for {
		a := p.bySock[fd]
		var n int
		err := retry(func() (err error) { n, err = unix.Read(fd, p.buf[:]); return err })
		switch {
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EBADF):
			return
		case a == nil:
			// Late, to a query that was given up, or an ICMP error for it.
			if err != nil {
				return
			}
			continue
		case err != nil:
			p.over(a, fmt.Errorf("receiving: %w", err))
			return
		case n < 2 || string(p.buf[:2]) != string(a.query[:2]):
			continue
		}
		ttl, err := check(a.query, p.buf[:n])
		r := p.results[a.to]
		if err == nil {
			r.answered(ttl)
			if sending {
				r.came(time.Now())
			}
		}
		p.over(a, err)
		return
	}
}

// came notes that an answer came.
func (r *FlowResult) came(now time.Time) {
	if gap := now.Sub(r.lastCame); gap > r.Gap {
		r.Gap = gap
	}
	r.lastCame = now
}

// over ends a query, well or with err.
func (p *pump) over(a *asked, err error) {
	a.over = true
	p.open.Add(-1)
	delete(p.bySock, a.fd)
	if _, kept := p.kept[a.fd]; kept {
		p.idle[a.to] = append(p.idle[a.to], a.fd)
	} else {
		unix.Close(a.fd)
	}
	if err == nil {
		return
	}
	r := p.results[a.to]
	name, _, _ := dns.UnpackDomainName(a.query, 12)
	r.failed(fmt.Errorf("%s to %v sent at %s: %w", name, a.to, a.at.Format("15:04:05.000000"), err))
	if r.FirstBad.IsZero() || a.at.Before(r.FirstBad) {
		r.FirstBad = a.at
	}
	if a.at.After(r.LastBad) {
		r.LastBad = a.at
	}
	if m := p.mark.Load(); m != 0 && a.at.UnixNano() > m {
		r.Entered++
	}
}

var errNoAnswer = errors.New("no answer in time")

// expire gives up what is out for too long.
func (p *pump) expire() {
	late := time.Now().Add(-p.flow.Timeout)
	i := 0
	for ; i < len(p.out) && (p.out[i].over || p.out[i].at.Before(late)); i++ {
		if !p.out[i].over {
			p.over(p.out[i], errNoAnswer)
		}
	}
	p.out = slices.Delete(p.out, 0, i)
}
