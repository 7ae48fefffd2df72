package nodecachemode

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/coredns/caddy/caddyfile"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
)

// wildcards are the addresses that stand for all of the node's.
var wildcards = []string{"0.0.0.0", "::"}

// A duplicateError says that the ConfigMap asks for a zone that the template has.
type duplicateError struct{ domain string }

func (e duplicateError) Error() string {
	return fmt.Sprintf("stubDomains: %s has a server block in the template already", e.domain)
}

// adapt gives nodecache to the server blocks of a Corefile that bind an address of -localip. notes
// are what whoever wrote the template should know.
//
// A template whose blocks bind the wildcard, or nothing, listens on all addresses of the node,
// which nodecache can't: such a block gets addresses of its own instead (narrow). Where some
// blocks name those of -localip the others are meant for something else, and stay as they are.
func (f *Flags) adapt(text, path string, s Settings) (_ string, notes []string, err error) {
	left := maxImports
	if text, err = inline(text, path, &left); err != nil {
		return "", nil, err
	}
	text = rebind(text, []string{f.Interface}, f.locals())
	blocks, err := parse(text, path)
	if err != nil {
		return "", nil, err
	}
	for domain := range s.StubDomains {
		if n := len(slices.Collect(f.serving(blocks, domain))); n > 1 {
			return "", nil, duplicateError{domain}
		}
	}
	if !f.SetUpLink && !f.SetUpRules && !slices.ContainsFunc(blocks, f.names) {
		return text, nil, nil // nothing on the node is ours, as with a pod's own network
	}
	if !f.SetUpRules && !slices.ContainsFunc(blocks, f.names) && !mayNetAdmin() {
		// As with a chart that gives the capability for the rules alone. node-cache goes on without the interface.
		return text, []string{fmt.Sprintf("-setupinterface: the interface %s is not made, as the process lacks the capability NET_ADMIN; the server blocks listen on all addresses", f.Interface)}, nil
	}
	if !slices.ContainsFunc(blocks, f.names) {
		if text, notes, err = f.narrow(text, path, blocks); err != nil {
			return "", nil, err
		}
		if blocks, err = parse(text, path); err != nil {
			return "", nil, err
		}
	}
	if !slices.ContainsFunc(blocks, f.names) {
		return "", nil, fmt.Errorf("%s: no server block binds an address of -localip (%s); bind %s there", path, f.locals(), localDNS)
	}
	bound := map[string]bool{}
	text, err = insert(text, path, blocks, func(b caddyfile.ServerBlock) string {
		for _, a := range binds(b) {
			bound[a] = true
		}
		if !f.names(b) || b.Tokens["nodecache"] != nil {
			return ""
		}
		return f.directive(b)
	})
	if err != nil {
		return "", nil, err
	}
	for _, a := range f.LocalIPs {
		if !bound[a.String()] {
			notes = append(notes, fmt.Sprintf("no server block binds %s of -localip, so it is not put on the node", a))
		}
	}
	return text, notes, nil
}

func parse(text, path string) ([]caddyfile.ServerBlock, error) {
	blocks, err := caddyfile.Parse(path, strings.NewReader(text), nil)
	if err != nil {
		return nil, err
	}
	return blocks, nil
}

// binds are the arguments of a block's bind, addresses in their usual form.
func binds(b caddyfile.ServerBlock) (all []string) {
	d := caddyfile.NewDispenserTokens("", b.Tokens["bind"])
	for d.Next() {
		for _, arg := range d.RemainingArgs() {
			if a, err := netip.ParseAddr(arg); err == nil {
				arg = a.String()
			}
			all = append(all, arg)
		}
		for d.NextBlock() { // except
			d.RemainingArgs()
		}
	}
	return all
}

// names says whether a block binds an address of -localip.
func (f *Flags) names(b caddyfile.ServerBlock) bool {
	return slices.ContainsFunc(binds(b), func(arg string) bool {
		a, err := netip.ParseAddr(arg)
		return err == nil && slices.Contains(f.LocalIPs, a)
	})
}

// anywhere says whether a block listens on all addresses of the node.
func anywhere(b caddyfile.ServerBlock) bool {
	all := binds(b)
	return len(all) == 0 || slices.ContainsFunc(all, func(arg string) bool { return slices.Contains(wildcards, arg) })
}

// serving are the blocks that would serve a zone on the addresses of -localip.
func (f *Flags) serving(blocks []caddyfile.ServerBlock, zone string) func(yield func(caddyfile.ServerBlock) bool) {
	return func(yield func(caddyfile.ServerBlock) bool) {
		for _, b := range blocks {
			if !f.names(b) && !anywhere(b) {
				continue
			}
			for _, key := range b.Keys {
				name, port := f.split(key)
				if strings.EqualFold(strings.TrimSuffix(name, "."), zone) && port == f.Port && !yield(b) {
					return
				}
			}
		}
	}
}

// split is the zone and the port of a block's key.
func (f *Flags) split(key string) (zone, port string) {
	key = strings.TrimPrefix(key, "dns://")
	if i := strings.LastIndexByte(key, ':'); i >= 0 && strings.Trim(key[i+1:], "0123456789") == "" {
		return key[:i], key[i+1:]
	}
	return key, f.Port
}

// narrow has the blocks that listen on all addresses of the node bind those of -localip. Without
// firewall rules this may be a pod with a network of its own, whose clients are redirected to its
// address: there the links that are there are bound too.
func (f *Flags) narrow(text, path string, blocks []caddyfile.ServerBlock) (string, []string, error) {
	to, others := f.locals(), "no others"
	if !f.SetUpRules {
		names, err := links(f.Interface)
		if err != nil {
			return "", nil, err
		}
		to, others = strings.Join(append([]string{to}, names...), " "), "those of "+strings.Join(names, ", ")
	}
	var notes []string
	for _, b := range blocks {
		if anywhere(b) && f.onPort(b) {
			notes = append(notes, fmt.Sprintf("the server block %s listens on all addresses of the node in the template; here it serves those of -localip (%s) and %s", strings.Join(b.Keys, " "), f.locals(), others))
		}
	}
	text, err := insert(text, path, blocks, func(b caddyfile.ServerBlock) string {
		if len(binds(b)) == 0 && f.onPort(b) {
			return "    bind " + to + "\n"
		}
		return ""
	})
	return rebind(text, wildcards, to), notes, err
}

// mayNetAdmin says whether this process can make an interface, as far as it shows.
var mayNetAdmin = func() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	err := unix.Capget(&header, &data[0])
	return err != nil || data[0].Effective&(1<<unix.CAP_NET_ADMIN) != 0
}

// links are the names of the node's links with addresses for clients, less one and IPVS's.
var links = func(except string) (names []string, err error) {
	carriers, err := nodelinks.Carriers()
	for a, on := range carriers {
		if a.IsGlobalUnicast() || a.IsLoopback() {
			names = append(names, on...)
		}
	}
	slices.Sort(names)
	names = slices.DeleteFunc(slices.Compact(names), func(name string) bool { return name == except || name == nodelinks.IPVS })
	return names, err
}

// onPort says whether a block serves DNS on -dns.port.
func (f *Flags) onPort(b caddyfile.ServerBlock) bool {
	return slices.ContainsFunc(b.Keys, func(key string) bool {
		_, port := f.split(key)
		return port == f.Port && (!strings.Contains(key, "://") || strings.HasPrefix(key, "dns://"))
	})
}

// rebind puts other addresses in the place of these arguments of bind.
func rebind(text string, args []string, to string) string {
	var out strings.Builder
	done := 0
	for _, p := range parts(text) {
		depth, binding := 0, false
		for _, t := range p.body {
			switch {
			case t.text == "{":
				depth++
			case t.text == "}":
				depth--
			case t.first:
				binding = depth == 0 && t.text == "bind"
			case binding && depth == 0 && slices.Contains(args, t.text):
				out.WriteString(text[done:t.start] + to)
				done = t.end
			}
		}
	}
	out.WriteString(text[done:])
	return out.String()
}

var errApart = errors.New("its server blocks can't be told apart; write each of them as KEYS { … }, with the brace at the end of the line")

// insert adds lines at the head of server blocks.
func insert(text, path string, blocks []caddyfile.ServerBlock, lines func(caddyfile.ServerBlock) string) (string, error) {
	ps := slices.DeleteFunc(parts(text), part.unserved)
	if !slices.EqualFunc(ps, blocks, part.is) {
		return "", fmt.Errorf("%s: %w", path, errApart)
	}
	var out strings.Builder
	done := 0
	for i, p := range ps {
		if add := lines(blocks[i]); add != "" {
			out.WriteString(text[done:p.after] + "\n" + strings.TrimSuffix(add, "\n"))
			done = p.after
			if rest, _, _ := strings.Cut(text[done:], "\n"); strings.TrimSpace(rest) != "" {
				out.WriteString("\n   ")
			}
		}
	}
	out.WriteString(text[done:])
	// What is odd enough to be read otherwise now is no Corefile that CoreDNS would take.
	if after, err := parse(out.String(), path); err != nil || !slices.EqualFunc(blocks, after, sameBefore) {
		return "", fmt.Errorf("%s: %w", path, errApart)
	}
	return out.String(), nil
}

// sameBefore says whether a block has all that it had before lines were added to it.
func sameBefore(before, after caddyfile.ServerBlock) bool {
	for directive, tokens := range before.Tokens {
		if !slices.EqualFunc(tokens, after.Tokens[directive], func(a, b caddyfile.Token) bool { return a.Text == b.Text }) {
			return false
		}
	}
	return slices.Equal(before.Keys, after.Keys)
}

// directive is nodecache with what the flags ask for.
func (f *Flags) directive(b caddyfile.ServerBlock) string {
	var properties []string
	switch {
	case !f.SetUpLink:
		properties = append(properties, "interface none")
	case f.Interface != "nodelocaldns":
		properties = append(properties, "interface "+f.Interface)
	}
	if !f.SetUpRules {
		properties = append(properties, "firewall none")
	}
	if s := f.Sync.String(); f.Sync.Seconds() != 60 {
		properties = append(properties, "sync "+s)
	}
	if f.SetUpRules && f.probed(b) {
		properties = append(properties, "untracked "+f.HealthPort)
	}
	line := "    nodecache"
	if f.SkipTeardown {
		line += " skipteardown"
	}
	if len(properties) == 0 {
		return line + "\n"
	}
	return line + " {\n        " + strings.Join(properties, "\n        ") + "\n    }\n"
}

// probed says whether a block's health listens on -health-port of an address of -localip. Where
// nobody does there is nothing to keep out of connection tracking.
func (f *Flags) probed(b caddyfile.ServerBlock) bool {
	d := caddyfile.NewDispenserTokens("", b.Tokens["health"])
	if !d.Next() {
		return false
	}
	at := ":8080"
	if args := d.RemainingArgs(); len(args) > 0 {
		at = args[0]
	}
	host, port, err := net.SplitHostPort(at)
	if err != nil || port != f.HealthPort {
		return false
	}
	a, err := netip.ParseAddr(host)
	return host == "" || err == nil && (a.IsUnspecified() || slices.Contains(f.LocalIPs, a))
}
