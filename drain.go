package nodecache

import (
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// counter counts the queries that are being answered. A query counts in the
// generation in which it came, so that those of before can be waited for while
// others keep coming.
type counter struct {
	generation atomic.Uint32
	open       [2]atomic.Int64
}

// begin counts one query in; the function it returns counts it out.
func (c *counter) begin() (end func()) {
	n := &c.open[c.generation.Load()&1]
	n.Add(1)
	return func() { n.Add(-1) }
}

// turn begins a new generation and returns how many queries of the one before
// are still open.
func (c *counter) turn() (open func() int64) {
	n := &c.open[(c.generation.Add(1)-1)&1]
	return n.Load
}

// drainPoll is how often a drain looks whether it is done.
const drainPoll = 2 * time.Millisecond

// drain waits until the queries that have arrived on es are answered: first
// until each socket's queue has been seen empty, then for the answers to what
// was read. It returns how many were still open when limit had passed.
func (c *counter) drain(es []endpoint, limit time.Duration) (open int64, err error) {
	deadline := time.Now().Add(limit)
	socks, err := ownSockets()
	if err != nil {
		return 0, err
	}
	for _, e := range es {
		for _, fd := range socks[e] {
			for e.proto == "udp" && queued(fd) && time.Now().Before(deadline) {
				time.Sleep(drainPoll)
			}
		}
	}
	left := c.turn()
	for left() > 0 && time.Now().Before(deadline) {
		time.Sleep(drainPoll)
	}
	return left(), nil
}

// queued tells whether a UDP socket holds a datagram that nobody has read.
func queued(fd int) bool {
	n, err := unix.IoctlGetInt(fd, unix.SIOCINQ)
	return err == nil && n > 0
}
