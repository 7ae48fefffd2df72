// Package loops keeps queries from going round: it refuses a Corefile by which one would feed
// itself, and has a guard stand before the plugins that ask upstreams, for what no Corefile
// shows. The guard refuses what its server block has sent itself, and what is too much to be
// under way at once.
package loops

import (
	"slices"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	clog "github.com/coredns/coredns/plugin/pkg/log"
)

var log = clog.NewWithPlugin("nodecache")

// pendingGuards are those of the Corefile that is being set up.
var pendingGuards struct {
	ctx    caddy.Context
	routes []*route
	guards []*guard
}

// Asker is one use of a plugin that asks upstreams.
type Asker struct {
	Plugin, At string   // At is "file:line"
	Zone       string   // the queries for which it sends on
	To         []string // as the Corefile has them: addresses, and files in the form of resolv.conf
	OnlyTCP    bool     // force_tcp

	route *route
}

// Next is the plugins from the first one on that asks, past the cache and the like; nil before
// CoreDNS has made its servers.
func (a Asker) Next() plugin.Handler { return a.route.next }

// Guard refuses the Corefile that is being set up if by it a query would feed itself, and has
// the guards put in. It returns all that ask upstreams. The binds of all its server blocks have
// been read.
func Guard(ctx caddy.Context) ([]Asker, error) {
	all, err := routesOf(ctx, dnsserver.Directives)
	if err != nil {
		log.Warningf("this build has a CoreDNS that nodecache does not know, so loops are not looked for: %v", err)
		return nil, nil
	}
	rs := newRouting(all)
	if err := rs.check(); err != nil {
		return nil, err
	}
	guardUpstreams(ctx, rs)
	var askers []Asker
	for _, r := range all {
		for _, s := range r.stanzas {
			zone := s.from
			if zone == "." && len(r.configs) > 0 {
				zone = r.configs[0].Zone
			}
			askers = append(askers, Asker{s.plugin, s.at, zone, s.texts, s.onlyTCP, r})
		}
	}
	return askers, nil
}

// guardUpstreams has the guards put into all server blocks that ask upstreams, once it is
// their turn. The plugin loop can end the process from any of them.
func guardUpstreams(ctx caddy.Context, rs routing) {
	group := &guards{underWay: &underWayInAll}
	pendingGuards.ctx, pendingGuards.routes, pendingGuards.guards = ctx, nil, nil
	for _, r := range rs.all {
		group.renames = group.renames || r.renames
		if len(r.stanzas) == 0 && !r.loop {
			continue
		}
		g := group.add(r.name)
		g.loop = r.loop
		if len(r.stanzas) > 0 {
			g.at = r.stanzas[0].at
		}
		pendingGuards.routes = append(pendingGuards.routes, r)
	}
	pendingGuards.guards = group.all
	registerGuards(dnsserver.Directives)
}

// guardsAfter are the directives after which caddy calls us.
var guardsAfter = map[string]bool{}

// registerGuards has caddy call us when all plugins before loop and the forwarders have been
// set up: their handlers run in that order.
func registerGuards(directives []string) {
	first := slices.IndexFunc(directives, func(d string) bool { return d == "loop" || slices.Contains(forwarders, d) })
	if first < 1 || guardsAfter[directives[first-1]] {
		return
	}
	guardsAfter[directives[first-1]] = true
	caddy.RegisterParsingCallback("dns", directives[first-1], func(ctx caddy.Context) error {
		if ctx != pendingGuards.ctx {
			return nil // a Corefile without nodecache
		}
		for i, r := range pendingGuards.routes {
			g := pendingGuards.guards[i]
			r.configs[0].AddPlugin(func(next plugin.Handler) plugin.Handler {
				r.next = next // the same for all its zones and addresses
				return guarded{g, next}
			})
		}
		pendingGuards.ctx, pendingGuards.routes, pendingGuards.guards = nil, nil, nil
		return nil
	})
}
