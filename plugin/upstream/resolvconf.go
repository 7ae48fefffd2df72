package upstream

import (
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// mostText is how much of a file is read.
const mostText = 64 << 10

// read returns a file's text. Only a regular file is read: anything else could take for ever.
func read(name string) (string, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("%s is no regular file", name)
	}
	text, err := io.ReadAll(io.LimitReader(f, mostText))
	if err != nil {
		return "", fmt.Errorf("reading %s: %w", name, err)
	}
	return string(text), nil
}

// nameservers returns the servers that a text in the form of resolv.conf(5) names, each once, and
// what of its lines can't be one.
func nameservers(text string) (all []netip.AddrPort, odd []string) {
	n := 0
	for line := range strings.Lines(text) {
		n++
		words := strings.Fields(line)
		if len(words) == 0 || words[0] != "nameserver" {
			continue
		}
		if len(words) == 1 {
			odd = append(odd, fmt.Sprintf("line %d has no address", n))
			continue
		}
		a, err := netip.ParseAddr(words[1])
		if err != nil {
			odd = append(odd, fmt.Sprintf("line %d: %.80q is no address", n, words[1]))
			continue
		}
		at := netip.AddrPortFrom(destination(a), 53)
		if !slices.Contains(all, at) {
			all = append(all, at)
		}
	}
	const most = 8
	if len(odd) > most {
		odd = append(odd[:most:most], fmt.Sprintf("and %d lines more", len(odd)-most))
	}
	return all, odd
}

// destination is where packets to an address go: those to none go to this machine (connect(2)).
func destination(a netip.Addr) netip.Addr {
	switch a = a.Unmap(); a {
	case netip.IPv4Unspecified():
		return netip.AddrFrom4([4]byte{127, 0, 0, 1})
	case netip.IPv6Unspecified():
		return netip.IPv6Loopback()
	}
	return a
}
