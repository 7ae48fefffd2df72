package nodecache

import (
	"fmt"
	"runtime/debug"
	"sync"
)

// outlived are the lines of panics that have been told with their stack.
var outlived sync.Map

// outlive is deferred by what only looks: a fault of this program there is logged, with
// its stack once, and counted, but never ends the cache.
func outlive(doing string) {
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
