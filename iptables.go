package nodecache

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

// iptables is the firewall backend that runs the iptables programs. All rules
// stand in chains of our own and are written in one transaction per table. The chains
// are those of all processes on the node: each writes its own rules only, and leaves
// standing what others want.
//
// What keeps a rule from being in force when nobody listens: for queries from
// elsewhere the match socket, which finds no socket then. It can't be had in
// OUTPUT, so the rules for the node's own queries use the match recent, on a list
// that this process has to renew every few seconds (see heart).
type iptables struct {
	families map[family]*xtables
	heart    *heart
}

// xtables is one family's part.
type xtables struct {
	family  family
	kind    string // "-legacy" where the programs are to be those of that variant by name
	variant string // "" until the programs have been asked
	version string // "1.8.9"
	written bool   // by this process
	touched bool   // it has tried to, and may have written one of the tables
	// length is how many rules each of our chains had after the last look or change.
	length map[hook]int
	order  map[hook]*order // of each of our jumps: see before
	// noRecent is set while the kernel does not take the match recent, or its list can't be
	// written (noList): then only the address guards the rules for the node's own queries.
	noRecent, noList bool
}

// newIPTables returns the backend. flushed is called when the kernel shows that
// somebody has removed our rules.
func newIPTables(flushed func()) *iptables {
	return &iptables{families: map[family]*xtables{ipv4: {family: ipv4}, ipv6: {family: ipv6}}, heart: newHeart(flushed)}
}

func (t *iptables) String() string {
	for _, f := range []family{ipv4, ipv6} {
		if x := t.families[f]; x.variant != "" {
			return fmt.Sprintf("iptables %s (%s)", x.version, x.variant)
		}
	}
	return "iptables"
}

// variant returns which of iptables' two variants has the chains: "" until it is known.
func (t *iptables) variant() string {
	for _, f := range []family{ipv4, ipv6} {
		if v := t.families[f].variant; v != "" {
			return v
		}
	}
	return ""
}

func (t *iptables) apply(ctx context.Context, own []desired.Endpoint, o standing) (missing int, err error) {
	for _, f := range []family{ipv4, ipv6} {
		x, mine := t.families[f], ofFamily(own, f)
		theirs := standing{Others: ofFamily(o.Others, f), Leaving: ofFamily(o.Leaving, f), Unknown: o.Unknown, Alone: ofFamily(o.Alone, f)}
		if len(mine) == 0 && !x.touched {
			// Maybe a process before this one had the family: look, where one can. Where the
			// kernel lacks it, or its tables, the program fails, and nothing is there.
			if len(own) > 0 && x.installed() {
				if _, e := x.apply(ctx, nil, theirs); e != nil {
					log.Debugf("looking for rules of IPv%d, which this process does not need: %v", f, e)
				}
			}
			continue
		}
		n, e := x.apply(ctx, mine, theirs)
		missing += n
		err = errors.Join(err, e)
	}
	return missing, err
}

func ofFamily(es []desired.Endpoint, f family) []desired.Endpoint {
	var own []desired.Endpoint
	for _, e := range es {
		if familyOf(e.Addr) == f {
			own = append(own, e)
		}
	}
	return own
}

func (t *iptables) enforce(es []desired.Endpoint) {
	t.heart.only(es)
	for _, f := range []family{ipv4, ipv6} {
		if !t.families[f].noRecent {
			t.heart.beat(ofFamily(es, f))
		}
	}
}

func (t *iptables) withdraw(ctx context.Context, gone []desired.Endpoint) (err error) {
	for _, f := range []family{ipv4, ipv6} {
		x, mine := t.families[f], ofFamily(gone, f)
		if len(mine) > 0 && x.written {
			err = errors.Join(err, x.withdraw(ctx, mine))
		}
	}
	return err
}

// apply is firewall.apply for one family. It asks iptables once for its version, runs
// iptables-save twice and, only where something is to change, iptables-restore once.
func (x *xtables) apply(ctx context.Context, own []desired.Endpoint, o standing) (missing int, err error) {
	if err := x.know(ctx); err != nil {
		return 0, err
	}
	have, err := x.look(ctx, "raw", "filter")
	if errors.As(err, new(unreadableError)) && x.nft() && len(own)+len(o.Others) == 0 && !o.Unknown {
		// Nobody's rules are to stand, so what they are need not be read.
		if e := removeFromNFT(x.family); e != nil {
			return 0, setupError(errFirewall, fmt.Errorf("%w; and %w; the chains %s stay", err, e, chainNames()))
		}
		x.written, x.touched, x.length = false, false, nil
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	p := x.rewrite(have, own, o)
	if x.noRecent && !x.noList && len(own) > 0 {
		// What the kernel lacked it may have by now, or it had no memory then.
		x.noRecent = false
		if x.write(ctx, x.rewrite(have, own, o), true) == nil {
			log.Infof("the kernel takes the match recent now")
			return p.missing, nil
		}
		x.noRecent = true
	}
	err = x.write(ctx, p, len(own) > 0)
	if err != nil && !x.noRecent && len(own) > 0 && mayLackRecent(err) {
		x.noRecent = true
		if x.write(ctx, x.rewrite(have, own, o), true) != nil {
			x.noRecent = false
			return 0, err
		}
		log.Warningf("the kernel took the rules only without the match recent (module xt_recent): when this process dies, the node's own programs will not fall back to the cluster (%v)", err)
		err = nil
	}
	if err != nil {
		return 0, err
	}
	if len(own) > 0 && !x.noRecent && notWritable(recentPath(own[0].Addr)) {
		x.noRecent, x.noList = true, true
		log.Warningf("%s can't be written: when this process dies, the node's own programs will not fall back to the cluster", recentPath(own[0].Addr))
		if have, err = x.look(ctx, "raw", "filter"); err == nil {
			err = x.write(ctx, x.rewrite(have, own, o), true)
		}
		if err != nil {
			return 0, err
		}
	}
	return p.missing, nil
}

// write carries p out. own tells whether it has rules of this process's own.
func (x *xtables) write(ctx context.Context, p rewrite, own bool) error {
	x.touched = x.touched || own
	if p.changes() {
		if err := x.restore(ctx, p.script()); err != nil {
			return err
		}
	}
	x.written, x.touched = own, own
	x.length = map[hook]int{}
	for _, c := range p.chains {
		x.length[c.hook] = len(c.lines)
		x.before(c.hook).at = c.at
		if c.moves {
			x.before(c.hook).move(c.hook)
		}
	}
	return nil
}

// mayLackRecent tells whether iptables-restore may have failed for want of the match
// recent: it says so, or the kernel has not even now loaded it.
func mayLackRecent(err error) bool {
	_, missing := os.Stat(recentDir)
	return !errors.As(err, new(lockError)) && !errors.Is(err, context.DeadlineExceeded) &&
		(errors.Is(missing, fs.ErrNotExist) || strings.Contains(err.Error(), "recent"))
}

// withdraw takes the rules for new UDP queries to gone out of the table raw. All others stay
// as they stand.
func (x *xtables) withdraw(ctx context.Context, gone []desired.Endpoint) error {
	have, err := x.look(ctx, "raw")
	if err != nil {
		return err
	}
	leaving := set(gone)
	var p rewrite
	for _, h := range hooks {
		if h.table != "raw" {
			continue
		}
		stand := have["raw"].chains[h.chain]
		lines := slices.DeleteFunc(slices.Clone(stand), func(line string) bool {
			r, known := readRule(line)
			return known && leaving[r.e] && newUDP(h, r.words, r.e)
		})
		p.chains = append(p.chains, planned{hook: h, lines: lines, write: len(lines) < len(stand)})
	}
	if !p.changes() {
		return nil
	}
	if err := x.restore(ctx, p.script()); err != nil {
		return err
	}
	for _, c := range p.chains {
		x.length[c.hook] = len(c.lines)
	}
	return nil
}
