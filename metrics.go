package nodecache

import (
	"errors"
	"maps"
	"slices"

	"github.com/coredns/coredns/plugin"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
	"github.com/contentful-labs/coredns-nodecache/internal/outlive"
	"github.com/contentful-labs/coredns-nodecache/internal/peers"
)

// Kinds of setup errors, as node-cache of kubernetes/dns labels them.
const (
	errFirewall       = "iptables" // of either backend
	errFirewallLock   = "iptables_lock"
	errInterfaceAdd   = "interface_add"
	errInterfaceCheck = "interface_check"
)

// Objects that can be repaired.
const (
	objectLink    = "link"
	objectAddress = "address"
	objectRule    = "rule"
)

var (
	setupErrors = promauto.NewCounterVec(prometheus.CounterOpts{
		Namespace: plugin.Namespace,
		Subsystem: directiveName,
		Name:      "setup_errors_total",
		Help:      "Counter of errors while making or checking the interface, its addresses and the firewall rules.",
	}, []string{"errortype"})
	repairs = promauto.NewCounterVec(prometheus.CounterOpts{
		Namespace: plugin.Namespace,
		Subsystem: directiveName,
		Name:      "repairs_total",
		Help:      "Counter of links, addresses and firewall rules that somebody else had removed and that were put back.",
	}, []string{"object"})

	objectsWanted = promauto.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: plugin.Namespace,
		Subsystem: directiveName,
		Name:      "objects_wanted",
		Help:      "Gauge of the links, the addresses on them and the endpoints with firewall rules that the configuration asks for.",
	}, []string{"object"})
	objectsInPlace = promauto.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: plugin.Namespace,
		Subsystem: directiveName,
		Name:      "objects_in_place",
		Help:      "Gauge of how many of the wanted objects stood after the last check, rules in force.",
	}, []string{"object"})
	processes = promauto.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: plugin.Namespace,
		Subsystem: directiveName,
		Name:      "processes",
		Help:      "Gauge of the nodecache processes on this node, this one among them, as it saw them at the last check.",
	}, []string{"state"})
	lastSync = promauto.NewGauge(prometheus.GaugeOpts{
		Namespace: plugin.Namespace,
		Subsystem: directiveName,
		Name:      "last_sync_success_timestamp_seconds",
		Help:      "Unix time of the last check after which everything stood.",
	})
	syncInterval = promauto.NewGauge(prometheus.GaugeOpts{
		Namespace: plugin.Namespace,
		Subsystem: directiveName,
		Name:      "sync_interval_seconds",
		Help:      "Gauge of the seconds between two checks.",
	})
	info = promauto.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: plugin.Namespace,
		Subsystem: directiveName,
		Name:      "info",
		Help:      "A metric with the value 1 and the version, the firewall backend and the kind of interface as labels.",
	}, []string{"version", "backend", "interface"})
	_ = promauto.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: plugin.Namespace,
		Subsystem: directiveName,
		Name:      "ready",
		Help:      "Gauge that is 1 while this process listens with everything in place, as the ready plugin reports it, and else 0.",
	}, func() float64 {
		if theNode.ready.Load() {
			return 1
		}
		return 0
	})
)

// Version is the plugin's own, stamped by the build.
var Version = "unknown"

func init() {
	// Present from the start, so that a rate over them sees the first error.
	for _, s := range []string{peers.Serving, peers.Idle, peers.Silent} {
		processes.WithLabelValues(s)
	}
	info.WithLabelValues(Version, "none", "none")
	for _, t := range []string{errFirewall, errFirewallLock, errInterfaceAdd, errInterfaceCheck} {
		setupErrors.WithLabelValues(t)
	}
	for _, o := range []string{objectLink, objectAddress, objectRule} {
		repairs.WithLabelValues(o)
		objectsWanted.WithLabelValues(o)
		objectsInPlace.WithLabelValues(o)
	}
}

// observe sets the gauges: links and addresses as the kernel has them now, rules
// as the backends' last look has left them, which costs no process.
func (n *node) observe() {
	defer outlive.Panic("counting what is in place")
	links, addrs, inPlaceLinks, inPlaceAddrs := 0, 0, 0, 0
	for name, want := range n.want.Links {
		links++
		addrs += len(want)
		l, err := nodelinks.ByName(name)
		if err != nil || l == nil || n.netifs[name] == nil {
			continue
		}
		if _, err := nodelinks.Kind(l); err != nil {
			continue // another link in our place
		}
		inPlaceLinks++
		have, err := n.netifs[name].addrs(l)
		for _, a := range want {
			if err == nil && slices.Contains(have, a) {
				inPlaceAddrs++
			}
		}
	}
	rules, inPlaceRules := 0, 0
	for backend, es := range n.want.Rules {
		rules += len(es)
		if !n.doubtful[backend] {
			inPlaceRules += len(es)
		}
	}
	inPlaceRules = max(0, inPlaceRules-int(n.notInForce.Load()))
	for object, v := range map[string][2]int{
		objectLink: {links, inPlaceLinks}, objectAddress: {addrs, inPlaceAddrs}, objectRule: {rules, inPlaceRules},
	} {
		objectsWanted.WithLabelValues(object).Set(float64(v[0]))
		objectsInPlace.WithLabelValues(object).Set(float64(v[1]))
	}

	own := peers.Idle
	if n.life.InForce != nil && !n.exited() {
		own = peers.Serving
	}
	for _, s := range []string{peers.Serving, peers.Idle, peers.Silent} {
		v := n.others.States[s]
		if s == own {
			v++
		}
		processes.WithLabelValues(s).Set(float64(v))
	}
}

// describe sets the metric info.
func (n *node) describe(target desired.State) {
	kinds, backends := map[string]bool{}, map[string]bool{}
	for name := range target.Links {
		if i := n.netifs[name]; i != nil {
			kinds[i.kind] = true
		}
	}
	for name := range target.Rules {
		backends[n.firewalls[name].String()] = true
	}
	info.Reset()
	info.WithLabelValues(Version, orNone(slices.Sorted(maps.Keys(backends)), "none"), orNone(slices.Sorted(maps.Keys(kinds)), "none")).Set(1)
}

// typedError is an error with the label under which it is counted.
type typedError struct {
	error
	errortype string
}

func (e typedError) Unwrap() error { return e.error }

func setupError(errortype string, err error) error { return typedError{err, errortype} }

// isFirewallError tells whether a firewall backend could not do its work at all.
func isFirewallError(err error) bool {
	var t typedError
	return errors.As(err, &t) && t.errortype == errFirewall
}

// count counts err, once, where it is reported, and returns it.
func count(err error) error {
	var t typedError
	if errors.As(err, &t) {
		setupErrors.WithLabelValues(t.errortype).Inc()
	}
	return err
}
