package nodecache

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

// hooks are our chains, and where each is jumped to from.
var hooks = []hook{
	{"raw", "PREROUTING", "NODECACHE-PREROUTING"},
	{"raw", "OUTPUT", "NODECACHE-OUTPUT"},
	{"filter", "INPUT", "NODECACHE-INPUT"},
	{"filter", "OUTPUT", "NODECACHE-OUTPUT"},
}

type hook struct{ table, builtin, chain string }

// jump is the rule that leads from h's built-in chain to ours.
func (h hook) jump() string {
	return "-m comment --comment \"nodecache: DNS cache of this node\" -j " + h.chain
}

// table is what iptables-save says of one table.
type table struct {
	chains map[string][]string // rules by chain; built-in chains too
	text   string
}

// readTable reads what iptables-save -t name has printed. What does not print the table
// in full is an error: to take it for an empty one would add a jump at each look.
func readTable(name, text string) (*table, error) {
	t := &table{chains: map[string][]string{}, text: text}
	inside, complete := false, false
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		switch rest, rule := strings.CutPrefix(line, "-A "); {
		case strings.HasPrefix(line, "*"):
			inside = line == "*"+name
		case !inside:
		case line == "COMMIT":
			inside, complete = false, true
		case strings.HasPrefix(line, ":"):
			chain, _, _ := strings.Cut(line[1:], " ")
			t.chains[chain] = nil
		case rule:
			chain, _, _ := strings.Cut(rest, " ")
			t.chains[chain] = append(t.chains[chain], line)
		}
	}
	if !complete {
		return nil, unreadableError{fmt.Errorf("iptables can't read the table %s, as another program has put rules there with nft; nodecache's rules stay there as they are until it can: "+
			"move those rules to a table of their own, or use firewall nftables", name)}
	}
	return t, nil
}

// unreadableError says that a table can't be read: iptables-nft-save prints
// "# Table `filter' is incompatible, use 'nft' tool.", up to 1.8.3 nothing at all, and
// ends with success.
type unreadableError struct{ error }

// jumps returns the lines of t that jump to h's chain.
func (t *table) jumps(h hook) (lines []string) {
	for _, line := range t.chains[h.builtin] {
		if strings.HasSuffix(line, " -j "+h.chain) {
			lines = append(lines, line)
		}
	}
	return lines
}

// rule is one rule of one of our chains.
type rule struct {
	words         string // what its comment says before the endpoint
	e             desired.Endpoint
	match, target string
}

func (r rule) String() string {
	return fmt.Sprintf("%s -m comment --comment \"%s\" -j %s", r.match, r.comment(), r.target)
}

func (r rule) comment() string { return "nodecache: " + r.words + " " + r.e.String() }

// identity is what a rule is known by among all processes and releases: its comment and
// its target, as the programs print a match in more than one way. So a release that changes
// a match has to change the words of the comment too.
type identity struct{ comment, target string }

func (r rule) identity() identity { return identity{r.comment(), r.target} }

// The words of the rules for new queries; an exit takes those for UDP away first.
const (
	queriesTo    = "queries to"
	requestsTo   = "requests to"
	ownQueriesTo = "queries of this node to"
	// unguardedTo is without the match recent: the address alone guards it.
	unguardedTo = "queries of this node, unguarded, to"
)

// newUDP tells whether a rule of the table raw leads new UDP queries here.
func newUDP(h hook, words string, e desired.Endpoint) bool {
	return h.table == "raw" && e.Proto == "udp" && !strings.HasPrefix(words, "answers ")
}

// readRule reads a line of iptables-save as a rule that some release of nodecache has
// written; its match stays unread.
func readRule(line string) (r rule, ok bool) {
	_, rest, ok := strings.Cut(line, " --comment \"nodecache: ")
	comment, rest, closed := strings.Cut(rest, "\"")
	if !ok || !closed || strings.ContainsAny(comment, "\\'") || strings.Count(line, "\"")%2 != 0 {
		return r, false
	}
	r.target, ok = strings.CutPrefix(rest[max(0, strings.LastIndex(rest, " -j ")):], " -j ")
	at := strings.LastIndexByte(comment, ' ')
	if !ok || at < 0 {
		return r, false
	}
	addr, proto, ok := strings.Cut(comment[at+1:], "/")
	ap, err := netip.ParseAddrPort(addr)
	if !ok || err != nil || ap.Addr().Zone() != "" || proto != "udp" && proto != "tcp" {
		return r, false
	}
	r.words, r.e = comment[:at], desired.Endpoint{Addr: ap.Addr(), Proto: proto, Port: ap.Port()}
	return r, r.comment() == "nodecache: "+comment
}

// set is endpoints, whosever port they are.
func set(es []desired.Endpoint) map[desired.Endpoint]bool {
	s := make(map[desired.Endpoint]bool, len(es))
	for _, e := range plain(es) {
		s[e] = true
	}
	return s
}

// rewrite is what a look at the tables leads to.
type rewrite struct {
	chains  []planned
	missing int // jumps and rules of this process's own
}

// planned is one of our chains.
type planned struct {
	hook
	lines  []string // its rules
	write  bool     // is to be made, or holds other rules now
	remove bool
	insert bool     // the jump
	drop   []string // jumps too many
	moves  bool     // the jump is dropped and inserted, as something stands before it
	at     int      // how many rules stand before it afterwards
}

func (c planned) changes() bool { return c.write || c.remove || c.insert || len(c.drop) > 0 }

func (p rewrite) changes() bool {
	for _, c := range p.chains {
		if c.changes() {
			return true
		}
	}
	return false
}

// rewrite returns what has to be written for own. Rules that stand for what only other
// processes want stay as they are printed, and are not written where they are missing.
func (x *xtables) rewrite(have map[string]*table, own []desired.Endpoint, o standing) (p rewrite) {
	mine, theirs, leaving, alone := set(own), set(o.Others), set(o.Leaving), set(o.Alone)
	stays := len(own) > 0 || o.Unknown && len(alone) == 0
	for _, h := range hooks {
		stand, there := have[h.table].chains[h.chain]
		jumps := have[h.table].jumps(h)
		c := planned{hook: h}
		seen := make(map[identity]string, len(stand))
		var rest []string
		for _, line := range stand {
			r, known := readRule(line)
			_, twice := seen[r.identity()]
			switch {
			case known && (twice || leaving[r.e] && newUDP(h, r.words, r.e)):
			case known:
				seen[r.identity()] = line
				if theirs[r.e] || o.Unknown && !alone[r.e] {
					rest = append(rest, line)
				}
			case o.Unknown && strings.Count(line, "\"")%2 == 0:
				rest = append(rest, line)
			}
		}
		ours := make(map[string]bool, len(stand))
		for _, r := range x.rules(h, own, leaving) {
			line, ok := seen[r.identity()]
			if !ok {
				line = "-A " + h.chain + " " + r.String()
				c.write = true
				p.missing++
			}
			c.lines = append(c.lines, line)
			ours[line] = true
		}
		for _, line := range rest {
			if !ours[line] {
				c.lines = append(c.lines, line)
			}
		}
		c.write = c.write || len(c.lines) < len(stand) || len(mine) > 0 && !there
		if len(mine) > 0 && len(jumps) == 0 {
			c.insert = true
			p.missing++
		}
		c.drop = jumps[min(1, len(jumps)):]
		if len(mine) == 0 {
			delete(x.order, h) // nothing of ours is to be in force there
		} else if len(jumps) > 0 && x.before(h).look(have[h.table].obstacles(x.family, h, own)) {
			c.insert, c.drop, c.moves = true, jumps, true
			p.missing++
		}
		if !c.insert && len(jumps) > 0 {
			c.at = slices.Index(have[h.table].chains[h.builtin], jumps[0])
		}
		stays = stays || len(c.lines) > 0
		p.chains = append(p.chains, c)
	}
	if !stays { // no rule of anybody's
		for i, c := range p.chains {
			_, there := have[c.table].chains[c.chain]
			p.chains[i] = planned{hook: c.hook, remove: there, drop: have[c.table].jumps(c.hook)}
		}
	}
	return p
}

// script returns the input of iptables-restore --noflush that carries p out, which
// commits each table as one transaction.
func (p rewrite) script() []byte {
	var b bytes.Buffer
	for _, name := range []string{"raw", "filter"} {
		var decls, rules, jumps bytes.Buffer
		for _, c := range p.chains {
			if c.table != name {
				continue
			}
			if c.write || c.remove {
				fmt.Fprintf(&decls, ":%s - [0:0]\n", c.chain) // made, or emptied
			}
			if c.write {
				for _, line := range c.lines {
					fmt.Fprintln(&rules, line)
				}
			}
			for _, line := range c.drop {
				fmt.Fprintln(&jumps, strings.Replace(line, "-A ", "-D ", 1))
			}
			if c.insert {
				fmt.Fprintf(&jumps, "-I %s 1 %s\n", c.builtin, c.jump())
			}
			if c.remove {
				fmt.Fprintf(&jumps, "-X %s\n", c.chain)
			}
		}
		if decls.Len()+jumps.Len() > 0 {
			fmt.Fprintf(&b, "*%s\n%s%s%sCOMMIT\n", name, &decls, &rules, &jumps)
		}
	}
	return b.Bytes()
}

// rules returns the rules of one of our chains for es, without those for new UDP
// queries to what is in leaving.
func (x *xtables) rules(h hook, es []desired.Endpoint, leaving map[desired.Endpoint]bool) (rs []rule) {
	for _, e := range es {
		to := fmt.Sprintf("-d %s -p %s -m %s --dport %d", e.Addr, e.Proto, e.Proto, e.Port)
		from := fmt.Sprintf("-s %s -p %s -m %s --sport %d", e.Addr, e.Proto, e.Proto, e.Port)
		left := leaving[desired.Endpoint{Addr: e.Addr, Proto: e.Proto, Port: e.Port}]
		add := func(words, match, target string) {
			if !left || !newUDP(h, words, e) {
				rs = append(rs, rule{words, e, match, target})
			}
		}
		switch h {
		case hook{"raw", "PREROUTING", "NODECACHE-PREROUTING"}:
			if e.Extra { // health and metrics may listen on the wildcard
				add(requestsTo, to+" -m socket --nowildcard", "NOTRACK")
			} else {
				add(queriesTo, to+" -m socket", "NOTRACK")
			}
		case hook{"raw", "OUTPUT", "NODECACHE-OUTPUT"}:
			add("answers from", from, "NOTRACK")
			if x.noRecent {
				add(unguardedTo, to+" -m addrtype --dst-type LOCAL", "NOTRACK")
			} else {
				add(ownQueriesTo, to+fmt.Sprintf(" -m recent --rcheck --seconds %d --name %s --rdest", beatSeconds, recentName(e.Addr)), "NOTRACK")
			}
		case hook{"filter", "INPUT", "NODECACHE-INPUT"}:
			add(queriesTo, to, "ACCEPT")
			add("answers to this node from", from+" -i lo", "ACCEPT")
		case hook{"filter", "OUTPUT", "NODECACHE-OUTPUT"}:
			add("answers from", from, "ACCEPT")
			add(ownQueriesTo, to+" -o lo", "ACCEPT")
		}
	}
	return rs
}
