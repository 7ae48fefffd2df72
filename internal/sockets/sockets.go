package sockets

import (
	"errors"

	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

// Own returns the file descriptors of this process's UDP and listening
// TCP sockets by what they are bound to. CoreDNS does not hand its sockets out.
func Own() (map[desired.Endpoint][]int, error) {
	fds, err := Descriptors()
	if err != nil {
		return nil, err
	}
	found := map[desired.Endpoint][]int{}
	for _, fd := range fds {
		if e, ok := boundTo(fd); ok {
			found[e] = append(found[e], fd)
		}
	}
	return found, nil
}

func boundTo(fd int) (desired.Endpoint, bool) {
	e, ok := localEnd(fd)
	if ok && e.Proto == "tcp" {
		on, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
		ok = err == nil && on != 0
	}
	return e, ok
}

// localEnd returns this end of the socket of fd, if it is one of UDP or TCP.
func localEnd(fd int) (e desired.Endpoint, ok bool) {
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return e, false
	}
	at, ok := addrPort(sa)
	typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	switch {
	case !ok || err != nil:
		return e, false
	case typ == unix.SOCK_DGRAM:
		e.Proto = "udp"
	case typ == unix.SOCK_STREAM:
		e.Proto = "tcp"
	default:
		return e, false
	}
	e.Addr, e.Port = at.Addr(), at.Port()
	return e, true
}

// LocalEnds returns this process's end of each of its UDP and TCP sockets, connections
// included.
func LocalEnds() (map[desired.Endpoint]bool, error) {
	fds, err := Descriptors()
	if err != nil {
		return nil, err
	}
	ends := map[desired.Endpoint]bool{}
	for _, fd := range fds {
		if e, ok := localEnd(fd); ok {
			ends[e] = true
		}
	}
	return ends, nil
}

// queueBytes is what a UDP socket may hold unread. The kernel counts it double, and a
// query as 768 bytes or more, so that it is room for 2,000 queries; its own default is
// for 200, which a process that gets no CPU for a tenth of a second loses at 2,000 a second.
const queueBytes = 1 << 20

// Deepen makes that much room on a UDP socket. It never takes any away.
func Deepen(fd int) error {
	if have, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF); err != nil || have >= 2*queueBytes {
		return err
	}
	// Without NET_ADMIN there is as much as net.core.rmem_max allows.
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, queueBytes) == nil {
		return nil
	}
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, queueBytes)
}

// wakeUp has whoever waits for something in the kernel, on a socket to which nothing comes,
// look up every second. When a reload hands the sockets on, Go takes them out of non-blocking
// mode for a moment; a read that begins then would never end, and the reload and every exit
// after it wait for that. Otherwise it is without effect.
func wakeUp(fd int) {
	err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1})
	if err != nil { // it may have been closed meanwhile
		log.Debugf("bounding waits on a socket: %v", err)
	}
}

// DeepenAll does so for all of this process's UDP sockets on es, and wakeUp for all.
func DeepenAll(es []desired.Endpoint) error {
	socks, err := Own()
	if err != nil {
		return err
	}
	var errs []error
	for _, fds := range socks {
		for _, fd := range fds {
			wakeUp(fd)
		}
	}
	for _, e := range es {
		for _, fd := range socks[e] {
			if e.Proto == "udp" {
				errs = append(errs, Deepen(fd))
			}
		}
	}
	return errors.Join(errs...)
}

// Listening tells whether this process has a socket on every one of es.
func Listening(es []desired.Endpoint) (bool, error) {
	have, err := Own()
	if err != nil {
		return false, err
	}
	for _, e := range es {
		if len(have[e]) == 0 {
			return false, nil
		}
	}
	return true, nil
}
