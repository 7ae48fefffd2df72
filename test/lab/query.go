package lab

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// A query on the wire, the socket it is sent from, and what makes an answer the right one:
// what a Load and a Flow have in common.

// name returns the n-th name of its kind, in zone.
func (k Names) name(n int, tag, zone string) string {
	switch k {
	case Misses:
		return fmt.Sprintf("miss-%d%s.%s", n, tag, zone)
	case Slow:
		return fmt.Sprintf("slow-%v-%d%s.%s", SlowFor, n, tag, zone)
	}
	return fmt.Sprintf("hit-%d%s.%s", n%16, tag, zone)
}

// appendQuery appends to b, which has room for it, a query for name: of the type A when n is
// even, and else of the type AAAA.
func appendQuery(b []byte, id uint16, name string, n int) ([]byte, error) {
	at := len(b)
	b = append(b, byte(id>>8), byte(id), 1, 0, 0, 1, 0, 0, 0, 0, 0, 0)
	// An offset within the message is what its compression would be reckoned from.
	end, err := dns.PackDomainName(name, b[at:cap(b)], len(b)-at, nil, false)
	if err != nil {
		return nil, fmt.Errorf("packing %s: %w", name, err)
	}
	typ := dns.TypeA
	if n%2 == 1 {
		typ = dns.TypeAAAA
	}
	b = binary.BigEndian.AppendUint16(b[:at+end], typ)
	return binary.BigEndian.AppendUint16(b, dns.ClassINET), nil
}

// openSocket returns a socket of the type typ, with the flags in it, and what to connect it to.
func openSocket(typ int, to netip.AddrPort) (fd int, addr unix.Sockaddr, err error) {
	family := unix.AF_INET6
	if to.Addr().Is4() {
		family, addr = unix.AF_INET, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	} else {
		addr = &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	}
	if fd, err = unix.Socket(family, typ|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, nil, fmt.Errorf("opening a socket: %w", err)
	}
	return fd, addr, nil
}

// retry repeats a system call that a signal interrupted: the runtime sends itself
// signals.
func retry(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

var errWrong = errors.New("wrong answer")

// check compares an answer with its query, and returns its TTL.
func check(q, a []byte) (ttl uint32, err error) {
	if len(a) < len(q) {
		return 0, fmt.Errorf("%w: %d bytes", errWrong, len(a))
	}
	if rcode := a[3] & 0xf; a[2]&0x80 == 0 || rcode != dns.RcodeSuccess {
		return 0, fmt.Errorf("%w: flags %x, %s", errWrong, a[2:4], dns.RcodeToString[int(rcode)])
	}
	if string(a[12:len(q)]) != string(q[12:]) || binary.BigEndian.Uint16(a[4:]) != 1 {
		return 0, fmt.Errorf("%w: another question", errWrong)
	}
	if binary.BigEndian.Uint16(a[6:]) != 1 {
		return 0, fmt.Errorf("%w: %d records", errWrong, binary.BigEndian.Uint16(a[6:]))
	}
	rr, _, err := dns.UnpackRR(a, len(q))
	if err != nil {
		return 0, fmt.Errorf("%w: %w", errWrong, err)
	}
	typ := binary.BigEndian.Uint16(q[len(q)-4:])
	if rr.Header().Rrtype != typ {
		return 0, fmt.Errorf("%w: %v", errWrong, rr)
	}
	switch rr := rr.(type) {
	case *dns.A:
		if !rr.A.Equal(clusterA) {
			return 0, fmt.Errorf("%w: %v", errWrong, rr)
		}
	case *dns.AAAA:
		if !rr.AAAA.Equal(clusterAAAA) {
			return 0, fmt.Errorf("%w: %v", errWrong, rr)
		}
	}
	return rr.Header().Ttl, nil
}
