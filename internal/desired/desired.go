// Package desired says what has to be on a node: which addresses and ports are served, and
// what stands there for them. It is the algebra of what one process wants and of what
// others do, and changes nothing.
package desired

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
)

// Endpoint is one thing that clients send to: an address, a transport protocol
// and a port.
type Endpoint struct {
	Addr  netip.Addr
	Proto string // "udp" or "tcp"
	Port  uint16
	// Extra is true for the ports of the property untracked. Somebody else
	// (health, prometheus) listens there, and maybe on the wildcard address.
	Extra bool
}

// String is such as "169.254.20.10:53/udp".
func (e Endpoint) String() string {
	return netip.AddrPortFrom(e.Addr, e.Port).String() + "/" + e.Proto
}

// Compare is an order of endpoints: by address, port and protocol. Extra makes no difference.
func Compare(a, b Endpoint) int {
	return cmp.Or(a.Addr.Compare(b.Addr), cmp.Compare(a.Port, b.Port), strings.Compare(b.Proto, a.Proto)) // udp first: it is most of the traffic
}

// State is what has to be on the node: per link its addresses, per firewall
// backend the endpoints it keeps out of connection tracking.
type State struct {
	Links map[string][]netip.Addr
	Rules map[string][]Endpoint
}

// Sorted returns s with its parts in order and each once, as the other methods need it.
func (s State) Sorted() State {
	for n, as := range s.Links {
		slices.SortFunc(as, netip.Addr.Compare)
		s.Links[n] = slices.Compact(as)
	}
	for b, es := range s.Rules {
		// Of an endpoint that is extra in one place only, the stricter one stays.
		slices.SortFunc(es, func(a, b Endpoint) int {
			if c := Compare(a, b); c != 0 || a.Extra == b.Extra {
				return c
			}
			if b.Extra {
				return -1
			}
			return 1
		})
		s.Rules[b] = slices.CompactFunc(es, func(a, b Endpoint) bool { return Compare(a, b) == 0 })
	}
	return s
}

// Union returns what s or t wants.
func (s State) Union(t State) State {
	u := State{Links: map[string][]netip.Addr{}, Rules: map[string][]Endpoint{}}
	for _, x := range []State{s, t} {
		for n, as := range x.Links {
			u.Links[n] = append(u.Links[n], as...)
		}
		for b, es := range x.Rules {
			u.Rules[b] = append(u.Rules[b], es...)
		}
	}
	return u.Sorted()
}

// Minus returns what s has and t does not.
func (s State) Minus(t State) State {
	m := State{Links: map[string][]netip.Addr{}, Rules: map[string][]Endpoint{}}
	for n, as := range s.Links {
		for _, a := range as {
			if !slices.Contains(t.Links[n], a) {
				m.Links[n] = append(m.Links[n], a)
			}
		}
	}
	for b, es := range s.Rules {
		for _, e := range es {
			if _, found := slices.BinarySearchFunc(t.Rules[b], e, Compare); !found {
				m.Rules[b] = append(m.Rules[b], e)
			}
		}
	}
	return m
}

// Only returns the rules of s that t has too.
func (s State) Only(t State) State {
	o := State{Rules: map[string][]Endpoint{}}
	for b, es := range s.Rules {
		for _, e := range es {
			if _, found := slices.BinarySearchFunc(t.Rules[b], e, Compare); found {
				o.Rules[b] = append(o.Rules[b], e)
			}
		}
	}
	return o
}

// Except returns s less the endpoints of es, and the addresses that they are on.
func (s State) Except(es map[Endpoint]string) State {
	on := map[netip.Addr]bool{}
	for e := range es {
		on[e.Addr] = true
	}
	x := State{Links: map[string][]netip.Addr{}, Rules: map[string][]Endpoint{}}
	for n, as := range s.Links {
		x.Links[n] = slices.DeleteFunc(slices.Clone(as), func(a netip.Addr) bool { return on[a] })
	}
	for b, rules := range s.Rules {
		x.Rules[b] = slices.DeleteFunc(slices.Clone(rules), func(e Endpoint) bool { _, is := es[e]; return is })
	}
	return x
}

// Empty tells whether nothing has to be there.
func (s State) Empty() bool { return len(s.Links) == 0 && len(s.Rules) == 0 }
