package doctor

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/ruleset"
)

// xtablesNames are the tables of iptables, by which those of its variant nf_tables are known too.
var xtablesNames = []string{"raw", "mangle", "nat", "filter", "security"}

// ownChains begins the names of the chains that this program has in both variants.
const ownChains = "NODECACHE-"

// bothVariants finds rules of one IP version in tables of the legacy iptables and in those
// of iptables-nft. Packets pass both, but each program shows one only.
func bothVariants(Site) (found []string) {
	type seen map[bool]map[string]bool // by whether they are legacy: the tables with rules
	for _, f := range []struct {
		family  byte
		program string
	}{{unix.NFPROTO_IPV4, "iptables"}, {unix.NFPROTO_IPV6, "ip6tables"}} {
		in := look(xtablesNames, func(r *ruleset.Ruleset) seen {
			in := seen{true: {}, false: {}}
			for _, c := range r.Chains {
				if c.Family != f.family || !slices.Contains(xtablesNames, c.Table) || strings.HasPrefix(c.Name, ownChains) || in[c.Legacy][c.Table] {
					continue
				}
				rules, _ := r.Rules(c)
				in[c.Legacy][c.Table] = slices.ContainsFunc(rules, func(rule ruleset.Rule) bool { return !jumpsToOurs(rule) })
			}
			for _, tables := range in {
				maps.DeleteFunc(tables, func(_ string, has bool) bool { return !has })
			}
			return in
		})
		if len(in[true]) > 0 && len(in[false]) > 0 {
			list := func(tables map[string]bool) string { return strings.Join(slices.Sorted(maps.Keys(tables)), ", ") }
			found = append(found, fmt.Sprintf("programs of this node write rules with both variants of iptables, the legacy one (%[1]s-legacy: %[2]s) and nf_tables (%[1]s-nft: %[3]s): a packet has to pass the rules of both, while each program sees those of its own only, so that what one accepts the other may drop: have all use one variant (update-alternatives --config %[1]s), and remove the rules of the other",
				f.program, list(in[true]), list(in[false])))
		}
	}
	return found
}

// jumpsToOurs tells whether a rule leads to one of this program's chains.
func jumpsToOurs(rule ruleset.Rule) bool {
	return slices.ContainsFunc(rule.Exprs, func(e any) bool {
		to := ""
		switch e := e.(type) {
		case *expr.Verdict:
			to = e.Chain
		case *expr.Target: // of the legacy iptables, which writes jumps like targets
			to = e.Name
		}
		return strings.HasPrefix(to, ownChains)
	})
}
