package e2e

import (
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// What the EDNS compliance tests of ISC ask (RFC 6891), and what each answers.

// A complianceRow is a query, and what has to hold of its answer.
type complianceRow struct {
	dig, want string
	tcp       bool
	name      string // by default one that has a SOA record
	change    func(m *dns.Msg)
	ok        func(a *seenAnswer) bool
}

func ednsOf(version uint8, flags uint32, options ...dns.EDNS0) func(m *dns.Msg) {
	return func(m *dns.Msg) {
		edns(4096, false, options...)(m)
		o := m.IsEdns0()
		o.Hdr.Ttl |= flags
		o.SetVersion(version)
	}
}

func (a *seenAnswer) version() uint32 { return a.optTTL >> 16 & 0xff }
func (a *seenAnswer) do() bool        { return a.optTTL&0x8000 != 0 }

// answers tells whether it has the record, and an OPT record of version 0 with nothing but, perhaps, DO.
func (a *seenAnswer) answers() bool {
	return a.rcode == 0 && len(a.sections[0]) > 0 && a.opts == 1 && a.version() == 0 && a.optTTL&0x7fff == 0 && len(a.options) == 0
}

func (a *seenAnswer) badVersion() bool {
	return a.rcode == dns.RcodeBadVers && len(a.sections[0]) == 0 && a.opts == 1 && a.version() == 0 && a.optTTL&0x7fff == 0 && len(a.options) == 0
}

var unknownOption = &dns.EDNS0_LOCAL{Code: 100}

var complianceRows = []complianceRow{
	{dig: "+noedns", want: "NOERROR, the record, no OPT", change: func(*dns.Msg) {}, ok: func(a *seenAnswer) bool { return a.rcode == 0 && len(a.sections[0]) > 0 && a.opts == 0 }},
	{dig: "+noedns +norec", want: "the same", change: noRD, ok: func(a *seenAnswer) bool { return a.rcode == 0 && len(a.sections[0]) > 0 && a.opts == 0 }},
	{dig: "+edns=0", want: "NOERROR, the record, OPT of version 0", change: ednsOf(0, 0), ok: (*seenAnswer).answers},
	{dig: "+edns=1 +noednsneg", want: "BADVERS, no record, OPT of version 0", change: ednsOf(1, 0), ok: (*seenAnswer).badVersion},
	{dig: "+ednsopt=100", want: "NOERROR, the record, no such option back", change: ednsOf(0, 0, unknownOption), ok: (*seenAnswer).answers},
	{dig: "+edns=1 +ednsopt=100", want: "BADVERS, no option back", change: ednsOf(1, 0, unknownOption), ok: (*seenAnswer).badVersion},
	{dig: "+ednsflags=0x40", want: "NOERROR, the record, no flag back", change: ednsOf(0, 0x40), ok: (*seenAnswer).answers},
	{dig: "+ednsflags=0x4000", want: "the same", change: ednsOf(0, 0x4000), ok: (*seenAnswer).answers},
	{dig: "+edns=1 +ednsflags=0x40", want: "BADVERS, no flag back", change: ednsOf(1, 0x40), ok: (*seenAnswer).badVersion},
	{dig: "+dnssec", want: "NOERROR, the record, DO back", change: ednsOf(0, 0x8000), ok: func(a *seenAnswer) bool { return a.answers() && a.do() }},
	{dig: "+edns=1 +dnssec", want: "BADVERS, DO back", change: ednsOf(1, 0x8000), ok: func(a *seenAnswer) bool { return a.badVersion() && a.do() }},
	{dig: "+cookie +dnssec", want: "NOERROR, the record, DO back, a cookie or none", change: func(m *dns.Msg) {
		edns(4096, true, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0123456789abcdef"})(m)
	}, ok: func(a *seenAnswer) bool { return a.answers() && a.do() }},
	{dig: "+nsid +subnet=0/0 +expire +cookie", want: "NOERROR, the record", change: ednsOf(0, 0, &dns.EDNS0_NSID{Code: dns.EDNS0NSID}, &dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, Address: net.IPv4zero},
		&dns.EDNS0_EXPIRE{Code: dns.EDNS0EXPIRE, Empty: true}, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0123456789abcdef"}),
		ok: func(a *seenAnswer) bool {
			return a.rcode == 0 && len(a.sections[0]) > 0 && a.opts == 1 && a.version() == 0
		}},
	{dig: "+bufsize=512 +dnssec +ignore, a record of 1,300 bytes", want: "TC, no more than 512 bytes, OPT", name: "b1300-c.big.", change: edns(512, true), ok: func(a *seenAnswer) bool {
		return a.flags>>9&1 == 1 && a.size <= 512 && a.opts == 1 && a.do()
	}},
	{dig: "+noedns +ignore, the same", want: "TC, no more than 512 bytes", name: "b1300-c.big.", change: func(*dns.Msg) {}, ok: func(a *seenAnswer) bool { return a.flags>>9&1 == 1 && a.size <= 512 && a.opts == 0 }},
	{dig: "+bufsize=512 +dnssec +tcp, the same", want: "the record, no TC", tcp: true, name: "b1300-c.big.", change: edns(512, true), ok: func(a *seenAnswer) bool { return a.answers() && a.flags>>9&1 == 0 }},
	{dig: "+bufsize=0", want: "as with 512", name: "b600-c.big.", change: edns(0, false), ok: func(a *seenAnswer) bool { return a.flags>>9&1 == 1 && a.size <= 512 && a.opts == 1 }},
	{dig: "+edns=0 +tcp", want: "NOERROR, the record, OPT of version 0", tcp: true, change: ednsOf(0, 0), ok: (*seenAnswer).answers},
	{dig: "+edns=1 +tcp", want: "BADVERS", tcp: true, change: ednsOf(1, 0), ok: (*seenAnswer).badVersion},
	{dig: "two OPT records", want: "FORMERR", change: func(m *dns.Msg) { edns(1232, false)(m); m.Extra = append(m.Extra, m.Extra[0]) }, ok: func(a *seenAnswer) bool { return a.rcode == dns.RcodeFormatError }},
	{dig: "+opcode=15", want: "NOTIMP", change: func(m *dns.Msg) { m.Opcode = 15 }, ok: func(a *seenAnswer) bool { return a.rcode == dns.RcodeNotImplemented }},
	{dig: "type 1000, +edns", want: "NOERROR, no record", name: "x-c.types.", change: func(m *dns.Msg) { ednsOf(0, 0)(m); m.Question[0].Qtype = 1000 }, ok: func(a *seenAnswer) bool {
		return a.rcode == 0 && len(a.sections[0]) == 0 && a.opts == 1 && len(a.sections[1]) == 1
	}},
}

// complianceTable asks each row of everybody, three times, so that it comes from the cache and
// from a ready answer too.
func (n *node) complianceTable() (table string) {
	n.Helper()
	table = "| `dig` | Expected | ours | with `fastpath` | CoreDNS | unbound |\n|-|-|-|-|-|-|\n"
	for _, row := range complianceRows {
		name := row.name
		if name == "" {
			name = "t0-c.types."
		}
		q := dns.Question{Name: name + corpusZone, Qtype: dns.TypeSOA, Qclass: dns.ClassINET}
		if strings.Contains(name, "big") {
			q.Qtype = dns.TypeTXT
		}
		packet := message(q, row.change)
		var cells []string
		for _, who := range []int{answersOurs, answersFast, answersPlain, answersUnbound} {
			cell := "yes"
			a, err := n.asker(on(answersAddrs[who])[0])
			n.must(err)
			for range 3 {
				var b []byte
				if row.tcp {
					b, err = n.askTCP(on(answersAddrs[who])[0], packet, 10*time.Second)
				} else {
					var got [][]byte
					got, err = a.ask(10*time.Second, packet)
					b = got[0]
				}
				n.must(err)
				if seen, err := readAnswer(b); err != nil || !row.ok(seen) {
					cell = briefly(b)
				}
			}
			a.conn.Close()
			cells = append(cells, cell)
		}
		dig := "`" + row.dig + "`"
		if i := strings.IndexByte(row.dig, ','); i > 0 && row.dig[0] == '+' {
			dig = "`" + row.dig[:i] + "`" + row.dig[i:]
		} else if row.dig[0] != '+' {
			dig = row.dig
		}
		table += fmt.Sprintf("| %s | %s | %s |\n", dig, row.want, strings.Join(cells, " | "))
	}
	return table
}
