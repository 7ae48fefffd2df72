package fastpath

import (
	"bytes"
	"slices"
	"testing"

	"github.com/coredns/coredns/plugin/test"
	"github.com/miekg/dns"
)

func TestPlainQuery(t *testing.T) {
	edns := func(change func(o *dns.OPT)) []byte {
		m := question("example.org.", dns.TypeA).SetEdns0(1232, true)
		change(m.IsEdns0())
		return packed(t, m)
	}
	changed := func(at int, v byte) []byte {
		q := packed(t, question("example.org.", dns.TypeA))
		q[at] = v
		return q
	}
	plain := packed(t, question("example.org.", dns.TypeA))
	for _, c := range []struct {
		what string
		q    []byte
		want bool
	}{
		{"plain", plain, true},
		{"the root", packed(t, question(".", dns.TypeNS)), true},
		{"all flags but QR and opcode", changed(3, 0xff), true},
		{"EDNS", edns(func(*dns.OPT) {}), true},
		{"EDNS with a cookie", edns(func(o *dns.OPT) { o.Option = append(o.Option, &dns.EDNS0_COOKIE{Code: 10, Cookie: "0011223344556677"}) }), true},
		{"EDNS with a cookie and padding", edns(func(o *dns.OPT) {
			o.Option = append(o.Option, &dns.EDNS0_PADDING{Padding: make([]byte, 9)}, &dns.EDNS0_COOKIE{Code: 10, Cookie: "00"})
		}), true},
		{"EDNS with an option that is answered", edns(func(o *dns.OPT) { o.Option = append(o.Option, &dns.EDNS0_NSID{Code: 3}) }), false},
		{"EDNS with an option that goes beyond the end", func() []byte {
			q := edns(func(o *dns.OPT) { o.Option = append(o.Option, &dns.EDNS0_PADDING{Padding: make([]byte, 9)}) })
			q[len(q)-10] = 10
			return q
		}(), false},
		{"EDNS of version 1", edns(func(o *dns.OPT) { o.SetVersion(1) }), false},
		{"EDNS with an extended rcode", func() []byte {
			q := edns(func(*dns.OPT) {})
			q[len(q)-6] = 1
			return q
		}(), false},
		{"a response", changed(2, 0x80), false},
		{"another opcode", changed(2, 0x10), false},
		{"two questions", changed(5, 2), false},
		{"an answer", changed(7, 1), false},
		{"an authority", changed(9, 1), false},
		{"an additional that is not there", changed(11, 1), false},
		{"a compressed name", changed(12, 0xc0), false},
		{"another class", changed(len(plain)-1, 3), false},
		{"a byte too many", append(bytes.Clone(plain), 0), false},
		{"a byte too few", plain[:len(plain)-1], false},
		{"nothing", nil, false},
		{"no end of the name", append(bytes.Clone(plain[:12]), bytes.Repeat([]byte{1, 'a'}, 200)...), false},
	} {
		if got := plainQuery(c.q); got != c.want {
			t.Errorf("%s: plain is %v, want %v", c.what, got, c.want)
		}
	}
}

// What is taken for a plain query is one to the DNS library too.
func FuzzPlainQuery(f *testing.F) {
	f.Add(packed(f, question("example.org.", dns.TypeA)))
	f.Add(packed(f, question(".", dns.TypeNS).SetEdns0(1232, true)))
	f.Fuzz(func(t *testing.T, q []byte) {
		if !plainQuery(q) {
			return
		}
		var m dns.Msg
		if err := m.Unpack(q); err != nil {
			t.Fatalf("%x is no message: %v", q, err)
		}
		o := m.IsEdns0()
		if m.Response || m.Opcode != dns.OpcodeQuery || len(m.Question) != 1 || m.Question[0].Qclass != dns.ClassINET ||
			len(m.Answer)+len(m.Ns) > 0 || len(m.Extra) > 1 || (o == nil) != (len(m.Extra) == 0) ||
			o != nil && (slices.ContainsFunc(o.Option, func(e dns.EDNS0) bool { return !ignored(e.Option()) }) || o.Version() != 0) || m.Len() != len(q) {
			t.Fatalf("%x is not plain: %v", q, &m)
		}
	})
}

// In what the DNS library packs, changing the bytes where layOut says that the TTLs are changes
// these and nothing else.
func FuzzLayOut(f *testing.F) {
	m := question("example.org.", dns.TypeMX).SetEdns0(1232, true)
	m.Answer = []dns.RR{test.MX("example.org. 30 IN MX 10 mail.example.org.")}
	m.Extra = append(m.Extra, test.A("mail.example.org. 30 IN A 192.0.2.1"))
	m.Compress = true
	f.Add(packed(f, m))
	f.Fuzz(func(t *testing.T, b []byte) {
		layOut(b)
		var before, after dns.Msg
		if before.Unpack(b) != nil || len(before.Question) > 1 {
			return
		}
		before.Compress = len(b)%2 == 0
		b, err := before.Pack()
		if err != nil || before.Unpack(b) != nil {
			return
		}
		l, ok := layOut(b)
		if !ok {
			t.Fatalf("%x has records whose TTLs are not found", b)
		}
		const ttl = 0x01020304
		a := answer{wire: b, ttls: l.ttls()}
		out := make([]byte, len(b))
		a.put(out, b, ttl)
		if err := after.Unpack(out); err != nil {
			t.Fatalf("%x has become %x: %v", b, out, err)
		}
		for _, section := range [][]dns.RR{before.Answer, before.Ns, before.Extra} {
			for _, rr := range section {
				if rr.Header().Rrtype != dns.TypeOPT {
					rr.Header().Ttl = ttl
				}
			}
		}
		if before.String() != after.String() {
			t.Fatalf("%x has become %x", b, out)
		}
	})
}
