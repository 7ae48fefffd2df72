package plan

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

// A world is a node on which several processes carry out what is planned for them.
type world struct {
	rnd   *rand.Rand
	links map[string]map[netip.Addr]bool
	// rules are those in chains that all processes share; true where new queries come by them.
	rules map[desired.Endpoint]bool
	all   []*process
	log   []string
	wrong string
	calm  bool // nobody dies or is silent: then nothing without use is left
}

// A process does what the root of the module does with plans.
type process struct {
	*world
	name           string
	alive, silent  bool
	shown, leaving desired.State // to the others
	want           desired.State
	cfg, next      desired.State
	phase          string        // "", "serving", "changing", "leaving"
	needs          desired.State // what must not go, not even for a moment
}

func (w *world) say(format string, args ...any) { w.log = append(w.log, fmt.Sprintf(format, args...)) }

func (w *world) fail(format string, args ...any) {
	if w.wrong == "" {
		w.wrong = fmt.Sprintf(format, args...)
	}
}

// others is what the others show p, and at its exit what the kernel's list of sockets says.
func (p *process) others(going desired.State) Others {
	o := Others{}
	served := map[desired.Endpoint]string{}
	for _, q := range p.all {
		switch {
		case q == p || !q.alive:
		case q.silent:
			o.Unknown = true
			for _, e := range q.needs.Rules[backend] {
				served[e] = q.name
			}
		default:
			o.Wants = o.Wants.Union(q.shown)
			o.Stays = o.Stays.Union(q.shown.Minus(q.leaving))
		}
	}
	if o.Unknown {
		o.Alone = going.Minus(o.Wants).Except(served)
	}
	return o
}

// do carries out steps, of which one may fail, and looks after each what has come of it.
func (p *process) do(steps []Step, failing bool) (ok bool) {
	for _, s := range steps {
		if failing && p.rnd.IntN(3) == 0 {
			p.say("%s fails to %s", p.name, s)
			return false
		}
		p.say("%s: %s", p.name, s)
		switch s := s.(type) {
		case Add:
			if p.links[s.Link] == nil {
				p.links[s.Link] = map[netip.Addr]bool{}
			}
			for _, a := range s.Addrs {
				p.links[s.Link][a] = true
			}
		case Apply:
			maps.DeleteFunc(p.rules, func(e desired.Endpoint, _ bool) bool {
				return !slices.Contains(s.Standing.Others, e) && (!s.Standing.Unknown || slices.Contains(s.Standing.Alone, e))
			})
			for _, e := range s.Own {
				p.rules[e] = !slices.Contains(s.Standing.Leaving, e)
			}
		case Withdraw:
			for _, e := range s.Gone {
				p.rules[e] = false
			}
		case Trim:
			for _, a := range s.Addrs {
				delete(p.links[s.Link], a)
			}
			if s.Whole && len(p.links[s.Link]) == 0 {
				delete(p.links, s.Link)
			}
		}
		p.look()
	}
	return true
}

// look checks the promises.
func (w *world) look() {
	carried := map[netip.Addr]bool{}
	for _, on := range w.links {
		maps.Copy(carried, on)
	}
	for _, p := range w.all {
		if !p.alive {
			continue
		}
		for link, addrs := range p.needs.Links {
			for _, a := range addrs {
				if !w.links[link][a] {
					w.fail("%s is taken from %s, which needs it", a, p.name)
				}
			}
		}
		for _, e := range p.needs.Rules[backend] {
			news, stands := w.rules[e]
			if !stands {
				w.fail("the rule of %s is taken from %s, which needs it", e, p.name)
			}
			if !news && w.calm && p.phase != "leaving" && !slices.Contains(p.leaving.Rules[backend], e) {
				w.fail("new queries to %s do not come to %s any more, which stays", e, p.name)
			}
		}
	}
	for e := range w.rules {
		if !carried[e.Addr] && w.calm {
			w.fail("a rule of %s stands without the address", e)
		}
	}
}

// found is what a look has found on the links of p.
func (p *process) found() desired.State {
	s := desired.State{Links: map[string][]netip.Addr{}}
	for link := range p.want.Links {
		if on, there := p.links[link]; there {
			s.Links[link] = slices.Collect(maps.Keys(on))
		}
	}
	return s.Sorted()
}

func (p *process) begin(cfg desired.State, failing bool) {
	was, before := p.want, p.copyLinks()
	want := was.Union(cfg)
	p.shown = want
	o := p.others(desired.State{})
	steps := Plan(Have{Stage: Stage{Leaving: p.leaving}}, Stage{want, p.leaving}, o)
	if !p.do(steps.Add, failing) || !p.do(steps.Rules, failing) {
		added, adopted := desired.State{Links: map[string][]netip.Addr{}}, desired.State{Links: map[string][]netip.Addr{}}
		for link, on := range p.links {
			for a := range on {
				if !before[link][a] {
					added.Links[link] = append(added.Links[link], a)
				}
			}
			if before[link] != nil {
				adopted.Links[link] = nil
			}
		}
		o.Wants.Links, o.Alone.Links = nil, added.Links
		back := Plan(Have{Stage{State: was.Union(added)}, []string{backend}}, Stage{State: was.Union(adopted)}, o)
		p.do(slices.Concat(back.Rules, back.Trim), false)
		if after := p.copyLinks(); fmt.Sprint(after) != fmt.Sprint(before) {
			p.fail("a start of %s that failed leaves %v, and there was %v", p.name, after, before)
		}
		if p.shown = was; p.phase == "" {
			p.alive = false
		}
		return
	}
	p.want, p.next, p.needs = want, cfg, want
	if p.phase == "" {
		p.phase, p.cfg = "serving", cfg
		p.reduce(cfg)
		return
	}
	p.phase = "changing"
	p.leave(was.Minus(cfg))
}

func (p *process) leave(going desired.State) {
	p.leaving = going
	p.do(Plan(has(p.want), Stage{p.want, going}, p.others(desired.State{})).Rules, false)
}

func (p *process) reduce(want desired.State) {
	have := Have{Stage: Stage{p.want, p.leaving}}
	o := p.others(p.want.Minus(want))
	if p.phase != "leaving" {
		o.Alone = desired.State{} // it is known at an exit only
	}
	p.shown, p.leaving, p.needs = want, desired.State{}, want
	p.do(Plan(have, stage(want), o).Rules, false)
	have.State = have.Union(p.found())
	p.do(Plan(have, stage(want), o).Trim, false)
	p.want = want
}

func (p *process) repair() {
	o := p.others(desired.State{})
	o.Alone = desired.State{}
	now := Stage{p.want, p.leaving}
	steps := Plan(Have{Stage: Stage{Leaving: p.leaving}}, now, o)
	p.do(slices.Concat(steps.Add, steps.Rules), false)
	if p.phase != "changing" {
		p.do(Plan(Have{Stage: Stage{p.want.Union(p.found()), p.leaving}}, now, o).Trim, false)
	}
}

// exit is in two turns, between which others may have theirs.
func (p *process) exit() {
	if p.phase != "leaving" {
		p.phase = "leaving"
		p.leave(p.want)
		return
	}
	p.shown, p.needs = desired.State{}, desired.State{}
	p.reduce(desired.State{})
	p.alive = false
}

func (p *process) copyLinks() map[string]map[netip.Addr]bool {
	c := map[string]map[netip.Addr]bool{}
	for link, on := range p.links {
		c[link] = maps.Clone(on)
	}
	return c
}

// event has something happen to a process.
func (w *world) event(p *process) {
	if p.silent {
		if w.rnd.IntN(3) == 0 {
			w.say("%s answers again", p.name)
			p.silent = false
		}
		return
	}
	some := func() desired.State {
		var addresses []string
		for _, a := range []string{one, two, three} {
			if w.rnd.IntN(2) == 0 {
				addresses = append(addresses, a)
			}
		}
		return on("a", append(addresses, "10.0.0.9")...)
	}
	n := w.rnd.IntN(12)
	if n < 2 && w.calm {
		n = 4
	}
	switch {
	case !p.alive:
		*p = process{world: w, name: p.name, alive: true}
		w.say("%s starts", p.name)
		p.begin(some(), w.rnd.IntN(4) == 0)
	case p.phase == "leaving":
		w.say("%s goes", p.name)
		p.exit()
	case n == 0:
		w.say("%s dies", p.name)
		p.alive = false
	case n == 1:
		w.say("%s is stopped", p.name)
		p.silent = true
	case n < 4:
		w.say("%s leaves", p.name)
		p.exit()
	case n < 6:
		w.say("%s looks", p.name)
		p.repair()
	case p.phase == "serving":
		w.say("%s is reloaded", p.name)
		p.begin(some(), w.rnd.IntN(4) == 0)
	case n < 9:
		w.say("the reload of %s fails", p.name)
		p.phase = "serving"
		p.reduce(p.cfg)
	default:
		w.say("the old servers of %s stop", p.name)
		p.phase, p.cfg = "serving", p.next
		p.reduce(p.cfg)
	}
}

// Whatever three processes do, in whatever order, and whatever fails: nothing goes that one
// of them needs, no rule stands without its address, and the last one leaves nothing.
func TestSequences(t *testing.T) {
	for seed := range uint64(1000) {
		w := &world{calm: seed%2 == 0, rnd: rand.New(rand.NewPCG(seed, 1)), links: map[string]map[netip.Addr]bool{}, rules: map[desired.Endpoint]bool{}}
		for _, name := range []string{"A", "B", "C"} {
			w.all = append(w.all, &process{world: w, name: name})
		}
		for range 60 {
			w.event(w.all[w.rnd.IntN(len(w.all))])
		}
		for _, p := range w.all { // all answer, and go
			p.silent = false
		}
		last := &process{world: w, name: "the last", alive: true}
		w.all = append(w.all, last) // a start and a stop remove what the dead have left
		last.begin(on("a", one), false)
		for _, p := range w.all {
			for p.alive {
				p.exit()
			}
		}
		if len(w.links) > 0 || len(w.rules) > 0 {
			w.fail("left are %v and rules of %v", w.links, slices.Collect(maps.Keys(w.rules)))
		}
		if w.wrong != "" {
			t.Fatalf("seed %d: %s\n%s", seed, w.wrong, strings.Join(w.log, "\n"))
		}
	}
}
