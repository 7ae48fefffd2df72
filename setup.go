package nodecache

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/pkg/transport"
	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/fastpath"
	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
)

func init() {
	plugin.Register(directiveName, setup)
	fastpath.GrowStacks()
	// The one place that every way out passes (SIGTERM, SIGINT, SIGQUIT).
	caddy.OnProcessExit = append(caddy.OnProcessExit, func() { theNode.exit() })
	// Called for each Corefile that is read, with the directive in it or without.
	caddy.RegisterParsingCallback("dns", directiveName, func(ctx caddy.Context) error {
		if ctx != lastSetup {
			theNode.dropped()
		}
		return nil
	})
}

// lastSetup is the instance whose setup was the last to be called. Corefiles are
// read one after the other.
var lastSetup caddy.Context

// configKey is where the blocks of one instance share their config.
type configKey struct{}

// setup reads the directive of one server block. It only reads: CoreDNS also
// calls it for a Corefile that will turn out to be bad further down.
func setup(c *caddy.Controller) error {
	if err := checkOrder(dnsserver.Directives); err != nil {
		return plugin.Error(directiveName, err)
	}
	lastSetup = c.Context()
	b, err := parse(c)
	if err != nil {
		return plugin.Error(directiveName, err)
	}
	cfg, ok := c.Get(configKey{}).(*config)
	if !ok {
		cfg = newConfig()
		cfg.ours = theNode.links()
	}
	dc := dnsserver.GetConfig(c)
	if b.fast != nil {
		b.fast.Config = dc
	}
	if err := cfg.add(b, dc.ListenHosts, c.ServerBlockKeys); err != nil {
		return plugin.Error(directiveName, err)
	}
	if err := cfg.check(b, cfg.ours); err != nil {
		return plugin.Error(directiveName, err)
	}
	if !ok {
		if err := checkUpstreams(c.Context()); err != nil {
			return plugin.Error(directiveName, err)
		}
		c.Set(configKey{}, cfg)
		late, err := newLatecomers(c, cfg)
		if err != nil {
			return plugin.Error(directiveName, err)
		}
		ctx := c.Context()
		c.OnStartup(func() error { theNode.tcp.Start(); return nil })
		c.OnStartup(func() error { return wrap(cfg.attachFast(ctx)) })
		c.OnStartup(func() error { return wrap(late.start()) })
		c.OnStartup(func() error { return wrap(theNode.start(cfg)) })
		c.OnStartup(late.watch)
		c.OnRestart(late.yield)
		c.OnRestart(func() error { theNode.restarting(cfg, true); return nil })
		c.OnRestartFailed(func() error { theNode.restarting(cfg, false); theNode.revert(cfg); return nil })
		c.OnRestartFailed(late.resume)
		c.OnShutdown(late.yield)
		c.OnShutdown(func() error { theNode.replaced(cfg); return nil })
	}
	fast := b.fast
	// Without fastpath too: a reload may turn it off.
	dc.UDPDecorateWriterFunc = func(s *dnsserver.Server) dns.DecorateWriter {
		theNode.fast.Serve(s, cfg.fastAt)
		return nil
	}
	dc.AddPlugin(func(next plugin.Handler) plugin.Handler {
		if fast != nil {
			fast.Next = next
		}
		return handler{next: next, node: theNode, fast: fast}
	})
	return nil
}

func wrap(err error) error {
	if err == nil {
		return nil
	}
	return plugin.Error(directiveName, err)
}

// checkOrder says whether a build has the plugins in an order that can work:
// setup needs what bind has read, and the startup callbacks of the others, which
// run in this same order, may listen on an address that nodecache brings.
func checkOrder(directives []string) error {
	self := slices.Index(directives, directiveName)
	if b := slices.Index(directives, "bind"); self >= 0 && b > self {
		return fmt.Errorf("this build runs nodecache before bind: move the line nodecache of its plugin.cfg right after bind and build again")
	}
	for _, other := range []string{"health", "ready", "prometheus", "pprof"} {
		if o := slices.Index(directives, other); o >= 0 && o < self {
			return fmt.Errorf("this build runs %s before nodecache, so that %s could not listen on an address that nodecache makes: move the line nodecache of its plugin.cfg right after bind and build again", other, other)
		}
	}
	return nil
}

// block is the directive of one server block.
type block struct {
	at               string // "file:line"
	skipteardown     bool
	link             string
	backend          string
	backendAt        string
	sync             time.Duration
	syncAt           string
	extra            []uint16
	ifaceAt, extraAt string
	fast             *fastpath.Block // nil: no fastpath
	fastAt           string
}

func position(c *caddy.Controller) string { return c.File() + ":" + strconv.Itoa(c.Line()) }

// errorAt has the form of the errors of caddy's parser.
func errorAt(at, format string, args ...any) error {
	return fmt.Errorf("%s - Error during parsing: %w", at, fmt.Errorf(format, args...))
}

// parse reads
//
//	nodecache [skipteardown] {
//	    interface NAME
//	    firewall  auto|iptables|nftables|none
//	    sync      DURATION
//	    untracked PORT...
//	    fastpath  [ENTRIES]
//	}
func parse(c *caddy.Controller) (*block, error) {
	var b *block
	for c.Next() {
		if b != nil {
			return nil, c.Errf("nodecache stands in this server block already, at %s", b.at)
		}
		b = &block{at: position(c), link: defaultLink}
		for _, arg := range c.RemainingArgs() {
			switch {
			case !strings.EqualFold(arg, "skipteardown"):
				return nil, c.Errf("unknown argument %q; nodecache takes only skipteardown here", arg)
			case b.skipteardown:
				return nil, c.Err("skipteardown is given twice")
			}
			b.skipteardown = true
		}
		for c.NextBlock() {
			if err := b.property(c); err != nil {
				return nil, err
			}
		}
	}
	return b, nil
}

func (b *block) property(c *caddy.Controller) error {
	name, args := c.Val(), c.RemainingArgs()
	seen := map[string]*string{"interface": &b.ifaceAt, "firewall": &b.backendAt, "sync": &b.syncAt, "untracked": &b.extraAt, "fastpath": &b.fastAt}[name]
	switch {
	case seen == nil:
		return c.Errf("unknown property %q; nodecache has interface, firewall, sync, untracked and fastpath", name)
	case *seen != "":
		return c.Errf("%s is given twice, before this at %s", name, *seen)
	case len(args) == 0 && name != "fastpath":
		return c.Errf("%s needs a value", name)
	case len(args) > 1 && name != "untracked":
		return c.Errf("%s takes one value, not %d", name, len(args))
	}
	*seen = position(c)
	switch name {
	case "interface":
		if why := badLinkName(args[0]); why != "" {
			return c.Errf("%q can't be the name of an interface: %s", args[0], why)
		}
		b.link = args[0]
	case "firewall":
		if !slices.Contains([]string{backendAuto, backendIPT, backendNFT, backendNone}, args[0]) {
			return c.Errf("unknown firewall %q; it is auto, iptables, nftables or none", args[0])
		}
		b.backend = args[0]
	case "sync":
		d, err := time.ParseDuration(args[0])
		if err != nil {
			return c.Errf("sync %q is no duration, such as 60s or 5m", args[0])
		}
		if d < minSync || d > maxSync {
			return c.Errf("sync %s is out of range; it is %s to %s", args[0], minSync, maxSync)
		}
		b.sync = d
	case "fastpath":
		b.fast = &fastpath.Block{Entries: fastpath.DefaultEntries}
		if len(args) == 0 {
			break
		}
		n, err := strconv.Atoi(args[0])
		if err != nil {
			return c.Errf("fastpath %q is no number of entries", args[0])
		}
		if n < fastpath.MinEntries || n > fastpath.MaxEntries {
			return c.Errf("fastpath %d is out of range; it is %d to %d entries", n, fastpath.MinEntries, fastpath.MaxEntries)
		}
		b.fast.Entries = n
	case "untracked":
		for _, arg := range args {
			p, err := strconv.ParseUint(arg, 10, 16)
			if err != nil || p == 0 {
				return c.Errf("untracked %q is no port; a port is 1 to 65535", arg)
			}
			b.extra = append(b.extra, uint16(p))
		}
	}
	return nil
}

// badLinkName says what the kernel would hold against an interface's name
// (dev_valid_name in net/core/dev.c), or "".
func badLinkName(name string) string {
	switch {
	case len(name) > maxLinkNameLen:
		return fmt.Sprintf("it has %d bytes, and the kernel takes %d", len(name), maxLinkNameLen)
	case name == "" || name == "." || name == "..":
		return "the kernel refuses it"
	case strings.ContainsAny(name, "/:%\x7f") || slices.ContainsFunc([]byte(name), func(b byte) bool { return b <= ' ' || b == 0xa0 }):
		return "it has a slash, a colon, a percent sign or a blank"
	}
	return ""
}

// add puts one server block's demands into c: b its directive, hosts what its
// bind resolved to, keys its zones in the form dns://zone:port.
func (c *config) add(b *block, hosts, keys []string) error {
	if b.fast != nil {
		c.fast = append(c.fast, b)
	}
	if len(hosts) == 0 || hosts[0] == "" {
		return errorAt(b.at, "nodecache needs the addresses of a bind in the same server block, such as: bind 169.254.20.10")
	}
	l := c.links[b.link]
	if l == nil {
		l = &linkConfig{backend: backendAuto, sync: defaultSync}
		c.links[b.link] = l
	}
	if b.backendAt != "" {
		if l.backendAt != "" && l.backend != b.backend {
			return errorAt(b.backendAt, "firewall %s here, but %s at %s for the same interface %s", b.backend, l.backend, l.backendAt, b.link)
		}
		l.backend, l.backendAt = b.backend, b.backendAt
	}
	if b.syncAt != "" {
		if l.syncAt != "" && l.sync != b.sync {
			return errorAt(b.syncAt, "sync %s here, but %s at %s for the same interface %s", b.sync, l.sync, l.syncAt, b.link)
		}
		l.sync, l.syncAt = b.sync, b.syncAt
	}
	var addrs []netip.Addr
	for _, host := range hosts {
		a, err := parseAddr(host)
		if err != nil {
			return errorAt(b.at, "bind %s: %w", host, err)
		}
		if a.Zone() != "" {
			continue // from an interface's name in bind; nobody is pointed there
		}
		if p := c.addrs[a]; p == nil {
			c.addrs[a] = &placed{link: b.link, at: b.at, keep: b.skipteardown}
		} else if p.link != b.link {
			return errorAt(cmp.Or(b.ifaceAt, b.at), "interface %s here, but %s at %s for the same address %s", b.link, p.link, p.at, a)
		} else {
			p.keep = p.keep || b.skipteardown
		}
		addrs = append(addrs, a)
	}
	var es []desired.Endpoint
	for _, key := range keys {
		protos, port, err := parseKey(key)
		if err != nil {
			return errorAt(b.at, "reading the server block's key %s: %w", key, err)
		}
		if b.fast != nil {
			b.fast.Ports = append(b.fast.Ports, strconv.Itoa(int(port)))
		}
		for _, a := range addrs {
			for _, proto := range protos {
				e := desired.Endpoint{Addr: a, Proto: proto, Port: port}
				es = append(es, e)
				if b.fast != nil && proto == "udp" && len(protos) == 2 { // dns://
					at := netip.AddrPortFrom(a, port)
					c.fastAt[at] = max(c.fastAt[at], b.fast.Entries)
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
			o.keep = o.keep || b.skipteardown
		} else {
			c.wants[e] = &endpointOf{link: b.link, at: b.at, keep: b.skipteardown}
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

// parseKey reads a server block's key, such as dns://cluster.local.:53, and
// returns what its transport is served over.
func parseKey(key string) (protos []string, port uint16, err error) {
	trans, rest, found := strings.Cut(key, "://")
	if !found {
		trans, rest = transport.DNS, key
	}
	switch trans {
	case transport.DNS:
		protos = []string{"udp", "tcp"}
	case transport.TLS, transport.GRPC, transport.HTTPS:
		protos = []string{"tcp"}
	case transport.QUIC, transport.HTTPS3:
		protos = []string{"udp"}
	default:
		return nil, 0, fmt.Errorf("nodecache does not know the transport %s", trans)
	}
	s := dnsserver.Port
	if i := strings.LastIndexByte(rest, ':'); i >= 0 {
		s = rest[i+1:]
	}
	p, err := strconv.ParseUint(s, 10, 16)
	if err != nil || p == 0 {
		return nil, 0, fmt.Errorf("%q is no port", s)
	}
	return protos, uint16(p), nil
}

// check looks at this machine, without changing it, for what would make the
// block's demands fail later. ours are the links of the configuration in force.
func (c *config) check(b *block, ours []string) error {
	l := c.links[b.link]
	if b.link != noInterface || l.backend != backendNone {
		if ok, err := hasNetAdmin(); err == nil && !ok {
			return errorAt(b.at, "making an interface and firewall rules needs the capability NET_ADMIN: run as root, or add NET_ADMIN to the container's securityContext.capabilities")
		}
	}
	if l.backend == backendIPT {
		for _, bin := range c.binaries(b.link) {
			if _, err := exec.LookPath(bin); err != nil {
				return errorAt(cmp.Or(l.backendAt, b.at), "firewall iptables: finding the program %s: %w; install the package iptables, or use firewall nftables", bin, err)
			}
		}
	}
	if b.link != noInterface {
		if err := checkLink(b.link, slices.Contains(ours, b.link)); err != nil {
			return errorAt(cmp.Or(b.ifaceAt, b.at), "interface %s: %w", b.link, err)
		}
	}
	carriers, err := nodelinks.Carriers()
	if err != nil {
		return errorAt(b.at, "%w", err)
	}
	for a, p := range c.addrs {
		if p.link != b.link {
			continue
		}
		others := slices.DeleteFunc(slices.Clone(carriers[a]), func(n string) bool { return n == p.link || slices.Contains(ours, n) })
		if slices.Contains(others, nodelinks.IPVS) {
			return errorAt(p.at, "bind %s: the link %s carries this address, so IPVS takes its queries before any listener sees them; with kube-proxy in IPVS mode bind only a link-local address, such as 169.254.20.10", a, nodelinks.IPVS)
		}
		p.foreign = len(others) > 0
		if b.link == noInterface && len(carriers[a]) == 0 {
			return errorAt(p.at, "bind %s: no link of this node carries the address, and interface none leaves it to somebody else to put it there", a)
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
