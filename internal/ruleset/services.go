package ruleset

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// ClusterIPs returns the addresses that Services with endpoints have on this node, by the names
// (namespace/name) that kube-proxy gives its rules. In IPVS mode, and where something else has
// the place of kube-proxy, there are none.
func (r *Ruleset) ClusterIPs() map[string][]netip.Addr {
	all := map[string][]netip.Addr{}
	add := func(name string, a netip.Addr) {
		if name != "" && a.IsValid() && !slices.Contains(all[name], a) {
			all[name] = append(all[name], a)
		}
	}
	for _, c := range r.Chains {
		switch {
		case c.Table == "nat" && c.Name == "KUBE-SERVICES":
			rules, _ := r.Rules(c)
			for _, rule := range rules {
				add(serviceOfComment(rule.Comment), rule.destination())
			}
		case c.Table == "kube-proxy" && c.Name == "services":
			ips, _ := r.set(c, "service-ips")
			for _, e := range ips.Elements {
				if e.Verdict != nil && slices.Equal(e.From, e.To) {
					add(serviceOfChain(e.Verdict.Chain), firstAddr(c, e.From))
				}
			}
		}
	}
	return all
}

// serviceOfComment reads "namespace/name:port cluster IP", where the port may have no name.
func serviceOfComment(comment string) string {
	s, ok := strings.CutSuffix(comment, " cluster IP")
	if !ok || strings.Count(s, "/") != 1 {
		return ""
	}
	s, _, _ = strings.Cut(s, ":")
	return s
}

// serviceOfChain reads service-HASH-namespace/name/protocol/port, or local- in its place.
func serviceOfChain(chain string) string {
	kind, rest, _ := strings.Cut(chain, "-")
	_, rest, _ = strings.Cut(rest, "-")
	words := strings.Split(rest, "/")
	if kind != "service" && kind != "local" || len(words) != 4 {
		return ""
	}
	return words[0] + "/" + words[1]
}

// firstAddr is what the key of a map begins with.
func firstAddr(c Chain, key []byte) netip.Addr {
	n := 4
	if c.Family == unix.NFPROTO_IPV6 {
		n = 16
	}
	a, _ := netip.AddrFromSlice(key[:min(n, len(key))])
	return a
}

// destination is the one address that a rule is for, or none.
func (r Rule) destination() (a netip.Addr) {
	var at *expr.Payload
	whole := true
	for _, e := range r.Exprs {
		switch e := e.(type) {
		case *expr.Payload:
			at, whole = nil, true
			if e.Base == expr.PayloadBaseNetworkHeader && (e.Offset == 16 && e.Len == 4 || e.Offset == 24 && e.Len == 16) {
				at = e
			}
		case *expr.Bitwise:
			whole = !slices.ContainsFunc(e.Mask, func(b byte) bool { return b != 0xff })
		case *expr.Cmp:
			if at != nil && whole && e.Op == expr.CmpOpEq && len(e.Data) == int(at.Len) {
				a, _ = netip.AddrFromSlice(e.Data)
			}
			at = nil
		}
	}
	return a
}
