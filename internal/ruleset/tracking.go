package ruleset

import (
	"encoding/binary"
	"slices"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
)

// priorityConntrack is where connection tracking takes up a packet.
const priorityConntrack = -200

// maxCourses bounds the courses of one packet. Where there are more, nothing is known.
const maxCourses = 64

// Tracking is how a packet may come to connection tracking, where it comes there at all.
type Tracking struct {
	Untracked, Tracked bool
	// By are rules by which it is tracked: that end its way through a chain, or say that
	// it is. There are none where no rule says anything.
	By []Place
}

// Tracking returns how a packet may come to connection tracking. What stands in chains of
// which own is true is taken to match wherever it may: it does while somebody listens. The
// packet has no mark when it comes.
//
// In the kernel the first to decide has its way, but for nft's "ct zone set", which has a
// packet tracked even after notrack (nft_ct_set_zone_eval in net/netfilter/nft_ct.c, seen
// on 6.18).
func (r *Ruleset) Tracking(p Packet, hook uint32, own func(Chain) bool) (t Tracking) {
	bases := r.bases(p, hook, "filter")
	bases = slices.DeleteFunc(bases, func(c Chain) bool { return c.Priority >= priorityConntrack })
	// Which of two chains with one priority comes first the kernel does not tell.
	reversed := slices.Clone(bases)
	slices.Reverse(reversed)
	slices.SortStableFunc(reversed, byPriority)
	orders := [][]Chain{bases}
	if !slices.Equal(bases, reversed) {
		orders = append(orders, reversed)
	}
	for _, order := range orders {
		w := walk{ruleset: r, packet: p, own: own, known: map[visit]passage{}}
		courses := []course{{known: ^uint32(0)}}
		for _, c := range order {
			courses = w.base(c, courses)
		}
		if w.lost {
			return Tracking{Untracked: true}
		}
		for _, c := range courses {
			if c.decided == untracked {
				t.Untracked = true
				continue
			}
			t.Tracked = true
			if c.by != (Place{}) && !slices.Contains(t.By, c.by) {
				t.By = append(t.By, c.by)
			}
		}
	}
	return t
}

// A course is one way that a packet may take, as far as it has come.
type course struct {
	decided     decision
	mark, known uint32 // the mark, and which bits of it are known
	by          Place  // what has ended a chain for it while nothing was decided, or has decided otherwise
}

// decision is whether a packet is to be tracked.
type decision int

const (
	undecided decision = iota
	untracked
	tracked // as a template says, which has a zone or a helper
)

// walk takes the courses of a packet through chains. Unlike an evaluation, which says what
// each chain may do, it tells courses apart, so that what one rule does under a condition
// another one's same condition knows.
type walk struct {
	ruleset *Ruleset
	packet  Packet
	own     func(Chain) bool
	ended   []course // by a verdict, in this base chain
	known   map[visit]passage
	lost    bool // there is too much
}

// visit is a jump to a chain, and passage what comes of it.
type visit struct {
	chain tableKey
	depth int
	from  course
}

type passage struct{ out, ended []course }

// jump returns the courses that return from a chain. Many rules may jump to it.
func (w *walk) jump(c Chain, from course, depth int) []course {
	v := visit{c.key(c.Name), depth, from}
	p, ok := w.known[v]
	if !ok {
		before := w.ended
		w.ended = nil
		p.out = w.chain(c, []course{from}, depth)
		p.ended = w.gather(w.ended)
		w.ended = before
		w.known[v] = p
	}
	w.ended = append(w.ended, p.ended...)
	return p.out
}

// base returns the courses that come through a base chain.
func (w *walk) base(c Chain, in []course) []course {
	w.ended = nil
	out := w.chain(c, in, 0)
	if c.Drops {
		out = nil
	}
	return w.gather(append(w.ended, out...))
}

// gather leaves one of courses between which no rule could tell.
func (w *walk) gather(cs []course) (out []course) {
	seen := map[course]bool{}
	for _, c := range cs {
		k := c
		k.by = Place{}
		if !seen[k] {
			seen[k] = true
			out = append(out, c)
		}
	}
	if len(out) > maxCourses {
		w.lost = true
		return nil
	}
	return out
}

// chain returns the courses that come to a chain's end, or return from it.
func (w *walk) chain(c Chain, in []course, depth int) (out []course) {
	rules, ok := w.ruleset.Rules(c)
	if !ok || depth > maxDepth {
		w.lost = true
	}
	for i, rule := range rules {
		var next []course
		for _, from := range in {
			if w.ruleset.work++; w.ruleset.work > maxWork {
				w.lost = true
			}
			if w.lost {
				return nil
			}
			on, back := w.rule(c, Place{c, i + 1, rule.Handle}, rule, from, depth)
			next, out = append(next, on...), append(out, back...)
		}
		in = w.gather(next)
	}
	return w.gather(append(out, in...))
}

// rule returns the courses that go on to the next rule, and those that leave the chain.
func (w *walk) rule(c Chain, at Place, r Rule, from course, depth int) (on, back []course) {
	e := &evaluation{ruleset: w.ruleset, packet: w.packet, known: map[tableKey]Outcome{}}
	e.packet.State = 0
	if from.decided == untracked {
		e.packet.State = StateUntracked
	}
	own := w.own(c)
	x := run{evaluation: e, chain: c, place: at, depth: depth, match: yes, way: &way{walk: w, course: from}}
	for _, e := range r.Exprs {
		goesOn := x.expr(e)
		if own && x.match == perhaps {
			x.match = yes
		}
		if x.match == no {
			return []course{from}, nil
		}
		if !goesOn {
			on, back = x.way.on, x.way.back
			if x.match == perhaps {
				on = append(on, from)
			}
			return on, back
		}
	}
	if x.match == perhaps {
		on = append(on, from)
	}
	return append(on, x.way.course), nil
}

// way is a rule's part of a walk.
type way struct {
	walk     *walk
	course   course
	on, back []course
}

// ends notes a verdict that ends the packet's way through the base chain.
func (y *way) ends(at Place) {
	if y.course.by == (Place{}) && y.course.decided == undecided {
		y.course.by = at
	}
	y.walk.ended = append(y.walk.ended, y.course)
}

// verdict carries out a verdict. Nothing of the rule follows.
func (y *way) verdict(x *run, v Verdict) {
	switch kind := expr.VerdictKind(v.Kind); kind {
	case expr.VerdictAccept, expr.VerdictStop:
		y.ends(x.place)
	case expr.VerdictDrop:
	case expr.VerdictContinue, expr.VerdictBreak:
		y.on = append(y.on, y.course)
	case expr.VerdictReturn:
		if x.depth == 0 {
			y.ends(x.place)
			return
		}
		y.back = append(y.back, y.course)
	case expr.VerdictJump, expr.VerdictGoto:
		c, ok := x.ruleset.chain(x.chain, v.Chain)
		if !ok {
			y.walk.lost = true
			return
		}
		out := y.walk.jump(c, y.course, x.depth+1)
		if kind == expr.VerdictJump {
			y.on = append(y.on, out...)
			return
		}
		was := y.course
		for _, y.course = range out {
			y.verdict(x, Verdict{Kind: int32(expr.VerdictReturn)})
		}
		y.course = was
	default: // what a program says
		y.on = append(y.on, y.course)
		y.ends(x.place)
	}
}

// decide notes what a rule says of tracking; always says that it does even where another
// one has said that there is none.
func (y *way) decide(d decision, at Place, always bool) {
	c := &y.course
	if c.decided != undecided && !(always && c.decided == untracked) {
		return
	}
	c.decided, c.by = d, Place{}
	if d == tracked {
		c.by = at
	}
}

// ctNotrack is a flag of the target CT (XT_CT_NOTRACK).
const ctNotrack = 1

// target carries out a target that decides on tracking, or that changes the mark, and
// tells whether it is one of these.
func (y *way) target(x *run, t *expr.Target) bool {
	info := bytesOf(t.Info)
	word := func(i int) uint32 { return binary.NativeEndian.Uint32(info[4*i:]) }
	switch t.Name {
	case "NOTRACK":
		y.decide(untracked, x.place, false)
	case "CT":
		if len(info) >= 2 && binary.NativeEndian.Uint16(info)&ctNotrack != 0 {
			y.decide(untracked, x.place, false)
		} else {
			y.decide(tracked, x.place, false)
		}
	case "MARK":
		if len(info) < 8 { // struct xt_mark_tginfo2: mark, mask
			y.course.known = 0
			break
		}
		y.course.mark, y.course.known = y.course.mark&^word(1)^word(0), y.course.known|word(1)
	case "CONNMARK", "HMARK", "SET", "TPROXY":
		y.course.known = 0
		return false
	default:
		return false
	}
	return true
}

// marked tells whether the mark is that of a match (struct xt_mark_mtinfo1: mark, mask,
// invert).
func (c course) marked(info []byte) maybe {
	if len(info) < 9 {
		return perhaps
	}
	mark, mask := binary.NativeEndian.Uint32(info), binary.NativeEndian.Uint32(info[4:])
	m := perhaps
	switch {
	case (c.mark&mask^mark)&(c.known|^mask) != 0:
		m = no
	case c.known&mask == mask:
		m = yes
	}
	return m.invert(info[8] != 0)
}

func bytesOf(info any) []byte {
	if u, ok := info.(*xt.Unknown); ok {
		return *u
	}
	return nil
}

// value is the mark as a rule loads it.
func (c course) value() value {
	return value{data: binary.NativeEndian.AppendUint32(nil, c.mark), known: binary.NativeEndian.AppendUint32(nil, c.known)}
}

// setMark is what "meta mark set" does.
func (y *way) setMark(v value) {
	y.course.mark, y.course.known = binary.NativeEndian.Uint32(v.data), binary.NativeEndian.Uint32(v.known)
}

// Of returns what a table holds that iptables-save has printed. family is NFPROTO_IPV4 or
// NFPROTO_IPV6.
func Of(family byte, text string) *Ruleset {
	r := newRuleset()
	r.addText(family, text)
	return r
}
