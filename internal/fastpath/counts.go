package fastpath

import (
	"errors"
	"slices"
	"sync"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/cache"
	"github.com/coredns/coredns/plugin/metrics/vars"
	"github.com/coredns/coredns/plugin/pkg/rcode"
	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"golang.org/x/sys/unix"
)

var (
	hitsTotal = promauto.NewCounter(prometheus.CounterOpts{
		Namespace: plugin.Namespace,
		Subsystem: "nodecache",
		Name:      "fastpath_hits_total",
		Help:      "Counter of queries that fastpath has answered.",
	})
	missesTotal = promauto.NewCounter(prometheus.CounterOpts{
		Namespace: plugin.Namespace,
		Subsystem: "nodecache",
		Name:      "fastpath_misses_total",
		Help:      "Counter of queries that have come to fastpath and have taken the ordinary way.",
	})
	_ = promauto.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: plugin.Namespace,
		Subsystem: "nodecache",
		Name:      "fastpath_entries",
		Help:      "Number of answers that fastpath keeps.",
	}, func() float64 { return float64(newest.Load().entries()) })
)

// counts is what a hit is counted in, as the plugins cache and prometheus would.
type counts struct {
	counters     []prometheus.Counter
	duration     prometheus.Observer // nil without prometheus
	requestSize  prometheus.Observer
	responseSize prometheus.Observer
}

type countsKey struct {
	block   *Block
	zone    string
	qtype   string
	rcode   int
	denial  bool // the cache plugin's kind
	do, six bool
}

// answered is how long a hit takes, for the histogram: less than its first bucket,
// and not worth a look at the clock.
const answered = 10e-6

// add counts a query and a response of these sizes.
func (c *counts) add(query, response uint16) {
	for _, x := range c.counters {
		x.Inc()
	}
	if c.duration != nil {
		c.duration.Observe(answered)
		c.requestSize.Observe(float64(query))
		c.responseSize.Observe(float64(response))
	}
}

// countsFor returns what the answer m to q is counted in.
func (v *serving) countsFor(q *query, m *dns.Msg, denial bool) *counts {
	b := q.block
	k := countsKey{block: b, qtype: typeLabel(m.Question[0].Qtype), rcode: m.Rcode, denial: denial, six: q.from.raw.Family != unix.AF_INET}
	if o := m.IsEdns0(); o != nil {
		k.do = o.Do()
	}
	if b.metrics != nil {
		if k.zone = plugin.Zones(b.metrics.ZoneNames()).Matches(m.Question[0].Name); k.zone == "" {
			k.zone = "."
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	c := v.counts[k]
	if c == nil {
		c = v.newCounts(k)
		v.counts[k] = c
	}
	return c
}

func (v *serving) newCounts(k countsKey) *counts {
	server, view := v.server.Addr, ""
	class := cache.Success
	if k.denial {
		class = cache.Denial
	}
	c := &counts{}
	c.counters = append(c.counters,
		cacheRequests().WithLabelValues(server, k.block.settings.zones, view),
		cacheHits().WithLabelValues(server, class, k.block.settings.zones, view))
	if k.block.metrics == nil {
		return c
	}
	family := "1"
	if k.six {
		family = "2"
	}
	c.counters = append(c.counters,
		vars.RequestCount.WithLabelValues(server, k.zone, view, "udp", family, k.qtype),
		vars.ResponseRcode.WithLabelValues(server, k.zone, view, rcode.ToString(k.rcode), k.block.metrics.Next.Name()))
	if k.do {
		c.counters = append(c.counters, vars.RequestDo.WithLabelValues(server, k.zone, view))
	}
	c.duration = vars.RequestDuration.WithLabelValues(server, k.zone, view)
	c.requestSize = vars.RequestSize.WithLabelValues(server, k.zone, view, "udp")
	c.responseSize = vars.ResponseSize.WithLabelValues(server, k.zone, view, "udp")
	return c
}

// countedTypes are those that coredns_dns_requests_total has a label for.
var countedTypes = []uint16{
	dns.TypeA, dns.TypeAAAA, dns.TypeCNAME, dns.TypeDNSKEY, dns.TypeDS, dns.TypeHTTPS, dns.TypeMX, dns.TypeNS, dns.TypeNSEC,
	dns.TypeNSEC3, dns.TypePTR, dns.TypeRRSIG, dns.TypeSOA, dns.TypeSRV, dns.TypeSVCB, dns.TypeTXT, dns.TypeIXFR, dns.TypeAXFR, dns.TypeANY,
}

func typeLabel(t uint16) string {
	if slices.Contains(countedTypes, t) {
		return dns.Type(t).String()
	}
	return "other"
}

// cacheCounter returns a counter of the cache plugin, which does not export it.
func cacheCounter(name, help string, labels ...string) *prometheus.CounterVec {
	c := prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: plugin.Namespace, Subsystem: "cache", Name: name, Help: help}, labels)
	var there prometheus.AlreadyRegisteredError
	if err := prometheus.Register(c); errors.As(err, &there) {
		if had, ok := there.ExistingCollector.(*prometheus.CounterVec); ok {
			return had
		}
	}
	return c
}

var (
	cacheRequests = sync.OnceValue(func() *prometheus.CounterVec {
		return cacheCounter("requests_total", "The count of cache requests.", "server", "zones", "view")
	})
	cacheHits = sync.OnceValue(func() *prometheus.CounterVec {
		return cacheCounter("hits_total", "The count of cache hits.", "server", "type", "zones", "view")
	})
)
