// Package outlive keeps a fault of this program from ending the cache where it only looks.
package outlive

import (
	"fmt"
	"runtime/debug"
	"sync"

	"github.com/coredns/coredns/plugin"
	clog "github.com/coredns/coredns/plugin/pkg/log"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

var log = clog.NewWithPlugin("nodecache")

var lookPanics = promauto.NewCounter(prometheus.CounterOpts{
	Namespace: plugin.Namespace,
	Subsystem: "nodecache",
	Name:      "look_panics_total",
	Help:      "Counter of looks at the node that a fault of this program has ended, which the log explains.",
})

// outlived are the lines of panics that have been told with their stack.
var outlived sync.Map

// Panic is deferred by what only looks: a fault of this program there is logged, with
// its stack once, and counted, but never ends the cache.
func Panic(doing string) {
	r := recover()
	if r == nil {
		return
	}
	lookPanics.Inc()
	line := fmt.Sprintf("%s: a fault of this program: %v", doing, r)
	if _, told := outlived.LoadOrStore(doing, true); told {
		log.Errorf("%s", line)
		return
	}
	log.Errorf("%s; the cache goes on, please report this:\n%s", line, debug.Stack())
}
