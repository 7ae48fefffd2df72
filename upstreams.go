package nodecache

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/coredns/caddy"
	"github.com/coredns/caddy/caddyfile"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	pkgparse "github.com/coredns/coredns/plugin/pkg/parse"
	"github.com/coredns/coredns/plugin/pkg/transport"
	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
	"github.com/contentful-labs/coredns-nodecache/internal/serverblocks"
)

// forwarders are the plugins that send a query on, as
//
//	NAME FROM TO... {
//	    except ZONE...
//	}
var forwarders = []string{"forward", "grpc", "fanout"}

// A route is a server block as far as the ways of queries through it go.
type route struct {
	name    string // its keys, with the position of its first upstreams
	configs []*dnsserver.Config
	hosts   []netip.Addr // that it listens on; unspecified: on all
	answers []ownZones   // before a query gets to them
	stanzas []stanza     // in the order in which they get a query
	view    bool         // who is answered here can't be told
	renames bool         // the name that it sends on can't be told
	loop    bool         // it has the plugin loop
}

// A stanza is one use of a forwarder.
type stanza struct {
	plugin, at string
	from       string
	except     []string
	to         []target
	more       bool // the next one may get the query too
}

// A target is where a stanza sends queries to.
type target struct {
	text      string // as the Corefile has it
	transport string
	at        netip.AddrPort
}

func (t target) String() string {
	if t.transport == transport.DNS && strings.Contains(t.text, t.at.Addr().String()) {
		return t.text
	}
	return fmt.Sprintf("%s (%s://%s)", t.text, t.transport, t.at)
}

// routesOf returns the server blocks of the Corefile that is being set up, whose binds
// have been read; none where there is no Corefile.
func routesOf(ctx caddy.Context, directives []string) ([]*route, error) {
	blocks, err := serverblocks.Read(directives)
	if err != nil || blocks == nil {
		return nil, err
	}
	configs, err := serverblocks.Configs(ctx)
	if err != nil {
		return nil, err
	}
	instances := caddy.Instances()
	path := instances[len(instances)-1].Caddyfile().Path() // the file of what is not imported
	var all []*route
	for _, b := range blocks {
		n := zonesOf(b.Keys)
		if n > len(configs) {
			return nil, fmt.Errorf("CoreDNS has made fewer zones of the Corefile than expected")
		}
		r := &route{configs: configs[:n], view: len(b.Tokens["view"]) > 0, loop: len(b.Tokens["loop"]) > 0}
		configs = configs[n:]
		r.renames = renames(b.Tokens["rewrite"])
		// Only the first has what bind has read; CoreDNS copies it to the others later.
		for _, h := range r.configs[0].ListenHosts {
			if a, err := readHost(h); err == nil {
				r.hosts = append(r.hosts, a)
			}
		}
		r.answers = answersOf(b)
		for _, d := range directives {
			if slices.Contains(forwarders, d) {
				r.stanzas = append(r.stanzas, stanzasOf(path, d, b.Tokens[d])...)
			}
		}
		r.name = strings.Join(b.Keys, " ")
		all = append(all, r)
	}
	return all, nil
}

// zonesOf returns how many zones CoreDNS makes of a block's keys: a key such as
// 10.0.0.0/22 stands for several.
func zonesOf(keys []string) (n int) {
	for _, k := range keys {
		_, k = pkgparse.Transport(k)
		if hosts, _, err := plugin.SplitHostPort(k); err == nil {
			n += len(hosts)
		}
	}
	return n
}

// readHost reads an address to listen on. None is every address.
func readHost(h string) (netip.Addr, error) {
	if h == "" {
		return netip.IPv6Unspecified(), nil
	}
	a, err := netip.ParseAddr(h)
	return a.WithZone("").Unmap(), err
}

// renames tells whether a rewrite changes names, in the line or in the block that is opened
// there.
func renames(tokens []caddyfile.Token) bool {
	d := caddyfile.NewDispenserTokens("", tokens)
	for d.Next() {
		words := append([]string{d.Val()}, d.RemainingArgs()...)
		for _, before := range [][]string{{"rewrite"}, {"continue", "stop"}} {
			if len(words) > 1 && slices.Contains(before, words[0]) {
				words = words[1:]
			}
		}
		if strings.EqualFold(words[0], "name") {
			return true
		}
	}
	return false
}

// stanzasOf reads what a forwarder has been given. What it can't read the plugin will
// complain of itself.
func stanzasOf(path, name string, tokens []caddyfile.Token) (all []stanza) {
	d := caddyfile.NewDispenserTokens(path, tokens)
	for d.Next() {
		s := stanza{plugin: name, at: d.File() + ":" + strconv.Itoa(d.Line())}
		args := d.RemainingArgs()
		for d.NextBlock() {
			property, values := d.Val(), d.RemainingArgs()
			switch property {
			case "except":
				for _, v := range values {
					s.except = append(s.except, plugin.Host(v).NormalizeExact()...)
				}
			case "next", "next_on_nodata", "fallthrough":
				s.more = true
			}
		}
		if len(args) == 0 {
			continue
		}
		from := plugin.Host(args[0]).NormalizeExact()
		if len(from) == 0 {
			continue
		}
		s.from = from[0]
		for _, to := range args[1:] {
			s.to = append(s.to, targetsOf(name, to)...)
		}
		all = append(all, s)
	}
	return all
}

// targetsOf resolves one upstream as the plugin itself does: an address, or a file in
// the form of resolv.conf. A host's name leads nowhere here: its addresses are not ours
// to ask for.
func targetsOf(name, text string) (ts []target) {
	hosts, err := pkgparse.HostPortOrFile(text)
	if err != nil {
		return nil
	}
	for _, h := range hosts {
		t := target{text: text}
		t.transport, h = pkgparse.Transport(h)
		if name == "grpc" {
			t.transport = transport.GRPC
		}
		at, err := netip.ParseAddrPort(withoutZone(h))
		if err != nil {
			continue // unix://
		}
		a := at.Addr().Unmap()
		switch { // as net.Dial has it
		case a == netip.IPv4Unspecified():
			a = netip.AddrFrom4([4]byte{127, 0, 0, 1})
		case a == netip.IPv6Unspecified():
			a = netip.IPv6Loopback()
		}
		t.at = netip.AddrPortFrom(a, at.Port())
		ts = append(ts, t)
	}
	return ts
}

// withoutZone takes what follows a % out of an address with a port. For forward it is the
// name of a TLS server, for an IPv4 address too.
func withoutZone(s string) string {
	before, zone, found := strings.Cut(s, "%")
	if !found {
		return s
	}
	end := strings.IndexByte(zone, ']')
	if end < 0 {
		end = strings.LastIndexByte(zone, ':')
	}
	if end < 0 {
		return before
	}
	return before + zone[end:]
}

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
		return errorAt(h.stanza.at, "%s: the upstream %s is this server block itself (%s), which listens there: a query would come back to it without end; name a server that does not ask this cache",
			h.stanza.plugin, h.to, h.from.name)
	}
	var way strings.Builder
	for _, h := range path[1:] {
		fmt.Fprintf(&way, ", to the server block %s, which asks %s (%s)", h.from.name, h.to, h.stanza.at)
	}
	return errorAt(h.stanza.at, "%s: the upstream %s leads back to this server block (%s)%s: a query would go round without end; name a server that does not ask this cache",
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
