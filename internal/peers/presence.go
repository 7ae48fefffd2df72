package peers

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

// presence is what one process shows the others, as JSON. A version only ever adds
// fields, and what a release does not know it passes over, so that any two releases
// understand of each other what the older one of them says:
//
//	version      release   adds
//	0 (no such   0.1.0     links, rules, serves, leaving_links, leaving_rules
//	   field)
//	1                      version, variant
type presence struct {
	Version int                     `json:"version,omitempty"`
	Links   map[string][]netip.Addr `json:"links"`
	// Rules are those of the backend iptables, whose chains all processes share.
	Rules []shownEndpoint `json:"rules"`
	// Variant is the variant of iptables in which Rules stand: "legacy", "nf_tables", or
	// "" where that is not known. Each has chains of its own.
	Variant string `json:"variant,omitempty"`
	// Serves is what it listens on, and goes on to.
	Serves []shownEndpoint `json:"serves"`
	// LeavingLinks and LeavingRules are what of Links and Rules it is about to give
	// up: still needed, but not by anything new.
	LeavingLinks map[string][]netip.Addr `json:"leaving_links,omitempty"`
	LeavingRules []shownEndpoint         `json:"leaving_rules,omitempty"`
}

const (
	presenceVersion = 1
	// answerLimit is how many bytes a process may answer with, addressLimit how many
	// addresses of links and endpointLimit how many endpoints: enough for 2,000 addresses
	// with four ports each, and little enough for the memory of who asks.
	answerLimit   = 2 << 20
	linkLimit     = 64
	addressLimit  = 4096
	endpointLimit = 8192
)

// readPresence reads what a process answers, to the end.
func readPresence(r io.Reader, badLink func(string) string) (p presence, err error) {
	b, err := io.ReadAll(io.LimitReader(r, answerLimit+1))
	if err != nil {
		return p, err
	}
	if len(b) == 0 {
		return p, io.ErrUnexpectedEOF // it ends just now
	}
	p, err = parsePresence(b, badLink)
	if err != nil {
		// The reason has words of the answer in it.
		return p, garbledError(fmt.Sprintf("what it answers can't be understood: %.200q", err.Error()))
	}
	return p, nil
}

// garbledError is that a process answers what no release of this program does.
type garbledError string

func (e garbledError) Error() string { return string(e) }

// parsePresence takes nothing but what a process of this program can want.
func parsePresence(b []byte, badLink func(string) string) (p presence, err error) {
	if len(b) > answerLimit {
		return p, fmt.Errorf("more than %d bytes", answerLimit)
	}
	if err := json.Unmarshal(b, &p); err != nil {
		return presence{}, err
	}
	if err := p.check(badLink); err != nil {
		return presence{}, err
	}
	if p.Variant != "legacy" && p.Variant != "nf_tables" {
		p.Variant = "" // a release to come may know of more
	}
	return p, nil
}

// check says what of p is out of bounds.
func (p presence) check(badLink func(string) string) error {
	if p.Version < 0 {
		return fmt.Errorf("version %d", p.Version)
	}
	for _, links := range []map[string][]netip.Addr{p.Links, p.LeavingLinks} {
		n := 0
		for name, addrs := range links {
			if why := badLink(name); why != "" {
				return fmt.Errorf("the interface %q: %s", name, why)
			}
			for _, a := range addrs {
				if err := checkShown(a); err != nil {
					return err
				}
			}
			n += len(addrs)
		}
		if len(links) > linkLimit || n > addressLimit {
			return fmt.Errorf("%d addresses on %d interfaces; at most %d and %d can be shared with other processes", n, len(links), addressLimit, linkLimit)
		}
	}
	for _, es := range [][]shownEndpoint{p.Rules, p.Serves, p.LeavingRules} {
		if len(es) > endpointLimit {
			return fmt.Errorf("%d addresses and ports; at most %d can be shared with other processes", len(es), endpointLimit)
		}
		for _, e := range es {
			if e.Proto != "udp" && e.Proto != "tcp" || e.Port == 0 {
				return fmt.Errorf("the port %d of the protocol %q", e.Port, e.Proto)
			}
			if err := checkShown(e.Addr); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkShown refuses what parseAddr does not let into a Corefile.
func checkShown(a netip.Addr) error {
	if !a.IsValid() || a.Zone() != "" || a.Is4In6() || a.IsUnspecified() || a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		return fmt.Errorf("the address %q", a)
	}
	return nil
}

// state returns links and rules as a state.
func (m *Member) state(links map[string][]netip.Addr, rules []shownEndpoint) desired.State {
	s := desired.State{Links: links, Rules: map[string][]desired.Endpoint{}}
	if len(rules) > 0 {
		s.Rules[m.shared] = shown(rules)
	}
	return desired.State{}.Union(s) // a copy, which can be sorted
}

type shownEndpoint struct {
	Addr  netip.Addr `json:"addr"`
	Proto string     `json:"proto"`
	Port  uint16     `json:"port"`
	Extra bool       `json:"extra,omitempty"`
}

func toShow(es []desired.Endpoint) (ss []shownEndpoint) {
	for _, e := range es {
		ss = append(ss, shownEndpoint{e.Addr, e.Proto, e.Port, e.Extra})
	}
	return ss
}

func shown(ss []shownEndpoint) (es []desired.Endpoint) {
	for _, s := range ss {
		es = append(es, desired.Endpoint{Addr: s.Addr, Proto: s.Proto, Port: s.Port, Extra: s.Extra})
	}
	return es
}
