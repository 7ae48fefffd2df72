package fastpath

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
)

// sockaddr is an address of either family as the kernel has it.
type sockaddr struct {
	raw unix.RawSockaddrInet6
	len uint32
}

// addr returns a as the net package has it.
func (a *sockaddr) addr() *net.UDPAddr {
	port := (*[2]byte)(unsafe.Pointer(&a.raw.Port))
	p := int(port[0])<<8 | int(port[1])
	if a.raw.Family == unix.AF_INET {
		four := (*unix.RawSockaddrInet4)(unsafe.Pointer(&a.raw))
		return &net.UDPAddr{IP: net.IP(four.Addr[:]).To16(), Port: p}
	}
	u := &net.UDPAddr{IP: append(net.IP(nil), a.raw.Addr[:]...), Port: p}
	if a.raw.Scope_id != 0 {
		if i, err := net.InterfaceByIndex(int(a.raw.Scope_id)); err == nil {
			u.Zone = i.Name
		}
	}
	return u
}

// sendBytes is what answers may hold that are on their way to clients: each 768 bytes or
// more, however small, while the link of a pod with a limited bandwidth has it in its queue.
// The kernel's own default is for some 270, which one such pod would take from all.
const sendBytes = 2 << 20

// A socket is one UDP socket. Go's poller waits for it: a goroutine that waits in a system
// call of its own is one that the runtime's monitor has to be woken for, or that holds a P
// (docs/fastpath.md has what either costs).
type socket struct {
	conn *net.UDPConn
	raw  syscall.RawConn
	fd   int // to know it by
}

// openSocket opens a socket on at, beside those that others have there.
func openSocket(at netip.AddrPort) (*socket, error) {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if e := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		}); e != nil {
			return e
		}
		return err
	}}
	// As CoreDNS does: the kernel shares queries out among sockets that agree in IPV6_V6ONLY.
	packets, err := lc.ListenPacket(context.Background(), "udp", at.String())
	if err != nil {
		return nil, err
	}
	s := &socket{conn: packets.(*net.UDPConn)}
	s.raw, err = s.conn.SyscallConn()
	if err == nil {
		e := s.raw.Control(func(fd uintptr) {
			s.fd = int(fd)
			if err = sockets.Deepen(s.fd); err != nil {
				return
			}
			// Without NET_ADMIN there is as much as net.core.wmem_max allows, which will do.
			unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sendBytes)
		})
		if e != nil {
			err = e
		}
	}
	if err != nil {
		s.conn.Close()
		return nil, err
	}
	return s, nil
}

func (s *socket) close() { s.conn.Close() }

// wake ends a wait for packets, and all later ones.
func (s *socket) wake() { s.conn.SetReadDeadline(time.Unix(1, 0)) }

// send sends one packet.
func (s *socket) send(b []byte, to *sockaddr) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	var e syscall.Errno
	err := s.raw.Write(func(fd uintptr) bool {
		for e = unix.EINTR; e == unix.EINTR; {
			_, _, e = unix.RawSyscall6(unix.SYS_SENDTO, fd, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), unix.MSG_DONTWAIT,
				uintptr(unsafe.Pointer(&to.raw)), uintptr(to.len))
		}
		return e != unix.EAGAIN
	})
	if err == nil && e != 0 {
		err = e
	}
	if err != nil {
		return 0, fmt.Errorf("sending to %s: %w", to.addr(), err)
	}
	return len(b), nil
}
