package nodecache

import (
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// source is where a query has come from.
type source struct {
	at    netip.AddrPort
	proto string
}

func sourceOf(a net.Addr) source {
	s := source{proto: "tcp"}
	switch a := a.(type) {
	case *net.UDPAddr:
		s.at, s.proto = a.AddrPort(), "udp"
	case *net.TCPAddr:
		s.at = a.AddrPort()
	default:
		s.at, _ = netip.ParseAddrPort(a.String())
	}
	s.at = netip.AddrPortFrom(s.at.Addr().WithZone("").Unmap(), s.at.Port())
	return s
}

// localAddrs are this machine's addresses.
type localAddrs struct {
	mu  sync.Mutex
	at  time.Time
	all map[netip.Addr]bool
}

// localsFor is how old the list may be. An address that is newer is taken for another
// machine's, and then a loop is found by a probe.
const localsFor = 250 * time.Millisecond

var locals localAddrs

func (l *localAddrs) has(a netip.Addr) bool {
	if a.IsLoopback() {
		return true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.at) > localsFor {
		l.at, l.all = time.Now(), map[netip.Addr]bool{}
		addrs, err := net.InterfaceAddrs()
		if err != nil {
			log.Debugf("listing this machine's addresses: %v", err)
		}
		for _, n := range addrs {
			if n, ok := n.(*net.IPNet); ok {
				if ip, ok := netip.AddrFromSlice(n.IP); ok {
					l.all[ip.Unmap()] = true
				}
			}
		}
	}
	return l.all[a.WithZone("").Unmap()]
}

// ownSocketNames are the names of this process's own sockets, from which its queries come.
type ownSocketNames struct {
	mu    sync.Mutex
	begun time.Time // when the last look began
	ended time.Time
	all   map[source]bool
}

var ownSources ownSocketNames

// restEach is how many times as long as a look takes there is none after it, so that
// looking costs a twentieth of a CPU at most.
const restEach = 20

// has tells whether a query that came no later than at came from a socket of this process.
// It waits for a look that is newer than the query; all that wait share the next one.
func (o *ownSocketNames) has(s source, at time.Time) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.begun.Before(at) {
		time.Sleep(time.Until(o.ended.Add(restEach * o.ended.Sub(o.begun))))
		o.begun = time.Now()
		all, err := socketNames()
		if err != nil {
			log.Debugf("listing this process's sockets: %v", err)
		}
		o.all, o.ended = all, time.Now()
	}
	return o.all[s] || o.all[source{netip.AddrPortFrom(netip.Addr{}, s.at.Port()), s.proto}]
}

// socketNames returns what all of this process's sockets are bound to; without an address
// what is bound to all of them, as QUIC's are.
func socketNames() (map[source]bool, error) {
	dir, err := os.Open("/proc/self/fd")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	found := map[source]bool{}
	for _, n := range names {
		fd, err := strconv.Atoi(n)
		if err != nil {
			continue
		}
		sa, err := unix.Getsockname(fd)
		if err != nil {
			continue // no socket
		}
		var s source
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			s.at = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
		case *unix.SockaddrInet6:
			s.at = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
		default:
			continue
		}
		switch typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); {
		case err != nil:
			continue
		case typ == unix.SOCK_DGRAM:
			s.proto = "udp"
		case typ == unix.SOCK_STREAM:
			s.proto = "tcp"
		default:
			continue
		}
		if s.at.Addr().IsUnspecified() {
			s.at = netip.AddrPortFrom(netip.Addr{}, s.at.Port())
		}
		found[s] = true
	}
	return found, nil
}
