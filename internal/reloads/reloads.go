// Package reloads tries a reload again that has failed, since its reason may pass: a port
// that another program has, a lock, another plugin's start. CoreDNS itself tries a Corefile
// once. It also has no two reloads run at the same time, and tells which Corefile is in force.
package reloads

import (
	"errors"
	"sync"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/plugin"
	clog "github.com/coredns/coredns/plugin/pkg/log"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

var log = clog.NewWithPlugin("nodecache")

var (
	pending = promauto.NewGauge(prometheus.GaugeOpts{
		Namespace: plugin.Namespace,
		Subsystem: "nodecache",
		Name:      "reload_pending",
		Help:      "Gauge that is 1 while a reload has failed and is tried again, and the Corefile before it is in force.",
	})
	inForce = promauto.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: plugin.Namespace,
		Subsystem: "nodecache",
		Name:      "corefile_info",
		Help:      "A metric with the value 1 and the hash of the Corefile in force as labels, as the reload plugin has it.",
	}, []string{"hash", "value"})
)

// The pauses between two tries.
const (
	// firstPause is after a start that has failed, each further pause being twice as long.
	firstPause = time.Second
	// longPause is after a Corefile that could not be read: it mostly has to be mended, which
	// the reload plugin notices.
	longPause = 30 * time.Second
	mostPause = 5 * time.Minute
	// mostTries is how often one Corefile is tried where other plugins have begun to start each
	// time: CoreDNS does not stop what they have started, such as the server of health.
	mostTries = 20
	// othersFor bounds the wait for a reload that is under way.
	othersFor = 30 * time.Second
)

func init() { show("none") }

// underWay is held by the reload that is under way.
var underWay = make(chan struct{}, 1)

// How far a reload has come.
type stage int

const (
	reading  stage = iota // the plugins' setup
	starting              // our own start
	others                // what other plugins start, and listening
)

// current is the stage of the reload that is under way.
var current struct {
	sync.Mutex
	stage
}

func reach(s stage) {
	current.Lock()
	defer current.Unlock()
	current.stage = s
}

// key is where an instance has its Tracked.
type key struct{}

// Tracked is an instance whose reloads are looked after.
type Tracked struct {
	instance *caddy.Instance
	hash     string
	exit     <-chan struct{}

	mu      sync.Mutex
	holds   bool   // underWay
	over    bool   // it has been replaced
	failing string // the hash of what has failed, where it is known
	tries   int    // of that
	pause   time.Duration
	next    *time.Timer
}

// Track has the reloads of the instance that is being set up looked after, and of those in
// force that nobody looks after: those without nodecache. exit is closed when the process is on
// its way out. The callbacks that c adds from now on run after it.
func Track(c *caddy.Controller, self *caddy.Instance, exit <-chan struct{}) *Tracked {
	t := &Tracked{instance: self, hash: hashOf(self.Caddyfile()), exit: exit}
	c.Set(key{}, t)
	c.OnFirstStartup(func() error {
		onSignal()
		show(t.hash)
		return nil
	})
	c.OnStartup(func() error { reach(starting); return nil })
	c.OnRestart(t.begin)
	c.OnRestartFailed(t.failed)
	c.OnShutdown(t.stopped)
	for _, i := range caddy.Instances() {
		if i != self && trackedOf(i) == nil {
			without := &Tracked{instance: i, hash: hashOf(i.Caddyfile()), exit: exit}
			i.StorageMu.Lock()
			i.Storage[key{}] = without
			i.StorageMu.Unlock()
			i.OnRestart = append(i.OnRestart, without.begin)
			i.OnRestartFailed = append(i.OnRestartFailed, without.failed)
			i.OnShutdown = append(i.OnShutdown, without.stopped)
			reach(reading)
		}
	}
	return t
}

func trackedOf(i *caddy.Instance) *Tracked {
	i.StorageMu.RLock()
	defer i.StorageMu.RUnlock()
	t, _ := i.Storage[key{}].(*Tracked)
	return t
}

// Started is OnStartup, after all callbacks of ours.
func (t *Tracked) Started() error {
	reach(others)
	return nil
}

// begin is OnRestart. Nothing else keeps two reloads, by the signal and by the reload plugin,
// from running at once, and both from replacing the same instance.
func (t *Tracked) begin() error {
	select {
	case underWay <- struct{}{}:
	case <-time.After(othersFor):
		log.Warningf("another reload has been under way for %s; going on without waiting for it", othersFor)
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.holds = true
	if t.over {
		t.release()
		// Its plugins are not to start again what the other reload has stopped.
		t.instance.OnRestartFailed = nil
		return errors.New("the configuration has been replaced by another reload meanwhile")
	}
	reach(reading)
	return nil
}

// release is called with t.mu held.
func (t *Tracked) release() {
	if t.holds {
		t.holds = false
		<-underWay
	}
}

// stopped is OnShutdown: in a reload, another instance has taken over.
func (t *Tracked) stopped() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.next != nil {
		t.next.Stop()
	}
	t.release()
	all := caddy.Instances()
	for _, i := range all {
		if i == t.instance {
			return nil // an exit, in which the instance is stopped later
		}
	}
	t.over = true
	if len(all) > 0 {
		pending.Set(0)
		if next := trackedOf(all[len(all)-1]); next != nil {
			show(next.hash)
		} else {
			show(hashOf(all[len(all)-1].Caddyfile()))
		}
		if t.tries > 0 {
			log.Infof("the Corefile is in force now, after %d tries", t.tries+1)
		}
	}
	return nil
}

// failed is OnRestartFailed: the instance stays in force.
func (t *Tracked) failed() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.release()
	if t.over || closed(t.exit) {
		return nil
	}
	current.Lock()
	came := current.stage
	current.Unlock()
	hash := ""
	if in, err := load(); err == nil {
		hash = hashOf(in)
	}
	if hash != t.failing {
		t.failing, t.tries, t.pause = hash, 0, 0
	}
	t.tries++
	first := firstPause
	if came == reading {
		first = longPause
	}
	t.pause = min(max(2*t.pause, first), mostPause)
	pending.Set(1)
	if came == others && t.tries >= mostTries {
		log.Errorf("the reload has failed %d times, and is not tried again until the Corefile is changed: the configuration before it stays in force", t.tries)
		return nil
	}
	log.Errorf("the reload has failed, as is said below, and the configuration before it stays in force; trying again in %s", t.pause)
	t.again(t.pause)
	return nil
}

// again is called with t.mu held.
func (t *Tracked) again(in time.Duration) {
	if t.next != nil {
		t.next.Stop()
	}
	t.next = time.AfterFunc(in, t.try)
}

// try reloads once more.
func (t *Tracked) try() {
	if closed(t.exit) {
		return
	}
	in, err := load()
	t.mu.Lock()
	switch {
	case t.over || t.holds: // another reload is there, and says itself how it ends
		t.mu.Unlock()
		return
	case err != nil:
		log.Errorf("reading the Corefile for another try: %v", err)
		t.pause = min(max(2*t.pause, firstPause), mostPause)
		t.again(t.pause)
		t.mu.Unlock()
		return
	case hashOf(in) == t.hash:
		log.Infof("the Corefile is again the one that is in force")
		t.failing, t.tries, t.pause = "", 0, 0
		pending.Set(0)
		t.mu.Unlock()
		return
	}
	t.mu.Unlock()
	// What comes of it the callbacks are told, and caddy has it in the log.
	_, _ = t.instance.Restart(in)
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
