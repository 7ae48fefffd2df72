// Package shield is a CoreDNS plugin that stands around the plugin cache. In front of it, it
// has everybody ask in one form, so that what one client has asked decides nobody else's
// answer; behind it, it remembers what upstreams have failed at and what they have denied.
//
// front.go is what stands before cache, back.go what stands behind it, memory.go what the
// two of them know of questions.
package shield

import (
	"strings"

	"github.com/miekg/dns"
)

const name = "shield"

// A key is what the cache plugin goes by. The name is in lower case.
type key struct {
	name          string
	qtype, qclass uint16
	do, cd        bool
}

// concerns tells whether the cache plugin would look at a query.
func concerns(r *dns.Msg) bool {
	if r.Opcode != dns.OpcodeQuery || len(r.Question) != 1 || r.IsTsig() != nil {
		return false
	}
	t := r.Question[0].Qtype
	return t != dns.TypeAXFR && t != dns.TypeIXFR
}

func keyOf(r *dns.Msg) key {
	q := r.Question[0]
	k := key{name: strings.ToLower(q.Name), qtype: q.Qtype, qclass: q.Qclass, cd: r.CheckingDisabled}
	if o := r.IsEdns0(); o != nil {
		k.do = o.Do()
	}
	return k
}

// isAlias tells whether a record leads from the question's name to another one.
func isAlias(rr dns.RR) bool {
	switch rr := rr.(type) {
	case *dns.CNAME, *dns.DNAME:
		return true
	case *dns.RRSIG:
		return rr.TypeCovered == dns.TypeCNAME || rr.TypeCovered == dns.TypeDNAME
	}
	return false
}

// soaOf returns the SOA record of a denial, or nil.
func soaOf(m *dns.Msg) *dns.SOA {
	for _, rr := range m.Ns {
		if soa, ok := rr.(*dns.SOA); ok {
			return soa
		}
	}
	return nil
}

// answers tells whether a response has a record of the type that was asked for.
func answers(m *dns.Msg, qtype uint16) bool {
	for _, rr := range m.Answer {
		if rr.Header().Rrtype == qtype || qtype == dns.TypeANY {
			return true
		}
	}
	return false
}

// denies tells whether a response says that what was asked for is not there.
func denies(m *dns.Msg, qtype uint16) bool {
	return m.Rcode == dns.RcodeNameError || m.Rcode == dns.RcodeSuccess && soaOf(m) != nil && !answers(m, qtype)
}

// keepable tells whether the cache plugin can keep a response. What it can't keep does not
// replace what it had before either, and that would be answered again as stale.
func keepable(m *dns.Msg, qtype uint16) bool {
	for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			if h := rr.Header(); h.Ttl == 0 && h.Rrtype != dns.TypeOPT {
				return false
			}
		}
	}
	if soaOf(m) != nil {
		return true
	}
	return m.Rcode == dns.RcodeSuccess && (len(m.Answer) == 0 || answers(m, qtype))
}
