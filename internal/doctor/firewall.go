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
// answer, wherever it comes from and by whatever link; and where that is not so, those in
// which that of each of this node's pods is. Where some pods may be served nothing is said.
func firewallDrops(s Site) (found []string) {
	if len(s.Untracked) == 0 {
		return nil
	}
	links := podLinks()
	drops := look([]string{"raw", "mangle", "filter", "security"}, func(r *ruleset.Ruleset) map[string][]desired.Endpoint {
		drops := map[string][]desired.Endpoint{}
		for _, e := range s.Untracked {
			dropped := dropsOf(r, e, ruleset.Link{})
			of := ""
			if len(dropped) == 0 {
				dropped, of = dropsOfAll(r, e, links[e.Addr.Is4()]), " of this node's pods"
			}
			for d, at := range dropped {
				where := d.chain.String()
				if len(at) == 1 {
					where = at[0].String()
				}
				what := fmt.Sprintf("%s%s (%s)", d.what, of, where)
				drops[what] = append(drops[what], e)
			}
		}
		return drops
	})
	for _, what := range slices.Sorted(maps.Keys(drops)) {
		found = append(found, fmt.Sprintf("the firewall drops every %s: have it accept what comes to %s, and what comes from there, whatever the connection state, or pods get no answer", what, some(drops[what])))
	}
	return found
}

// dropping is a base chain in which queries are dropped, or answers.
type dropping struct {
	what  string
	chain ruleset.Chain
}

// dropsOf returns where each query to an endpoint of ours that comes in by a link, and each answer
// that leaves by it, is dropped for certain, with the places.
func dropsOf(r *ruleset.Ruleset, e desired.Endpoint, by ruleset.Link) map[dropping][]ruleset.Place {
	drops := map[dropping][]ruleset.Place{}
	query, answer, _ := ruleset.PacketsOf(e.Proto, netip.AddrPortFrom(e.Addr, e.Port))
	for _, at := range []struct {
		what string
		ruleset.Packet
		hook uint32
	}{
		{"query", query, unix.NF_INET_PRE_ROUTING},
		{"query", query, unix.NF_INET_LOCAL_IN},
		{"answer", answer, unix.NF_INET_LOCAL_OUT},
		{"answer", answer, unix.NF_INET_POST_ROUTING},
	} {
		at.Link = by
		for _, res := range r.Through(at.Packet, at.hook, "filter", "route") {
			if res.Drop && !res.Accept {
				drops[dropping{at.what, res.Chain}] = res.Places
			}
		}
	}
	return drops
}

// dropsOfAll is dropsOf for several links, of which there is none where one lets some pass.
func dropsOfAll(r *ruleset.Ruleset, e desired.Endpoint, links []ruleset.Link) map[dropping][]ruleset.Place {
	all := map[dropping][]ruleset.Place{}
	for _, l := range links {
		drops := dropsOf(r, e, l)
		if len(drops) == 0 {
			return nil
		}
		for d, places := range drops {
			for _, p := range places {
				if !slices.Contains(all[d], p) {
					all[d] = append(all[d], p)
				}
			}
		}
	}
	return all
}
