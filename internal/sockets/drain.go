package sockets

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

// Counter counts the queries that are being answered. A query counts in the
// generation in which it came, so that those of before can be waited for while
// others keep coming.
type Counter struct {
	generation atomic.Uint32
	open       [2]atomic.Int64
}

// Begin counts one query in and returns where to count it out, with Add(-1).
func (c *Counter) Begin() *atomic.Int64 {
	for {
		g := c.generation.Load()
		n := &c.open[g&1]
		n.Add(1)
		if c.generation.Load() == g {
			return n
		}
		n.Add(-1) // a turn has not seen it, and the next one would not look there
	}
}

// Turn begins a new generation and returns how many queries of the one before
// are still open.
func (c *Counter) Turn() (open func() int64) {
	n := &c.open[(c.generation.Add(1)-1)&1]
	return n.Load
}

// Generation is how often the counter has been turned.
func (c *Counter) Generation() uint32 { return c.generation.Load() }

// Open is how many queries are open in all.
func (c *Counter) Open() int64 { return c.open[0].Load() + c.open[1].Load() }

// Poll is how often a drain looks whether it is done.
const Poll = 2 * time.Millisecond

// Park takes this process's sockets on es out of the kernel's choice, at once
// and without losing what is in them. A UDP socket that is connected is chosen
// only for its peer's packets, and the peer here never sends; answers can still
// be sent from it, as they name their destination. To close it would lose what
// nobody has read yet, and the server that owns it would keep it open, unread,
// until its last answer has left. A listening TCP socket is closed, and replaced
// by one that nobody can reach, so that its server sees no error; connections
// that were accepted go on.
func Park(es []desired.Endpoint) error {
	socks, err := Own()
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range es {
		for _, fd := range socks[e] {
			do := ParkUDP
			if e.Proto == "tcp" {
				do = replace
			}
			if err := do(fd, e); err != nil {
				errs = append(errs, fmt.Errorf("parking the socket on %s: %w", e, err))
			}
		}
	}
	return errors.Join(errs...)
}

// ParkUDP has the kernel choose the socket of fd no more.
func ParkUDP(fd int, e desired.Endpoint) error {
	if e.Addr.Is4() {
		return unix.Connect(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 255, 255, 254}, Port: 9}) // discard
	}
	return unix.Connect(fd, &unix.SockaddrInet6{Addr: [16]byte{15: 1}, Port: 9})
}

// replace closes the socket of fd and lets fd be one on which nobody can call. It
// listens, since the server's next accept would fail on one that does not.
func replace(fd int, _ desired.Endpoint) error {
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	if err := unix.Bind(s, &unix.SockaddrUnix{}); err != nil { // to a name of the kernel's choice
		return err
	}
	if err := unix.Listen(s, 1); err != nil {
		return err
	}
	return unix.Dup3(s, fd, unix.O_CLOEXEC)
}

// Drain waits until the queries that have arrived on es are answered: first
// until each socket's queue has been seen empty, then for the answers to what
// was read. It returns how many were still open when limit had passed.
func (c *Counter) Drain(es []desired.Endpoint, limit time.Duration) (open int64, err error) {
	deadline := time.Now().Add(limit)
	if err := ReadOut(es, deadline); err != nil {
		return 0, err
	}
	// What was read just now counts when its goroutine has come to the handler.
	time.Sleep(Poll)
	left := c.Turn()
	for left() > 0 && time.Now().Before(deadline) {
		time.Sleep(Poll)
	}
	return left(), nil
}

// ReadOut waits until the queue of each UDP socket on es has been seen empty.
func ReadOut(es []desired.Endpoint, deadline time.Time) error {
	socks, err := Own()
	if err != nil {
		return err
	}
	for _, e := range es {
		for _, fd := range socks[e] {
			for e.Proto == "udp" && Queued(fd) && time.Now().Before(deadline) {
				time.Sleep(Poll)
			}
		}
	}
	return nil
}

// Queued tells whether a UDP socket holds a datagram that nobody has read, if only an empty
// one, for which SIOCINQ says 0 whatever is behind it.
func Queued(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(p, 0)
	return err == nil && n > 0 && p[0].Revents&unix.POLLIN != 0
}
