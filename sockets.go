package nodecache

import (
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ownSockets returns the file descriptors of this process's UDP and listening
// TCP sockets by what they are bound to. CoreDNS does not hand its sockets out.
func ownSockets() (map[endpoint][]int, error) {
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, fmt.Errorf("listing this process's sockets: %w", err)
	}
	found := map[endpoint][]int{}
	for _, n := range names {
		to, err := os.Readlink("/proc/self/fd/" + n.Name())
		if err != nil || !strings.HasPrefix(to, "socket:") {
			continue
		}
		fd, err := strconv.Atoi(n.Name())
		if err != nil {
			continue
		}
		if e, ok := boundTo(fd); ok {
			found[e] = append(found[e], fd)
		}
	}
	return found, nil
}

func boundTo(fd int) (endpoint, bool) {
	var e endpoint
	typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return e, false
	}
	switch typ {
	case unix.SOCK_DGRAM:
		e.proto = "udp"
	case unix.SOCK_STREAM:
		e.proto = "tcp"
		if on, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err != nil || on == 0 {
			return e, false
		}
	default:
		return e, false
	}
	sa, err := unix.Getsockname(fd)
	if err != nil {
		return e, false
	}
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		e.addr, e.port = netip.AddrFrom4(sa.Addr), uint16(sa.Port)
	case *unix.SockaddrInet6:
		e.addr, e.port = netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port)
	default:
		return e, false
	}
	return e, true
}

// listening tells whether this process has a socket on every one of es.
func listening(es []endpoint) (bool, error) {
	have, err := ownSockets()
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
