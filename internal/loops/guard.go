package loops

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
)

// limitUnderWay is how many queries may wait for upstreams at once.
var limitUnderWay = int64(sockets.UnderWayLimit())

const (
	// guardName is not that of the directive, under which CoreDNS keeps the handler.
	guardName = "nodecache-guard"
	// A block may get queries from others of the Corefile, but only so many for each query that
	// is under way there: forward asks again when it gets no answer.
	triesEach = 4
	// manyLocal is how many queries of the node's own programs may be under way before each
	// is looked at, whatever its question, where the Corefile changes names.
	manyLocal = 16
	// sayEvery is how often a block says that it refuses queries.
	sayEvery = time.Minute
)

// Why a query is refused.
const (
	refusedLoop  = "loop"
	refusedLimit = "limit"
)

var refused = promauto.NewCounterVec(prometheus.CounterOpts{
	Namespace: plugin.Namespace,
	Subsystem: "nodecache",
	Name:      "refused_total",
	Help:      "Counter of queries that were refused because an upstream had sent them back, or because too many were under way.",
}, []string{"reason"})

func init() {
	for _, why := range []string{refusedLoop, refusedLimit} {
		refused.WithLabelValues(why)
	}
}

// nameType is what is asked, with the name in lower case.
type nameType struct {
	name  string
	qtype uint16
}

// A guard stands in front of the plugins of a server block that ask upstreams, where it
// sees only what the cache does not know. It refuses queries that this very block has sent
// and that have come back, and what is too much to be under way at once.
type guard struct {
	at    string // of the block's first forwarder, "file:line"
	loop  bool   // the block has the plugin loop, which would end the process
	group *guards

	underWay atomic.Int64
	mu       sync.Mutex
	asked    map[nameType]int // under way
	askedBy  map[asker]int    // the same, by who asks
	local    int              // of the node's own programs, this one among them
	self     int              // known to be of this process
	probing  prober
	said     map[string]time.Time // by why
	unsaid   map[string]int
}

// asker is a question and the address that it has come from.
type asker struct {
	nameType
	from netip.Addr
}

// guards are those of one Corefile.
type guards struct {
	all      []*guard
	underWay *atomic.Int64 // of the process: a reload begins while the old instance still has queries
	renames  bool          // a query may come back under another name
}

var underWayInAll atomic.Int64

// add adds the guard of another server block.
func (group *guards) add(at string) *guard {
	g := &guard{at: at, group: group, asked: map[nameType]int{}, askedBy: map[asker]int{}, said: map[string]time.Time{}, unsaid: map[string]int{}}
	group.all = append(group.all, g)
	return g
}

// A guarded is a guard in one of the chains of plugins that CoreDNS makes of a block.
type guarded struct {
	*guard
	next plugin.Handler
}

// Name implements plugin.Handler.
func (guarded) Name() string { return guardName }

// ServeDNS implements plugin.Handler.
func (h guarded) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	q := nameType{strings.ToLower(r.Question[0].Name), r.Question[0].Qtype}
	from := sourceOf(w.RemoteAddr())
	if h.loop && fromLoopPlugin(q) {
		h.probe(ctx, h.next, w, q)
		return dns.RcodeRefused, nil
	}
	if h.cameBack(q, from) {
		return dns.RcodeRefused, nil
	}
	v, why := h.enter(q, from)
	if why == "" {
		defer h.answered(v)
	}
	if v.suspicious {
		h.probe(ctx, h.next, w, q)
	}
	if why != "" {
		h.refuse(why, q, from)
		return dns.RcodeRefused, nil
	}
	return plugin.NextOrFailure(h.Name(), h.next, ctx, w, r)
}

// fromLoopPlugin tells whether a query has the form of those that the plugin loop sends
// when it starts, and counts: HINFO for two random numbers under the block's zone. When the
// third one comes it ends the process, so it gets none. The guard's own probe takes their
// place, at the start as well.
func fromLoopPlugin(q nameType) bool {
	if q.qtype != dns.TypeHINFO {
		return false
	}
	labels := strings.SplitN(q.name, ".", 3)
	random := func(label string) bool {
		// Shorter ones are as good as never drawn, and reverse zones have them.
		return len(label) >= 8 && strings.Trim(label, "0123456789") == ""
	}
	return len(labels) == 3 && random(labels[0]) && random(labels[1])
}

// A visit is a query under way.
type visit struct {
	asker
	local, self bool
	suspicious  bool // it may be in a loop through another server
}

// enter counts a query, or says why it is refused.
func (g *guard) enter(q nameType, from source) (v visit, why string) {
	g.underWay.Add(1)
	g.group.underWay.Add(1)
	defer func() {
		if why != "" {
			g.underWay.Add(-1)
			g.group.underWay.Add(-1)
		}
	}()
	// A block gets half of it, so that it does not stop the others.
	if g.group.underWay.Load() > limitUnderWay || len(g.group.all) > 1 && g.underWay.Load() > limitUnderWay/2 {
		return v, refusedLimit
	}
	v = visit{asker: asker{q, from.at.Addr()}, local: locals.has(from.at.Addr())}
	g.mu.Lock()
	same, crowded := g.asked[q] > 0, g.group.renames && g.local >= manyLocal
	v.suspicious = same && g.probing.known(v.from)
	g.mu.Unlock()
	if v.suspicious {
		return v, refusedLoop
	}
	if v.local && (same || crowded) {
		v.self = ownSources.has(from, time.Now())
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if v.self {
		allowed := triesEach * g.others()
		if !same {
			allowed += manyLocal // its name may have been changed on the way, or it is a program's own
		}
		if g.self >= allowed {
			return v, refusedLoop
		}
		g.self++
	}
	if v.local {
		g.local++
	}
	g.asked[q]++
	g.askedBy[v.asker]++
	v.suspicious = g.askedBy[v.asker] >= suspicious
	return v, ""
}

// others returns how many queries are under way elsewhere in this process, whose server blocks
// may ask this one: those of the Corefile before count too, since they ask it once it listens.
func (g *guard) others() int { return int(g.group.underWay.Load() - g.underWay.Load()) }

// answered is called when a query that has entered is.
func (g *guard) answered(v visit) {
	g.underWay.Add(-1)
	g.group.underWay.Add(-1)
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.asked[v.nameType]--; g.asked[v.nameType] == 0 {
		delete(g.asked, v.nameType)
	}
	if g.askedBy[v.asker]--; g.askedBy[v.asker] == 0 {
		delete(g.askedBy, v.asker)
	}
	if v.local {
		g.local--
	}
	if v.self {
		g.self--
	}
}

// refuse counts what is refused, and says so from time to time.
func (g *guard) refuse(why string, q nameType, from source) {
	refused.WithLabelValues(why).Inc()
	g.mu.Lock()
	n := g.unsaid[why] + 1
	if time.Since(g.said[why]) < sayEvery {
		g.unsaid[why] = n
		g.mu.Unlock()
		return
	}
	g.said[why], g.unsaid[why] = time.Now(), 0
	g.mu.Unlock()
	what := fmt.Sprintf("%q %s from %s", q.name, dns.Type(q.qtype), from.at.Addr())
	switch why {
	case refusedLoop:
		log.Errorf("%s: an upstream leads back to this cache: queries that this server block has sent come back to it, and are refused (%s, and %d others since it was last said); name an upstream that does not ask this cache", g.at, what, n-1)
	case refusedLimit:
		log.Errorf("%s: too many queries wait for upstreams, and more are refused (%s, and %d others since it was last said): the upstreams answer too slowly or not at all", g.at, what, n-1)
	}
}
