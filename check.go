package nodecache

import (
	"cmp"
	"fmt"
	"os/exec"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
	"github.com/contentful-labs/coredns-nodecache/internal/serverblocks"
)

// check looks at this machine, without changing it, for what would make the
// block's demands fail later. ours are the links of the configuration in force.
func (c *config) check(b *block, ours []string) error {
	l := c.links[b.link]
	if b.link != noInterface || l.backend != backendNone {
		if ok, err := hasNetAdmin(); err == nil && !ok {
			return serverblocks.ErrorAt(b.at, "making an interface and firewall rules needs the capability NET_ADMIN: run as root, or add NET_ADMIN to the container's securityContext.capabilities")
		}
	}
	if l.backend == backendIPT {
		for _, bin := range c.binaries(b.link) {
			if _, err := exec.LookPath(bin); err != nil {
				return serverblocks.ErrorAt(cmp.Or(l.backendAt, b.at), "firewall iptables: finding the program %s: %w; install the package iptables, or use firewall nftables", bin, err)
			}
		}
	}
	if b.link != noInterface {
		if err := checkLink(b.link, slices.Contains(ours, b.link)); err != nil {
			return serverblocks.ErrorAt(cmp.Or(b.ifaceAt, b.at), "interface %s: %w", b.link, err)
		}
	}
	carriers, err := nodelinks.Carriers()
	if err != nil {
		return serverblocks.ErrorAt(b.at, "%w", err)
	}
	for a, p := range c.addrs {
		if p.link != b.link {
			continue
		}
		others := slices.DeleteFunc(slices.Clone(carriers[a]), func(n string) bool { return n == p.link || slices.Contains(ours, n) })
		if slices.Contains(others, nodelinks.IPVS) {
			return serverblocks.ErrorAt(p.at, "bind %s: the link %s carries this address, so IPVS takes its queries before any listener sees them; with kube-proxy in IPVS mode bind only a link-local address, such as 169.254.20.10", a, nodelinks.IPVS)
		}
		p.foreign = len(others) > 0
		if b.link == noInterface && len(carriers[a]) == 0 {
			return serverblocks.ErrorAt(p.at, "bind %s: no link of this node carries the address, and interface none leaves it to somebody else to put it there", a)
		}
	}
	return nil
}

// binaries returns the iptables programs that the addresses of a link need.
func (c *config) binaries(link string) []string {
	var bins []string
	for _, f := range []family{ipv4, ipv6} {
		for a, p := range c.addrs {
			if p.link == link && familyOf(a) == f {
				bins = append(bins, f.program(), f.program()+"-save", f.program()+"-restore")
				break
			}
		}
	}
	return bins
}

// hasNetAdmin tells whether this process has the capability NET_ADMIN in effect.
func hasNetAdmin() (bool, error) {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&head, &data[0]); err != nil {
		return false, fmt.Errorf("reading the capabilities of this process: %w", err)
	}
	return data[0].Effective&(1<<unix.CAP_NET_ADMIN) != 0, nil
}
