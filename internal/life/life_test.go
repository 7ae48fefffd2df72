package life

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

func text(p Phase[int], names map[*int]string) string {
	var of []string
	for _, c := range []*int{p.InForce, p.Next} {
		if c != nil {
			of = append(of, names[c])
		}
	}
	return p.Kind.String() + "(" + strings.Join(of, ",") + ")"
}

func TestPhases(t *testing.T) {
	a, b := new(int), new(int)
	names := map[*int]string{a: "a", b: "b"}
	all := []Phase[int]{{}, {Rising, nil, a}, {Serving, a, nil}, {Changing, a, b}, {Changed, a, b}, {Ending, a, nil}, {Gone, a, nil}}
	want := map[string]string{
		"absent() begins a":       "rising(a)",
		"absent() begins b":       "rising(b)",
		"rising(a) listens a":     "serving(a)",
		"rising(a) fails a":       "absent()",
		"rising(a) begins b":      "changing(a,b)",
		"rising(a) begins a":      "rising(a)",
		"rising(a) stops a":       "absent()",
		"serving(a) begins b":     "changing(a,b)",
		"serving(a) begins a":     "changing(a,a)",
		"serving(a) drops a":      "ending(a)",
		"serving(a) stops a":      "absent()",
		"serving(a) fails a":      "absent()", // it had listened before another plugin failed
		"changing(a,b) listens b": "changed(a,b)",
		"changing(a,b) stays a":   "serving(a)",
		"changing(a,b) stops a":   "serving(b)",
		"changing(a,b) begins a":  "changing(a,a)",
		"changing(a,b) begins b":  "changing(a,b)",
		"changed(a,b) stays a":    "serving(a)",
		"changed(a,b) stops a":    "serving(b)",
		"changed(a,b) begins a":   "changing(a,a)",
		"changed(a,b) begins b":   "changing(a,b)",
		"ending(a) stays a":       "serving(a)",
		"ending(a) stops a":       "absent()",
		"ending(a) begins a":      "changing(a,a)",
		"ending(a) begins b":      "changing(a,b)",
	}
	for _, p := range all {
		for e := Begins; e <= Exits; e++ {
			for _, c := range []*int{a, b} {
				next, changes := p.On(e, c)
				what := fmt.Sprintf("%s %s %s", text(p, names), e, names[c])
				switch to := want[what]; {
				case e == Exits && p.Kind != Gone:
					if !changes || next.Kind != Gone || next.InForce != p.InForce || next.Next != p.Next {
						t.Errorf("%s leads to %s", what, text(next, names))
					}
				case !changes && to != "":
					t.Errorf("%s changes nothing, want %s", what, to)
				case !changes && next != p:
					t.Errorf("%s changes nothing and yet leads to %s", what, text(next, names))
				case changes && text(next, names) != to:
					t.Errorf("%s leads to %s, want %q", what, text(next, names), to)
				}
			}
		}
	}
}

// Whatever caddy calls and in whatever order: who is in force has begun, and has not
// stopped since; one that is in force goes on to be until it stops or the process exits.
func TestWhoIsInForceStaysSo(t *testing.T) {
	for seed := range uint64(2000) {
		r := rand.New(rand.NewPCG(seed, 0))
		var configs []*int
		for range 4 {
			configs = append(configs, new(int))
		}
		var p Phase[int]
		begun := map[*int]bool{}
		for step := range 40 {
			e, c := Event(r.IntN(int(Exits))), configs[r.IntN(len(configs))]
			next, changes := p.On(e, c)
			if e == Begins {
				begun[c] = true
			}
			for _, x := range []*int{next.InForce, next.Next} {
				if x != nil && !begun[x] {
					t.Fatalf("seed %d, step %d: %v has never begun", seed, step, next.Kind)
				}
			}
			if has := next.InForce != nil; has != (next.Kind == Serving || next.Kind == Changing || next.Kind == Changed || next.Kind == Ending) {
				t.Fatalf("seed %d, step %d: %v with one in force: %v", seed, step, next.Kind, has)
			}
			if has := next.Next != nil; has != (next.Kind == Rising || next.Kind == Changing || next.Kind == Changed) {
				t.Fatalf("seed %d, step %d: %v with one on its way: %v", seed, step, next.Kind, has)
			}
			if p.InForce != nil && next.InForce != p.InForce && (e != Stops && e != Fails || c != p.InForce) {
				t.Fatalf("seed %d, step %d: %v of another ends who was in force", seed, step, e)
			}
			if !changes && next != p {
				t.Fatalf("seed %d, step %d: %v changes nothing, and did", seed, step, e)
			}
			if !p.Has(c) && e != Begins && changes {
				t.Fatalf("seed %d, step %d: %v of one that has no part in %v", seed, step, e, p.Kind)
			}
			p = next
		}
		if p, changes := p.On(Exits, nil); !changes || p.Kind != Gone {
			t.Fatalf("seed %d: an exit leads to %v", seed, p.Kind)
		}
	}
}
