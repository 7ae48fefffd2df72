// Package upstream sends queries on to other servers, as CoreDNS's forward does, and stays within
// a client's patience whatever these do. A server that is late has another one asked beside it; one
// that does not answer, over TCP or at all, is found out once and not by every query; names whose
// servers are silent take no place from the others; and the servers that a file such as
// /etc/resolv.conf names are those that it names now.
//
// setup.go reads the directive. A query that nobody else waits for already (gather.go) takes a place
// (slots.go), is asked for in a race of attempts (race.go, outcome.go, query.go) over connections
// (conn.go, quick.go) to servers of which it is known how they do
// (server.go). servers.go has which those are, and follows files; left.go closes those of a reload that
// has failed.
package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/metadata"
	"github.com/coredns/coredns/request"
	"github.com/miekg/dns"
)

const directive = "upstream"

// options are what a stanza has been given.
type options struct {
	except         []string
	forceTCP       bool
	preferUDP      bool
	expire, maxAge time.Duration
	maxIdle        int
	maxFails       int
	maxConcurrent  int
	patience       time.Duration
	policy         string
	checkEvery     time.Duration
	probeName      string
	probeRecursion bool
	failover       []int
	tls            *tls.Config
	tlsServerName  string
}

// Upstream is one use of the directive.
type Upstream struct {
	Next plugin.Handler

	from    string
	opts    *options
	same    gathering
	slots   slots
	hedges  budget
	tell    *teller
	servers *servers
	turn    atomic.Uint32
}

// Name implements plugin.Handler.
func (u *Upstream) Name() string { return directive }

// ServeDNS implements plugin.Handler.
func (u *Upstream) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	state := request.Request{W: w, Req: r}
	if !u.takes(state.Name()) {
		return plugin.NextOrFailure(u.Name(), u.Next, ctx, w, r)
	}
	began := time.Now()
	m, err := u.answer(ctx, &state)
	switch {
	case m != nil:
		w.WriteMsg(m)
		return dns.RcodeSuccess, nil
	case errors.Is(err, errUnpackable):
		return dns.RcodeFormatError, err
	case errors.Is(ctx.Err(), context.Canceled):
		// Nobody waits any more, and what is not written nobody remembers for the next client.
		return dns.RcodeServerFailure, nil
	}
	why := reason(err)
	failures.WithLabelValues(why).Inc()
	// The plugin errors would write a line for each: these are gathered here.
	u.tell.error("%s, so queries fail, as the one for %s %s: %v", failing[why], state.QName(), state.Type(), err)
	if why == reasonFull {
		// It says nothing of the name: what is returned and not written, nobody remembers.
		return dns.RcodeRefused, nil
	}
	alive := slices.ContainsFunc(u.servers.now().all, func(s *server) bool { return s.heardSince(began) })
	if r.IsEdns0() == nil {
		return dns.RcodeServerFailure, nil
	}
	w.WriteMsg(failure(r, why, alive, err))
	return dns.RcodeSuccess, nil
}

// takes tells whether queries for a name are for these upstreams.
func (u *Upstream) takes(name string) bool {
	if !plugin.Name(u.from).Matches(name) {
		return false
	}
	return name == u.from || plugin.Zones(u.opts.except).Matches(name) == ""
}

var errUnpackable = errors.New("the query can't be sent on")

// answer gets an answer from one of the servers.
func (u *Upstream) answer(ctx context.Context, state *request.Request) (*dns.Msg, error) {
	c := &race{u: u} // with all that a query takes: one allocation
	if err := c.q.begin(ctx, state.Req, state.Proto() == "udp", max(state.Size(), leastLen), u.opts.patience); err != nil {
		return nil, errors.Join(errUnpackable, err)
	}
	m, by, err := u.once(ctx, c)
	if m != nil && by != nil {
		metadata.SetValueFunc(ctx, "upstream/server", by.isName)
	}
	return m, err
}

// ask runs the race. It also returns the server that has answered.
func (u *Upstream) ask(c *race) (*dns.Msg, *server, error) {
	list := u.servers.now()
	if len(list.all) == 0 {
		return nil, nil, u.servers.why()
	}
	c.changed, c.runners = list.over, u.order(list.all, c.lone[:0])
	if err := u.slots.enter(&c.q); err != nil {
		return nil, nil, err
	}
	defer u.slots.leave(&c.q)
	u.hedges.earn()
	m, err := c.run()
	return m, c.answered, err
}

// order returns the servers in the order in which they are to be asked. A lone one is put into room.
func (u *Upstream) order(all []*server, room []runner) []runner {
	if len(all) == 1 {
		return append(room, runner{server: all[0]})
	}
	runners := make([]runner, len(all))
	turn := int(u.turn.Add(1) - 1) // #nosec G115 -- 64 bits
	first := u.first(turn, len(all))
	quickest := time.Duration(0)
	for _, s := range all {
		if d := s.usually(); d > 0 && (quickest == 0 || d < quickest) {
			quickest = d
		}
	}
	if turn%lookAgain == 0 || u.opts.policy == sequential {
		quickest = 0
	}
	for i := range runners {
		s := all[(first+i)%len(all)]
		runners[i] = runner{server: s, rank: s.standing(quickest)}
	}
	return runners
}

// lookAgain is how often a slow server is asked all the same, to see how slow it is: once in so
// many queries.
const lookAgain = 32

// Reasons for failures, as metrics have them.
const (
	reasonTimeout     = "timeout"
	reasonRefused     = "refused"
	reasonReset       = "reset"
	reasonUnreachable = "unreachable"
	reasonCrowded     = "crowded"
	reasonFull        = "limit"
	reasonNoServer    = "no_server"
	reasonOther       = "other"
)

// failing is how the log has them.
var failing = map[string]string{
	reasonTimeout:     "upstreams do not answer in time",
	reasonRefused:     "upstreams refuse connections",
	reasonReset:       "upstreams close connections without an answer",
	reasonUnreachable: "upstreams can't be reached",
	reasonCrowded:     "max_concurrent queries wait for upstreams and those that have waited for longest are given up",
	reasonFull:        "max_concurrent queries wait for upstreams and more are refused",
	reasonNoServer:    "there is no upstream to ask",
	reasonOther:       "upstreams give no answer",
}

func reason(err error) string {
	var n net.Error
	switch {
	case errors.Is(err, errNoServer):
		return reasonNoServer
	case errors.Is(err, errCrowded):
		return reasonCrowded
	case errors.Is(err, errFull):
		return reasonFull
	case errors.Is(err, syscall.ECONNREFUSED):
		return reasonRefused
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, errClosed):
		return reasonReset
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return reasonUnreachable
	case errors.Is(err, errPatience), errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &n) && n.Timeout():
		return reasonTimeout
	}
	return reasonOther
}

// failure is the answer to a query with EDNS that has none, with the reason (RFC 8914). It is No Reachable Authority only where a server was there that gave no answer to
// this very question.
func failure(r *dns.Msg, why string, alive bool, err error) *dns.Msg {
	m := new(dns.Msg)
	m.SetRcode(r, dns.RcodeServerFailure)
	m.RecursionAvailable = true
	o := r.IsEdns0()
	ede := &dns.EDNS0_EDE{InfoCode: dns.ExtendedErrorCodeNetworkError, ExtraText: failing[why]}
	switch {
	case why == reasonNoServer:
		ede.InfoCode, ede.ExtraText = dns.ExtendedErrorCodeNotReady, err.Error()
	case alive:
		ede.InfoCode = dns.ExtendedErrorCodeNoReachableAuthority
	}
	m.SetEdns0(o.UDPSize(), o.Do())
	m.IsEdns0().Option = []dns.EDNS0{ede}
	return m
}

// observe counts an answer of a server.
func (s *server) observe(rcode int, took time.Duration) {
	if rcode >= 0 && rcode < len(s.durations) {
		if o := s.durations[rcode].Load(); o != nil {
			(*o).Observe(took.Seconds())
			return
		}
	}
	name, ok := dns.RcodeToString[rcode]
	if !ok {
		name = "other"
	}
	o := requestDuration.WithLabelValues(s.name, name)
	if rcode >= 0 && rcode < len(s.durations) {
		s.durations[rcode].Store(&o)
	}
	o.Observe(took.Seconds())
}

// A budget is how many queries may be asked a second time although their server answers others:
// one of ten, and some at once.
type budget struct{ tenths atomic.Int64 }

const mostTenths = 320

func (b *budget) earn() {
	if b.tenths.Load() < mostTenths {
		b.tenths.Add(1)
	}
}

func (b *budget) take() bool {
	if b.tenths.Add(-10) < 0 {
		b.tenths.Add(10)
		return false
	}
	return true
}
