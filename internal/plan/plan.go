// Package plan says by which steps a process leads its node from what it has there to what it
// wants, beside other processes that want things of their own. It is one pure function: it
// looks at nothing and changes nothing.
package plan

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

// A Stage is what a process has on the node at some time.
type Stage struct {
	desired.State
	// Leaving is of it what the process is about to give up: it needs it still for what is
	// under way, but nothing new is to come by it.
	Leaving desired.State
}

// Have is where a plan begins. The zero Have is of one that takes nothing for granted.
type Have struct {
	Stage
	// Doubtful are the backends whose rules may be others than Rules has.
	Doubtful []string
}

// Others is what a process knows of the others on its node.
type Others struct {
	Wants desired.State
	Stays desired.State // of Wants, what somebody is not about to give up
	// Unknown is true when one of them does not say what it wants: then all stays, whoever has
	// made it, less Alone, which as the kernel's list of sockets says nobody else serves.
	Unknown bool
	Alone   desired.State
}

// Standing is what a backend whose rules are not its process's alone has to heed. A process
// writes rules for what it wants itself, whatever others say: so nobody has rules written who
// could not write them, and two releases never undo each other's.
type Standing struct {
	// Others is what other processes want: what stands for it stays as it stands.
	Others []desired.Endpoint
	// Leaving is what this process still wants but is about to give up, and nobody else stays
	// for: no rule for new UDP queries to it is written.
	Leaving []desired.Endpoint
	// Unknown is true when a process does not say what it wants: then all stays that stands,
	// less the rules for new UDP queries to Leaving.
	Unknown bool
	// Alone is what goes all the same: this process gives it up, and nobody else serves it.
	Alone []desired.Endpoint
}

// A Step is one of the following types.
type Step interface{ fmt.Stringer }

type (
	// Add puts addresses on a link, which it makes where there is none.
	Add struct {
		Link  string
		Addrs []netip.Addr
	}
	// Unprefer has the node's own programs send to addresses from another one of the node.
	Unprefer struct {
		Link  string
		Addrs []netip.Addr
	}
	// Withdraw sends new UDP queries the way that they would go without this process.
	Withdraw struct {
		Backend string
		Gone    []desired.Endpoint
	}
	// Apply makes the rules for Own stand, in place of what this process has made before, and
	// leaves of others' rules what Standing says.
	Apply struct {
		Backend  string
		Own      []desired.Endpoint
		Standing Standing
	}
	// Prefer takes Unprefer back.
	Prefer struct {
		Link  string
		Addrs []netip.Addr
	}
	// Trim takes addresses off a link. With Whole the link goes too, if nothing is left on
	// it; with Over this process has no further use of it.
	Trim struct {
		Link        string
		Addrs       []netip.Addr
		Over, Whole bool
	}
)

// Steps lead from what a process has to what it wants. Those of one list need nothing of each
// other, and those of a later list need all before them done.
type Steps struct {
	Add   []Step // Add
	Rules []Step // Unprefer, and for each backend Apply or Withdraw
	Trim  []Step // Prefer, Trim
}

// Plan returns the steps from have to want.
//
// Addresses come before the rules that lead to them, and go after them: an address that goes
// before its rules is a black hole. Nothing goes that another process wants, and where one does
// not say what it wants, nothing that it may serve.
func Plan(have Have, want Stage, o Others) Steps {
	return Steps{
		Add:   add(have, want),
		Rules: rules(have, want, o),
		Trim:  append(prefer(have, want), trim(have, want, o)...),
	}
}

func add(have Have, want Stage) (steps []Step) {
	for link, addrs := range sorted(want.Links) {
		_, there := have.Links[link]
		if lacks := less(addrs, have.Links[link]); !there || len(lacks) > 0 {
			steps = append(steps, Add{link, lacks})
		}
	}
	return steps
}

func rules(have Have, want Stage, o Others) (steps []Step) {
	begun := want.Leaving.Minus(have.Leaving).Minus(o.Stays)
	ended := have.Leaving.Minus(want.Leaving)
	for link, addrs := range sorted(begun.Links) {
		steps = append(steps, Unprefer{link, addrs})
	}
	backends := maps.Clone(want.Rules)
	if backends == nil {
		backends = map[string][]desired.Endpoint{}
	}
	for b := range have.Rules {
		backends[b] = want.Rules[b]
	}
	for _, b := range have.Doubtful {
		backends[b] = want.Rules[b]
	}
	for b, own := range sorted(backends) {
		switch {
		case !slices.Equal(have.Rules[b], own) || slices.Contains(have.Doubtful, b) || len(ended.Rules[b]) > 0:
			steps = append(steps, Apply{b, own, o.standing(b, want.Leaving)})
		case len(begun.Rules[b]) > 0:
			steps = append(steps, Withdraw{b, begun.Rules[b]})
		}
	}
	return steps
}

// prefer is for what stays after all.
func prefer(have Have, want Stage) (steps []Step) {
	for link, addrs := range sorted(have.Leaving.Minus(want.Leaving).Links) {
		if stay := less(addrs, less(addrs, want.Links[link])); len(stay) > 0 {
			steps = append(steps, Prefer{link, stay})
		}
	}
	return steps
}

func trim(have Have, want Stage, o Others) (steps []Step) {
	for link, addrs := range sorted(have.Links) {
		_, ours := want.Links[link]
		_, theirs := o.Wants.Links[link]
		alone, left := o.Alone.Links[link]
		goes := less(less(addrs, want.Links[link]), o.Wants.Links[link])
		if o.Unknown {
			goes = less(goes, less(goes, alone))
		}
		if !o.Unknown || left {
			steps = append(steps, Trim{link, goes, !ours, !ours && !theirs})
		}
	}
	return steps
}

func (o Others) standing(backend string, leaving desired.State) Standing {
	return Standing{
		Others:  o.Wants.Rules[backend],
		Leaving: leaving.Minus(o.Stays).Rules[backend],
		Unknown: o.Unknown,
		Alone:   o.Alone.Rules[backend],
	}
}

// less returns what as has and bs does not.
func less(as, bs []netip.Addr) []netip.Addr {
	return slices.DeleteFunc(slices.Clone(as), func(a netip.Addr) bool { return slices.Contains(bs, a) })
}

// sorted yields what m has, in the order of its keys.
func sorted[V any](m map[string]V) func(yield func(string, V) bool) {
	return func(yield func(string, V) bool) {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			if !yield(k, m[k]) {
				return
			}
		}
	}
}

func (s Add) String() string      { return fmt.Sprintf("add %v to %s", s.Addrs, s.Link) }
func (s Unprefer) String() string { return fmt.Sprintf("unprefer %v on %s", s.Addrs, s.Link) }
func (s Withdraw) String() string { return fmt.Sprintf("withdraw %v by %s", s.Gone, s.Backend) }
func (s Prefer) String() string   { return fmt.Sprintf("prefer %v on %s", s.Addrs, s.Link) }

func (s Apply) String() string {
	text := fmt.Sprintf("apply %v by %s", s.Own, s.Backend)
	for what, es := range sorted(map[string][]desired.Endpoint{"beside": s.Standing.Others, "leaving": s.Standing.Leaving, "sparing all but": s.Standing.Alone}) {
		if len(es) > 0 || what == "sparing all but" && s.Standing.Unknown {
			text += fmt.Sprintf(" %s %v", what, es)
		}
	}
	return text
}

func (s Trim) String() string {
	text := fmt.Sprintf("trim %v off %s", s.Addrs, s.Link)
	if s.Whole {
		text += ", the link too"
	}
	return text
}
