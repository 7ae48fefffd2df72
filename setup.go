package nodecache

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/internal/fastpath"
	"github.com/contentful-labs/coredns-nodecache/internal/loops"
	"github.com/contentful-labs/coredns-nodecache/internal/otherports"
	"github.com/contentful-labs/coredns-nodecache/internal/reloads"
	"github.com/contentful-labs/coredns-nodecache/internal/serverblocks"
)

func init() {
	plugin.Register(directiveName, setup)
	explainVariables()
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
		cfg.ours = theNode.linksInUse()
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
		askers, err := loops.Guard(c.Context())
		if err != nil {
			return plugin.Error(directiveName, err)
		}
		cfg.askers, cfg.upstreams = askers, upstreamsOf(askers)
		c.Set(configKey{}, cfg)
		late, err := otherports.New(c, func() (is, over bool) { return theNode.isInForce(cfg) })
		if err != nil {
			return plugin.Error(directiveName, err)
		}
		ctx := c.Context()
		tracked := reloads.Track(c, serverblocks.Instance(), theNode.exiting.Done())
		c.OnStartup(func() error { theNode.tcp.Start(); return nil })
		c.OnStartup(func() error { return wrap(cfg.attachFast(ctx)) })
		c.OnStartup(func() error { return wrap(late.Start(cfg.untracked())) })
		c.OnStartup(func() error { return wrap(theNode.start(cfg)) })
		c.OnStartup(late.Watch)
		c.OnStartup(tracked.Started)
		c.OnRestart(late.Yield)
		c.OnRestart(func() error { theNode.restarting(cfg, true); return nil })
		c.OnRestartFailed(func() error { theNode.restarting(cfg, false); theNode.revert(cfg); return nil })
		c.OnRestartFailed(late.Resume)
		c.OnShutdown(late.Yield)
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
	fastOn           []netip.AddrPort
}

func position(c *caddy.Controller) string { return c.File() + ":" + strconv.Itoa(c.Line()) }

// parse reads
//
//	nodecache [skipteardown] {
//	    interface NAME
//	    firewall  auto|iptables|nftables|none
//	    sync      DURATION
//	    untracked PORT...
//	    fastpath  [auto] [ENTRIES]
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
	case len(args) > 1 && name != "untracked" && !(name == "fastpath" && args[0] == "auto" && len(args) == 2):
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
		if len(args) > 0 && args[0] == "auto" {
			b.fast.Auto, args = true, args[1:]
		}
		if len(args) == 0 {
			break
		}
		n, err := strconv.Atoi(args[0])
		switch {
		case err != nil && b.fast.Auto:
			return c.Errf("fastpath auto %q is no number of entries", args[0])
		case err != nil:
			return c.Errf("fastpath %q is no number of entries, and not auto", args[0])
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
