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
//  4. Of several processes on one node the last one out tears down, and only
//     then; nobody else has to be told. skipteardown leaves everything in place.
//  5. A planned exit loses no query: what has arrived is answered, and what
//     arrives later goes to whoever serves next, another process or the cluster.
//  6. What somebody else removes comes back: at once where the kernel tells of
//     it, else within the sync interval. So it is with a rule that somebody's
//     comes before, unless he insists, which is told.
//  7. What is not ours is never touched: an address that another link carries,
//     a foreign rule, a foreign chain. After the last one has left, the node
//     reads as before.
//  8. IPv4 and IPv6 are equals, in one process and in one server block.
//
// setup.go reads the directive into a config (config.go); node.go owns what the process has
// on the node and is the only one to change it, through netif.go (the interface and its
// addresses) and a firewall (iptables.go, nftables.go). docs/architecture.md has the rest.
package nodecache

import (
	"context"

	"github.com/coredns/coredns/plugin"
	clog "github.com/coredns/coredns/plugin/pkg/log"
	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/internal/fastpath"
	"github.com/contentful-labs/coredns-nodecache/internal/ownquery"
)

var log = clog.NewWithPlugin("nodecache")

// handler stands early in the plugin chain of a server block. It changes no
// query and no answer: it only counts what is being answered, so that an exit
// can wait for it, answers what this process asks itself, and tells the ready plugin how
// the node is.
type handler struct {
	next plugin.Handler
	node *node
	fast *fastpath.Block // nil: the block has no fastpath
}

// Name implements plugin.Handler.
func (handler) Name() string { return "nodecache" }

// ServeDNS implements plugin.Handler.
func (h handler) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	if ownquery.Answer(w, r) {
		return dns.RcodeSuccess, nil
	}
	open := h.node.answering.Begin()
	defer open.Add(-1)
	if h.fast != nil {
		h.fast.Enter(ctx, r)
	}
	return plugin.NextOrFailure(h.Name(), h.next, ctx, w, r)
}

// Ready implements ready.Readiness: true while the addresses and the rules of
// the configuration in force stood at the last look and CoreDNS listens.
func (h handler) Ready() bool { return h.node.ready.Load() }
