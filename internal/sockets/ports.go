package sockets

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

// loopback is the index of the device lo in every network namespace.
const loopback = 1

// TryPort tells whether CoreDNS will be able to listen on e, before the address
// is on the node: a start that fails once it is there leaves the address behind,
// as CoreDNS calls nobody then. A socket that is bound joins its SO_REUSEPORT
// group, so for UDP it is bound to lo as well, through which nothing comes for an
// address that another link carries or will carry: to the kernel even the node's
// own queries come in through that link (rt_iif, ip_route_output_key_hash_rcu in
// net/ipv4/route.c; ip6_rcv_core). So no query is taken from a twin that serves.
func TryPort(e desired.Endpoint) error { return TryBind(e, true) }

// TryBind is TryPort for one who shares the address with others of ours, or with nobody.
func TryBind(e desired.Endpoint, share bool) error {
	domain, typ := unix.AF_INET, unix.SOCK_STREAM
	var sa unix.Sockaddr = &unix.SockaddrInet4{Addr: as4(e.Addr), Port: int(e.Port)}
	if e.Addr.Is6() {
		domain, sa = unix.AF_INET6, &unix.SockaddrInet6{Addr: e.Addr.As16(), Port: int(e.Port)}
	}
	if e.Proto == "udp" {
		if e.Addr.IsLoopback() {
			return nil // nowhere to hide: let CoreDNS try
		}
		typ = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(domain, typ|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("trying %s: %w", e, err)
	}
	defer unix.Close(fd)
	set := func(level, option, value int) {
		if err == nil {
			err = unix.SetsockoptInt(fd, level, option, value)
		}
	}
	if share {
		set(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	}
	if e.Addr.Is6() {
		set(unix.SOL_IPV6, unix.IPV6_V6ONLY, 0) // as for Go's listeners on all addresses
		set(unix.SOL_IPV6, unix.IPV6_FREEBIND, 1)
	} else {
		set(unix.SOL_IP, unix.IP_FREEBIND, 1)
	}
	if typ == unix.SOCK_STREAM {
		set(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) // as Go's listeners do
	} else {
		set(unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, loopback)
	}
	if err != nil {
		log.Debugf("trying %s before CoreDNS does: %v", e, err) // kernels before 5.1
		return nil
	}
	switch err := unix.Bind(fd, sa); {
	case err == nil:
		return nil
	case errors.Is(err, unix.EADDRINUSE):
		return takenError(e)
	case errors.Is(err, unix.EACCES):
		return fmt.Errorf("%s: %w (ports below 1024 need the capability NET_BIND_SERVICE)", e, err)
	default:
		log.Debugf("trying %s before CoreDNS does: %v", e, err)
		return nil
	}
}

// takenError is that another program has the endpoint. Who that is takes a look at all
// processes, so it is found out only to be told.
type takenError desired.Endpoint

func (t takenError) Error() string {
	return fmt.Sprintf("%s is taken%s: end that program or have it listen elsewhere; two can share an address only when both set SO_REUSEPORT and run as the same user", desired.Endpoint(t), Holder(desired.Endpoint(t)))
}

func as4(a netip.Addr) (b [4]byte) {
	if a.Is4() {
		b = a.As4()
	}
	return b
}
