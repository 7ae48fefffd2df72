package loops

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
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
	ends, err := sockets.LocalEnds()
	if err != nil {
		return nil, err
	}
	found := map[source]bool{}
	for e := range ends {
		if e.Addr.IsUnspecified() {
			e.Addr = netip.Addr{}
		}
		found[source{netip.AddrPortFrom(e.Addr, e.Port), e.Proto}] = true
	}
	return found, nil
}
