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
	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
)

// nodeCacheComment begins the comments of the rules that node-cache of kubernetes/dns
// writes (since 1.22.6).
const nodeCacheComment = "NodeLocal DNS Cache"

// look returns what f finds in the packet filters. A look that fails finds nothing.
func look[T any](legacy []string, f func(*ruleset.Ruleset) T) (found T) {
	err := ruleset.Look(legacy, func(r *ruleset.Ruleset) { found = f(r) })
	if err != nil {
		log.Debugf("%v", err)
		var nothing T
		return nothing
	}
	return found
}

// rulesOfNodeCache finds NOTRACK rules of node-cache for our addresses. They match
// whether somebody listens or not.
func rulesOfNodeCache(s Site) []string {
	found := look([]string{"raw"}, func(r *ruleset.Ruleset) (found []netip.Addr) {
		for _, c := range r.Chains {
			if c.Table != "raw" || c.Name != "PREROUTING" || c.Family == unix.NFPROTO_INET {
				continue
			}
			rules, _ := r.Rules(c)
			for _, rule := range rules {
				if !strings.Contains(rule.Comment, nodeCacheComment) {
					continue
				}
				for a := range s.Addrs {
					if rule.Names(a) && !slices.Contains(found, a) {
						found = append(found, a)
					}
				}
			}
		}
		return found
	})
	if len(found) == 0 {
		return nil
	}
	slices.SortFunc(found, netip.Addr.Compare)
	return []string{fmt.Sprintf("node-cache's rules (%q) for %s stand in the table raw, and take queries out of connection tracking even when nobody listens, so that the cluster can't answer in this cache's place: when node-cache has left this node for good, remove them with: for t in raw filter; do iptables-save -t $t | sed -n \"/%s/s/^-A/iptables -t $t -D/p\"; done | sh (and the same with ip6tables)",
		nodeCacheComment, some(found), nodeCacheComment)}
}

// sharedPort finds programs that are not nodecache on an address and port of ours.
// With SO_REUSEPORT and the same user the kernel lets them, and gives them a share of
// the queries.
func sharedPort(s Site) (found []string) {
	udp := slices.DeleteFunc(slices.Clone(s.Listeners), func(e desired.Endpoint) bool { return e.Proto != "udp" })
	by := sockets.Strangers(udp)
	if len(by) == 0 {
		return nil
	}
	// Asked after the look, so that it is known of all that the look can have seen.
	serves, known := s.Others()
	if !known {
		return nil
	}
	for _, e := range udp {
		if by[e] != "" && !serves[e] {
			found = append(found, fmt.Sprintf("%s is served%s too, which takes a share of its queries and loses them when it ends: stop that program, unless this is a change from it to this cache", e, by[e]))
		}
	}
	return found
}

// firewallDrops finds chains in which every query that is not tracked is dropped, or every
// answer, wherever it comes from and by whatever link. Where some may pass nothing is
// said.
func firewallDrops(s Site) (found []string) {
	if len(s.Untracked) == 0 {
		return nil
	}
	drops := look([]string{"raw", "mangle", "filter", "security"}, func(r *ruleset.Ruleset) map[string][]desired.Endpoint {
		drops := map[string][]desired.Endpoint{}
		note := func(what string, e desired.Endpoint, results []ruleset.Result) {
			for _, res := range results {
				if !res.Drop || res.Accept {
					continue
				}
				at := res.Chain.String()
				if len(res.Places) == 1 {
					at = res.Places[0].String()
				}
				drops[what+" ("+at+")"] = append(drops[what+" ("+at+")"], e)
			}
		}
		for _, e := range s.Untracked {
			query, answer, _ := ruleset.PacketsOf(e.Proto, netip.AddrPortFrom(e.Addr, e.Port))
			note("query", e, r.Through(query, unix.NF_INET_PRE_ROUTING, "filter"))
			note("query", e, r.Through(query, unix.NF_INET_LOCAL_IN, "filter"))
			note("answer", e, r.Through(answer, unix.NF_INET_LOCAL_OUT, "filter", "route"))
			note("answer", e, r.Through(answer, unix.NF_INET_POST_ROUTING, "filter"))
		}
		return drops
	})
	for _, what := range slices.Sorted(maps.Keys(drops)) {
		found = append(found, fmt.Sprintf("the firewall drops every %s: have it accept what comes to %s, and what comes from there, whatever the connection state, or pods get no answer", what, some(drops[what])))
	}
	return found
}
