package loops

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
	"github.com/contentful-labs/coredns-nodecache/internal/serverblocks"
)

// sends returns the targets of a query for name.
func (r *route) sends(name string) (ts []target, by []stanza) {
	if r.renames || slices.ContainsFunc(r.answers, func(o ownZones) bool { return o.ends(name) }) {
		return nil, nil
	}
	for _, s := range r.stanzas {
		if !dns.IsSubDomain(s.from, name) || plugin.Zones(s.except).Contains(name) {
			continue
		}
		for _, t := range s.to {
			ts, by = append(ts, t), append(by, s)
		}
		if !s.more {
			break
		}
	}
	return ts, by
}

// routing is the server blocks of one Corefile.
type routing struct {
	all   []*route
	local func(netip.Addr) bool // this machine's own address
}

// receiver returns the server block that gets a query for name which is sent to t; nil if
// none does, or it can't be told.
func (rs routing) receiver(t target, name string) *route {
	// The kernel prefers the socket that is bound to the very address.
	r, listens := rs.bound(t, name, func(h netip.Addr) bool { return h == t.at.Addr() })
	if !listens && rs.local(t.at.Addr()) {
		r, _ = rs.bound(t, name, func(h netip.Addr) bool { return h.IsUnspecified() && (h.Is6() || t.at.Addr().Is4()) })
	}
	return r
}

// bound is receiver among those that listen on an address that fits.
func (rs routing) bound(t target, name string, fits func(netip.Addr) bool) (best *route, listens bool) {
	most := -1
	for _, r := range rs.all {
		if !slices.ContainsFunc(r.hosts, fits) {
			continue
		}
		for _, c := range r.configs {
			if c.Transport != t.transport || c.Port != strconv.Itoa(int(t.at.Port())) {
				continue
			}
			listens = true
			labels := dns.CountLabel(c.Zone)
			if !dns.IsSubDomain(c.Zone, name) || labels < most {
				continue
			}
			if labels > most || r.view {
				best = r
			}
			most = labels
		}
	}
	if best != nil && best.view {
		return nil, listens
	}
	return best, listens
}

// check refuses upstreams by which a query would come back to a server block that it has
// passed. It is enough to follow one name under each zone that the Corefile names: what
// goes round does so for a whole zone, less the zones within it that go elsewhere.
func (rs routing) check() error {
	names := map[string]bool{}
	var sorted []string // so that the same Corefile gets the same error
	add := func(zone string) {
		if name := "*." + strings.TrimPrefix(zone, "."); !names[name] {
			names[name] = true
			sorted = append(sorted, name)
		}
	}
	for _, r := range rs.all {
		for _, c := range r.configs {
			add(c.Zone)
		}
		for _, s := range r.stanzas {
			add(s.from)
		}
	}
	for _, name := range sorted {
		done := map[*route]bool{}
		for _, r := range rs.all {
			if !slices.ContainsFunc(r.configs, func(c *dnsserver.Config) bool { return dns.IsSubDomain(c.Zone, name) }) {
				continue
			}
			if err := rs.follow(r, name, nil, done); err != nil {
				return err
			}
		}
	}
	return nil
}

// A hop is one step of a query's way.
type hop struct {
	from   *route
	stanza stanza
	to     target
}

// follow goes all ways of a query for name from r on. path is how it has come there.
func (rs routing) follow(r *route, name string, path []hop, done map[*route]bool) error {
	if first := slices.IndexFunc(path, func(h hop) bool { return h.from == r }); first >= 0 {
		return cycle(path[first:])
	}
	if done[r] {
		return nil
	}
	targets, by := r.sends(name)
	for i, t := range targets {
		if next := rs.receiver(t, name); next != nil {
			if err := rs.follow(next, name, append(slices.Clone(path), hop{r, by[i], t}), done); err != nil {
				return err
			}
		}
	}
	done[r] = true
	return nil
}

// cycle is the error for a way that ends where it began.
func cycle(path []hop) error {
	h := path[0]
	if len(path) == 1 {
		return serverblocks.ErrorAt(h.stanza.at, "%s: the upstream %s is this server block itself (%s), which listens there: a query would come back to it without end; name a server that does not ask this cache",
			h.stanza.plugin, h.to, h.from.name)
	}
	var way strings.Builder
	for _, h := range path[1:] {
		fmt.Fprintf(&way, ", to the server block %s, which asks %s (%s)", h.from.name, h.to, h.stanza.at)
	}
	return serverblocks.ErrorAt(h.stanza.at, "%s: the upstream %s leads back to this server block (%s)%s: a query would go round without end; name a server that does not ask this cache",
		h.stanza.plugin, h.to, h.from.name, way.String())
}

// newRouting is the Corefile's server blocks on this machine, with the addresses that they
// bring to it. What is sent to a ClusterIP never gets to a listener where IPVS takes it.
func newRouting(all []*route) routing {
	carriers, err := nodelinks.Carriers()
	if err != nil {
		log.Debugf("looking for ClusterIPs: %v", err)
	}
	brought := map[netip.Addr]bool{}
	for _, r := range all {
		for _, h := range r.hosts {
			brought[h] = true
		}
	}
	return routing{all: all, local: func(a netip.Addr) bool {
		return brought[a] || locals.has(a) && !slices.Contains(carriers[a], nodelinks.IPVS)
	}}
}
