package e2e

import (
	"slices"
	"strings"

	"github.com/miekg/dns"
)

// The kinds of differences that there may be, each with what it comes to for a client. Any other one
// fails `make answers`.

// A kindOfDifference is differences that have one reason.
type kindOfDifference struct {
	what, first, second string // for the table
	judge               string
	is                  func(q *corpusQuestion, d difference) bool
}

func in(names ...string) func(q *corpusQuestion, d difference) bool {
	return func(_ *corpusQuestion, d difference) bool { return slices.Contains(names, d.in) }
}

func isSection(d difference) bool {
	return d.in == "answer section" || d.in == "authority" || d.in == "additional"
}

// isTTL, isSpelling and isReason are the same whomever one compares with.
func isTTL(_ *corpusQuestion, d difference) bool { return isSection(d) && d.first == "TTL" }
func isSpelling(_ *corpusQuestion, d difference) bool {
	return isSection(d) && d.first == "owners spelled"
}
func isReason(_ *corpusQuestion, d difference) bool {
	return d.in == "EDNS options" && strings.HasPrefix(d.first, "15:")
}

// isMalformed tells of what comes malformed from the upstream.
func isMalformed(q *corpusQuestion, _ difference) bool { return q.kind == "broken" }

// metaTypes are those of which there are no records in zones.
var metaTypes = []uint16{0, dns.TypeOPT, dns.TypeNXNAME, dns.TypeTKEY, dns.TypeTSIG, dns.TypeMAILA, dns.TypeMAILB, 65535}

// againstPlain is how the shipped plugins shield and upstream answer otherwise than cache and forward alone.
var againstPlain = []kindOfDifference{
	{
		"owner names", "as the client spells the name", "as the first who asked", "On purpose: who asks in random letter case (0x20) has his own name back.",
		isSpelling,
	},
	{"class other than IN", "REFUSED", "handed on", "On purpose: a cache has no answers of other classes; an upstream's `version.bind` is not this server's.", func(q *corpusQuestion, d difference) bool {
		return d.in == "rcode" && d.first == "REFUSED" && strings.HasPrefix(q.shape, "class")
	}},
	{
		"a record that the DNS library can't read or write", "handed on as it came", "SERVFAIL, TC, or no answer at all", "Ours is better: HTTPS records with keys out of order are out there, and the client gets the others beside them.",
		func(q *corpusQuestion, d difference) bool {
			return q.kind == "broken" && (d.in == "rcode" && d.first == "NOERROR" || d.in == "flag TC" && d.first == "0" || d.in == "answer" && d.second == "none")
		},
	},
	{
		"an old type's record that is malformed, or a message cut off", "SERVFAIL", "TC, and SERVFAIL over TCP; FORMERR with two questions", "The same in the end, a query earlier.",
		func(q *corpusQuestion, d difference) bool {
			return q.kind == "broken" && d.in == "rcode" && d.first == "SERVFAIL"
		},
	},
	{
		"an answer that the upstream truncates", "whole, if it fits compressed", "TC", "Ours is better: *upstream* asks over TCP at once, which saves the client that.",
		func(_ *corpusQuestion, d difference) bool { return d.in == "flag TC" && d.first == "0" },
	},
	{
		"a failure, with EDNS", "the reason (RFC 8914)", "none", "On purpose: `dig` shows why.",
		isReason,
	},
	{
		"RA of a failure", "0", "1", "Harmless: *shield* leaves failures to CoreDNS, which sets no RA. Clients look at it in answers without an error only.",
		func(_ *corpusQuestion, d difference) bool { return d.in == "flag RA" && d.first == "0" },
	},
	{
		"RD where the upstream does not give it back", "the client's", "the upstream's", "Ours is right (RFC 1035).",
		in("flag RD"),
	},
	{
		"EDNS flags without a meaning", "cleared", "given back", "Ours is right (RFC 6891).",
		in("EDNS flags"),
	},
	{
		"TTLs of what can't be cached, and of aliases to nowhere", "the real ones", "5 s, or those of the first answer", "On purpose: see *shield*.",
		isTTL,
	},
}

// againstUnbound is how unbound answers otherwise.
var againstUnbound = []kindOfDifference{
	{
		"what comes malformed from the upstream", "handed on where that can be, else SERVFAIL", "the same, of other types", "Ours hands on what has no names in it, unbound what has nothing to parse. Neither invents an answer, but that the DNS library fills in what a record of a few types lacks at its end.",
		isMalformed,
	},
	{"size in OPT", "the client's own", "1232", "Harmless: it says what a server can receive, which clients do not go by.", in("EDNS size")},
	{"TTL", "one for all records of an answer, bounded by *cache*", "each record's own", "Harmless: never longer than the record's, but where the upstream's TTL has its highest bit set (0 by RFC 2181).", isTTL},
	{
		"spelling of names", "the owner as asked, others as the upstream says", "all as compression makes them", "Harmless.",
		isSpelling,
	},
	{"a query with TC, records where none belong, or TSIG; a type that is no record's", "answered", "FORMERR", "Harmless: no client asks so.", func(q *corpusQuestion, d difference) bool {
		return d.in == "rcode" && d.second == "FORMERR" && (q.odd || strings.HasPrefix(q.shape, "aa-tc") || slices.Contains(metaTypes, q.Qtype))
	}},
	{"a query without RD", "answered, and asked for", "REFUSED", "As CoreDNS: pods' queries are not those of strangers.", func(q *corpusQuestion, d difference) bool {
		return d.in == "rcode" && d.second == "REFUSED" && strings.HasPrefix(q.shape, "no-rd")
	}},
	{"class ANY", "REFUSED", "answered as IN", "Harmless: no client asks so.", func(q *corpusQuestion, d difference) bool {
		return d.in == "rcode" && d.first == "REFUSED" && q.shape == "class 255"
	}},
	{"NOTIFY", "what the upstream says", "REFUSED", "Harmless: it is for servers that have zones.", func(q *corpusQuestion, d difference) bool {
		return d.in == "rcode" && d.second == "REFUSED" && q.shape == "opcode 4"
	}},
	{"AXFR and IXFR", "what the upstream says", "REFUSED", "Harmless: it is the upstream's to refuse.", func(q *corpusQuestion, d difference) bool {
		return d.in == "rcode" && d.second == "REFUSED" && (q.Qtype == dns.TypeAXFR || q.Qtype == dns.TypeIXFR || strings.HasSuffix(q.shape, "xfr"))
	}},
	{"RCODEs other than NOERROR and NXDOMAIN", "the upstream's", "SERVFAIL; of an extended one its last 4 bits", "Harmless: stubs take all of them for a failure, and tools see the real one.", func(q *corpusQuestion, d difference) bool {
		return q.kind == "rcode" && (d.in == "rcode" || d.in == "flag AA" || d.in == "flag RA")
	}},
	{"truncated over TCP too", "handed on", "SERVFAIL", "The same: no answer either way.", func(q *corpusQuestion, d difference) bool {
		return q.kind == "flags" && q.arg == "f5" && d.in == "rcode"
	}},
	{"aliases in a loop, and more than 11", "handed on", "SERVFAIL", "Ours is as good as the upstream's: stubs follow what is in the answer.", func(q *corpusQuestion, d difference) bool {
		return q.kind == "chain" && d.in == "rcode" && d.second == "SERVFAIL"
	}},
	{"an alias or a DNAME that the upstream does not follow", "handed on", "followed", "As *forward*: a recursive upstream follows them. One that does not leaves the client with half an answer.", func(q *corpusQuestion, d difference) bool {
		return (q.kind == "chain" || q.kind == "dname") && (isSection(d) || d.in == "rcode")
	}},
	{"AD", "the upstream's, if the client asks with AD or DO", "0 without a validator", "As CoreDNS: it is worth what the way to the upstream is.", in("flag AD")},
	{"AA, RA and Z of the upstream", "handed on", "its own", "Harmless.", func(q *corpusQuestion, d difference) bool {
		return q.kind == "flags" && (d.in == "flag AA" || d.in == "flag RA" || d.in == "flag Z")
	}},
	{"RA of a failure", "0", "1", "Harmless, as above.", func(q *corpusQuestion, d difference) bool { return d.in == "flag RA" && d.first == "0" }},
	{"a failure, with EDNS", "the reason (RFC 8914)", "none by default", "Ours says more.", isReason},
	{"authority and additional", "the upstream's", "what goes with the answer", "Harmless.", func(_ *corpusQuestion, d difference) bool {
		return d.in == "authority" || d.in == "additional"
	}},
	{"ANY", "the upstream's", "what is in the cache", "Harmless (RFC 8482).", func(q *corpusQuestion, d difference) bool {
		return q.Qtype == dns.TypeANY && (d.in == "answer section" || d.in == "rcode")
	}},
	{"a query that can't be read", "FORMERR, the header alone", "FORMERR, with a question counted that is not there", "Ours is right.", func(q *corpusQuestion, d difference) bool {
		return q.odd && d.in == "answer" && d.second == "unreadable"
	}},
	{"another opcode, or not one question", "NOTIMP or FORMERR without the question", "with it", "Harmless.", func(q *corpusQuestion, d difference) bool {
		return q.odd && d.in == "question"
	}},
	{"an EDNS option of a query that is malformed", "FORMERR", "ignored", "As RFC 6891 has it, and as CoreDNS.", func(q *corpusQuestion, d difference) bool {
		return q.odd && d.in == "rcode" && d.first == "FORMERR"
	}},
	{"DO of BADVERS", "0", "given back", "CoreDNS's: see [what it could mend](upstream.md). No client of version 1 is known.", func(q *corpusQuestion, d difference) bool { return d.in == "DO" && d.first == "0" }},
	{"more than 4096 bytes over UDP", "sent, if the client takes so much", "TC", "unbound's `max-udp-size`. The client has asked for it.", func(q *corpusQuestion, d difference) bool {
		return d.in == "flag TC" && d.first == "0" && q.kind == "big"
	}},
}
