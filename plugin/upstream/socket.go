package upstream

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// reportUnreachable has a UDP socket report all ICMP errors: without IP_RECVERR Linux keeps
// from a connected socket that a network or a host can't be reached (net/ipv4/udp.c), and a
// query waits for nothing.
func reportUnreachable(network, _ string, c syscall.RawConn) error {
	level, option := unix.SOL_IP, unix.IP_RECVERR
	switch network {
	case "udp4":
	case "udp6":
		level, option = unix.SOL_IPV6, unix.IPV6_RECVERR
	default:
		return nil
	}
	return c.Control(func(fd uintptr) {
		// Without it a query only fails later.
		_ = unix.SetsockoptInt(int(fd), level, option, 1) // #nosec G115 -- a descriptor
	})
}
