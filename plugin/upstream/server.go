package upstream

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/contentful-labs/coredns-nodecache/internal/outlive"
)

const (
	// When an answer is late, before anything is known and at the limits.
	lateAtFirst = 400 * time.Millisecond
	lateLeast   = 100 * time.Millisecond
	lateMost    = time.Second

	// backAfter is how long a server gave no answer that counts as back with the next one.
	backAfter = 500 * time.Millisecond

	// probeFor is how long a probe waits for its answer.
	probeFor = 2 * time.Second
	// probeEveryMost is the longest pause between two probes of a server that is down.
	probeEveryMost = 5 * time.Second

	// How long TCP to a server that did not get through is left alone.
	tcpPauseLeast = 10 * time.Second
	tcpPauseMost  = 5 * time.Minute
)

// A server is one upstream, with what is known of it.
type server struct {
	name string // as metrics and the log have it
	pool pool
	way  way // overUDP for a plain one, which is asked over UDP and TCP
	opts *options
	tell *teller

	isName    func() string // its name, for the plugin metadata
	durations [dns.RcodeNotZone + 1]atomic.Pointer[prometheus.Observer]

	ctx  context.Context // until it is asked no more
	stop context.CancelFunc

	mu      sync.Mutex
	usual   time.Duration // the smoothed time to an answer, 0: none yet
	spread  time.Duration // the smoothed deviation from it
	heard   time.Time     // when the last answer came
	back    time.Time     // when one came after backAfter without
	failed  int           // probes that got no answer, since one did
	down    bool          // more than max_fails of them, unless that is 0
	doubted bool          // a query got no answer, and no probe has since
	probing bool
	noTCP   bool // TCP does not get through, UDP does
	closed  bool
	tcpAsk  bool // whether that is so, or is so still, is being found out
}

func newServer(a address, o *options, tell *teller) *server {
	s := &server{
		name: a.String(), way: a.way, opts: o, tell: tell,
		pool: pool{at: a.at, expire: o.expire, maxAge: o.maxAge, most: o.maxIdle},
	}
	if a.way == overTLS {
		s.pool.tls = tlsFor(o, a.serverName)
	}
	s.isName = func() string { return s.name }
	s.ctx, s.stop = context.WithCancel(context.Background())
	serverUp.add(s.name)
	serverTCP.add(s.name)
	return s
}

// close has it asked no more; what is under way is answered.
func (s *server) close() {
	s.stop()
	s.pool.close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	serverUp.drop(s.name, s.down)
	serverTCP.drop(s.name, s.noTCP)
}

// late is when an answer is late: when nearly all others have been there for some time.
func (s *server) late() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.usual == 0 {
		return lateAtFirst
	}
	return min(max(s.usual+4*s.spread, lateLeast), lateMost)
}

// answered notes that an answer has come, and after what time.
func (s *server) answered(after time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sample(after)
	now := time.Now()
	if now.Sub(s.heard) > backAfter {
		s.back = now
	}
	s.heard = now
	s.doubted = false
	s.failed = 0
	s.isUp()
}

func (s *server) isUp() {
	if s.down && !s.closed {
		s.down = false
		serverUp.ill(s.name, -1)
		s.tell.info("%s answers again", s.name)
	}
}

// sample is how RFC 6298 keeps a usual time.
func (s *server) sample(after time.Duration) {
	if s.usual == 0 {
		s.usual, s.spread = after, after/2
		return
	}
	s.spread += ((after - s.usual).Abs() - s.spread) / 4
	s.usual += (after - s.usual) / 8
}

// silent notes that a query which was sent then has no answer yet, or that another server has
// answered it first. Of a server that has answered others since it shows nothing but that it
// is slow for this name; else it is asked for something that it knows.
func (s *server) silent(since time.Time) {
	s.mu.Lock()
	if waited := time.Since(since); waited > s.usual {
		s.sample(min(waited, lateMost))
	}
	alive := s.heard.After(since)
	s.mu.Unlock()
	if !alive {
		s.doubt()
	}
}

// doubt has it probed, unless that is being done.
func (s *server) doubt() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.doubted = true
	if s.probing || s.ctx.Err() != nil {
		return
	}
	s.probing = true
	go s.probe()
}

// probe asks until there is an answer, to a probe or to a query.
func (s *server) probe() {
	defer outlive.Panic("probing the upstream " + s.name)
	defer func() {
		s.mu.Lock()
		s.probing = false
		s.mu.Unlock()
	}()
	for pause := s.opts.checkEvery; ; pause = min(2*pause, probeEveryMost) {
		began := time.Now()
		err := s.ping(s.usualWay(nil))
		if err != nil && s.usualWay(nil) == overTCP {
			err = s.ping(overUDP)
		}
		if err == nil {
			s.answered(time.Since(began))
			return
		}
		if s.ctx.Err() != nil {
			return
		}
		probeFailures.WithLabelValues(s.name).Inc()
		s.mu.Lock()
		if s.heard.After(began) {
			s.mu.Unlock()
			return
		}
		s.failed++
		if s.opts.maxFails > 0 && s.failed > s.opts.maxFails && !s.down && !s.closed {
			s.down = true
			serverUp.ill(s.name, 1)
			s.tell.warn("%s does not answer: %v; others are asked first, and it is asked every %v at most whether it is back", s.name, err, probeEveryMost)
		}
		s.mu.Unlock()
		select {
		case <-time.After(pause):
		case <-s.ctx.Done():
			return
		}
	}
}

// ping asks for what every server knows, over a new connection.
func (s *server) ping(w way) error {
	ctx, cancel := context.WithTimeout(s.ctx, probeFor)
	defer cancel()
	c, err := s.pool.dial(ctx, w)
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.SetDeadline(aLongTimeAgo) })()
	m := new(dns.Msg)
	m.SetQuestion(s.opts.probeName, dns.TypeNS)
	m.RecursionDesired = s.opts.probeRecursion
	query, err := framed(m)
	if err != nil {
		return fmt.Errorf("making a probe: %w", err)
	}
	_, err = c.exchange(query, usualLen)
	return err
}

var aLongTimeAgo = time.Unix(1, 0)

// usualWay is how a server is asked when nothing says otherwise: a query, or with nil a probe.
func (s *server) usualWay(q *query) way {
	switch {
	case s.way == overTLS:
		return overTLS
	case !s.hasTCP() || !s.opts.forceTCP && (s.opts.preferUDP || q == nil || q.udp):
		return overUDP
	}
	return overTCP
}

// heardSince tells whether it has answered anything since then.
func (s *server) heardSince(t time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.heard.After(t)
}

// backSince tells whether it has begun to answer again since then.
func (s *server) backSince(t time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.back.After(t)
}

// hasTCP tells whether TCP gets through to it, as far as is known and not just being asked.
func (s *server) hasTCP() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.tcpAsk
}

// doubtTCP finds out whether TCP gets through to a server that has just answered over UDP what
// it had not over TCP. While it does not, that is tried again with growing pauses.
func (s *server) doubtTCP() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tcpAsk || s.ctx.Err() != nil {
		return
	}
	s.tcpAsk = true
	go func() {
		defer outlive.Panic("asking " + s.name + " over TCP")
		defer func() {
			s.mu.Lock()
			s.tcpAsk = false
			s.mu.Unlock()
		}()
		for pause := tcpPauseLeast; ; pause = min(2*pause, tcpPauseMost) {
			err := s.ping(overTCP)
			if s.ctx.Err() != nil || s.tcpIs(err) {
				return
			}
			select {
			// Not all nodes of a cluster at the same time.
			case <-time.After(pause - rand.N(pause/4)): // #nosec G404 -- no secret
			case <-s.ctx.Done():
				return
			}
		}
	}()
}

// tcpIs takes in how asking over TCP went, and tells whether it went well.
func (s *server) tcpIs(err error) bool {
	if err != nil {
		// A server that answers over neither is down, which says nothing of TCP.
		if udp := s.ping(overUDP); udp != nil {
			return s.tcpKnown()
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return true
	}
	was := s.noTCP
	s.noTCP = err != nil
	switch {
	case s.noTCP && !was:
		serverTCP.ill(s.name, 1)
		s.tell.warn("%s answers over UDP, but not over TCP (%v), so it is asked over UDP until it does: see that nothing between here and there filters TCP to port %d", s.name, err, s.pool.at.Port())
	case was && !s.noTCP:
		serverTCP.ill(s.name, -1)
		s.tell.info("%s answers over TCP again", s.name)
	}
	return err == nil
}

func (s *server) tcpKnown() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.noTCP
}

// A standing is how willingly a server is asked.
type standing int

const (
	good    standing = iota
	slow             // others answer much sooner
	doubted          // its last query got no answer
	down
)

// standing compares it with the usual time of the quickest server, 0 where that is not known.
func (s *server) standing(quickest time.Duration) standing {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.down:
		return down
	case s.doubted:
		return doubted
	case quickest > 0 && s.usual > 4*quickest+lateLeast:
		return slow
	}
	return good
}

// usually is its usual time to an answer; 0: not known, or of no interest.
func (s *server) usually() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down || s.doubted {
		return 0
	}
	return s.usual
}
