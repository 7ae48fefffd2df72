package doctor

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/ruleset"
)

// ForeignRuleFirst is the fault that rules of ours stand and are not in force.
const ForeignRuleFirst = "foreign_rule_first"

// ownChain tells whether a chain is one of nodecache's, this process's or another's.
func ownChain(c ruleset.Chain) bool {
	return strings.HasPrefix(c.Name, "NODECACHE-") || c.Family == unix.NFPROTO_INET && strings.HasPrefix(c.Table, "nodecache-")
}

// foreignRuleFirst finds rules of others by which every query, or every answer, is tracked
// although our rules stand, and those that a backend has given way to.
func foreignRuleFirst(s Site) (found []string) {
	why := map[string][]desired.Endpoint{}
	bad := map[desired.Endpoint]bool{}
	note := func(what string, e desired.Endpoint) {
		why[what] = append(why[what], e)
		bad[e] = true
	}
	tracked := look([]string{"raw"}, func(r *ruleset.Ruleset) map[string][]desired.Endpoint {
		tracked := map[string][]desired.Endpoint{}
		for _, e := range s.Untracked {
			query, answer, own := ruleset.PacketsOf(e.Proto, netip.AddrPortFrom(e.Addr, e.Port))
			for _, p := range []struct {
				ruleset.Packet
				hook uint32
				what string
			}{{query, unix.NF_INET_PRE_ROUTING, "queries"}, {answer, unix.NF_INET_LOCAL_OUT, "answers"}, {own, unix.NF_INET_LOCAL_OUT, "queries of the node's own programs"}} {
				// Where no rule is named ours lack, and are looked after by the next check, as is
				// what has come before them.
				t := r.Tracking(p.Packet, p.hook, ownChain)
				if t.Tracked && !t.Untracked && len(t.By) > 0 && (s.Ordered == nil || !s.Ordered(t.By[0].Chain)) {
					what := t.By[0].String() + " has all " + p.what
					tracked[what] = append(tracked[what], e)
				}
			}
		}
		return tracked
	})
	for what, es := range tracked {
		for _, e := range es {
			note(what+" tracked, although nodecache's rules stand, for", e)
		}
	}
	for _, e := range slices.SortedFunc(maps.Keys(s.Displaced), desired.Compare) {
		if !slices.Contains(s.Untracked, e) {
			continue
		}
		note(s.Displaced[e]+", where another program has put it again and again, for", e)
	}
	for _, what := range slices.Sorted(maps.Keys(why)) {
		found = append(found, fmt.Sprintf("%s %s: have that rule come after nodecache's, or spare what comes to these addresses and from them; until then a full connection tracking table loses queries, and pods may ask past this cache", what, some(why[what])))
	}
	if s.NotInForce != nil {
		s.NotInForce(len(bad))
	}
	return found
}
