package nodecache

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/coredns/caddy"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
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
	ours  []string                         // the links that may carry addrs: see node.links
	fast  []*block                         // those with fastpath
	// fastAt is how many answers are kept for an address with fastpath.
	fastAt map[netip.AddrPort]int
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
	return &config{links: map[string]*linkConfig{}, addrs: map[netip.Addr]*placed{}, wants: map[desired.Endpoint]*endpointOf{}, fastAt: map[netip.AddrPort]int{}}
}

// attachFast gets the blocks with fastpath ready. CoreDNS has made its servers and
// does not listen yet.
func (c *config) attachFast(ctx caddy.Context) error {
	if len(c.fast) == 0 {
		return nil
	}
	all, err := serverblocks.Configs(ctx)
	if err != nil {
		return errorAt(c.fast[0].fastAt, "fastpath: this build has a CoreDNS that nodecache does not know: %w", err)
	}
	for _, b := range c.fast {
		if err := b.fast.Attach(directiveName, all); err != nil {
			return errorAt(b.fastAt, "%w", err)
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

// state returns what c wants on the node. With kept, only what stays there when
// the process exits (skipteardown). backend resolves "auto".
func (c *config) state(kept bool, backend func(string) string) desired.State {
	s := desired.State{Links: map[string][]netip.Addr{}, Rules: map[string][]desired.Endpoint{}}
	if c == nil {
		return s
	}
	for a, p := range c.addrs {
		if p.link != noInterface && !p.foreign && (!kept || p.keep) {
			s.Links[p.link] = append(s.Links[p.link], a)
		}
	}
	for e, o := range c.wants {
		if b := backend(c.links[o.link].backend); b != backendNone && (!kept || o.keep) {
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
