package upstream

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/pkg/parse"
	pkgtls "github.com/coredns/coredns/plugin/pkg/tls"
	"github.com/coredns/coredns/plugin/pkg/transport"
	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/internal/serverblocks"
)

func init() { plugin.Register(directive, setup) }

func setup(c *caddy.Controller) error {
	all, err := parseAll(c)
	if err != nil {
		return plugin.Error(directive, err)
	}
	ours, in := ownAddresses(c.Context()), serverblocks.Instance()
	c.OnRestartFailed(closeLeft)
	for _, u := range all {
		u.servers.ours = ours
		c.OnStartup(func() error { begin(u.servers, in); return nil })
		c.OnShutdown(func() error { finish(u.servers); return nil })
	}
	// The first of a block that takes a name asks for it: each is the next one's handler.
	for i, u := range all {
		dnsserver.GetConfig(c).AddPlugin(func(next plugin.Handler) plugin.Handler {
			if u.Next = next; i+1 < len(all) {
				u.Next = all[i+1]
			}
			return u
		})
	}
	return nil
}

func parseAll(c *caddy.Controller) (all []*Upstream, err error) {
	for c.Next() {
		u, err := parseOne(c)
		if err != nil {
			return nil, err
		}
		all = append(all, u)
	}
	return all, nil
}

// parseOne reads one stanza.
func parseOne(c *caddy.Controller) (*Upstream, error) {
	o := &options{
		expire: 10 * time.Second, maxFails: 2, maxConcurrent: 1000, patience: 4500 * time.Millisecond, policy: random,
		checkEvery: 500 * time.Millisecond, probeName: ".", probeRecursion: true,
		failover: []int{dns.RcodeServerFailure, dns.RcodeNotImplemented, dns.RcodeRefused},
	}
	tell := newTeller(fmt.Sprintf("%s:%d", c.File(), c.Line()))
	args := c.RemainingArgs()
	if len(args) < 2 {
		return nil, c.Errf("wants a zone and at least one upstream: upstream FROM TO...")
	}
	from := plugin.Host(args[0]).NormalizeExact()
	if len(from) != 1 {
		return nil, c.Errf("%q is not one zone", args[0])
	}
	seen := map[string]bool{}
	for c.NextBlock() {
		property := c.Val()
		if seen[property] && property != "except" {
			return nil, c.Errf("%s is there twice", property)
		}
		seen[property] = true
		if err := o.read(c, property, c.RemainingArgs()); err != nil {
			return nil, err
		}
	}
	if o.maxAge > 0 && o.maxAge < o.expire {
		return nil, c.Errf("max_age %v is less than expire %v", o.maxAge, o.expire)
	}
	if o.tls == nil {
		var err error
		if o.tls, err = pkgtls.NewTLSConfigFromArgs(); err != nil {
			return nil, c.Errf("tls: %v", err)
		}
	}
	u := &Upstream{from: from[0], opts: o, tell: tell, servers: &servers{opts: o, tell: tell}}
	u.slots.limit, u.same.limit = o.maxConcurrent, o.maxConcurrent
	u.hedges.tenths.Store(mostTenths / 2)
	for _, text := range args[1:] {
		t, err := readTarget(text)
		if err != nil {
			return nil, c.Err(err.Error())
		}
		if t.serverName != "" && o.tlsServerName != "" {
			return nil, c.Errf("%s names the server of TLS, and so does tls_servername", text)
		}
		u.servers.targets = append(u.servers.targets, t)
	}
	if len(args)-1 > mostServers {
		return nil, c.Errf("%d upstreams, of which no more than %d can be asked", len(args)-1, mostServers)
	}
	return u, nil
}

// read reads a property.
func (o *options) read(c *caddy.Controller, property string, values []string) error {
	flag := func(set *bool) error {
		if len(values) > 0 {
			return c.Errf("%s takes no value", property)
		}
		*set = true
		return nil
	}
	one := func(read func(string) error) error {
		if len(values) != 1 {
			return c.Errf("%s takes one value", property)
		}
		if err := read(values[0]); err != nil {
			return c.Errf("%s %s: %v", property, values[0], err)
		}
		return nil
	}
	duration := func(to *time.Duration, least, most time.Duration) error {
		return one(func(s string) (err error) {
			d, err := time.ParseDuration(s)
			if err == nil && (d < least || d > most) {
				err = fmt.Errorf("it has to be between %v and %v", least, most)
			}
			*to = d
			return err
		})
	}
	number := func(to *int) error {
		return one(func(s string) error {
			n, err := strconv.ParseUint(s, 10, 31)
			*to = int(n) // #nosec G115 -- 31 bits
			if err != nil {
				return fmt.Errorf("it is no number that could be meant")
			}
			return nil
		})
	}
	switch property {
	case "except":
		if len(values) == 0 {
			return c.Errf("except takes at least one zone")
		}
		for _, v := range values {
			zones := plugin.Host(v).NormalizeExact()
			if len(zones) == 0 {
				return c.Errf("except %s: it is no zone", v)
			}
			o.except = append(o.except, zones...)
		}
		return nil
	case "force_tcp":
		return flag(&o.forceTCP)
	case "prefer_udp":
		return flag(&o.preferUDP)
	case "expire":
		return duration(&o.expire, 0, time.Hour)
	case "max_age":
		return duration(&o.maxAge, 0, 24*time.Hour)
	case "max_idle_conns":
		return number(&o.maxIdle)
	case "max_fails":
		return number(&o.maxFails)
	case "max_concurrent":
		return number(&o.maxConcurrent)
	case "patience":
		return duration(&o.patience, 100*time.Millisecond, time.Minute)
	case "policy":
		return one(func(s string) error {
			if !slices.Contains([]string{random, roundRobin, sequential}, s) {
				return fmt.Errorf("it is none of %s, %s and %s", random, roundRobin, sequential)
			}
			o.policy = s
			return nil
		})
	case "failover":
		if len(values) == 0 {
			return c.Errf("failover takes at least one code")
		}
		o.failover = nil
		for _, v := range values {
			code, ok := dns.StringToRcode[strings.ToUpper(v)]
			if !ok || code == dns.RcodeSuccess {
				return c.Errf("failover %s: it is no code of a failure", v)
			}
			o.failover = append(o.failover, code)
		}
		return nil
	case "health_check":
		return o.readHealthCheck(c, values)
	case "tls":
		if len(values) > 3 {
			return c.Errf("tls takes three files at most")
		}
		root := dnsserver.GetConfig(c).Root
		for i, v := range values {
			if !filepath.IsAbs(v) && root != "" {
				values[i] = filepath.Join(root, v)
			}
		}
		config, err := pkgtls.NewTLSConfigFromArgs(values...)
		if err != nil {
			return c.Errf("tls: %v", err)
		}
		o.tls = config
		return nil
	case "tls_servername":
		return one(func(s string) error { o.tlsServerName = s; return nil })
	}
	return c.Errf("unknown property %q", property)
}

// readHealthCheck reads `health_check DURATION [no_rec] [domain NAME]`.
func (o *options) readHealthCheck(c *caddy.Controller, values []string) error {
	if len(values) == 0 {
		return c.Errf("health_check takes a duration")
	}
	d, err := time.ParseDuration(values[0])
	if err != nil || d < 10*time.Millisecond || d > time.Hour {
		return c.Errf("health_check %s: it is no duration between 10ms and 1h", values[0])
	}
	o.checkEvery = d
	for rest := values[1:]; len(rest) > 0; rest = rest[1:] {
		switch {
		case rest[0] == "no_rec":
			o.probeRecursion = false
		case rest[0] == "domain" && len(rest) > 1:
			rest = rest[1:]
			if _, ok := dns.IsDomainName(rest[0]); !ok {
				return c.Errf("health_check: %q is no name", rest[0])
			}
			o.probeName = dns.Fqdn(rest[0])
		default:
			return c.Errf("health_check: unknown option %q", rest[0])
		}
	}
	return nil
}

// readTarget reads an upstream: an address, which may have a port, a scheme and the name of the
// server of TLS, or a file.
func readTarget(text string) (target, error) {
	trans, rest := parse.Transport(text)
	a := address{way: overUDP}
	port := transport.Port
	switch trans {
	case transport.DNS:
	case transport.TLS:
		a.way, port = overTLS, transport.TLSPort
	default:
		return target{}, fmt.Errorf("%s: only dns:// and tls:// can be asked; the plugin forward asks others", text)
	}
	host := rest
	if h, p, err := net.SplitHostPort(rest); err == nil {
		host, port = h, p
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	if before, name, found := strings.Cut(host, "%"); found && a.way == overTLS {
		host, a.serverName = before, strings.TrimSuffix(name, "]")
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		if trans == transport.DNS && !strings.Contains(text, "://") && isFile(text) {
			return target{file: text}, nil
		}
		return target{}, fmt.Errorf("%q is neither an address nor a file", text)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return target{}, fmt.Errorf("%s: %q is no port", text, port)
	}
	a.at = netip.AddrPortFrom(destination(ip), uint16(n))
	return target{address: a}, nil
}

// isFile tells whether a word is meant for a file, which need not be there yet.
func isFile(s string) bool {
	if strings.Contains(s, "/") {
		return true
	}
	_, err := os.Stat(s)
	return err == nil
}

// ownAddresses returns what tells whether a server block of the same Corefile listens on an
// address. It may be called once CoreDNS has made its servers.
func ownAddresses(ctx caddy.Context) func(netip.AddrPort) bool {
	configs, err := serverblocks.Configs(ctx)
	if err != nil {
		log.Debugf("finding the addresses of this process: %v", err)
	}
	return func(at netip.AddrPort) bool {
		for _, c := range configs {
			if c.Transport != transport.DNS || c.Port != strconv.Itoa(int(at.Port())) {
				continue
			}
			for _, h := range c.ListenHosts {
				a, err := netip.ParseAddr(h)
				switch {
				case err == nil && !a.IsUnspecified():
					if a.Unmap().WithZone("") == at.Addr().WithZone("") {
						return true
					}
				case (h == "" || err == nil) && local(at.Addr()):
					return true
				}
			}
		}
		return false
	}
}

// local tells whether an address is this machine's.
func local(a netip.Addr) bool {
	if a.IsLoopback() {
		return true
	}
	all, err := net.InterfaceAddrs()
	if err != nil {
		log.Debugf("listing this machine's addresses: %v", err)
	}
	return slices.ContainsFunc(all, func(n net.Addr) bool {
		p, ok := n.(*net.IPNet)
		if !ok {
			return false
		}
		ip, _ := netip.AddrFromSlice(p.IP)
		return ip.Unmap() == a.WithZone("")
	})
}
