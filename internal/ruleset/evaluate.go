package ruleset

import (
	"bytes"
	"encoding/binary"
	"net/netip"

	"github.com/google/nftables/expr"
)

// maybe is what a match says: no, perhaps or yes.
type maybe int

const (
	no maybe = iota
	perhaps
	yes
)

func sure(b bool) maybe {
	if b {
		return yes
	}
	return no
}

func (m maybe) invert(not bool) maybe {
	if not {
		return yes - m
	}
	return m
}

const (
	// maxDepth is that of jumps; the kernel has 16.
	maxDepth = 32
	// maxWork bounds the rules and elements that are looked at in one ruleset, which takes
	// about a second.
	maxWork = 1_000_000
)

// evaluation is that of one packet in one base chain.
type evaluation struct {
	ruleset *Ruleset
	packet  Packet
	known   map[tableKey]Outcome // of the chains that have been gone through
}

func (e *evaluation) chain(c Chain, depth int) Outcome {
	k := c.key(c.Name)
	if o, ok := e.known[k]; ok {
		return o
	}
	rules, ok := e.ruleset.Rules(c)
	if !ok || depth > maxDepth {
		return anything
	}
	e.known[k] = anything // until it is known, for a chain that leads to itself
	var out Outcome
	open := true // the packet may come to the next rule
	for i, rule := range rules {
		e.ruleset.work++
		if e.ruleset.work > maxWork {
			return anything
		}
		x := run{evaluation: e, chain: c, place: Place{c, i + 1, rule.Handle}, depth: depth, match: yes}
		next := x.rule(rule)
		out.may(x.out)
		if !next {
			open = false
			break
		}
	}
	out.end = out.end || open
	e.known[k] = out
	return out
}

// run is one rule on its way.
type run struct {
	*evaluation
	registers
	chain Chain
	place Place
	depth int
	match maybe
	out   Outcome // so far
	way   *way    // of a walk; else nil
}

// rule goes through a rule. next tells whether the packet may come to the one after it.
func (x *run) rule(r Rule) (next bool) {
	for _, e := range r.Exprs {
		goesOn := x.expr(e)
		if x.match == no {
			return true
		}
		if !goesOn {
			return x.match == perhaps
		}
	}
	return true
}

// drops and accepts end the rule with a verdict.
func (x *run) drops() bool {
	if x.way != nil {
		return false
	}
	x.out.may(Outcome{Drop: true, Places: []Place{x.place}})
	return false
}

func (x *run) accepts() bool {
	if x.way != nil {
		x.way.ends(x.place)
		return false
	}
	x.out.Accept = true
	return false
}

// translates ends the rule with another destination.
func (x *run) translates(to ...netip.Addr) bool {
	if x.way != nil {
		return x.accepts()
	}
	x.out.may(Outcome{Translated: true, Targets: to})
	return false
}

// expr goes through an expression. It returns false where the rule ends with a verdict.
func (x *run) expr(e any) (goesOn bool) {
	and := func(m maybe) { x.match = min(x.match, m) }
	switch e := e.(type) {
	case *expr.Counter, *expr.Log, *expr.FlowOffload:
	case *expr.Notrack:
		if x.way != nil {
			x.way.decide(untracked, x.place, false)
		}
	case *expr.Meta:
		x.meta(e)
	case *expr.Ct:
		switch {
		case e.SourceRegister && e.Key == expr.CtKeyZONE && x.way != nil:
			x.way.decide(tracked, x.place, true)
		case e.SourceRegister:
		case e.Key == expr.CtKeySTATE && x.packet.State != 0:
			x.load(e.Register, value{data: binary.NativeEndian.AppendUint32(nil, x.packet.State), known: all(4)})
		case x.packet.State == StateUntracked:
			and(no) // of a packet that is not tracked, nothing else is there to compare
		default:
			x.load(e.Register, value{data: make([]byte, 16), known: make([]byte, 16)})
			and(perhaps)
		}
	case *expr.Payload:
		if e.OperationType == expr.PayloadLoad {
			x.load(e.DestRegister, x.packet.payload(e.Base, int(e.Offset), int(e.Len)))
		}
	case *expr.Fib:
		x.load(e.Register, x.packet.fib(e))
	case *expr.Numgen:
		x.load(e.Register, numbers(e.Offset, e.Modulus))
	case *expr.Immediate:
		x.load(e.Register, value{data: e.Data, known: all(len(e.Data))})
	case *expr.Bitwise:
		x.bitwise(e)
	case *expr.Cmp:
		and(x.cmp(e))
	case *expr.Range:
		v := x.value(e.Register, len(e.FromData))
		and(v.within(e.FromData, e.ToData).invert(e.Op == expr.CmpOpNeq))
	case *expr.Lookup:
		return x.lookup(e)
	case *expr.Verdict:
		return x.verdict(Verdict{int32(e.Kind), e.Chain})
	case *expr.Reject:
		return x.drops()
	case *expr.NAT:
		if e.Type == expr.NATTypeDestNAT {
			return x.translates(x.addrs(e.RegAddrMin)...)
		}
		return x.accepts()
	case *expr.Redir:
		return x.translates()
	case *expr.Masq:
		return x.accepts()
	case *expr.Match:
		and(x.xtMatch(e.Name, e.Info))
	case *expr.Target:
		if _, ok := x.ruleset.chain(x.chain, e.Name); ok && x.chain.Legacy {
			return x.verdict(Verdict{int32(expr.VerdictJump), e.Name})
		}
		if x.way != nil && x.way.target(x, e) {
			return true
		}
		return x.xtTarget(e.Name, e.Info)
	case *expr.Limit, *expr.Quota, *expr.Connlimit, *expr.Dynset:
		and(perhaps)
	case *expr.Objref:
		const counter, helper = 1, 3 // NFT_OBJECT_COUNTER, NFT_OBJECT_CT_HELPER
		if e.Type != counter && e.Type != helper {
			and(perhaps)
		}
	case Opaque:
		switch e {
		case "byteorder", "exthdr", "hash", "inner", "osf", "rt", "socket", "tunnel", "xfrm":
			x.registers = registers{} // one of them
		case "last":
			return true
		default:
			x.unknown()
		}
		and(perhaps)
	default:
		x.registers = registers{}
		x.unknown()
		and(perhaps)
	}
	return true
}

// unknown is what nobody can tell the outcome of: the packet may end there, or go on.
func (x *run) unknown() {
	if x.way != nil {
		x.way.ends(x.place)
		return
	}
	x.out.may(anything)
}

// meta loads a register, or stores one.
func (x *run) meta(e *expr.Meta) {
	mark := e.Key == expr.MetaKeyMARK && x.way != nil
	switch {
	case e.SourceRegister && mark:
		x.way.setMark(x.value(e.Register, 4))
	case e.SourceRegister:
	case mark:
		x.load(e.Register, x.way.course.value())
	default:
		x.load(e.Register, x.packet.meta(e.Key))
	}
}

func (x *run) verdict(v Verdict) (goesOn bool) {
	if x.way != nil {
		x.way.verdict(x, v)
		return false
	}
	switch expr.VerdictKind(v.Kind) {
	case expr.VerdictAccept, expr.VerdictStop:
		return x.accepts()
	case expr.VerdictDrop:
		return x.drops()
	case expr.VerdictContinue, expr.VerdictBreak:
		return true
	case expr.VerdictReturn:
		x.out.end = true
		return false
	case expr.VerdictJump, expr.VerdictGoto:
		o := anything
		if c, ok := x.ruleset.chain(x.chain, v.Chain); ok {
			o = x.evaluation.chain(c, x.depth+1)
		}
		returns := o.end
		// What returns from a goto does so from this chain too.
		o.end = returns && expr.VerdictKind(v.Kind) == expr.VerdictGoto
		x.out.may(o)
		return returns && expr.VerdictKind(v.Kind) == expr.VerdictJump
	}
	x.out.may(anything) // VerdictQueue: what a program says
	return true
}

func (x *run) cmp(e *expr.Cmp) maybe {
	v := x.value(e.Register, len(e.Data))
	switch e.Op {
	case expr.CmpOpEq, expr.CmpOpNeq:
		return v.within(e.Data, e.Data).invert(e.Op == expr.CmpOpNeq)
	}
	low, high := v.bounds()
	switch e.Op {
	case expr.CmpOpLt:
		return between(bytes.Compare(high, e.Data) < 0, bytes.Compare(low, e.Data) < 0)
	case expr.CmpOpLte:
		return between(bytes.Compare(high, e.Data) <= 0, bytes.Compare(low, e.Data) <= 0)
	case expr.CmpOpGt:
		return between(bytes.Compare(low, e.Data) > 0, bytes.Compare(high, e.Data) > 0)
	case expr.CmpOpGte:
		return between(bytes.Compare(low, e.Data) >= 0, bytes.Compare(high, e.Data) >= 0)
	}
	return perhaps
}

func between(always, ever bool) maybe {
	switch {
	case always:
		return yes
	case ever:
		return perhaps
	}
	return no
}

// lookup goes through a set or a map.
func (x *run) lookup(e *expr.Lookup) (goesOn bool) {
	set, ok := x.ruleset.set(x.chain, e.SetName)
	if !ok {
		x.registers = registers{}
		x.unknown()
		x.match = min(x.match, perhaps)
		return true
	}
	found, in := set.find(x.registers, e.SourceRegister)
	x.ruleset.work += len(set.Elements)/8 + 1
	if !e.IsDestRegSet {
		x.match = min(x.match, in.invert(e.Invert))
		return true
	}
	x.match = min(x.match, in)
	if e.DestRegister == 0 { // a map of verdicts
		var open bool
		for _, el := range found {
			if el.Verdict == nil {
				x.unknown()
				open = true
			} else if x.verdict(*el.Verdict) {
				open = true
			}
		}
		return open
	}
	v := value{data: make([]byte, 16), known: make([]byte, 16)}
	if len(found) == 1 && in == yes {
		v = value{data: found[0].Data, known: all(len(found[0].Data))}
	}
	for _, el := range found {
		if len(v.oneOf) < maxTargets {
			v.oneOf = append(v.oneOf, el.Data)
		}
	}
	x.load(e.DestRegister, v)
	return true
}

// find returns the elements of which one may match what stands in registers from r on, and
// whether one does.
func (s Set) find(regs registers, r uint32) (found []Element, in maybe) {
	if one := regs.value(r, 4).oneOf; len(one) > 0 && len(one) <= maxNumbers {
		in = yes
		some := false
		for _, b := range one {
			regs.load(r, value{data: b, known: all(len(b))})
			els, m := s.find(regs, r)
			found, in, some = append(found, els...), min(in, m), some || m != no
		}
		if some {
			in = max(in, perhaps)
		}
		return found, in
	}
	for _, el := range s.Elements {
		m := yes
		at := 0
		fields := el.Fields
		if fields == nil {
			fields = []int{len(el.From)}
		}
		for _, n := range fields {
			if at+n > len(el.From) || at+n > len(el.To) {
				m = min(m, perhaps)
				break
			}
			v := regs.valueAt(r, at, n)
			m = min(m, v.within(el.From[at:at+n], el.To[at:at+n]))
			at += (n + 3) / 4 * 4
		}
		if el.Unsure {
			m = min(m, perhaps)
		}
		switch m {
		case yes:
			return []Element{el}, yes
		case perhaps:
			found, in = append(found, el), perhaps
		}
	}
	if s.CatchAll != nil {
		found, in = append(found, *s.CatchAll), yes
		if s.CatchAll.Unsure {
			in = perhaps
		}
	}
	return found, in
}
