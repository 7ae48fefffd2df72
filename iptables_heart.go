package nodecache

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

const (
	// beatEvery and beatSeconds: see heart.
	beatEvery   = time.Second
	beatSeconds = 3
	// recentDir is there once the kernel has loaded the match recent.
	recentDir    = "/proc/thread-self/net/xt_recent"
	recentPrefix = "nodecache_"
)

// recentName is the name of an address's list of the match recent.
func recentName(a netip.Addr) string { return recentPrefix + a.String() }

// recentPath is the file through which a list is written. The kernel makes it
// with the first rule that names the list and removes it with the last.
func recentPath(a netip.Addr) string { return recentDir + "/" + recentName(a) }

// notWritable tells whether the list of a rule that stands can't be written, for a reason that
// lasts. Too many open files, or a rule that somebody has just removed, say nothing of it.
func notWritable(list string) bool {
	f, err := os.OpenFile(list, os.O_WRONLY, 0)
	if err == nil {
		f.Close()
	}
	if errors.Is(err, fs.ErrNotExist) {
		_, err = os.Stat(recentDir)
	}
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS)
}

// heart keeps the rules for the node's own queries in force: they match while
// the address has been written to its list in the last beatSeconds. So they go
// out of force by themselves when this process dies.
type heart struct {
	flushed func()
	mu      sync.Mutex
	addrs   map[netip.Addr]bool
	stop    chan struct{} // closes to end the goroutine; nil while none runs
}

func newHeart(flushed func()) *heart {
	return &heart{flushed: flushed, addrs: map[netip.Addr]bool{}}
}

// beat starts to keep the rules for the addresses of es in force.
func (h *heart) beat(es []desired.Endpoint) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, e := range es {
		h.addrs[e.Addr] = true
	}
	h.write()
	if h.stop == nil && len(h.addrs) > 0 {
		h.stop = make(chan struct{})
		go h.run(h.stop)
	}
}

// only puts the rules for every address that is not in es out of force.
func (h *heart) only(es []desired.Endpoint) {
	h.mu.Lock()
	defer h.mu.Unlock()
	stay := map[netip.Addr]bool{}
	for _, e := range es {
		stay[e.Addr] = true
	}
	for a := range h.addrs {
		if !stay[a] {
			tell('-', a) // where there is no list there is no rule
			delete(h.addrs, a)
		}
	}
	if len(h.addrs) == 0 && h.stop != nil {
		close(h.stop)
		h.stop = nil
	}
}

func (h *heart) run(stop <-chan struct{}) {
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
			h.mu.Lock()
			gone := h.write()
			h.mu.Unlock()
			if gone {
				h.flushed()
			}
		}
	}
}

// write renews every list and tells whether one is gone, and with it the rules.
func (h *heart) write() (gone bool) {
	for a := range h.addrs {
		if tell('+', a) != nil {
			gone = true
		}
	}
	return gone
}

// tell writes to an address's list that it has (+) the address or has it no more
// (-). The kernel takes one such line for each time that the file is opened.
func tell(sign byte, a netip.Addr) error {
	f, err := os.OpenFile(recentPath(a), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(f, "%c%s\n", sign, a)
	return errors.Join(err, f.Close())
}
