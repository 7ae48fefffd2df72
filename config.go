package nodecache

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/coredns/caddy"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/doctor"
	"github.com/contentful-labs/coredns-nodecache/internal/loops"
	"github.com/contentful-labs/coredns-nodecache/internal/serverblocks"
)

const (
	noInterface    = "none"
	backendAuto    = "auto"
	backendNone    = "none"
	backendIPT     = "iptables"
	backendNFT     = "nftables"
	defaultLink    = "nodelocaldns" // a name that Calico and MetalLB skip, projectcalico/calico#6910
	defaultSync    = time.Minute
	minSync        = 100 * time.Millisecond
	maxSync        = 24 * time.Hour
	directiveName  = "nodecache"
	maxLinkNameLen = 15 // IFNAMSIZ less the closing NUL
)

// config is what one loading of a Corefile asks for, over all its server
// blocks. Positions are "file:line".
type config struct {
	links map[string]*linkConfig           // by interface name; "none" is a name as any other here
	addrs map[netip.Addr]*placed           // every address of a bind
	wants map[desired.Endpoint]*endpointOf // every address and port that clients send to
	ours  []string                         // the links that may carry addrs: see node.linksInUse
	fast  []*block                         // those with fastpath
	// fastAt is how many answers are kept for an address with fastpath, once attachFast knows.
	fastAt    map[netip.AddrPort]int
	upstreams []doctor.Upstream
	askers    []loops.Asker
	// held are addresses whose queries the cluster is still to answer: no rules are wanted for
	// them. The node's owner changes it.
	held map[netip.Addr]bool
	// restarting is true from OnRestart on, until it is known to have failed.
	restarting bool
}

type linkConfig struct {
	backend, backendAt string // backendAt is empty while nobody has said a backend
	sync               time.Duration
	syncAt             string
}

type placed struct {
	link         string
	at           string
	skipteardown bool
	// foreign is true where another link carried the address when the Corefile
	// was read (an interface's name in bind, or 127.0.0.1): it is served there.
	foreign bool
}

type endpointOf struct {
	link         string
	at           string
	skipteardown bool
	zone         string // one that is answered there in plain DNS; "" is none
}

func newConfig() *config {
	return &config{links: map[string]*linkConfig{}, addrs: map[netip.Addr]*placed{}, wants: map[desired.Endpoint]*endpointOf{}, fastAt: map[netip.AddrPort]int{}}
}

// add puts one server block's demands into c: b its directive, hosts what its
// bind resolved to, keys its zones in the form dns://zone:port.
func (c *config) add(b *block, hosts, keys []string) error {
	if b.fast != nil {
		c.fast = append(c.fast, b)
	}
	if len(hosts) == 0 || hosts[0] == "" {
		return serverblocks.ErrorAt(b.at, "nodecache needs the addresses of a bind in the same server block, such as: bind 169.254.20.10")
	}
	l := c.links[b.link]
	if l == nil {
		l = &linkConfig{backend: backendAuto, sync: defaultSync}
		c.links[b.link] = l
	}
	if b.backendAt != "" {
		if l.backendAt != "" && l.backend != b.backend {
			return serverblocks.ErrorAt(b.backendAt, "firewall %s here, but %s at %s for the same interface %s", b.backend, l.backend, l.backendAt, b.link)
		}
		l.backend, l.backendAt = b.backend, b.backendAt
	}
	if b.syncAt != "" {
		if l.syncAt != "" && l.sync != b.sync {
			return serverblocks.ErrorAt(b.syncAt, "sync %s here, but %s at %s for the same interface %s", b.sync, l.sync, l.syncAt, b.link)
		}
		l.sync, l.syncAt = b.sync, b.syncAt
	}
	var addrs []netip.Addr
	for _, host := range hosts {
		a, err := parseAddr(host)
		if err != nil {
			return serverblocks.ErrorAt(b.at, "bind %s: %w", host, err)
		}
		if a.Zone() != "" {
			continue // from an interface's name in bind; nobody is pointed there
		}
		if p := c.addrs[a]; p == nil {
			c.addrs[a] = &placed{link: b.link, at: b.at, skipteardown: b.skipteardown}
		} else if p.link != b.link {
			return serverblocks.ErrorAt(cmp.Or(b.ifaceAt, b.at), "interface %s here, but %s at %s for the same address %s", b.link, p.link, p.at, a)
		} else {
			p.skipteardown = p.skipteardown || b.skipteardown
		}
		addrs = append(addrs, a)
	}
	var es []desired.Endpoint
	zones := map[desired.Endpoint]string{}
	for _, key := range keys {
		protos, port, err := serverblocks.ParseKey(key)
		if err != nil {
			return serverblocks.ErrorAt(b.at, "reading the server block's key %s: %w", key, err)
		}
		if b.fast != nil {
			b.fast.Ports = append(b.fast.Ports, strconv.Itoa(int(port)))
		}
		for _, a := range addrs {
			for _, proto := range protos {
				e := desired.Endpoint{Addr: a, Proto: proto, Port: port}
				es = append(es, e)
				if len(protos) == 2 { // dns://
					zones[e] = serverblocks.ZoneOf(key)
				}
				if b.fast != nil && proto == "udp" && len(protos) == 2 {
					b.fastOn = append(b.fastOn, netip.AddrPortFrom(a, port))
				}
			}
		}
	}
	for _, a := range addrs {
		for _, port := range b.extra {
			es = append(es, desired.Endpoint{Addr: a, Proto: "tcp", Port: port, Extra: true})
		}
	}
	for _, e := range es {
		if e.Extra && c.wants[desired.Endpoint{Addr: e.Addr, Proto: e.Proto, Port: e.Port}] != nil {
			continue // CoreDNS itself listens there, the stricter guard serves
		}
		delete(c.wants, desired.Endpoint{Addr: e.Addr, Proto: e.Proto, Port: e.Port, Extra: !e.Extra})
		if o := c.wants[e]; o != nil {
			o.skipteardown = o.skipteardown || b.skipteardown
		} else {
			c.wants[e] = &endpointOf{link: b.link, at: b.at, skipteardown: b.skipteardown}
		}
		if zone := zones[e]; zone != "" {
			c.wants[e].zone = zone
		}
	}
	return nil
}

// parseAddr reads one address of bind and refuses those that can't be put on an
// interface or asked by a client.
func parseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	switch {
	case err != nil:
		return a, err
	case a.IsUnspecified():
		return a, errors.New("the wildcard address can't be put on an interface; name the addresses, such as 169.254.20.10")
	case a.Is4In6():
		return a, fmt.Errorf("an IPv4-mapped IPv6 address; write %s", a.Unmap())
	case a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return a, errors.New("a multicast or broadcast address; clients of a cache need a unicast address")
	case a.Is6() && a.IsLinkLocalUnicast() && a.Zone() == "":
		return a, errors.New("a link-local IPv6 address is good for one link only and needs a zone, which bind does not take; use a unique local address, such as fd00:20::10")
	}
	return a, nil
}

// attachFast gets the blocks with fastpath ready. CoreDNS has made its servers and
// does not listen yet.
func (c *config) attachFast(ctx caddy.Context) error {
	if len(c.fast) == 0 {
		return nil
	}
	all, err := serverblocks.Configs(ctx)
	if err != nil {
		return serverblocks.ErrorAt(c.fast[0].fastAt, "fastpath: this build has a CoreDNS that nodecache does not know: %w", err)
	}
	for _, b := range c.fast {
		err := b.fast.Attach(directiveName, all)
		switch {
		case err != nil && b.fast.Auto:
			log.Infof("%s: the server block goes without fastpath, which is no fault: %v", b.at, err)
		case err != nil:
			return serverblocks.ErrorAt(b.fastAt, "%w", err)
		}
		for _, at := range b.fastOn {
			if err == nil {
				c.fastAt[at] = max(c.fastAt[at], b.fast.Entries)
			}
		}
	}
	return nil
}

// fastAddrs returns where fastpath answers, with how many answers are kept, for c in force.
func (c *config) fastAddrs() map[netip.AddrPort]int {
	if c == nil {
		return nil
	}
	return c.fastAt
}

// sync returns the shortest interval that a block asked for.
func (c *config) sync() time.Duration {
	d := time.Duration(0)
	for _, l := range c.links {
		if l.syncAt != "" && (d == 0 || l.sync < d) {
			d = l.sync
		}
	}
	return cmp.Or(d, defaultSync)
}

// auto tells whether c leaves the choice of a backend to us.
func (c *config) auto() bool {
	for _, l := range c.links {
		if l.backend == backendAuto {
			return true
		}
	}
	return false
}

// listeners returns what CoreDNS itself will listen on.
func (c *config) listeners() []desired.Endpoint {
	var es []desired.Endpoint
	for e := range c.wants {
		if !e.Extra {
			es = append(es, e)
		}
	}
	slices.SortFunc(es, desired.Compare)
	return es
}

// untracked returns the ports of the property untracked, with where it stands.
func (c *config) untracked() map[desired.Endpoint]string {
	all := map[desired.Endpoint]string{}
	for e, o := range c.wants {
		if e.Extra {
			all[e] = o.at
		}
	}
	return all
}

// state returns what c wants on the node. backend resolves "auto".
func (c *config) state(backend func(string) string) desired.State { return c.part(backend, false) }

// kept returns what of it stays there when the process exits.
func (c *config) kept(backend func(string) string) desired.State { return c.part(backend, true) }

// part returns what c wants of what has skipteardown, or of all.
func (c *config) part(backend func(string) string, skipteardown bool) desired.State {
	s := desired.State{Links: map[string][]netip.Addr{}, Rules: map[string][]desired.Endpoint{}}
	if c == nil {
		return s
	}
	for a, p := range c.addrs {
		if p.link != noInterface && !p.foreign && (!skipteardown || p.skipteardown) {
			s.Links[p.link] = append(s.Links[p.link], a)
		}
	}
	for e, o := range c.wants {
		if b := backend(c.links[o.link].backend); b != backendNone && !c.held[e.Addr] && (!skipteardown || o.skipteardown) {
			s.Rules[b] = append(s.Rules[b], e)
		}
	}
	return s.Sorted()
}

// String says in one phrase where clients find the cache, for the log:
// "169.254.20.10, 10.96.0.10 (udp 53, tcp 53)".
func (c *config) String() string {
	ports := map[string]bool{}
	for e := range c.wants {
		ports[fmt.Sprintf("%s %d", e.Proto, e.Port)] = true
	}
	var addrs []string
	for _, a := range slices.SortedFunc(maps.Keys(c.addrs), netip.Addr.Compare) {
		addrs = append(addrs, a.String())
	}
	return strings.Join(addrs, ", ") + " (" + strings.Join(slices.Sorted(maps.Keys(ports)), ", ") + ")"
}
