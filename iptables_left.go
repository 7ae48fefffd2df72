package nodecache

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// sweepLimit bounds a wait for the lock of the legacy variant.
const sweepLimit = 3 * time.Second

// leftRules is what n knows of rules of iptables that no process needs any more, in
// tables where this process does not write: those of the other variant of iptables, or of
// both where it has the backend nftables. Left are they by a process that was killed, or
// by one of release 0.1.0, which knows nothing of variants.
type leftRules struct {
	looked bool // since another process was here, with nothing left
	said   map[string]bool
}

// sweep removes them while no other process is there that may need them.
func (n *node) sweep(ctx context.Context) {
	own, known := n.ownVariant()
	if !known || n.others.Unknown || n.others.Variants[""] {
		n.left.looked = false
		return
	}
	if n.left.looked {
		return
	}
	n.left.looked = true
	ctx, cancel := context.WithTimeout(ctx, sweepLimit)
	defer cancel()
	var errs []error
	for variant, sweep := range map[string]func(family) error{
		variantNFT:    removeFromNFT,
		variantLegacy: func(f family) error { return n.sweepLegacy(ctx, f) },
	} {
		switch {
		case variant == own: // apply has done it
		case n.others.Variants[variant]:
			n.left.looked = false
		default:
			errs = append(errs, sweep(ipv4), sweep(ipv6))
		}
	}
	if err := errors.Join(errs...); err != nil {
		n.left.looked = false
		n.left.say("looking for iptables rules that another nodecache process has left: %v", err)
	}
}

// say warns, of the same thing once.
func (l *leftRules) say(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if l.said == nil || len(l.said) > 100 {
		l.said = map[string]bool{}
	}
	if !l.said[text] {
		l.said[text] = true
		log.Warning(text)
	}
}

// ownVariant returns the variant of iptables that this process writes, "" for none; ok
// is false when it is not known, or nothing may be looked at.
func (n *node) ownVariant() (v string, ok bool) {
	switch fw := n.firewalls[backendIPT].(type) {
	case nil:
		return "", n.firewalls[backendNFT] != nil
	case *iptables:
		v = fw.variant()
		return v, v != ""
	}
	return "", false
}

// sweepLegacy removes what is left in the legacy variant's tables. These are nobody's to
// look into but its programs', whose look loads the tables: so only where the table raw
// is in use already, which it is on few nodes.
func (n *node) sweepLegacy(ctx context.Context, f family) error {
	names := map[family]string{ipv4: "ip_tables_names", ipv6: "ip6_tables_names"}
	inUse, _ := os.ReadFile("/proc/thread-self/net/" + names[f])
	if !slices.Contains(strings.Fields(string(inUse)), "raw") {
		return nil
	}
	x := &xtables{family: f, kind: "-legacy"}
	if !x.installed() {
		x.kind = ""
		if !x.installed() || x.know(ctx) != nil || x.nft() {
			if leftList(f) {
				p := f.program() + "-legacy"
				n.left.say("rules of nodecache may be left in the tables of %s, and that program is not here: on the node, remove them with: for t in raw filter; do %s-save -t $t | grep -v NODECACHE- | %s-restore -T $t; done", p, p, p)
			}
			return nil
		}
	}
	_, err := x.apply(ctx, nil, standing{})
	return err
}

// leftList tells whether rules of ours stand in some table, as the lists of the match
// recent show without a program.
func leftList(f family) bool {
	lists, err := os.ReadDir(recentDir)
	return err == nil && slices.ContainsFunc(lists, func(l fs.DirEntry) bool {
		text, ours := strings.CutPrefix(l.Name(), recentPrefix)
		a, err := netip.ParseAddr(text)
		return ours && err == nil && familyOf(a) == f
	})
}

func chainNames() string {
	var names []string
	for _, h := range hooks {
		names = append(names, h.table+" "+h.chain)
	}
	return strings.Join(names, ", ")
}

// removeFromNFT removes our chains and the jumps to them from what iptables-nft has in
// nf_tables, without its programs: they may not be here, and can't read every table.
func removeFromNFT(f family) error {
	conn, err := dialNFT()
	if err != nil {
		return err
	}
	defer conn.CloseLasting()
	return removeOver(conn, f)
}

func removeOver(conn *nftables.Conn, f family) error {
	var chains []*nftables.Chain
	var jumps []*nftables.Rule
	for _, h := range hooks {
		t := nftTable(f, h.table)
		c, err := conn.ListChain(t, h.chain)
		// A kernel without nf_tables does not know what is asked.
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
			continue
		}
		if err != nil {
			return fmt.Errorf("looking for the chain %s of the table %s: %w", h.chain, h.table, err)
		}
		c.Table = t
		chains = append(chains, c)
		from, err := conn.GetRules(t, &nftables.Chain{Name: h.builtin})
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("looking for what jumps to the chain %s of the table %s: %w", h.chain, h.table, err)
		}
		for _, r := range from {
			if jumpTo([]*nftables.Rule{r}, h.chain) == 0 {
				jumps = append(jumps, r)
			}
		}
	}
	if len(chains) == 0 {
		return nil
	}
	for _, r := range jumps {
		if err := conn.DelRule(r); err != nil {
			return fmt.Errorf("removing the jumps to nodecache's chains: %w", err)
		}
	}
	for _, c := range chains {
		conn.FlushChain(c)
		conn.DelChain(c)
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("removing nodecache's chains from iptables-nft's tables: %w", err)
	}
	return nil
}

func nftTable(f family, name string) *nftables.Table {
	if f == ipv6 {
		return &nftables.Table{Name: name, Family: nftables.TableFamilyIPv6}
	}
	return &nftables.Table{Name: name, Family: nftables.TableFamilyIPv4}
}
