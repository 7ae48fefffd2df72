package fastpath

import (
	"slices"
	"strings"
	"testing"

	"github.com/coredns/coredns/plugin/cache/freq"
	"github.com/miekg/dns"
)

// laid returns an answer with these records, packed.
func laid(t *testing.T, compress bool, records ...string) laidOut {
	r := new(dns.Msg).SetReply(question("WwW.example.org.", dns.TypeA))
	r.Compress = compress
	for _, text := range records {
		rr, err := dns.NewRR(text)
		if err != nil {
			t.Fatal(err)
		}
		r.Answer = append(r.Answer, rr)
	}
	r.SetEdns0(1232, false)
	l, ok := layOut(packed(t, r))
	if !ok {
		t.Fatal("no layout")
	}
	l.pointers = compress
	return l
}

// What is turned has the same records, all orders come, and the message stays one.
func TestTurned(t *testing.T) {
	addresses := []string{"WwW.example.org. 30 IN A 192.0.2.1", "WwW.example.org. 30 IN A 192.0.2.2", "WwW.example.org. 30 IN AAAA 2001:db8::1"}
	mail := []string{"example.org. 30 IN MX 10 a.example.org.", "example.org. 30 IN MX 10 longer.example.org."}
	rest := []string{"WwW.example.org. 30 IN CNAME www.example.org.", "www.example.org. 30 IN TXT \"x\""}
	for _, c := range []struct {
		name     string
		compress bool
		records  []string
		orders   int // 0: not to be turned exactly
	}{
		{"addresses", false, addresses, 6},
		{"compressed addresses", true, addresses, 6},
		{"two", false, addresses[:2], 2},
		{"one", false, addresses[:1], 1},
		{"nothing", false, nil, 1},
		{"all kinds", false, slices.Concat(rest, addresses, mail), 12},
		{"compressed mail exchangers", true, mail, 0},
		{"compressed addresses of another name", true, []string{"b.example.org. 30 IN A 192.0.2.1", "b.example.org. 30 IN A 192.0.2.2"}, 0},
	} {
		l := laid(t, c.compress, c.records...)
		turns, ok := l.turned()
		if ok != (c.orders > 0) {
			t.Errorf("%s: it can be turned: %v", c.name, ok)
		}
		if !ok {
			continue
		}
		a := &answer{wire: l.wire, ttls: l.ttls(), turned: turns}
		q := packed(t, question("www.example.org.", dns.TypeA))
		orders := map[string]bool{}
		for range 1000 {
			out := make([]byte, len(l.wire))
			a.put(out, q, 7)
			var m dns.Msg
			if err := m.Unpack(out); err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
			var got []string
			for _, rr := range m.Answer {
				if rr.Header().Ttl != 7 {
					t.Fatalf("%s: %v", c.name, rr)
				}
				rr.Header().Ttl = 30
				got = append(got, rr.String())
			}
			orders[strings.Join(got, "\n")] = true
			want := strings.Split(strings.ReplaceAll(strings.Join(c.records, "\n"), " ", "\t"), "\n")
			for i := range got {
				got[i] = strings.ReplaceAll(got[i], " ", "\t")
			}
			slices.Sort(got)
			slices.Sort(want)
			if len(c.records) > 0 && !slices.Equal(got, want) {
				t.Fatalf("%s: %q, want %q", c.name, got, want)
			}
		}
		if len(orders) != c.orders {
			t.Errorf("%s: %d orders, want %d", c.name, len(orders), c.orders)
		}
	}
}

// An answer is given to each spelling of its question, with that spelling, where the DNS library
// would make the same of it.
func TestSpelled(t *testing.T) {
	for _, c := range []struct {
		name     string
		compress bool
		records  []string
		want     bool
	}{
		{"address", false, []string{"WwW.example.org. 30 IN A 192.0.2.1"}, true},
		{"compressed addresses", true, []string{"WwW.example.org. 30 IN A 192.0.2.1", "WwW.example.org. 30 IN A 192.0.2.2"}, true},
		{"alias", false, []string{"WwW.example.org. 30 IN CNAME b.Example.org.", "b.Example.org. 30 IN A 192.0.2.1"}, true},
		{"compressed alias", true, []string{"WwW.example.org. 30 IN CNAME b.example.org.", "b.example.org. 30 IN A 192.0.2.1"}, false},
	} {
		l := laid(t, c.compress, c.records...)
		asked := question("WwW.example.org.", dns.TypeA)
		a, _ := entry(t, 0)
		raw := packed(t, asked)
		a.key, a.wire, a.ttls = keyOf(raw, false), l.wire, l.ttls()
		a.spell(l, keyOf(raw, true))
		tab := newAnswerTable(64)
		tab.add(a, sinceEpoch())
		for _, name := range []string{"www.example.org.", "WWW.EXAMPLE.ORG.", "wWw.example.org.", "WwW.example.org."} {
			q := packed(t, question(name, dns.TypeA))
			got := tab.get(q)
			if want := c.want || name == "WwW.example.org."; (got != nil) != want {
				t.Errorf("%s: %s is known: %v", c.name, name, got != nil)
			}
			if got == nil {
				continue
			}
			out := make([]byte, len(l.wire))
			got.put(out, q, 30)
			want := new(dns.Msg).SetReply(question(name, dns.TypeA))
			want.Compress = c.compress
			for _, text := range c.records {
				want.Answer = append(want.Answer, parsed(dns.NewRR(strings.Replace(text, "WwW.example.org.", name, 1))))
			}
			want.SetEdns0(1232, false)
			if w := packed(t, want); string(out[2:]) != string(w[2:]) {
				t.Errorf("%s: %s gets %x, want %x", c.name, name, out, w)
			}
		}
		if other := packed(t, question("wwx.example.org.", dns.TypeA)); tab.get(other) != nil {
			t.Error("another name is answered")
		}
	}
}

// Clients that send options at which CoreDNS does not look get the answer of those who don't.
func TestOptionsThatAreIgnored(t *testing.T) {
	ask := func(options ...dns.EDNS0) []byte {
		m := question("name-0.example.org.", dns.TypeA).SetEdns0(1232, true)
		m.IsEdns0().Option = options
		return packed(t, m)
	}
	cookie := ask(&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0123456789abcdef"})
	a, _ := entry(t, 0)
	a.key = keyOf(cookie, false)
	tab := newAnswerTable(64)
	tab.add(a, sinceEpoch())
	for _, q := range [][]byte{ask(), cookie, ask(&dns.EDNS0_PADDING{Padding: make([]byte, 30)})} {
		if tab.get(q) != a {
			t.Errorf("%x is not answered", q)
		}
	}
	for _, q := range [][]byte{
		ask(&dns.EDNS0_NSID{Code: dns.EDNS0NSID}), ask(&dns.EDNS0_LOCAL{Code: 65001}), packed(t, question("name-0.example.org.", dns.TypeA)),
		packed(t, question("NAME-0.example.org.", dns.TypeA).SetEdns0(1232, true)), // there is no shield
	} {
		if tab.get(q) != nil {
			t.Errorf("%x is answered", q)
		}
	}
}

func parsed(rr dns.RR, err error) dns.RR {
	if err != nil {
		panic(err)
	}
	return rr
}

// The cache plugin gets to know of the hits that it has not seen, up to as many as it asks for.
func TestHitsAreMadeUpFor(t *testing.T) {
	a := &answer{every: 1000, urgent: 1 << 60, seen: new(freq.Freq), window: 1 << 40, wanted: 5}
	for range 100 {
		a.pass(10)
	}
	if h := a.seen.Hits(); h != 0 {
		t.Errorf("%d hits before it passes", h)
	}
	if !a.pass(5000) {
		t.Fatal("it does not pass")
	}
	if h := a.seen.Hits(); h != 5 {
		t.Errorf("%d hits are made up for, want 5", h)
	}
}
