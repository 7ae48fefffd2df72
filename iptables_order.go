package nodecache

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/outlive"
	"github.com/contentful-labs/coredns-nodecache/internal/ruleset"
)

// Our jumps are made as the first rule of their chains, since a rule before them can end
// the way of a packet that ours are for. But several programs want to be first, such as
// Calico, which looks every minute or so whether it is. So a jump is moved only where a rule
// before it does keep packets from ours, and not without end.

const (
	// movesMost is how often a jump is moved before whoever puts a rule before it again has
	// its way.
	movesMost = 5
	// movesForget is how long nothing has to stand before it until that is forgotten.
	movesForget = time.Hour
)

// obstacle is a rule before one of our jumps by which packets of e miss our rules.
type obstacle struct {
	line string // as iptables-save prints it; "" where it is our jump that does not lead there
	e    desired.Endpoint
}

// order is what a process knows of the rules before one of our jumps.
type order struct {
	at        int // how many there were at the last look
	moves     int
	moved     time.Time // the last time
	obstacles []obstacle
}

// before returns what x knows of the rules before the jump of a hook.
func (x *xtables) before(h hook) *order {
	if x.order == nil {
		x.order = map[hook]*order{}
	}
	if x.order[h] == nil {
		x.order[h] = &order{}
	}
	return x.order[h]
}

// obstacles returns what stands before our jump of a hook. In the table raw that is what
// ends the way of some packet that is still to be tracked, or has it tracked. A drop is none:
// our rules come to no end by which it would not be dropped after them. In the table filter,
// where ours accept, it is what drops all of them: to drop some, by their source or link, is
// for the node's owner to say.
func (t *table) obstacles(f family, h hook, own []desired.Endpoint) (found []obstacle) {
	defer outlive.Panic("judging the rules before " + h.chain) // then nothing is moved
	at := slices.IndexFunc(t.chains[h.builtin], func(line string) bool { return strings.HasSuffix(line, " -j "+h.chain) })
	if at < 0 || at == 0 && t.chains[h.builtin][0] == "-A "+h.builtin+" "+h.jump() {
		return nil
	}
	// With our chain as it is to be: what it lacks is not the order's fault.
	target := map[string]string{"raw": "NOTRACK", "filter": "ACCEPT"}[h.table]
	var text strings.Builder
	for line := range strings.Lines(t.text) {
		if strings.TrimRight(line, "\n") == "COMMIT" {
			fmt.Fprintf(&text, "-A %s -j %s\n", h.chain, target)
		}
		if !strings.HasPrefix(line, "-A "+h.chain+" ") {
			text.WriteString(line)
		}
	}
	r := ruleset.Of(map[family]byte{ipv4: unix.NFPROTO_IPV4, ipv6: unix.NFPROTO_IPV6}[f], text.String())
	for _, e := range own {
		for _, p := range packetsAt(h, e) {
			if places, bad := judge(r, h, p); bad {
				o := obstacle{e: e}
				if len(places) > 0 {
					o.line = t.line(places[0])
				}
				found = append(found, o)
				break
			}
		}
	}
	return found
}

// line returns a rule as iptables-save prints it.
func (t *table) line(p ruleset.Place) string {
	lines := t.chains[p.Chain.Name]
	if p.Rule < 1 || p.Rule > len(lines) {
		return p.String()
	}
	return lines[p.Rule-1]
}

// packetsAt returns packets that our rules at a hook are for.
func packetsAt(h hook, e desired.Endpoint) []ruleset.Packet {
	query, answer, own := ruleset.PacketsOf(e.Proto, netip.AddrPortFrom(e.Addr, e.Port))
	switch {
	case h.builtin != "OUTPUT":
		return []ruleset.Packet{query}
	case h.table == "raw":
		return []ruleset.Packet{answer, own}
	}
	return []ruleset.Packet{answer}
}

// judge tells whether a packet misses our rules, and by which others.
func judge(r *ruleset.Ruleset, h hook, p ruleset.Packet) (by []ruleset.Place, bad bool) {
	at := map[string]uint32{"PREROUTING": unix.NF_INET_PRE_ROUTING, "INPUT": unix.NF_INET_LOCAL_IN, "OUTPUT": unix.NF_INET_LOCAL_OUT}[h.builtin]
	if h.table == "raw" {
		t := r.Tracking(p, at, func(c ruleset.Chain) bool { return c.Name == h.chain })
		return t.By, t.Tracked
	}
	for _, res := range r.Through(p, at, "filter") {
		if res.Drop && !res.Accept {
			return slices.DeleteFunc(res.Places, func(p ruleset.Place) bool { return p.Rule == 0 }), true
		}
	}
	return nil, false
}

// look notes what stands before our jump, and tells whether that is to be moved.
func (o *order) look(found []obstacle) (move bool) {
	o.obstacles = found
	if len(found) == 0 {
		if time.Since(o.moved) > movesForget {
			o.moves = 0
		}
		return false
	}
	return o.moves < movesMost
}

// move notes that our jump is first again.
func (o *order) move(h hook) {
	if len(o.obstacles) == 0 {
		return
	}
	last := ""
	if o.moves++; o.moves == movesMost {
		last = fmt.Sprintf("; this was the %dth time, and the next time it stays there", movesMost)
	}
	log.Warningf("%s, such as %s: nodecache's come first again%s", o.obstacles[0].sentence(h), o.obstacles[0].e, last)
	o.moved, o.obstacles = time.Now(), nil
}

// sentence says what an obstacle does.
func (o obstacle) sentence(h hook) string {
	if o.line == "" {
		return fmt.Sprintf("the jump from the chain %s of the table %s to %s does not lead there all that it is for", h.builtin, h.table, h.chain)
	}
	what := map[string]string{"raw": "has what they are for tracked", "filter": "drops what they are for"}[h.table]
	return fmt.Sprintf("the rule %q of the table %s stands before nodecache's and %s", o.line, h.table, what)
}

// orders returns a function that tells whether a chain is in the tables where our jumps are
// kept first.
func (t *iptables) orders() func(ruleset.Chain) bool {
	legacy := t.variant() == variantLegacy
	return func(c ruleset.Chain) bool {
		return c.Legacy == legacy && (c.Table == "raw" || c.Table == "filter") && c.Family != unix.NFPROTO_INET
	}
}

// displaced returns the endpoints whose rules somebody has put others before again and
// again, with what is to be said of it.
func (t *iptables) displaced() map[desired.Endpoint]string {
	found := map[desired.Endpoint]string{}
	for _, x := range t.families {
		for _, h := range hooks {
			if o := x.before(h); o.moves >= movesMost {
				for _, b := range o.obstacles {
					found[b.e] = b.sentence(h)
				}
			}
		}
	}
	return found
}
