package upstream

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A quickConn is a socket that is read and written with system calls that never block, and of
// which Go's scheduler does not hear. Where it does, in a process that does little, each wakes
// the runtime's monitor, a thread that looks around and finds nothing to do: with a query's four
// calls that costs as much as all else that is done for it. Go's poller waits, and keeps the
// deadlines. One may read at a time, and one write.
type quickConn struct {
	net.Conn
	raw         syscall.RawConn
	stream      bool
	read, write transfer
}

// A transfer is one read or write. ready is made once, as each function would be an allocation.
type transfer struct {
	op    string
	b     []byte
	n     int
	errno unix.Errno
	ready func(fd uintptr) bool
}

// quick returns a connection of TCP or UDP in this form, or as it is if it is neither.
func quick(c net.Conn, stream bool) net.Conn {
	s, ok := c.(syscall.Conn)
	if !ok {
		return c
	}
	raw, err := s.SyscallConn()
	if err != nil {
		return c
	}
	q := &quickConn{Conn: c, raw: raw, stream: stream, read: transfer{op: "read"}, write: transfer{op: "write"}}
	q.read.ready = func(fd uintptr) bool {
		q.read.call(unix.SYS_RECVFROM, fd, unix.MSG_DONTWAIT)
		return q.read.errno != unix.EAGAIN
	}
	q.write.ready = func(fd uintptr) bool {
		for {
			q.write.call(unix.SYS_SENDTO, fd, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
			if q.write.errno != 0 || len(q.write.b) == 0 || !stream {
				return q.write.errno != unix.EAGAIN
			}
		}
	}
	return q
}

// call makes one call for what is left of b.
func (t *transfer) call(trap, fd, flags uintptr) {
	for {
		n, _, errno := unix.RawSyscall6(trap, fd, uintptr(unsafe.Pointer(unsafe.SliceData(t.b))), uintptr(len(t.b)), flags, 0, 0)
		if t.errno = errno; errno == unix.EINTR {
			continue
		}
		if errno == 0 {
			t.n += int(n) // #nosec G115 -- at most len(b)
			t.b = t.b[n:]
		}
		return
	}
}

// ended returns what a transfer came to. err is that of the wait.
func (c *quickConn) ended(t *transfer, err error) (int, error) {
	t.b = nil
	if err != nil || t.errno != 0 {
		err = c.failed(t, err)
	}
	return t.n, err
}

func (c *quickConn) failed(t *transfer, err error) error {
	if o := (*net.OpError)(nil); errors.As(err, &o) {
		err = o.Err // it says raw-read, and not to whom
	}
	if err == nil {
		err = os.NewSyscallError(t.op, t.errno)
	}
	return &net.OpError{Op: t.op, Net: c.LocalAddr().Network(), Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}

// Read implements net.Conn.
func (c *quickConn) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	c.read.b, c.read.n, c.read.errno = b, 0, 0
	n, err := c.ended(&c.read, c.raw.Read(c.read.ready))
	if n == 0 && err == nil && c.stream {
		return 0, io.EOF
	}
	return n, err
}

// Write implements net.Conn.
func (c *quickConn) Write(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	c.write.b, c.write.n, c.write.errno = b, 0, 0
	return c.ended(&c.write, c.raw.Write(c.write.ready))
}
