package nodecache

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/plan"
)

// firewall keeps DNS to endpoints out of connection tracking: the queries that
// come from elsewhere, the answers, and the queries of the node's own programs.
type firewall interface {
	// apply makes the rules for exactly own stand, in place of what this backend
	// has made before, and returns how many were missing. Of o it writes nothing. Nothing
	// is left of it where nobody wants anything.
	apply(ctx context.Context, own []desired.Endpoint, o standing) (missing int, err error)
	// enforce is told what this process listens on; apply has seen all of es.
	enforce(es []desired.Endpoint)
	// withdraw sends new UDP queries to gone the way they would go without us, at
	// once; what is under way (answers, TCP connections) stays out of connection
	// tracking, or late answers would be tracked and catch their client's next
	// queries. The next ensure takes the rest away.
	withdraw(ctx context.Context, gone []desired.Endpoint) error
	// String names the backend for the log: "iptables 1.8.9 (nf_tables)".
	String() string
}

// standing is what a backend whose rules are not its process's alone has to heed.
type standing = plan.Standing

// resolve returns the backend that a configuration's word for it means here.
func (n *node) resolve(backend string) string {
	if backend != backendAuto {
		return backend
	}
	if n.auto == "" {
		n.auto = backendIPT
		if _, err := exec.LookPath(ipv4.program()); err != nil {
			n.auto = backendNFT
		}
	}
	return n.auto
}

// backend returns the one firewall of that name.
func (n *node) backend(name string) (firewall, error) {
	if fw := n.firewalls[name]; fw != nil {
		return fw, nil
	}
	var fw firewall
	switch name {
	case backendIPT:
		fw = newIPTables(func() { poke(n.poked) })
	case backendNFT:
		fw = newNFT()
	default:
		return nil, fmt.Errorf("no firewall is called %s", name)
	}
	n.firewalls[name] = fw
	return fw, nil
}

// family is an IP version.
type family int

const (
	ipv4 family = 4
	ipv6 family = 6
)

func familyOf(a netip.Addr) family {
	if a.Is4() {
		return ipv4
	}
	return ipv6
}

// program returns the name of the family's iptables.
func (f family) program() string {
	if f == ipv6 {
		return "ip6tables"
	}
	return "iptables"
}
