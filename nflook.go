package nodecache

import (
	"errors"
	"fmt"
	"sync"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/outlive"
)

// selectLimit is from which number on a descriptor can't be given to select(2)
// (FD_SETSIZE), which google/nftables calls for its sockets, and panics with one above.
const selectLimit = 1024

// lowDescriptors are held so that a netlink socket gets a number below selectLimit
// however many descriptors there are by then, and so that it gets one at all.
var lowDescriptors = newReserve(4)

// reserve holds descriptors of nothing.
type reserve struct {
	mu   sync.Mutex
	size int
	fds  []int
}

func newReserve(size int) *reserve {
	r := &reserve{size: size}
	r.fill()
	return r
}

func (r *reserve) fill() {
	for len(r.fds) < r.size {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
		if err != nil {
			return
		}
		if fd >= selectLimit {
			unix.Close(fd)
			return
		}
		r.fds = append(r.fds, fd)
	}
}

// lend runs open, which opens one descriptor, while the numbers held are free: the
// kernel gives the lowest. Another goroutine may take one meanwhile.
func (r *reserve) lend(open func() error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, fd := range r.fds {
		unix.Close(fd)
	}
	r.fds = nil
	defer r.fill()
	return open()
}

// bufferBytes is how much a connection with nf_tables sends or holds unread at most:
// the elements of 50,000 addresses.
const bufferBytes = 8 << 20

// dialNFT opens a lasting connection with nf_tables.
func dialNFT() (conn *nftables.Conn, err error) {
	for range 3 { // somebody else may have got the low number
		err = lowDescriptors.lend(func() (err error) {
			conn, err = nftables.New(nftables.AsLasting(), nftables.WithSockOptions(setUpSocket))
			return err
		})
		if err == nil {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("opening nftables: %w", err)
	}
	return conn, nil
}

func setUpSocket(c *netlink.Conn) error {
	// The library sizes the buffers itself only where it is given no such function.
	err := errors.Join(c.SetReadBuffer(bufferBytes), c.SetWriteBuffer(bufferBytes))
	raw, e := c.SyscallConn()
	if e == nil {
		e = raw.Control(func(fd uintptr) {
			if fd >= selectLimit {
				err = errors.Join(err, fmt.Errorf("too many descriptors are open: the socket has the number %d, and can have %d at most", fd, selectLimit-1))
			}
		})
	}
	if err = errors.Join(err, e); err != nil {
		c.Close() // the library does not
	}
	return err
}

// nfLook is the connection over which all that only looks asks nf_tables. It stays
// open, and is opened anew after an error.
var nfLook nfLooker

type nfLooker struct {
	mu   sync.Mutex
	conn *nftables.Conn
}

// ask has f ask one thing. It outlives a panic of the library's.
func (l *nfLooker) ask(f func(*nftables.Conn) error) (err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn == nil {
		if l.conn, err = dialNFT(); err != nil {
			return err
		}
	}
	defer func() {
		// What does not exist is an answer like others.
		if err != nil && !errors.Is(err, unix.ENOENT) {
			l.conn.CloseLasting()
			l.conn = nil
		}
	}()
	err = errors.New("nf_tables could not be asked") // if f panics
	defer outlive.Panic("asking nf_tables")
	err = f(l.conn)
	return err
}

// These are what the library's methods of the same names are.

func (l *nfLooker) ListChains() (cs []*nftables.Chain, err error) {
	err = l.ask(func(c *nftables.Conn) error { cs, err = c.ListChains(); return err })
	return cs, err
}

func (l *nfLooker) GetRules(t *nftables.Table, ch *nftables.Chain) (rs []*nftables.Rule, err error) {
	err = l.ask(func(c *nftables.Conn) error { rs, err = c.GetRules(t, ch); return err })
	return rs, err
}

func (l *nfLooker) GetSetElements(s *nftables.Set) (es []nftables.SetElement, err error) {
	err = l.ask(func(c *nftables.Conn) error { es, err = c.GetSetElements(s); return err })
	return es, err
}
