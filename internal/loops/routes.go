package loops

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/coredns/caddy"
	"github.com/coredns/caddy/caddyfile"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	pkgparse "github.com/coredns/coredns/plugin/pkg/parse"
	"github.com/coredns/coredns/plugin/pkg/transport"

	"github.com/contentful-labs/coredns-nodecache/internal/serverblocks"
)

// forwarders are the plugins that send a query on, as
//
//	NAME FROM TO... {
//	    except ZONE...
//	}
var forwarders = []string{"upstream", "forward", "grpc", "fanout"}

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
	next    plugin.Handler
}

// A stanza is one use of a forwarder.
type stanza struct {
	plugin, at string
	from       string
	except     []string
	texts      []string // of where it sends to, and what they come to
	to         []target
	more       bool // the next one may get the query too
	onlyTCP    bool
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
	path := serverblocks.Instance().Caddyfile().Path() // the file of what is not imported
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
			case "force_tcp":
				s.onlyTCP = true
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
		s.texts = args[1:]
		for _, to := range s.texts {
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
	if _, err := os.Stat(text); name == "upstream" && err == nil {
		return nil // it follows the file, and leaves out what leads back to this process
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
