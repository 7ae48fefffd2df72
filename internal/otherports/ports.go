// Package otherports is the ports that a Corefile makes CoreDNS listen on beside those of server
// blocks with nodecache: they are tried before anything is put on the node, and plugins without
// which DNS can be served have their start put off until another program gives theirs up.
package otherports

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/caddy/caddyfile"
	"github.com/coredns/coredns/core/dnsserver"
	clog "github.com/coredns/coredns/plugin/pkg/log"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
	"github.com/contentful-labs/coredns-nodecache/internal/serverblocks"
	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
)

var log = clog.NewWithPlugin(directive)

// directive is the name of nodecache in a Corefile.
const directive = "nodecache"

// lookupLimit bounds the wait for the address of a name, which can be asked of ourselves.
const lookupLimit = 2 * time.Second

// otherPort is what another plugin, or a server block without nodecache, will listen on.
type otherPort struct {
	at     string // "file:line"
	plugin string // "" for a server block's own
	e      desired.Endpoint
}

// standardPorts are the plugins that listen on TCP for something else than DNS, with what
// they take when the Corefile says no address. dnstap needs one.
var standardPorts = map[string]string{"health": ":8080", "ready": ":8181", "prometheus": "localhost:9153", "pprof": "localhost:6053", "dnstap": ""}

// together tells which of the ports have to be free for a plugin to listen on p: ready
// listens on all that the server blocks name at once.
func (p otherPort) together() otherPort {
	if p.plugin == "ready" {
		return otherPort{plugin: p.plugin}
	}
	return otherPort{plugin: p.plugin, e: p.e}
}

// otherPorts returns what the Corefile that c is of makes CoreDNS listen on beside what
// nodecache is responsible for, and by plugin what for each time that it is named, in that
// order. c is any of its controllers, at a time when bind is done.
func otherPorts(c *caddy.Controller) (ports []otherPort, uses map[string][]otherPort, err error) {
	blocks, err := serverblocks.Read(dnsserver.Directives)
	if err != nil || len(blocks) == 0 {
		return nil, nil, err
	}
	uses = map[string][]otherPort{}
	file := serverblocks.Instance().Caddyfile().Path()
	seen := map[otherPort]bool{}
	add := func(p otherPort) {
		where := otherPort{plugin: p.plugin, e: p.e}
		if p.e.Port != 0 && !seen[where] {
			seen[where] = true
			ports = append(ports, p)
		}
	}
	for i, b := range blocks {
		for name, standard := range standardPorts {
			for _, p := range pluginPorts(name, standard, caddyfile.NewDispenserTokens(file, b.Tokens[name])) {
				add(p)
				uses[name] = append(uses[name], p)
			}
		}
		if len(b.Tokens[directive]) > 0 {
			continue
		}
		at := begin(file, b)
		for _, e := range blockPorts(c, i, len(b.Keys)) {
			add(otherPort{at: at, e: e})
		}
	}
	return ports, uses, nil
}

// pluginPorts reads what the plugin of this name is given in one server block, as it
// does itself. What it would refuse is left for it to tell, and has port 0, as what is no
// port has.
func pluginPorts(name, standard string, d caddyfile.Dispenser) (ports []otherPort) {
	for d.Next() {
		at := fmt.Sprintf("%s:%d", d.File(), d.Line())
		args := d.RemainingArgs()
		for d.NextBlock() {
			d.RemainingArgs()
		}
		addr := standard
		switch {
		case name == "dnstap" && len(args) > 1 && args[0] == "listen":
			if proto, rest, _ := strings.Cut(args[1], "://"); proto == "tcp" || proto == "tls" {
				addr = rest
			}
		case name != "dnstap" && len(args) > 0:
			addr = args[0]
		}
		p := otherPort{at: at, plugin: name}
		if e, ok := resolve(addr); ok {
			p.e = e
		}
		ports = append(ports, p)
	}
	return ports
}

// begin is where a server block's first directive is; of one in an imported file, there.
func begin(file string, b caddyfile.ServerBlock) string {
	var first caddyfile.Token
	for _, tokens := range b.Tokens {
		if len(tokens) == 0 {
			continue
		}
		t := tokens[0]
		if first.Line == 0 || cmp.Or(strings.Compare(t.File, first.File), cmp.Compare(t.Line, first.Line)) < 0 {
			first = t
		}
	}
	return fmt.Sprintf("%s:%d", cmp.Or(first.File, file), first.Line)
}

// blockPorts returns what the i-th server block, which has so many keys, listens on.
func blockPorts(c *caddy.Controller, i, keys int) (es []desired.Endpoint) {
	of := *c // CoreDNS hands out the settings of a controller's own block
	of.ServerBlockIndex, of.ServerBlockKeyIndex = i, 0
	hosts := dnsserver.GetConfig(&of).ListenHosts
	for of.ServerBlockKeyIndex = range keys {
		key := dnsserver.GetConfig(&of)
		protos, _, err := serverblocks.ParseKey(key.Transport + "://:" + key.Port)
		if err != nil {
			continue // a transport that only CoreDNS knows
		}
		for _, host := range hosts {
			e, ok := resolve(net.JoinHostPort(host, key.Port))
			for _, e.Proto = range protos {
				if ok {
					es = append(es, e)
				}
			}
		}
	}
	return es
}

// resolve returns what Go listens on for an address such as localhost:9153 or :8080.
func resolve(addr string) (e desired.Endpoint, ok bool) {
	host, service, err := net.SplitHostPort(addr)
	if err != nil || strings.Contains(host, "%") { // of one link only
		return e, false
	}
	ctx, cancel := context.WithTimeout(context.Background(), lookupLimit)
	defer cancel()
	port, err := net.DefaultResolver.LookupPort(ctx, "tcp", service)
	if err != nil {
		return e, false
	}
	e = desired.Endpoint{Proto: "tcp", Port: uint16(port)}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", cmp.Or(host, "::"))
	if err != nil || len(addrs) == 0 {
		return e, false
	}
	e.Addr = addrs[max(0, slices.IndexFunc(addrs, is4))].Unmap()
	if e.Addr.IsUnspecified() {
		e.Addr = wildcard()
	}
	return e, true
}

func is4(a netip.Addr) bool { return a.Unmap().Is4() }

// wildcard is the address that Go takes for "all": that of both families, if there are two.
func wildcard() netip.Addr {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return netip.IPv4Unspecified()
	}
	unix.Close(fd)
	return netip.IPv6Unspecified()
}

// try tells whether CoreDNS will be able to listen on p. Where a UDP socket can't hide
// from the queries of those that serve already, that is left for CoreDNS to see.
func (p otherPort) try(carriers map[netip.Addr][]string) error {
	if p.e.Proto == "udp" && (p.e.Addr.IsUnspecified() || slices.Contains(carriers[p.e.Addr], "lo")) {
		return nil
	}
	err := p.bind()
	if err != nil && p.plugin != "" {
		err = fmt.Errorf("%s: %w", p.plugin, err)
	}
	return err
}

// bind is try's work. dnstap shares with nobody, not even with a twin of ours.
func (p otherPort) bind() error { return sockets.TryBind(p.e, p.plugin != "dnstap") }

// tryOthers tries all of ports. Those of plugins without which DNS can be served all the
// same come out as late, with what is in the way; the first other that is taken is an error.
func tryOthers(ports []otherPort) (late map[otherPort][]error, taken error) {
	carriers, err := nodelinks.Carriers()
	if err != nil {
		return nil, err
	}
	late = map[otherPort][]error{}
	for _, p := range ports {
		err := p.try(carriers)
		if err == nil {
			continue
		}
		if optional(p.plugin) {
			late[p.together()] = append(late[p.together()], fmt.Errorf("%s - %w", p.at, err))
		} else if taken == nil {
			taken = serverblocks.ErrorAt(p.at, "%w", err)
		}
	}
	return late, taken
}

// optional tells whether DNS can be served without what a plugin listens on. Where health
// gets no answer, kubelet ends the process after a while.
func optional(plugin string) bool {
	_, listens := standardPorts[plugin]
	return listens && plugin != "health"
}
