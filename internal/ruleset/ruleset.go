// Package ruleset tells what the packet filters of this network namespace would do with a
// packet, without sending one. Where that can't be known (the address of a pod, the link
// that it comes in by, a match that is not understood) both ways count as possible, so that
// what is said to be certain is certain.
package ruleset

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Chain is a chain of nf_tables, or of the legacy iptables.
type Chain struct {
	Family byte // NFPROTO_IPV4, NFPROTO_IPV6 or NFPROTO_INET
	Table  string
	Name   string
	Legacy bool

	// What only base chains have.
	Base     bool
	Type     string
	Hook     uint32
	Priority int32
	Drops    bool // the policy
}

func (c Chain) String() string {
	if c.Legacy {
		return fmt.Sprintf("chain %s of the table %s of %s-legacy", c.Name, c.Table, map[byte]string{unix.NFPROTO_IPV4: "iptables", unix.NFPROTO_IPV6: "ip6tables"}[c.Family])
	}
	return fmt.Sprintf("chain %s of the nftables table %s %s", c.Name, map[byte]string{unix.NFPROTO_IPV4: "ip", unix.NFPROTO_IPV6: "ip6", unix.NFPROTO_INET: "inet"}[c.Family], c.Table)
}

// Rule is one rule. Its expressions are those of the package expr, or Opaque.
type Rule struct {
	Handle  uint64
	Exprs   []any
	Comment string
}

// Names tells whether a rule compares something with an address.
func (r Rule) Names(a netip.Addr) bool {
	return slices.ContainsFunc(r.Exprs, func(e any) bool {
		c, ok := e.(*expr.Cmp)
		return ok && c.Op == expr.CmpOpEq && slices.Equal(c.Data, a.AsSlice())
	})
}

// Opaque is an expression that is not understood, by its name.
type Opaque string

// Set is a set or a map.
type Set struct {
	Elements []Element
	CatchAll *Element // what matches where nothing else does
}

// Element matches keys from From to To, both included. Of a concatenation each of the
// Fields is compared on its own; they are byte lengths, and nil stands for one field.
type Element struct {
	From, To []byte
	Fields   []int
	Data     []byte // a map's value
	Verdict  *Verdict
	Unsure   bool // has conditions of its own
}

// Verdict is a verdict map's value.
type Verdict struct {
	Kind  int32
	Chain string
}

// tableKey and others name things as the kernel does.
type tableKey struct {
	family byte
	legacy bool
	table  string
	name   string
}

func (c Chain) key(name string) tableKey { return tableKey{c.Family, c.Legacy, c.Table, name} }

// Ruleset is what the filters have. Rules and sets are read when they are needed, and
// kept.
type Ruleset struct {
	Chains []Chain
	rules  map[tableKey][]Rule
	sets   map[tableKey]Set
	// read fills rules, readSet sets; both are nil for a ruleset that is whole.
	read    func(Chain) ([]Rule, error)
	readSet func(c Chain, name string) (Set, error)
	index   map[tableKey]int // of Chains
	work    int
}

func newRuleset() *Ruleset {
	return &Ruleset{rules: map[tableKey][]Rule{}, sets: map[tableKey]Set{}}
}

// Rules returns a chain's rules. ok is false where they can't be read.
func (r *Ruleset) Rules(c Chain) (rules []Rule, ok bool) {
	k := c.key(c.Name)
	rules, ok = r.rules[k]
	if !ok && r.read != nil && !c.Legacy {
		var err error
		if rules, err = r.read(c); err == nil {
			r.rules[k], ok = rules, true
		}
	}
	return rules, ok
}

func (r *Ruleset) set(c Chain, name string) (s Set, ok bool) {
	k := c.key(name)
	s, ok = r.sets[k]
	if !ok && r.readSet != nil && !c.Legacy {
		var err error
		if s, err = r.readSet(c, name); err == nil {
			r.sets[k], ok = s, true
		}
	}
	return s, ok
}

// Packet is a DNS query or answer. An address that is not valid can be any of another host's.
// A port that is 0 is a client's, any from clientPorts on.
type Packet struct {
	Proto            byte // IPPROTO_UDP or IPPROTO_TCP
	Src, Dst         netip.Addr
	SrcPort, DstPort uint16
	State            uint32 // StateUntracked, StateNew or 0, which can be any
	Loopback         bool   // it leaves by lo; else by another link
	Link             Link   // by which a query comes in, or an answer leaves; "" is any but lo
}

// Link is one by which others ask.
type Link struct {
	Name  string
	Index int
	Peers netip.Prefix // which addresses those others have; if it is not valid, any
}

// clientPorts is the first of the ports that Linux gives sockets by itself. So a rule for a
// single lower one, such as those of Calico's failsafes, says nothing of clients.
const clientPorts = 1 << 15

// The states of connection tracking, as a rule sees them.
const (
	StateNew       = 1 << 3
	StateUntracked = 1 << 6
)

// priorityRaw is that of the rules that keep packets out of connection tracking.
const priorityRaw = -300

// own is the packet's address that is known, which is this node's.
func (p Packet) own() netip.Addr {
	if p.Src.IsValid() {
		return p.Src
	}
	return p.Dst
}

func (p Packet) family() byte {
	if p.own().Is4() {
		return unix.NFPROTO_IPV4
	}
	return unix.NFPROTO_IPV6
}

// Outcome is what may become of a packet in a chain.
type Outcome struct {
	Accept, Drop bool
	Translated   bool // it may be accepted with another destination
	end          bool // it may come to the chain's end, or return

	Places  []Place      // where it is dropped; no more than two
	Targets []netip.Addr // what its destination becomes, as far as that is known
}

// Place is where a packet is dropped. A Rule of 0 is the chain's policy.
type Place struct {
	Chain  Chain
	Rule   int // from 1 on
	Handle uint64
}

func (p Place) String() string {
	switch {
	case p.Rule == 0:
		return "the policy of the " + p.Chain.String()
	case p.Chain.Legacy:
		return fmt.Sprintf("rule %d of the %s", p.Rule, p.Chain)
	}
	return fmt.Sprintf("rule %d (handle %d) of the %s", p.Rule, p.Handle, p.Chain)
}

// maxTargets bounds Targets.
const maxTargets = 1000

// may adds what o says to be possible.
func (o *Outcome) may(p Outcome) {
	o.Accept = o.Accept || p.Accept
	o.Drop = o.Drop || p.Drop
	o.Translated = o.Translated || p.Translated
	o.end = o.end || p.end
	for _, at := range p.Places {
		if len(o.Places) < 2 && !slices.Contains(o.Places, at) {
			o.Places = append(o.Places, at)
		}
	}
	for _, a := range p.Targets {
		if len(o.Targets) < maxTargets && !slices.Contains(o.Targets, a) {
			o.Targets = append(o.Targets, a)
		}
	}
}

// anything is what becomes of a packet where nobody knows.
var anything = Outcome{Accept: true, Drop: true, end: true}

// Result is what becomes of a packet in a base chain.
type Result struct {
	Chain Chain
	Outcome
}

// Through returns what becomes of a packet in each base chain of a hook that has one of the
// types, in their order.
func (r *Ruleset) Through(p Packet, hook uint32, types ...string) (results []Result) {
	for _, c := range r.bases(p, hook, types...) {
		e := evaluation{ruleset: r, packet: p, known: map[tableKey]Outcome{}}
		if c.Hook == unix.NF_INET_PRE_ROUTING && c.Priority <= priorityRaw {
			e.packet.State = 0 // nobody has decided yet
		}
		o := e.chain(c, 0)
		if o.end && c.Drops {
			o.may(Outcome{Drop: true, Places: []Place{{Chain: c}}})
		} else if o.end {
			o.Accept = true
		}
		o.end = false
		results = append(results, Result{c, o})
	}
	return results
}

// bases returns the base chains that Through goes through.
func (r *Ruleset) bases(p Packet, hook uint32, types ...string) (bases []Chain) {
	for _, c := range r.Chains {
		if c.Base && c.Hook == hook && slices.Contains(types, c.Type) && (c.Family == unix.NFPROTO_INET || c.Family == p.family()) {
			bases = append(bases, c)
		}
	}
	slices.SortStableFunc(bases, byPriority)
	return bases
}

func byPriority(a, b Chain) int { return cmp.Compare(a.Priority, b.Priority) }

// chain returns the chain of that name in c's table.
func (r *Ruleset) chain(c Chain, name string) (Chain, bool) {
	if r.index == nil {
		r.index = map[tableKey]int{}
		for i, d := range r.Chains {
			r.index[d.key(d.Name)] = i
		}
	}
	i, ok := r.index[c.key(name)]
	if !ok {
		return Chain{}, false
	}
	return r.Chains[i], true
}
