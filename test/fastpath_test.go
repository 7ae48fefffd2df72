package e2e

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// fastZone has names of every kind.
func fastZone() string {
	var z strings.Builder
	z.WriteString("$ORIGIN fast.test.\n$TTL 60\n@ 30 IN SOA ns hostmaster 1 3600 600 86400 20\n@ IN NS ns\nns IN A 192.0.2.53\nns IN AAAA 2001:db8::53\n")
	z.WriteString("@ IN MX 10 mail\nmail IN A 192.0.2.25\n_dns._udp IN SRV 0 5 53 ns\n_dns._udp IN SRV 1 5 53 mail\n@ IN CAA 0 issue \"ca.test\"\n@ IN HTTPS 1 . alpn=h2\n@ IN TYPE65280 \\# 4 01020304\n")
	z.WriteString("cname IN CNAME cname2\ncname2 5 IN CNAME cname3\ncname3 IN CNAME host1\ndangling IN CNAME nowhere\nout IN CNAME www.elsewhere.test.\n*.wild IN A 192.0.2.99\n*.wild IN TXT wild\nsub IN NS ns.sub\nns.sub IN A 192.0.2.54\n")
	expires := time.Now().AddDate(1, 0, 0).UTC().Format("20060102150405")
	for i := range 8 {
		fmt.Fprintf(&z, "host%d %d IN A 192.0.2.%d\nhost%d IN AAAA 2001:db8::%d\nhost%d IN TXT \"text %d\"\n", i, 4+7*i, i+1, i, i+1, i, i)
		fmt.Fprintf(&z, "host%d %d IN RRSIG A 13 3 %d %s 20200101000000 1 fast.test. c2lnbmF0dXJl\n", i, 4+7*i, 4+7*i, expires)
	}
	for i := range 60 {
		fmt.Fprintf(&z, "many IN A 198.51.100.%d\n", i+1)
		fmt.Fprintf(&z, "text IN TXT \"%s %d\"\n", strings.Repeat("x", 40+i), i)
	}
	for i := range 4 {
		fmt.Fprintf(&z, "four IN A 198.51.100.%d\n", i+1)
	}
	z.WriteString("two IN A 198.51.100.1\ntwo IN A 198.51.100.2\ntwo IN AAAA 2001:db8::1\n@ IN MX 20 mail2\n@ IN MX 10 ns\nmail2 IN A 192.0.2.26\n")
	for i := range 20 {
		fmt.Fprintf(&z, "twenty IN A 198.51.100.%d\n", i+1)
	}
	z.WriteString(strings.Repeat("a", 63) + "." + strings.Repeat("b", 63) + "." + strings.Repeat("c", 63) + " IN A 192.0.2.77\n")
	return z.String()
}

// fastNames are names with the types to ask for them.
var fastNames = func() (qs []dns.Question) {
	long := strings.Repeat("a", 63) + "." + strings.Repeat("b", 63) + "." + strings.Repeat("c", 63)
	for _, name := range []string{
		"", "ns.", "mail.", "_dns._udp.", "cname.", "cname2.", "dangling.", "out.", "a.wild.", "b.c.wild.", "www.sub.",
		"host0.", "host1.", "host2.", "host3.", "host4.", "host5.", "host6.", "host7.", "many.", "text.", "twenty.", "four.", "two.", "nowhere.", "no.such.name.", long + ".",
	} {
		for _, t := range []uint16{
			dns.TypeA, dns.TypeAAAA, dns.TypeMX, dns.TypeTXT, dns.TypeSRV, dns.TypeNS, dns.TypeSOA, dns.TypeCNAME, dns.TypePTR,
			dns.TypeHTTPS, dns.TypeCAA, dns.TypeDS, dns.TypeRRSIG, dns.TypeANY, 65280,
		} {
			qs = append(qs, dns.Question{Name: name + "fast.test.", Qtype: t, Qclass: dns.ClassINET})
		}
	}
	return append(qs, dns.Question{Name: ".", Qtype: dns.TypeNS, Qclass: dns.ClassINET}, dns.Question{Name: "other.", Qtype: dns.TypeA, Qclass: dns.ClassINET})
}()

// fastNode is a node that serves the zone twice: with fastpath on the link-local
// address and without on the ClusterIP.
func (n *node) fastCorefile(cache string) string {
	zone := filepath.Join(n.Dir, "fast.zone")
	n.must(os.WriteFile(zone, []byte(fastZone()), 0o644))
	block := func(bind, properties string) string {
		return ".:53 {\n    bind " + bind + "\n    nodecache {\n        " + properties + "\n    }\n" +
			"    prometheus 169.254.20.10:9253\n    errors\n    " + cache + "\n    file " + zone + " fast.test\n}\n"
	}
	return block("169.254.20.10 fd00:20::10", "fastpath") + block("10.96.0.10 fd00:96::10", "")
}

// fastNumber returns a number of the metrics at the prometheus plugin's address.
func (n *node) fastNumber(name string) float64 {
	n.Helper()
	page, err := get(n.Node, "http://169.254.20.10:9253/metrics")
	n.must(err)
	m := regexp.MustCompile("(?m)^" + name + " (.*)$").FindStringSubmatch(page)
	if m == nil {
		n.Fatalf("no metric %s", name)
	}
	v, err := strconv.ParseFloat(m[1], 64)
	n.must(err)
	return v
}

// Every answer from a ready answer is byte for byte what the ordinary way gives at that
// moment: a query with a byte too many is the same to CoreDNS and never gets a ready
// answer. LAB_FASTPATH_QUERIES is how many queries are compared.
func TestFastpathAnswersTheSame(t *testing.T) {
	rewrites := `cache 3600
    shield
    rewrite name exact host0.fast.test host1.fast.test
    rewrite continue name prefix host2 four
    rewrite name suffix .out.fast.test. .fast.test. answer auto
    rewrite name regex (cname)2\.(.*) {1}.{2} answer name (.*)\.fast\.test {1}.elsewhere.test
    rewrite name substring wenty ext
    rewrite type MX TXT`
	for _, c := range []struct{ name, lines string }{
		{"cache", "cache 3600"}, {"rewrite", rewrites}, {"shield-and-loadbalance", "cache 3600 {\n prefetch 10 1m 10%\n }\n    shield\n    loadbalance"},
		{"manifest", "cache {\n success 9984 30 0\n denial 9984 5 0\n prefetch 10 1m 10%\n serve_stale 1h verify 1s 5s\n servfail 0\n }\n    shield\n    loadbalance"},
	} {
		t.Run(c.name, func(t *testing.T) { answersTheSame(t, c.lines) })
	}
}

func answersTheSame(t *testing.T, lines string) {
	n := newNode(t, backend{lab.NFT, ""})
	n.serve(n.fastCorefile(lines))
	total := scale(20000)
	if s := os.Getenv("LAB_FASTPATH_QUERIES"); s != "" {
		var err error
		total, err = strconv.Atoi(s)
		n.must(err)
	}
	const together = 10
	var asked, different atomic.Int64
	var wg sync.WaitGroup
	for w := range 8 {
		to := on(lab.LinkLocal)[0]
		if w%2 == 1 {
			to = on(lab.Local6)[0]
		}
		wg.Go(func() {
			a, err := n.asker(to)
			if err != nil {
				n.Error(err)
				return
			}
			defer a.conn.Close()
			r := rand.New(rand.NewPCG(1, uint64(w)))
			burst := make([][]byte, together)
			for different.Load() < 10 && int(asked.Load()) < total {
				q := fastNames[r.IntN(len(fastNames))]
				s := fastShapes[r.IntN(len(fastShapes))]
				plain := s.query(q)
				ordinary := append(bytes.Clone(plain), 0)
				for i := range burst {
					burst[i] = plain
				}
				// The first makes the cache have it, so that those that follow are hits.
				var got [4][][]byte
				for i, qs := range [][][]byte{{plain}, {ordinary}, burst, {ordinary}} {
					if got[i], err = a.ask(10*time.Second, qs...); err != nil {
						n.Error(err)
						return
					}
				}
				before, after := got[1][0], got[3][0]
				if before == nil || after == nil {
					n.Errorf("%s %v: no answer the ordinary way", s.name, q)
					return
				}
				for _, b := range got[2] {
					asked.Add(1)
					if b == nil || !bytes.Equal(b, before) && !bytes.Equal(b, after) && !between(b, before, after) && !turned(b, before) && !turned(b, after) {
						different.Add(1)
						n.Errorf("%s %v:\n\tgot    %x\n\tbefore %x\n\tafter  %x", s.name, q, b, before, after)
						break
					}
				}
			}
		})
	}
	wg.Wait()
	hits := n.fastNumber("coredns_nodecache_fastpath_hits_total")
	n.Logf("%d queries of %d shapes and %d questions compared, %d different; %.0f were ready answers",
		asked.Load(), len(fastShapes), len(fastNames), different.Load(), hits)
	if hits < float64(asked.Load())/3 {
		n.Errorf("only %.0f of %d came from ready answers", hits, asked.Load())
	}
}

// turned tells whether an answer is another one but for what loadbalance turns: the addresses of
// a section, and the mail exchangers.
func turned(b, other []byte) bool {
	var texts [2]string
	for i, wire := range [][]byte{b, other} {
		var m dns.Msg
		if m.Unpack(append([]byte{0, 0}, wire...)) != nil {
			return false
		}
		if m.Truncated {
			m.Answer = nil // those that have come first
		}
		for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
			kinds := map[string][]int{}
			for at, rr := range section {
				switch rr.Header().Rrtype {
				case dns.TypeA, dns.TypeAAAA:
					kinds["address"] = append(kinds["address"], at)
				case dns.TypeMX:
					kinds["mx"] = append(kinds["mx"], at)
				}
			}
			for _, ats := range kinds {
				var rrs []dns.RR
				for _, at := range ats {
					rrs = append(rrs, section[at])
				}
				slices.SortFunc(rrs, func(a, b dns.RR) int { return strings.Compare(a.String(), b.String()) })
				for k, at := range ats {
					section[at] = rrs[k]
				}
			}
		}
		texts[i] = m.String()
	}
	return len(b) == len(other) && texts[0] == texts[1]
}

// between tells whether an answer's TTLs are between those of two others that it equals
// otherwise: a second and more has passed.
func between(b, before, after []byte) bool {
	var m [3]dns.Msg
	for i, wire := range [][]byte{b, before, after} {
		if m[i].Unpack(append([]byte{0, 0}, wire...)) != nil {
			return false
		}
	}
	ttl := func(m *dns.Msg) (t uint32) {
		for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
			for _, rr := range section {
				if rr.Header().Rrtype != dns.TypeOPT {
					t, rr.Header().Ttl = rr.Header().Ttl, 0
				}
			}
		}
		return t
	}
	t, most, least := ttl(&m[0]), ttl(&m[1]), ttl(&m[2])
	if least > most && t > most {
		most = 3600 // it was prefetched or has expired
	} else if least > most {
		least = 0 // not yet then
	}
	var wires [2][]byte
	for i := range wires {
		m[i].Compress = false
		w, err := m[i].Pack()
		if err != nil {
			return false
		}
		wires[i] = w[2:]
	}
	return t < most && t > least && turned(wires[0], wires[1])
}

// What is not of the usual kind goes to CoreDNS as it came, and gets the same answer as
// where there is no fastpath, or none.
func TestFastpathHandsOnWhatIsOdd(t *testing.T) {
	n := newNode(t, backend{lab.NFT, ""})
	n.serve(n.fastCorefile("cache 3600"))
	for _, pair := range [][2]netip.Addr{{lab.LinkLocal, lab.ClusterIP}, {lab.Local6, lab.ClusterIP6}} {
		fast, err := n.asker(on(pair[0])[0])
		n.must(err)
		defer fast.conn.Close()
		plain, err := n.asker(on(pair[1])[0])
		n.must(err)
		defer plain.conn.Close()
		silent := 0
		for _, s := range oddShapes {
			for _, q := range []dns.Question{fastNames[0], fastNames[12*15], {Name: "nowhere.fast.test.", Qtype: dns.TypeA, Qclass: 1}} {
				packet := s.query(q)
				want, err := plain.ask(200*time.Millisecond, packet)
				n.must(err)
				patience := 10 * time.Second
				if want[0] == nil {
					patience = 200 * time.Millisecond
					silent++
				}
				got, err := fast.ask(patience, packet)
				n.must(err)
				if !bytes.Equal(withoutTTLs(got[0]), withoutTTLs(want[0])) {
					n.Errorf("%s %v:\n\tsent %x\n\tgot  %x\n\twant %x", s.name, q, packet, got[0], want[0])
				}
			}
		}
		n.Logf("%d packets, of which %d get no answer", 3*len(oddShapes), silent)
	}
	if hits := n.fastNumber("coredns_nodecache_fastpath_hits_total"); hits > 0 {
		n.Errorf("%.0f were ready answers", hits)
	}
}

func withoutTTLs(wire []byte) []byte {
	var m dns.Msg
	if wire == nil || m.Unpack(append([]byte{0, 0}, wire...)) != nil {
		return wire
	}
	for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			if rr.Header().Rrtype != dns.TypeOPT {
				rr.Header().Ttl = 0
			}
		}
	}
	b, err := m.Pack()
	if err != nil {
		return wire
	}
	return append(b, m.String()...)
}

// Every query counts as it would without.
func TestFastpathCountsTheSame(t *testing.T) {
	n := newNode(t, backend{lab.NFT, ""})
	n.serve(n.fastCorefile("cache 3600\n    shield\n    loadbalance"))
	for _, pair := range [][2]netip.Addr{{lab.LinkLocal, lab.ClusterIP}, {lab.Local6, lab.ClusterIP6}} {
		for _, addr := range pair {
			a, err := n.asker(on(addr)[0])
			n.must(err)
			defer a.conn.Close()
			for i, q := range fastNames {
				if strings.HasPrefix(q.Name, "host0") {
					continue // it expires on the way
				}
				for range 6 {
					got, err := a.ask(10*time.Second, fastShapes[i%len(fastShapes)].query(q))
					n.must(err)
					if got[0] == nil {
						n.Fatalf("%v: no answer", q)
					}
				}
			}
		}
	}
	if hits := n.fastNumber("coredns_nodecache_fastpath_hits_total"); hits < float64(len(fastNames)) {
		n.Errorf("only %.0f were ready answers", hits)
	}
	page, err := get(n.Node, "http://169.254.20.10:9253/metrics")
	n.must(err)
	series := func(addr string) (lines []string) {
		for _, l := range strings.Split(page, "\n") {
			if strings.Contains(l, `server="dns://`+addr+`:53"`) && !strings.HasPrefix(l, "#") && !strings.Contains(l, "duration_seconds_bucket") &&
				!strings.Contains(l, "duration_seconds_sum") && !strings.Contains(l, "plugin_enabled") {
				lines = append(lines, strings.ReplaceAll(l, addr, "ADDR"))
			}
		}
		return lines
	}
	for _, pair := range [][2]string{{"169.254.20.10", "10.96.0.10"}, {"[fd00:20::10]", "[fd00:96::10]"}} {
		got, want := series(pair[0]), series(pair[1])
		if len(want) < 50 {
			n.Errorf("only %d series of %s", len(want), pair[1])
		}
		n.same("the metrics of "+pair[0], strings.Join(want, "\n"), strings.Join(got, "\n"))
	}
}

// A name that is asked for again and again is prefetched before its TTL is over.
func TestFastpathPrefetches(t *testing.T) {
	n := newNode(t, backend{lab.NFT, ""})
	n.serve(strings.ReplaceAll(n.fastCorefile("cache 3600 {\n prefetch 5 10s 30%\n }"), "errors\n", "errors\n"))
	a, err := n.asker(on(lab.LinkLocal)[0])
	n.must(err)
	defer a.conn.Close()
	q := message(dns.Question{Name: "host1.fast.test.", Qtype: dns.TypeA, Qclass: 1}, func(*dns.Msg) {}) // TTL 11 s
	prefetches := `coredns_cache_prefetch_total{server="dns://169.254.20.10:53",view="",zones="."}`
	misses := `coredns_cache_misses_total{server="dns://169.254.20.10:53",view="",zones="."}`
	lowest := uint32(1 << 31)
	for begun := time.Now(); time.Since(begun) < 26*time.Second; time.Sleep(5 * time.Millisecond) {
		got, err := a.ask(10*time.Second, q)
		n.must(err)
		var m dns.Msg
		n.must(m.Unpack(append([]byte{0, 0}, got[0]...)))
		lowest = min(lowest, m.Answer[0].Header().Ttl)
	}
	page, err := get(n.Node, "http://169.254.20.10:9253/metrics")
	n.must(err)
	value := func(series string) string {
		_, rest, _ := strings.Cut(page, "\n"+series+" ")
		v, _, _ := strings.Cut(rest, "\n")
		return v
	}
	n.Logf("%s prefetches, %s misses, lowest TTL %d, %.0f ready answers", value(prefetches), value(misses), lowest,
		n.fastNumber("coredns_nodecache_fastpath_hits_total"))
	if p, _ := strconv.Atoi(value(prefetches)); p < 2 {
		n.Errorf("%s prefetches in 26 s, want at least 2", value(prefetches))
	}
	if value(misses) != "1" {
		n.Errorf("%s misses, want 1, the first", value(misses))
	}
	if hits := n.fastNumber("coredns_nodecache_fastpath_hits_total"); hits < 500 {
		n.Errorf("only %.0f were ready answers", hits)
	}
}

// Of several addresses each is first as often as the others, as loadbalance has it, with and
// without fastpath, and however the name is spelled.
func TestFastpathTurnsAddresses(t *testing.T) {
	n := newNode(t, backend{lab.NFT, ""})
	n.serve(n.fastCorefile("cache 3600\n    shield\n    loadbalance"))
	for _, addr := range []netip.Addr{lab.LinkLocal, lab.ClusterIP} {
		for _, name := range []string{"four.fast.test.", "two.fast.test."} {
			a, err := n.asker(on(addr)[0])
			n.must(err)
			first, all := map[string]int{}, map[string]bool{}
			const asked = 2000
			for range asked / 10 {
				var burst [][]byte
				for i := range 10 {
					spelled := strings.Replace(name, "fast", []string{"fast", "FaSt", "fASt"}[i%3], 1)
					burst = append(burst, message(dns.Question{Name: spelled, Qtype: dns.TypeA, Qclass: 1}, func(*dns.Msg) {}))
				}
				got, err := a.ask(10*time.Second, burst...)
				n.must(err)
				for i, b := range got {
					var m dns.Msg
					if b == nil || m.Unpack(append([]byte{0, 0}, b...)) != nil || len(m.Answer) == 0 {
						n.Fatalf("%s: %x", name, b)
					}
					order := ""
					for _, rr := range m.Answer {
						if owner := rr.Header().Name; !bytes.Contains(burst[i], []byte(strings.Split(owner, ".")[1])) {
							n.Fatalf("%x is answered with the owner %s", burst[i], owner)
						}
						order += rr.(*dns.A).A.String() + " "
					}
					first[m.Answer[0].(*dns.A).A.String()]++
					all[order] = true
				}
			}
			a.conn.Close()
			addresses, orders := map[string]int{"four.fast.test.": 4, "two.fast.test.": 2}[name], map[string]int{"four.fast.test.": 24, "two.fast.test.": 2}[name]
			if len(first) != addresses || len(all) != orders {
				n.Errorf("%v %s: %d addresses and %d orders, want %d and %d", addr, name, len(first), len(all), addresses, orders)
			}
			for ip, count := range first {
				if share := asked / addresses; count < share*3/4 || count > share*5/4 {
					n.Errorf("%v %s: of %d, %s is first %d times", addr, name, asked, ip, count)
				}
			}
		}
	}
	if hits := n.fastNumber("coredns_nodecache_fastpath_hits_total"); hits < 3900 {
		n.Errorf("%.0f of 4000 were ready answers", hits)
	}
}

// A question that the plugin rewrite changes gets no ready answer, not even one whose name others
// are changed into, so that the cache plugin has an item for it.
func TestFastpathLeavesWhatIsRewritten(t *testing.T) {
	n := newNode(t, backend{lab.NFT, ""})
	n.serve(n.fastCorefile("cache 3600\n    rewrite name exact host3.fast.test host0.fast.test\n    rewrite name exact host0.fast.test host1.fast.test"))
	a, err := n.asker(on(lab.LinkLocal)[0])
	n.must(err)
	defer a.conn.Close()
	ready := func(name string) float64 {
		q := message(dns.Question{Name: name, Qtype: dns.TypeAAAA, Qclass: 1}, func(*dns.Msg) {})
		for range 3 {
			got, err := a.ask(10*time.Second, slices.Repeat([][]byte{q}, 10)...)
			n.must(err)
			if slices.ContainsFunc(got, func(b []byte) bool { return b == nil }) {
				n.Fatalf("%s is not answered", name)
			}
		}
		return n.fastNumber("coredns_nodecache_fastpath_hits_total")
	}
	for range 5 {
		for _, name := range []string{"host3.fast.test.", "host0.fast.test."} {
			if hits := ready(name); hits > 0 {
				n.Fatalf("%.0f ready answers after %s", hits, name)
			}
		}
	}
	if !eventually(func() bool { return ready("host2.fast.test.") > 0 }) {
		n.Error("a question that no rule changes gets no ready answer")
	}
}

// What the plugin log has to see goes there each time, and the rest does not.
func TestFastpathLogsWhatItHasTo(t *testing.T) {
	n := newNode(t, backend{lab.NFT, ""})
	p := n.serve(n.fastCorefile("cache 3600\n    log {\n        class denial error\n    }"))
	a, err := n.asker(on(lab.LinkLocal)[0])
	n.must(err)
	defer a.conn.Close()
	ask := func(name string) {
		_, err := a.ask(10*time.Second, message(dns.Question{Name: name, Qtype: dns.TypeA, Qclass: 1}, func(*dns.Msg) {}))
		n.must(err)
	}
	n.readySoon(func() { ask("host7.fast.test.") })
	n.readyAnswers(10, func() {
		for range 10 {
			ask("host7.fast.test.")
			ask("nowhere.fast.test.")
		}
	})
	lines := func(name string) int { return strings.Count(p.Log(), " IN "+name+" udp ") }
	if !eventually(func() bool { return lines("nowhere.fast.test.") == 10 }) {
		n.Errorf("%d lines for 10 denials", lines("nowhere.fast.test."))
	}
	if got := lines("host7.fast.test."); got > 0 {
		n.Errorf("%d lines for answers", got)
	}
}

// A question is a ready answer from its second asking on, also with prefetch: the third comes
// from there, or one soon after it.
func TestFastpathIsReadySoon(t *testing.T) {
	n := newNode(t, backend{lab.NFT, ""})
	n.serve(n.fastCorefile("cache 3600 {\n prefetch 10 1h 10%\n }"))
	a, err := n.asker(on(lab.LinkLocal)[0])
	n.must(err)
	defer a.conn.Close()
	ask := func(i int) {
		_, err := a.ask(10*time.Second, message(dns.Question{Name: fmt.Sprintf("n%d.wild.fast.test.", i), Qtype: dns.TypeA, Qclass: 1}, func(*dns.Msg) {}))
		n.must(err)
	}
	const names = 10
	asked := 0
	for i := range names {
		asked += n.readySoon(func() { ask(i) })
		n.readyAnswers(10, func() {
			for range 10 {
				ask(i)
			}
		})
	}
	if asked < 3*names || asked > 5*names {
		n.Errorf("%d names had ready answers after asking %d times, want 3 times each and seldom more", names, asked)
	}
}

// Reloads that turn fastpath on and off, with another answer each time: no query is
// lost, and none gets an answer of a configuration that is no longer in force.
func TestFastpathReloads(t *testing.T) {
	forBackends(t, func(n *node) {
		corefile := func(i int) string {
			properties := []string{"fastpath"}
			if i%3 == 1 {
				properties = nil
			}
			zone := fmt.Sprintf("    template IN A answer.test {\n        answer \"{{ .Name }} 3600 IN A 192.0.2.%d\"\n    }\n", i)
			return strings.Replace(n.block(".:53", allAddrs, properties...), "    errors\n", "    errors\n"+zone, 1)
		}
		p := n.serve(corefile(0))
		loads := n.start(n.everywhere(scale(2000), addrs...)...)
		n.sent(loads, 1)
		q := message(dns.Question{Name: "x.answer.test.", Qtype: dns.TypeA, Qclass: 1}, func(*dns.Msg) {})
		for i := range max(scale(12), 7) {
			if i > 0 {
				if i%4 == 2 { // one that fails changes nothing
					if err := p.Reload(corefile(200+i) + plainBlock("taken.:5300", "203.0.113.1")); err == nil {
						n.Fatal("the reload succeeded")
					}
					n.answer(q, fmt.Sprintf("192.0.2.%d", i-1))
				}
				p.reload(corefile(i))
			}
			n.answer(q, fmt.Sprintf("192.0.2.%d", i))
			n.sent(loads, 1)
		}
		n.stop(loads)
		p.exit(syscall.SIGTERM)
	})
}

// answer checks that a query has one answer on every address, asked 20 times from
// each of several ports.
func (n *node) answer(q []byte, want string) {
	n.Helper()
	for _, to := range on(addrs...) {
		for range 4 {
			a, err := n.asker(to)
			n.must(err)
			burst := make([][]byte, 20)
			for i := range burst {
				burst[i] = q
			}
			got, err := a.ask(10*time.Second, burst...)
			a.conn.Close()
			n.must(err)
			for _, b := range got {
				var m dns.Msg
				if b == nil || m.Unpack(append([]byte{0, 0}, b...)) != nil || len(m.Answer) != 1 {
					n.Fatalf("%v: got %x", to, b)
				}
				if ip := m.Answer[0].(*dns.A).A.String(); ip != want {
					n.Fatalf("%v: the answer is %s, want %s", to, ip, want)
				}
			}
		}
	}
}
