// Package life is the life of a nodecache process as a machine: the phases that it stands in
// between its configurations, and the events that lead from one to the next. It changes
// nothing, and knows of configurations only that they differ.
package life

// A Phase is where a process stands between its configurations. CoreDNS's callbacks, and the
// looks that tell whether it listens, are the events that lead to another.
//
//	          begins           listens            begins            listens
//	Absent ───────────▶ Rising ────────▶ Serving ─────────▶ Changing ───────▶ Changed
//	  ▲                   │               ▲   │ ▲               │                │
//	  │   fails, stops    │         stays │   │ └───────────────┴────────────────┘
//	  ├───────────────────┘               │   │            stays, stops
//	  │   stops                           │   │ drops
//	  └─────────────────────────────── Ending ◀
//
// From everywhere an exit leads to Gone, and from there nothing leads away.
type Phase[C any] struct {
	Kind Kind
	// InForce is the configuration whose servers answer: in Serving, Changing, Changed and
	// Ending. Next is the one on its way up: in Rising, Changing and Changed. Gone keeps both.
	InForce, Next *C
}

// Kind names a phase.
type Kind int

// The kinds of phases.
const (
	Absent   Kind = iota // no configuration has nodecache
	Rising               // the first one does not listen yet
	Serving              // one is in force
	Changing             // a reload: the next one does not listen yet
	Changed              // a reload: both listen, and the old one is about to stop
	Ending               // a reload to none: the old one is about to stop
	Gone                 // the process exits
)

func (k Kind) String() string {
	return [...]string{"absent", "rising", "serving", "changing", "changed", "ending", "gone"}[k]
}

// Event is what happens to one configuration.
type Event int

// The events.
const (
	Begins  Event = iota // it is brought up
	Listens              // CoreDNS listens on all its addresses
	Fails                // the reload that was to bring it to a process without one has failed
	Stays                // the reload that was to replace it has failed
	Drops                // a Corefile without the directive has been read in its place
	Stops                // its servers have stopped, in favour of what comes next
	Exits                // the process is on its way out
)

func (e Event) String() string {
	return [...]string{"begins", "listens", "fails", "stays", "drops", "stops", "exits"}[e]
}

// Has tells whether c has a part in the phase.
func (p Phase[C]) Has(c *C) bool { return c != nil && (p.InForce == c || p.Next == c) }

// On returns the phase after an event. It is false where the event changes nothing: caddy
// also calls for configurations that have been replaced since, and more than once.
func (p Phase[C]) On(e Event, c *C) (next Phase[C], changes bool) {
	switch {
	case p.Kind == Gone:
		return p, false
	case e == Exits:
		return Phase[C]{Gone, p.InForce, p.Next}, true
	case e == Begins:
		return p.begin(c), true
	case !p.Has(c):
		return p, false
	}
	old, new := p.InForce == c, p.Next == c
	switch {
	case e == Listens && p.Kind == Rising:
		return Phase[C]{Serving, c, nil}, true
	case e == Listens && p.Kind == Changing && new:
		return Phase[C]{Changed, p.InForce, c}, true
	case e == Fails && (p.Kind == Rising || p.Kind == Serving):
		return Phase[C]{}, true
	case e == Stays && old && p.Kind != Serving:
		return Phase[C]{Serving, c, nil}, true
	case e == Drops && p.Kind == Serving:
		return Phase[C]{Ending, c, nil}, true
	case e == Stops && (p.Kind == Changing || p.Kind == Changed) && old:
		// CoreDNS stops the old servers only when the new ones listen.
		return Phase[C]{Serving, p.Next, nil}, true
	case e == Stops && p.Kind != Changing && p.Kind != Changed:
		return Phase[C]{}, true
	}
	return p, false
}

func (p Phase[C]) begin(c *C) Phase[C] {
	old := p.InForce
	if p.Kind == Rising && p.Next != c {
		// CoreDNS reloads only what has come up, whether we have seen it listen or not.
		old = p.Next
	}
	if old == nil {
		return Phase[C]{Rising, nil, c}
	}
	return Phase[C]{Changing, old, c}
}
