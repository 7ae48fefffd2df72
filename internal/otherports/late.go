package otherports

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/serverblocks"
	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
)

// lateEvery is how often a port is tried again that another program has.
const lateEvery = time.Second

// Latecomers are the plugins of one instance whose port another program has when they
// are to start. ready, prometheus and dnstap try to listen once, in their startup
// callbacks, the first two then never again, not even after a reload; and pprof fails
// the whole start. So these callbacks are put off until the port is free.
type Latecomers struct {
	inForce func() (is, over bool)
	ports   []otherPort            // of all plugins, and of the server blocks that are not ours
	uses    map[string][]otherPort // by plugin, in the order of their callbacks

	mu     sync.Mutex
	putOff map[otherPort][]func() error // by what has to be free
	// yielding is true while the plugins' other callbacks, for a reload and an exit,
	// have their turn.
	yielding bool
	watching bool
	// startup and failed are how many callbacks the directives so far have added.
	startup, failed int
}

// latecomersKey is where an instance has its latecomers.
type latecomersKey struct{}

// latest is the latecomers of the instance that was the last to start.
var latest atomic.Pointer[Latecomers]

var _ = promauto.NewGaugeFunc(prometheus.GaugeOpts{
	Namespace: plugin.Namespace,
	Subsystem: directive,
	Name:      "ports_taken",
	Help:      "Gauge of the ports that other plugins of this process can't listen on yet, as another program has them.",
}, func() float64 { return float64(latest.Load().missing()) })

// New looks for the ports that the Corefile of c makes CoreDNS listen on beside those of server
// blocks with nodecache, once bind has been read, and has callbacks of its plugins come by it.
// inForce tells whether that Corefile is in force, and whether it will not be any more.
func New(c *caddy.Controller, inForce func() (is, over bool)) (*Latecomers, error) {
	ports, uses, err := otherPorts(c)
	if err != nil {
		return nil, err
	}
	l := &Latecomers{inForce: inForce, ports: ports, uses: uses, putOff: map[otherPort][]func() error{}}
	c.Set(latecomersKey{}, l)
	afterEachDirective()
	return l, nil
}

// observed are the directives after which the callbacks that they have added are known.
var observed = map[string]bool{}

// afterEachDirective has the callbacks wrapped that each directive from ours on adds.
func afterEachDirective() {
	all := dnsserver.Directives
	for _, name := range all[max(0, slices.Index(all, directive)):] {
		if observed[name] {
			continue
		}
		observed[name] = true
		caddy.RegisterParsingCallback("dns", name, func(caddy.Context) error {
			in := serverblocks.Instance()
			if l, ok := in.Storage[latecomersKey{}].(*Latecomers); ok {
				l.startup = l.wrap(name, in.OnStartup, l.startup)
				l.failed = l.wrap(name, in.OnRestartFailed, l.failed)
			}
			return nil
		})
	}
}

// wrap has those callbacks put off if need be that a plugin has added to the first ones:
// as many each time that it is named.
func (l *Latecomers) wrap(name string, callbacks []func() error, first int) int {
	uses, added := l.uses[name], len(callbacks)-first
	if !optional(name) || len(uses) == 0 {
		return len(callbacks)
	}
	for i := range added {
		f, what := callbacks[first+i], uses[i*len(uses)/added].together()
		callbacks[first+i] = func() error { return l.call(what, f) }
	}
	return len(callbacks)
}

// call is what CoreDNS calls for f.
func (l *Latecomers) call(what otherPort, f func() error) error {
	l.mu.Lock()
	if waiting, late := l.putOff[what]; late {
		l.putOff[what] = append(waiting, f)
		l.mu.Unlock()
		return nil
	}
	l.mu.Unlock()
	return f()
}

// Start tries all ports. It is OnStartup, before anything is put on the node. untracked are the
// further ports of ours, each with where it is named: who else has one is told, since mostly it is
// meant for a plugin.
func (l *Latecomers) Start(untracked map[desired.Endpoint]string) error {
	late, err := tryOthers(l.ports)
	if err != nil {
		return err
	}
	l.putOffThose(late)
	told := map[uint16]bool{}
	for _, e := range slices.SortedFunc(maps.Keys(untracked), desired.Compare) {
		if told[e.Port] || slices.ContainsFunc(l.ports, func(p otherPort) bool { return p.e.Port == e.Port }) {
			continue // told, or tried
		}
		if err := sockets.TryPort(e); err != nil {
			told[e.Port] = true
			log.Warningf("%s - untracked: %v; no plugin listens there, and that program's connections are kept out of connection tracking", untracked[e], err)
		}
	}
	return nil
}

// Resume does so when a reload has failed, in which the plugins are to listen again. It is
// OnRestartFailed.
func (l *Latecomers) Resume() error {
	late, _ := tryOthers(l.ports) // for what else is taken they say so themselves
	l.putOffThose(late)
	return l.Watch()
}

func (l *Latecomers) putOffThose(late map[otherPort][]error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.yielding = false
	for what, why := range late {
		if _, known := l.putOff[what]; known {
			continue
		}
		l.putOff[what] = nil
		for _, err := range why {
			log.Warningf("%v; DNS is served all the same, and the port tried again until it is free%s", err, without[what.plugin])
		}
	}
	latest.Store(l)
}

// without says what a plugin that can't listen is missed for.
var without = map[string]string{
	"ready":      "; until then Kubernetes does not take the pod for ready",
	"prometheus": "; until then there are no metrics on it",
}

// Yield waits for callbacks that run, and has no others run. It is OnRestart and
// OnShutdown.
func (l *Latecomers) Yield() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.yielding = true
	return nil
}

// Watch has what was put off done when it can be. It is OnStartup, after all that has to be on
// the node is there.
func (l *Latecomers) Watch() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.putOff) == 0 || l.watching {
		return nil
	}
	l.watching = true
	go func() {
		for l.again() {
			time.Sleep(lateEvery)
		}
	}()
	return nil
}

// again lets those plugins listen whose ports are free by now, and tells whether there
// is anything left to wait for.
func (l *Latecomers) again() bool {
	is, over := l.inForce()
	l.mu.Lock()
	defer l.mu.Unlock()
	if over {
		latest.CompareAndSwap(l, nil)
	}
	if over || l.yielding {
		l.watching = false
		return false
	}
	for what := range l.putOff {
		if is && l.free(what) {
			l.listen(what)
		}
	}
	l.watching = len(l.putOff) > 0
	return l.watching
}

func (l *Latecomers) free(what otherPort) bool {
	return !slices.ContainsFunc(l.ports, func(p otherPort) bool { return p.together() == what && p.bind() != nil })
}

// listen runs what the plugin was not allowed to do.
func (l *Latecomers) listen(what otherPort) {
	for i, f := range l.putOff[what] {
		if err := f(); err != nil {
			log.Warningf("%v; trying again", err)
			l.putOff[what] = l.putOff[what][i:]
			return
		}
	}
	delete(l.putOff, what)
	log.Infof("%s listens now, as nobody else has its port any more", what.plugin)
}

// missing is how many ports plugins wait for.
func (l *Latecomers) missing() int {
	if l == nil {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.putOff)
}
