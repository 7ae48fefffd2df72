package sockets

import (
	"cmp"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/outlive"
)

var (
	_ = promauto.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: plugin.Namespace,
		Subsystem: "nodecache",
		Name:      "tcp_clients",
		Help:      "Gauge of the TCP connections that clients have open.",
	}, ClientsOpen)
	tcpClosed = promauto.NewCounter(prometheus.CounterOpts{
		Namespace: plugin.Namespace,
		Subsystem: "nodecache",
		Name:      "tcp_clients_closed_total",
		Help:      "Counter of TCP connections that were closed because clients had more open than there is room for.",
	})
)

const (
	// clientsEvery is how often the number of descriptors is looked at where there are
	// few, and clientsSeldom where a burst of that time fits easily.
	clientsEvery  = 25 * time.Millisecond
	clientsSeldom = 10 * clientsEvery
	// clientsAgain is how often at least the connections are counted where many
	// descriptors are open.
	clientsAgain = time.Second
	// saidAgain is how often the log tells of connections that were closed.
	saidAgain = time.Minute
)

// Clients keeps the number of TCP connections that clients have open below
// tcpLimit. CoreDNS accepts as many as come, until no descriptor is left for its own
// queries, and hands out neither its listeners nor its connections; so they are found
// among this process's sockets. What goes is what those have who have the most, the
// longest idle first.
type Clients struct {
	once    sync.Once
	limit   int
	others  int       // descriptors that were no client's at the last count
	counted time.Time // when that was
	// closing are those that CoreDNS has been shown the end of, and has not closed yet.
	closing map[connID]bool
	said    time.Time // when the log told of it
}

func (g *Clients) Start() {
	g.once.Do(func() {
		g.limit = tcpLimit()
		warnOfFewDescriptors()
		// As long as clients take to open a certain share of what there is.
		every := max(clientsEvery, clientsSeldom*time.Duration(min(DescriptorLimit(), manyDescriptors))/manyDescriptors)
		go func() {
			for {
				began := time.Now()
				g.look()
				time.Sleep(max(every, 3*time.Since(began))) // a quarter of a CPU at most
			}
		}()
	})
}

// look counts the connections where there may be too many, and closes some.
func (g *Clients) look() {
	defer outlive.Panic("counting TCP clients")
	open, err := descriptorsOpen()
	if err != nil || open <= g.limit || open-g.others <= g.limit && time.Since(g.counted) < clientsAgain {
		return
	}
	conns, open, err := clientConns()
	if err != nil {
		log.Debugf("counting TCP clients: %v", err)
		return
	}
	g.others, g.counted = open-len(conns), time.Now()
	total, still := len(conns), map[connID]bool{}
	conns = slices.DeleteFunc(conns, func(c clientConn) bool {
		if g.closing[c.connID] {
			still[c.connID] = true
		}
		return g.closing[c.connID]
	})
	g.closing = still
	if len(conns) <= g.limit {
		return
	}
	for i := range conns {
		conns[i].judge()
	}
	// Some more than there must be, or the next one to come would have all counted again.
	going := beyond(conns, g.limit-g.limit/8)
	closed := map[netip.Addr]int{}
	for _, c := range going {
		if c.shut() == nil {
			g.closing[c.connID] = true
			closed[c.peer.Addr()]++
			tcpClosed.Inc()
		}
	}
	if len(closed) > 0 && time.Since(g.said) >= saidAgain {
		g.said = time.Now()
		most := slices.MaxFunc(slices.Collect(maps.Keys(closed)), func(a, b netip.Addr) int { return cmp.Compare(closed[a], closed[b]) })
		log.Warningf("clients had %d TCP connections open, more than the %d that there is room for: closed %d of them that were idle, %d of %s, which has the most; nobody else's, and nothing over UDP, is affected",
			total, g.limit, len(going), closed[most], most)
	}
}

// connID tells one connection from another.
type connID struct {
	fd   int
	peer netip.AddrPort
}

// clientConn is a TCP connection that a client has opened.
type clientConn struct {
	connID
	asking bool // it waits for an answer
	idle   time.Duration
}

// clientConns returns the connections to this process's listeners, and how many
// Descriptors there are in all.
func clientConns() (conns []clientConn, open int, err error) {
	fds, err := Descriptors()
	if err != nil {
		return nil, 0, err
	}
	listens := map[netip.AddrPort]bool{}
	locals := map[int]netip.AddrPort{}
	for _, fd := range fds {
		if typ, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE); err != nil || typ != unix.SOCK_STREAM {
			continue
		}
		sa, err := unix.Getsockname(fd)
		at, ok := addrPort(sa)
		if err != nil || !ok {
			continue
		}
		if on, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN); err == nil && on != 0 {
			listens[at] = true
		} else {
			locals[fd] = at
		}
	}
	for fd, at := range locals {
		if !listens[at] && !listens[netip.AddrPortFrom(netip.IPv4Unspecified(), at.Port())] && !listens[netip.AddrPortFrom(netip.IPv6Unspecified(), at.Port())] {
			continue
		}
		if peer, ok := peerOf(fd); ok {
			conns = append(conns, clientConn{connID: connID{fd, peer}})
		}
	}
	return conns, len(fds), nil
}

func peerOf(fd int) (netip.AddrPort, bool) {
	sa, err := unix.Getpeername(fd)
	if err != nil {
		return netip.AddrPort{}, false
	}
	return addrPort(sa)
}

func addrPort(sa unix.Sockaddr) (netip.AddrPort, bool) {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)), true
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port)), true
	}
	return netip.AddrPort{}, false
}

// judge asks the kernel how idle c is. Where it can't tell, c counts as asking.
func (c *clientConn) judge() {
	i, err := unix.GetsockoptTCPInfo(c.fd, unix.IPPROTO_TCP, unix.TCP_INFO)
	if err != nil {
		c.asking = true
		return
	}
	c.asking = i.Bytes_received > 0 && (i.Data_segs_out == 0 || i.Last_data_recv < i.Last_data_sent)
	c.idle = time.Duration(min(i.Last_data_recv, i.Last_data_sent)) * time.Millisecond
}

// beyond returns which of conns to close so that limit are left: each client has the
// same share, and what one leaves of it goes to the others.
func beyond(conns []clientConn, limit int) (going []clientConn) {
	byClient := map[netip.Addr][]clientConn{}
	for _, c := range conns {
		byClient[c.peer.Addr()] = append(byClient[c.peer.Addr()], c)
	}
	share := fairShare(byClient, limit)
	var rest []clientConn
	for _, cs := range byClient {
		slices.SortFunc(cs, idlestFirst)
		n := max(0, len(cs)-share)
		going = append(going, cs[:n]...)
		rest = append(rest, cs[n:]...)
	}
	if n := len(rest) - limit; n > 0 { // more clients than there is room for
		slices.SortFunc(rest, idlestFirst)
		going = append(going, rest[:n]...)
	}
	return going
}

// fairShare returns how many connections a client may have, 1 at least, so that all
// have limit together.
func fairShare(byClient map[netip.Addr][]clientConn, limit int) int {
	var counts []int
	for _, cs := range byClient {
		counts = append(counts, len(cs))
	}
	slices.Sort(counts)
	share := limit
	for i, n := range counts {
		share = limit / (len(counts) - i)
		if n > share {
			break
		}
		limit -= n
	}
	return max(1, share)
}

func idlestFirst(a, b clientConn) int {
	if a.asking != b.asking {
		if a.asking {
			return 1
		}
		return -1
	}
	return cmp.Compare(b.idle, a.idle)
}

var errReused = errors.New("the descriptor is another's by now")

// shut has CoreDNS see the end of c, so that it closes it; an answer that is due is
// still sent. Its number may be another socket's by now, which the look at the peer
// tells, but for the moment between the two.
func (c clientConn) shut() error {
	if peer, ok := peerOf(c.fd); !ok || peer != c.peer {
		return errReused
	}
	if !c.asking {
		// Closed at once, or the kernel would keep it until the client closes it too.
		if err := unix.SetsockoptLinger(c.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
			return err
		}
	}
	return unix.Shutdown(c.fd, unix.SHUT_RD)
}

// ClientsOpen is how many connections clients have open.
func ClientsOpen() float64 {
	conns, _, err := clientConns()
	if err != nil {
		return 0
	}
	return float64(len(conns))
}
