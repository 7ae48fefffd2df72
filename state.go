package nodecache

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"
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

// endpoint is one thing that clients send to: an address, a transport protocol
// and a port.
type endpoint struct {
	addr  netip.Addr
	proto string // "udp" or "tcp"
	port  uint16
	// extra is true for the ports of the property untracked. Somebody else
	// (health, prometheus) listens there, and maybe on the wildcard address.
	extra bool
}

func (e endpoint) String() string {
	return netip.AddrPortFrom(e.addr, e.port).String() + "/" + e.proto
}

func compareEndpoints(a, b endpoint) int {
	return cmp.Or(a.addr.Compare(b.addr), cmp.Compare(a.port, b.port), strings.Compare(b.proto, a.proto)) // udp first: it is most of the traffic
}

// config is what one loading of a Corefile asks for, over all its server
// blocks. Positions are "file:line".
type config struct {
	links map[string]*linkConfig   // by interface name; "none" is a name as any other here
	addrs map[netip.Addr]*placed   // every address of a bind
	wants map[endpoint]*endpointOf // every address and port that clients send to
	ours  []string                 // the links that may carry addrs: see node.links
	fast  []*fastBlock             // the blocks with fastpath
	// fastAt is how many answers are kept for an address with fastpath.
	fastAt map[endpoint]int
	// restarting is true from OnRestart on, until it is known to have failed.
	restarting bool
}

type linkConfig struct {
	backend, backendAt string // backendAt is empty while nobody has said a backend
	sync               time.Duration
	syncAt             string
}

type placed struct {
	link string
	at   string
	keep bool // skipteardown
	// foreign is true where another link carried the address when the Corefile
	// was read (an interface's name in bind, or 127.0.0.1): it is served there.
	foreign bool
}

type endpointOf struct {
	link string
	at   string
	keep bool
}

func newConfig() *config {
	return &config{links: map[string]*linkConfig{}, addrs: map[netip.Addr]*placed{}, wants: map[endpoint]*endpointOf{}, fastAt: map[endpoint]int{}}
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
func (c *config) listeners() []endpoint {
	var es []endpoint
	for e := range c.wants {
		if !e.extra {
			es = append(es, e)
		}
	}
	slices.SortFunc(es, compareEndpoints)
	return es
}

// state is what has to be on the node: per link its addresses, per firewall
// backend the endpoints it keeps out of connection tracking.
type state struct {
	links map[string][]netip.Addr
	rules map[string][]endpoint
}

// state returns what c wants on the node. With kept, only what stays there when
// the process exits (skipteardown). backend resolves "auto".
func (c *config) state(kept bool, backend func(string) string) state {
	s := state{links: map[string][]netip.Addr{}, rules: map[string][]endpoint{}}
	if c == nil {
		return s
	}
	for a, p := range c.addrs {
		if p.link != noInterface && !p.foreign && (!kept || p.keep) {
			s.links[p.link] = append(s.links[p.link], a)
		}
	}
	for e, o := range c.wants {
		if b := backend(c.links[o.link].backend); b != backendNone && (!kept || o.keep) {
			s.rules[b] = append(s.rules[b], e)
		}
	}
	return s.sorted()
}

func (s state) sorted() state {
	for n, as := range s.links {
		slices.SortFunc(as, netip.Addr.Compare)
		s.links[n] = slices.Compact(as)
	}
	for b, es := range s.rules {
		// Of an endpoint that is extra in one place only, the stricter one stays.
		slices.SortFunc(es, func(a, b endpoint) int {
			if c := compareEndpoints(a, b); c != 0 || a.extra == b.extra {
				return c
			}
			if b.extra {
				return -1
			}
			return 1
		})
		s.rules[b] = slices.CompactFunc(es, func(a, b endpoint) bool { return compareEndpoints(a, b) == 0 })
	}
	return s
}

// union returns what s or t wants.
func (s state) union(t state) state {
	u := state{links: map[string][]netip.Addr{}, rules: map[string][]endpoint{}}
	for _, x := range []state{s, t} {
		for n, as := range x.links {
			u.links[n] = append(u.links[n], as...)
		}
		for b, es := range x.rules {
			u.rules[b] = append(u.rules[b], es...)
		}
	}
	return u.sorted()
}

// minus returns what s has and t does not.
func (s state) minus(t state) state {
	m := state{links: map[string][]netip.Addr{}, rules: map[string][]endpoint{}}
	for n, as := range s.links {
		for _, a := range as {
			if !slices.Contains(t.links[n], a) {
				m.links[n] = append(m.links[n], a)
			}
		}
	}
	for b, es := range s.rules {
		for _, e := range es {
			if _, found := slices.BinarySearchFunc(t.rules[b], e, compareEndpoints); !found {
				m.rules[b] = append(m.rules[b], e)
			}
		}
	}
	return m
}

// only returns the rules of s that t has too.
func (s state) only(t state) state {
	o := state{rules: map[string][]endpoint{}}
	for b, es := range s.rules {
		for _, e := range es {
			if _, found := slices.BinarySearchFunc(t.rules[b], e, compareEndpoints); found {
				o.rules[b] = append(o.rules[b], e)
			}
		}
	}
	return o
}

func (s state) empty() bool { return len(s.links) == 0 && len(s.rules) == 0 }

// String says in one phrase where clients find the cache, for the log:
// "169.254.20.10, 10.96.0.10 (udp 53, tcp 53)".
func (c *config) String() string {
	ports := map[string]bool{}
	for e := range c.wants {
		ports[fmt.Sprintf("%s %d", e.proto, e.port)] = true
	}
	var addrs []string
	for _, a := range slices.SortedFunc(maps.Keys(c.addrs), netip.Addr.Compare) {
		addrs = append(addrs, a.String())
	}
	return strings.Join(addrs, ", ") + " (" + strings.Join(slices.Sorted(maps.Keys(ports)), ", ") + ")"
}
