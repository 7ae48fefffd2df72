package e2e

import (
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// An authority is an upstream that answers as a test says, and remembers what it was asked.
type authority struct {
	mu     sync.Mutex
	answer map[string]func(r, m *dns.Msg) *dns.Msg // by the name, "" for all others; nil: silence
	asked  map[string]int
}

const authorityAt = "10.0.2.2:5300"

// authority starts one on the cluster's side. It answers nothing yet.
func (n *node) authority() *authority {
	n.Helper()
	a := &authority{answer: map[string]func(r, m *dns.Msg) *dns.Msg{"": silent}, asked: map[string]int{}}
	n.must(n.DNS.Do(func() error {
		packets, err := net.ListenPacket("udp", authorityAt)
		if err != nil {
			return err
		}
		listener, err := net.Listen("tcp", authorityAt)
		if err != nil {
			return err
		}
		for _, s := range []*dns.Server{{PacketConn: packets, Handler: a}, {Listener: listener, Handler: a, MaxTCPQueries: -1}} {
			go s.ActivateAndServe()
		}
		n.Cleanup(func() { packets.Close(); listener.Close() })
		return nil
	}))
	return a
}

// ServeDNS implements dns.Handler.
func (a *authority) ServeDNS(w dns.ResponseWriter, r *dns.Msg) {
	m := new(dns.Msg)
	m.SetReply(r)
	name := strings.ToLower(r.Question[0].Name)
	a.mu.Lock()
	a.asked[name]++
	answer := a.answer[name]
	if answer == nil {
		answer = a.answer[""]
	}
	a.mu.Unlock()
	if m = answer(r, m); m != nil {
		w.WriteMsg(m)
	}
}

// answers changes what is answered from now on, for a name.
func (a *authority) answers(name string, f func(r, m *dns.Msg) *dns.Msg) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.answer[name] = f
}

// queries returns how often a name has been asked for.
func (a *authority) queries(name string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.asked[name]
}

func silent(_, _ *dns.Msg) *dns.Msg { return nil }

func refuses(rcode int) func(r, m *dns.Msg) *dns.Msg {
	return func(_, m *dns.Msg) *dns.Msg {
		m.Rcode = rcode
		return m
	}
}

// zone answers with these records, of which $NAME is the name that was asked for; those of
// the type SOA go to the authority section.
func zone(rcode int, records ...string) func(r, m *dns.Msg) *dns.Msg {
	return func(r, m *dns.Msg) *dns.Msg {
		m.Rcode = rcode
		for _, text := range records {
			rr, err := dns.NewRR(strings.ReplaceAll(text, "$NAME", r.Question[0].Name))
			if err != nil {
				panic(err)
			}
			if rr.Header().Rrtype == dns.TypeSOA {
				m.Ns = append(m.Ns, rr)
			} else {
				m.Answer = append(m.Answer, rr)
			}
		}
		return m
	}
}

// soa is that of a denial with this TTL.
func soa(ttl, minimum int) string {
	return fmt.Sprintf("shield.test. %d IN SOA ns.shield.test. hostmaster.shield.test. 1 3600 600 86400 %d", ttl, minimum)
}

// shielded runs a test with and without fastpath, and with upstream in the place of forward. There is a new upstream for each, and what is
// asked goes to the address.
func shielded(t *testing.T, test func(n *node, a *authority, at netip.Addr)) {
	forward := "forward . " + authorityAt + " {\n        prefer_udp\n        max_fails 0\n    }"
	for _, c := range []struct{ name, property, asks string }{
		{"ordinary", "", forward}, {"fastpath", "fastpath", forward}, {"upstream", "", "upstream . " + authorityAt + " {\n        prefer_udp\n    }"},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t, backend{lab.NFT, "nftables"})
			a := n.authority()
			n.serve(".:53 {\n    bind 169.254.20.10\n    nodecache {\n        firewall nftables\n        " + c.property + "\n    }\n" +
				"    prometheus 169.254.20.10:9253\n    errors\n    cache {\n        success 9984 30 0\n        denial 9984 5 0\n        prefetch 10 1m 10%\n" +
				"        serve_stale 1h verify 1s 30s\n        servfail 0\n    }\n    shield\n" +
				"    " + c.asks + "\n}\n")
			test(n, a, lab.LinkLocal)
		})
	}
}

// query returns the answer to a query from the pod.
func (n *node) query(to netip.Addr, name string, qtype uint16, change ...func(m *dns.Msg)) *dns.Msg {
	n.Helper()
	m := new(dns.Msg)
	n.must(m.Unpack(n.packed(to, name, qtype, change...)))
	return m
}

// packed is that answer as it came, with the ID 0.
func (n *node) packed(to netip.Addr, name string, qtype uint16, change ...func(m *dns.Msg)) []byte {
	n.Helper()
	q := message(dns.Question{Name: name, Qtype: qtype, Qclass: dns.ClassINET}, func(m *dns.Msg) {
		for _, c := range change {
			c(m)
		}
	})
	a, err := n.asker(on(to)[0])
	n.must(err)
	defer a.conn.Close()
	got, err := a.ask(20*time.Second, q)
	n.must(err)
	if got[0] == nil {
		n.Fatalf("%s: no answer", name)
	}
	return append([]byte{0, 0}, got[0]...)
}

// said is what an answer comes to: its rcode, and the records of the answer section without
// their owners and TTLs.
func said(m *dns.Msg) string {
	words := []string{dns.RcodeToString[m.Rcode]}
	for _, rr := range m.Answer {
		words = append(words, strings.Fields(rr.String())[4])
	}
	return strings.Join(words, " ")
}

func noRD(m *dns.Msg) { m.RecursionDesired = false }
func cd(m *dns.Msg)   { m.CheckingDisabled = true }

func subnet(family uint16, mask uint8, ip string) *dns.EDNS0_SUBNET {
	return &dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: family, SourceNetmask: mask, Address: net.ParseIP(ip)}
}

// What one client asks in its own way decides nobody else's answer: an upstream sees all
// questions for the same thing alike.
func TestShieldClientsAreAlike(t *testing.T) {
	shielded(t, func(n *node, a *authority, at netip.Addr) {
		a.answers("", func(r, m *dns.Msg) *dns.Msg {
			o := r.IsEdns0()
			if !r.RecursionDesired || o != nil && len(o.Option) > 0 || r.Question[0].Name != strings.ToLower(r.Question[0].Name) || r.Zero || r.Truncated {
				return zone(0, "$NAME 30 IN A 192.0.2.66")(r, m) // what is for this client alone
			}
			return zone(0, "$NAME 30 IN A 192.0.2.1")(r, m)
		})
		for i, way := range []func(m *dns.Msg){
			edns(1232, false, subnet(1, 24, "198.51.100.0")), edns(1232, false, subnet(2, 56, "2001:db8::")), edns(1232, true, subnet(1, 0, "0.0.0.0")),
			edns(1232, false, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0123456789abcdef"}),
			edns(4096, false, &dns.EDNS0_LOCAL{Code: 65001, Data: []byte{1, 2, 3, 4, 5, 6}}), // a client's hardware address
			noRD, func(m *dns.Msg) { m.Zero, m.Truncated = true, true },
			func(m *dns.Msg) { m.Question[0].Name = strings.ToUpper(m.Question[0].Name) },
		} {
			name := fmt.Sprintf("way%d.shield.test.", i)
			first := n.query(at, name, dns.TypeA, way)
			for range 4 {
				for _, m := range []*dns.Msg{first, n.query(at, name, dns.TypeA), n.query(at, name, dns.TypeA, edns(1232, i == 2)), n.query(at, name, dns.TypeA, way)} {
					if said(m) != "NOERROR 192.0.2.1" {
						n.Errorf("way %d: %s", i, said(m))
					}
				}
			}
			if o := first.IsEdns0(); o != nil && len(o.Option) > 0 {
				n.Errorf("way %d: the answer has options: %v", i, o)
			}
		}
		if m := n.query(at, "way5.shield.test.", dns.TypeA, noRD); m.RecursionDesired {
			n.Error("an answer has RD, which its query had not")
		}
	})
}

// The answer has the name as it was asked for, whoever has asked before.
func TestShieldLetterCase(t *testing.T) {
	shielded(t, func(n *node, a *authority, at netip.Addr) {
		a.answers("", func(r, m *dns.Msg) *dns.Msg {
			if r.Question[0].Qtype == dns.TypeTXT {
				return zone(dns.RcodeNameError, soa(30, 30))(r, m)
			}
			return zone(0, "$NAME 30 IN CNAME host.shield.test.", "host.shield.test. 30 IN A 192.0.2.1")(r, m)
		})
		for range 5 {
			for _, name := range []string{"WwW.ShIeLd.TeSt.", "www.shield.test.", "WWW.SHIELD.TEST.", "www.shield.tesT."} {
				m := n.query(at, name, dns.TypeA)
				if len(m.Answer) != 2 || m.Question[0].Name != name || m.Answer[0].Header().Name != name || m.Answer[1].Header().Name != "host.shield.test." {
					n.Errorf("%s: %v", name, m)
				}
				if m := n.query(at, name, dns.TypeTXT); m.Rcode != dns.RcodeNameError || m.Question[0].Name != name {
					n.Errorf("%s: %v", name, m)
				}
			}
		}
		if asked := a.queries("www.shield.test."); asked != 2 {
			n.Errorf("the upstream was asked %d times, want 2", asked)
		}
	})
}

// An answer of TTL 0 is for the one who has asked: the next one gets what is so then, also
// where there is an answer from before.
func TestShieldTTLZero(t *testing.T) {
	becomes := map[string]func(r, m *dns.Msg) *dns.Msg{
		"NOERROR 192.0.2.2":            zone(0, "$NAME 0 IN A 192.0.2.2"),
		"NOERROR":                      zone(0, soa(30, 0)),
		"NXDOMAIN":                     zone(dns.RcodeNameError, soa(0, 30)),
		"NOERROR h.example. 192.0.2.3": zone(0, "$NAME 30 IN CNAME h.example.", "h.example. 0 IN A 192.0.2.3"),
		"NXDOMAIN other.example.":      zone(dns.RcodeNameError, "$NAME 0 IN CNAME other.example.", soa(30, 30)),
		"NOERROR nowhere.example.":     zone(0, "$NAME 30 IN CNAME nowhere.example."), // an answer that is no answer
	}
	shielded(t, func(n *node, a *authority, at netip.Addr) {
		var wg sync.WaitGroup
		for want, answer := range becomes {
			wg.Go(func() { n.becomesTTLZero(a, at, fmt.Sprintf("zero%d.shield.test.", len(want)), want, answer) })
		}
		wg.Wait()
	})
}

func (n *node) becomesTTLZero(a *authority, at netip.Addr, name, want string, answer func(r, m *dns.Msg) *dns.Msg) {
	ask := func() string { return said(n.query(at, name, dns.TypeA)) }
	a.answers(name, zone(0, "$NAME 1 IN A 192.0.2.1"))
	if m := n.query(at, name, dns.TypeA); said(m) != "NOERROR 192.0.2.1" || m.Answer[0].Header().Ttl != 1 {
		n.Errorf("TTL 1: %v", m)
	}
	a.answers(name, answer)
	if !eventually(func() bool { return ask() == want }) {
		n.Errorf("never becomes %s", want)
	}
	// From now on it is that for everybody, at the same time too.
	had, wrong := a.queries(name), atomic.Int64{}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 25 {
				if ask() != want {
					wrong.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if asked := a.queries(name) - had; asked < 100 || wrong.Load() > 0 {
		n.Errorf("%s: the upstream was asked %d times for 100 queries, of which %d got something else", want, asked, wrong.Load())
	}
	a.answers(name, refuses(dns.RcodeServerFailure))
	for range 5 {
		if got := ask(); got != "SERVFAIL" {
			n.Errorf("%s, while its server fails: %s", want, got)
		}
	}
	a.answers(name, zone(0, "$NAME 30 IN A 192.0.2.9"))
	if !eventually(func() bool { return ask() == "NOERROR 192.0.2.9" }) {
		n.Errorf("%s: never comes back", want)
	}
	had = a.queries(name)
	for range 10 {
		ask()
	}
	if asked := a.queries(name) - had; asked > 1 {
		n.Errorf("an answer of TTL 30 is asked for %d times", asked)
	}
}

// What was known to be gone stays gone while its server fails, and is there again when the
// server says so.
func TestShieldGoneStaysGone(t *testing.T) {
	denials := map[string]func(r, m *dns.Msg) *dns.Msg{
		"NXDOMAIN":                zone(dns.RcodeNameError, soa(1, 1)),
		"NOERROR":                 zone(0, soa(1, 1)),
		"NXDOMAIN other.example.": zone(dns.RcodeNameError, "$NAME 1 IN CNAME other.example.", soa(1, 1)),
		"NOERROR other.example.":  zone(0, "$NAME 1 IN CNAME other.example.", soa(1, 1)),
	}
	failures := map[string]func(r, m *dns.Msg) *dns.Msg{"servfail": refuses(dns.RcodeServerFailure), "refused": refuses(dns.RcodeRefused), "silent": silent}
	shielded(t, func(n *node, a *authority, at netip.Addr) {
		var wg sync.WaitGroup
		for want, denial := range denials {
			for kind, failure := range failures {
				name := fmt.Sprintf("gone%d.%s.shield.test.", len(want), kind)
				wg.Go(func() { n.staysGone(a, at, name, want, denial, failure) })
			}
		}
		wg.Wait()
	})
}

func (n *node) staysGone(a *authority, at netip.Addr, name, want string, denial, failure func(r, m *dns.Msg) *dns.Msg) {
	ways := []func(m *dns.Msg){func(*dns.Msg) {}, edns(1232, true), cd}
	becomes := func(want string) {
		for _, way := range ways {
			if !eventually(func() bool { return said(n.query(at, name, dns.TypeA, way)) == want }) {
				n.Errorf("%s never becomes %s", name, want)
			}
		}
	}
	a.answers(name, zone(0, "$NAME 1 IN A 192.0.2.1"))
	becomes("NOERROR 192.0.2.1")
	a.answers(name, denial)
	becomes(want)
	a.answers(name, failure)
	had, other := a.queries(name), map[string]int{}
	for a.queries(name) < had+6 { // it has been tried again and again, by prefetches too
		for _, way := range ways {
			if got := said(n.query(at, name, dns.TypeA, way)); got != want {
				other[got]++
			}
		}
	}
	if len(other) > 0 {
		n.Errorf("%s is known as %s and becomes, how often: %v", name, want, other)
	}
	a.answers(name, zone(0, "$NAME 30 IN A 192.0.2.9"))
	becomes("NOERROR 192.0.2.9")
}

// A record that can't be read comes as it was sent with upstream. With forward it fails its answer,
// as the README says, and no other.
func TestUnreadableRecord(t *testing.T) {
	// Priority 1, the root, then port (3) before alpn (1).
	const rdata = "0001" + "00" + "0003000201bb" + "00010003026832"
	shielded(t, func(n *node, a *authority, at netip.Addr) {
		a.answers("", zone(0, "$NAME 30 IN A 192.0.2.1"))
		a.answers("odd.shield.test.", func(r, m *dns.Msg) *dns.Msg {
			if r.Question[0].Qtype != dns.TypeHTTPS {
				return zone(0, "$NAME 30 IN A 192.0.2.1")(r, m)
			}
			hdr := dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeHTTPS, Class: dns.ClassINET, Ttl: 30}
			m.Answer = append(m.Answer, &dns.RFC3597{Hdr: hdr, Rdata: rdata})
			return m
		})
		for range 5 {
			got := n.packed(at, "odd.shield.test.", dns.TypeHTTPS)
			if strings.HasSuffix(n.Name(), "/upstream") {
				if code := int(got[3] & 0xf); code != dns.RcodeSuccess || !strings.Contains(hex.EncodeToString(got), rdata) {
					n.Errorf("%x", got)
				}
			} else if m := new(dns.Msg); m.Unpack(got) != nil || m.Rcode != dns.RcodeServerFailure {
				n.Errorf("%v", m)
			}
			for _, name := range []string{"fine.shield.test.", "odd.shield.test."} {
				if m := n.query(at, name, dns.TypeA); said(m) != "NOERROR 192.0.2.1" {
					n.Errorf("beside it: %v", m)
				}
			}
		}
	})
}

// A failure is remembered for its question, with pauses that grow, and for no other.
func TestShieldRemembersFailures(t *testing.T) {
	shielded(t, func(n *node, a *authority, at netip.Addr) {
		const name = "dead.shield.test."
		a.answers("", func(r, m *dns.Msg) *dns.Msg {
			if r.Question[0].Qtype != dns.TypeA || r.CheckingDisabled || r.Question[0].Name != name {
				return zone(0, "$NAME 30 IN TXT fine", "$NAME 30 IN A 192.0.2.1")(r, m)
			}
			m.Rcode = dns.RcodeServerFailure
			m.SetEdns0(1232, false)
			m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_EDE{InfoCode: dns.ExtendedErrorCodeSignatureExpired}}
			return m
		})
		begun := time.Now()
		sent, tries, asked, last := 0, 0, 0, time.Time{}
		for tries < 3 { // after pauses of 1 and 2 s
			sent++
			if q := a.queries(name); q > asked {
				// upstream may ask twice at once.
				if asked = q; time.Since(last) > 500*time.Millisecond {
					tries++
				}
				last = time.Now()
			}
			if m := n.query(at, name, dns.TypeA); said(m) != "SERVFAIL" || m.IsEdns0() != nil {
				n.Fatalf("%v", m)
			}
		}
		if took := time.Since(begun); took < 2900*time.Millisecond || sent < 100 {
			n.Errorf("3 tries in %v, of %d queries", took, sent)
		}
		m := n.query(at, name, dns.TypeA, edns(1232, false))
		var codes []uint16
		for _, o := range m.IsEdns0().Option {
			codes = append(codes, o.(*dns.EDNS0_EDE).InfoCode)
		}
		if want := []uint16{dns.ExtendedErrorCodeSignatureExpired, dns.ExtendedErrorCodeCachedError}; said(m) != "SERVFAIL" || !slices.Equal(codes, want) {
			n.Errorf("%s with the extended errors %v, want %v", said(m), codes, want)
		}
		for _, m := range []*dns.Msg{n.query(at, name, dns.TypeTXT), n.query(at, name, dns.TypeA, cd), n.query(at, "other."+name, dns.TypeA)} {
			if m.Rcode != dns.RcodeSuccess {
				n.Errorf("%v", m)
			}
		}
		a.answers("", zone(0, "$NAME 30 IN A 192.0.2.1"))
		if !eventually(func() bool { return said(n.query(at, name, dns.TypeA)) == "NOERROR 192.0.2.1" }) {
			n.Error("never comes back")
		}
		page, err := get(n.Node, "http://169.254.20.10:9253/metrics")
		n.must(err)
		n.has(page, `coredns_shield_answers_total{reason="failure",server="dns://169.254.20.10:53"} `)
	})
}
