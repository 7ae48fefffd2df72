// Package nodecache turns CoreDNS into the DNS cache of a Kubernetes node: it
// puts the addresses of a server block's bind on an interface of its own and
// keeps DNS to them out of connection tracking.
//
// What it promises, and what every change has to keep:
//
//  1. Before CoreDNS listens, every address is on the node.
//  2. A rule that takes a query out of connection tracking is in force only
//     while somebody listens on that address and port. When the process dies,
//     however it dies, queries to a ClusterIP fall through to kube-proxy.
//  3. A reload never removes, not even for a moment, what the new configuration
//     needs; one that fails leaves exactly what the old one needs.
//  4. A planned exit answers what has arrived before the address goes. The rules
//     for queries go first, so that later queries take the cluster's way.
//  5. What somebody else removes comes back: at once where the kernel tells of
//     it, else within the sync interval.
//  6. What is not ours is never touched: an address that another link carries,
//     a foreign rule, a foreign chain. After the exit the node reads as before.
//  7. IPv4 and IPv6 are equals, in one process and in one server block.
//
// setup.go reads the directive; node.go owns what the process has on the node
// and is the only one to change it, through netif.go (the interface and its
// addresses) and a firewall (iptables.go, nftables.go).
package nodecache

import (
	"context"

	"github.com/coredns/coredns/plugin"
	clog "github.com/coredns/coredns/plugin/pkg/log"
	"github.com/miekg/dns"
)

var log = clog.NewWithPlugin("nodecache")

// handler stands early in the plugin chain of a server block. It changes no
// query and no answer: it only counts what is being answered, so that an exit
// can wait for it, and tells the ready plugin how the node is.
type handler struct {
	next plugin.Handler
	node *node
}

// Name implements plugin.Handler.
func (handler) Name() string { return "nodecache" }

// ServeDNS implements plugin.Handler.
func (h handler) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	defer h.node.answering.begin()()
	return plugin.NextOrFailure(h.Name(), h.next, ctx, w, r)
}

// Ready implements ready.Readiness: true while the addresses and the rules of
// the configuration in force stood at the last look and CoreDNS listens.
func (h handler) Ready() bool { return h.node.ready.Load() }
