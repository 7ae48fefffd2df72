package upstream

import (
	"slices"
	"sync"

	"github.com/coredns/caddy"
)

// begun are the servers that are asked, by the instance whose they are. caddy calls no OnShutdown
// of one whose start has failed, as where a port is taken, but drops it from its list.
var begun = struct {
	sync.Mutex
	by map[*servers]*caddy.Instance
}{by: map[*servers]*caddy.Instance{}}

// begin is OnStartup.
func begin(s *servers, in *caddy.Instance) {
	closeLeft()
	begun.Lock()
	begun.by[s] = in
	begun.Unlock()
	s.start()
}

// finish is OnShutdown.
func finish(s *servers) {
	begun.Lock()
	_, is := begun.by[s]
	delete(begun.by, s)
	begun.Unlock()
	if is {
		s.close()
	}
}

// closeLeft closes what instances have begun that failed to start. It is OnRestartFailed of the
// one in force; where that has no upstream, the next start does it.
func closeLeft() error {
	var left []*servers
	begun.Lock()
	for s, in := range begun.by {
		if !slices.Contains(caddy.Instances(), in) {
			left = append(left, s)
		}
	}
	begun.Unlock()
	for _, s := range left {
		finish(s)
	}
	return nil
}
