package e2e

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// The queries with which fastpath is compared, and how they are asked.

// A shape makes a query of a question.
type shape struct {
	name  string
	query func(q dns.Question) []byte
}

func message(q dns.Question, change func(m *dns.Msg)) []byte {
	m := new(dns.Msg)
	m.Question = []dns.Question{q}
	m.RecursionDesired = true
	change(m)
	b, err := m.Pack()
	if err != nil {
		panic(fmt.Sprintf("%v: %v", q, err))
	}
	return b
}

func edns(size uint16, do bool, options ...dns.EDNS0) func(m *dns.Msg) {
	return func(m *dns.Msg) {
		m.SetEdns0(size, do)
		m.IsEdns0().Option = options
	}
}

// fastShapes are all that a query of the usual kind can be; such may be answered from
// a ready answer.
var fastShapes = func() (shapes []shape) {
	add := func(name string, change func(m *dns.Msg)) {
		shapes = append(shapes, shape{name, func(q dns.Question) []byte { return message(q, change) }})
	}
	flags := map[string]func(m *dns.Msg){
		"rd": func(*dns.Msg) {}, "no-rd": func(m *dns.Msg) { m.RecursionDesired = false },
		"ad": func(m *dns.Msg) { m.AuthenticatedData = true }, "cd": func(m *dns.Msg) { m.CheckingDisabled = true },
		"ad-cd": func(m *dns.Msg) { m.AuthenticatedData, m.CheckingDisabled = true, true },
		"aa-tc": func(m *dns.Msg) { m.Authoritative, m.Truncated = true, true },
		"z-ra":  func(m *dns.Msg) { m.Zero, m.RecursionAvailable = true, true },
		"rcode": func(m *dns.Msg) { m.Rcode = dns.RcodeRefused },
	}
	for f, flag := range flags {
		add(f, flag)
		for _, size := range []uint16{0, 512, 1232, 4096, 65535} {
			for _, do := range []bool{false, true} {
				add(fmt.Sprintf("%s edns %d do %v", f, size, do), func(m *dns.Msg) { flag(m); edns(size, do)(m) })
			}
		}
	}
	add("cookie", edns(1232, false, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0123456789abcdef"}))
	add("another cookie", edns(1232, false, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "fedcba9876543210" + "0011223344556677"}))
	add("short cookie", edns(1232, false, &dns.EDNS0_LOCAL{Code: dns.EDNS0COOKIE, Data: []byte{1, 2, 3, 4}}))
	add("long cookie", edns(1232, false, &dns.EDNS0_LOCAL{Code: dns.EDNS0COOKIE, Data: make([]byte, 41)}))
	add("padding", edns(1232, false, &dns.EDNS0_PADDING{Padding: make([]byte, 20)}))
	add("cookie and padding", edns(4096, true, &dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "00"}, &dns.EDNS0_PADDING{}))
	cases := func(name string, change func(string) string) {
		shapes = append(shapes, shape{name, func(q dns.Question) []byte {
			q.Name = change(q.Name)
			return message(q, func(*dns.Msg) {})
		}})
	}
	cases("upper case", strings.ToUpper)
	cases("mixed case", func(s string) string {
		b := []byte(s)
		for i := range b {
			if b[i] >= 'a' && b[i] <= 'z' && i%3 == 0 {
				b[i] -= 'a' - 'A'
			}
		}
		return string(b)
	})
	for i := range 8 {
		cases(fmt.Sprintf("random case %d", i), func(s string) string {
			b, r := []byte(s), rand.New(rand.NewPCG(uint64(i), uint64(len(s))))
			for i := range b {
				if b[i] >= 'a' && b[i] <= 'z' && r.IntN(2) == 0 {
					b[i] -= 'a' - 'A'
				}
			}
			return string(b)
		})
	}
	slices.SortFunc(shapes, func(a, b shape) int { return strings.Compare(a.name, b.name) })
	return shapes
}()

// oddShapes are everything else.
var oddShapes = func() (shapes []shape) {
	add := func(name string, change func(m *dns.Msg)) {
		shapes = append(shapes, shape{name, func(q dns.Question) []byte { return message(q, change) }})
	}
	raw := func(name string, change func(b []byte) []byte) {
		shapes = append(shapes, shape{name, func(q dns.Question) []byte { return change(message(q, func(*dns.Msg) {})) }})
	}
	set := func(at int, v ...byte) func(b []byte) []byte {
		return func(b []byte) []byte { copy(b[at:], v); return b }
	}
	add("nsid", edns(1232, true, &dns.EDNS0_NSID{Code: dns.EDNS0NSID}))
	add("subnet", edns(1232, false, &dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: net.IPv4(192, 0, 2, 0)}))
	add("edns version 1", func(m *dns.Msg) { edns(1232, false)(m); m.IsEdns0().SetVersion(1) })
	add("edns flags", func(m *dns.Msg) { edns(1232, false)(m); m.IsEdns0().Hdr.Ttl |= 0x4001 })
	add("edns rcode", func(m *dns.Msg) { edns(1232, false)(m); m.IsEdns0().Hdr.Ttl |= 1 << 24 })
	add("two edns", func(m *dns.Msg) { edns(1232, false)(m); m.Extra = append(m.Extra, m.Extra[0]) })
	add("record in additional", func(m *dns.Msg) {
		m.Extra = append(m.Extra, &dns.A{Hdr: dns.RR_Header{Name: "x.", Rrtype: dns.TypeA, Class: 1}, A: net.IPv4zero})
	})
	add("record in answer", func(m *dns.Msg) {
		m.Answer = append(m.Answer, &dns.A{Hdr: dns.RR_Header{Name: "x.", Rrtype: dns.TypeA, Class: 1}, A: net.IPv4zero})
	})
	add("record in authority", func(m *dns.Msg) {
		m.Ns = append(m.Ns, &dns.A{Hdr: dns.RR_Header{Name: "x.", Rrtype: dns.TypeA, Class: 1}, A: net.IPv4zero})
	})
	add("response", func(m *dns.Msg) { m.Response = true })
	for _, o := range ednsOptions {
		add("option "+o.name, func(m *dns.Msg) {
			edns(1232, false, &dns.EDNS0_LOCAL{Code: o.code, Data: o.data})(m)
			m.Extra[0].(*dns.OPT).SetVersion(o.version)
		})
	}
	for _, v := range []uint8{2, 255} {
		add(fmt.Sprintf("edns version %d", v), func(m *dns.Msg) { edns(1232, true)(m); m.IsEdns0().SetVersion(v) })
	}
	add("edns with a name", func(m *dns.Msg) { edns(1232, false)(m); m.Extra[0].Header().Name = "x." })
	add("edns in answer", func(m *dns.Msg) { edns(1232, false)(m); m.Answer, m.Extra = m.Extra, nil })
	for o := 1; o < 16; o++ {
		add(fmt.Sprintf("opcode %d", o), func(m *dns.Msg) { m.Opcode = o })
	}
	for _, c := range []uint16{dns.ClassCHAOS, dns.ClassHESIOD, dns.ClassANY, dns.ClassNONE, 0, 2, 5, 65535} {
		add(fmt.Sprintf("class %d", c), func(m *dns.Msg) { m.Question[0].Qclass = c })
	}
	add("two questions", func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) })
	add("no question", func(m *dns.Msg) { m.Question = nil })
	add("axfr", func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAXFR })
	add("ixfr", func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeIXFR })
	shapes = append(shapes, shape{"tsig", func(q dns.Question) []byte {
		m := new(dns.Msg)
		m.Question = []dns.Question{q}
		m.SetTsig("key.", dns.HmacSHA256, 300, 1700000000)
		b, _, err := dns.TsigGenerate(m, "c2VjcmV0c2VjcmV0", "", false)
		if err != nil {
			panic(err)
		}
		return b
	}})
	raw("trailing byte", func(b []byte) []byte { return append(b, 0) })
	raw("trailing bytes", func(b []byte) []byte { return append(b, make([]byte, 100)...) })
	raw("600 bytes", func(b []byte) []byte { return append(b, make([]byte, 600-len(b))...) })
	raw("512 bytes", func(b []byte) []byte { return append(b, make([]byte, 512-len(b))...) })
	raw("cut by one", func(b []byte) []byte { return b[:len(b)-1] })
	raw("cut in the name", func(b []byte) []byte { return b[:13] })
	raw("header only", func(b []byte) []byte { return b[:12] })
	raw("half a header", func(b []byte) []byte { return b[:6] })
	raw("one byte", func(b []byte) []byte { return b[:1] })
	raw("empty", func(b []byte) []byte { return b[:0] })
	raw("name that points to itself", func(b []byte) []byte { return append(b[:12:12], 0xc0, 12, 0, 1, 0, 1) })
	raw("names that point to each other", func(b []byte) []byte { return append(b[:12:12], 0xc0, 14, 0xc0, 12, 0, 1, 0, 1) })
	raw("name that points away", func(b []byte) []byte { return append(b[:12:12], 0xc1, 0xff, 0, 1, 0, 1) })
	raw("label of a reserved kind", set(12, 0x41))
	raw("label beyond the end", set(12, 63))
	raw("name of 400 bytes", func(b []byte) []byte {
		return append(append(b[:12:12], bytes.Repeat([]byte("\x07abcdefg"), 50)...), 0, 0, 1, 0, 1)
	})
	raw("additional that is not there", set(11, 1))
	opt := func(data ...byte) func(b []byte) []byte {
		return func(b []byte) []byte {
			b[11] = 1
			return append(b, append([]byte{0, 0, 41, 4, 208, 0, 0, 0, 0, 0, byte(len(data))}, data...)...)
		}
	}
	raw("option beyond the end", opt(0, 3, 0, 9))
	raw("option that is cut", opt(0, 3, 0))
	raw("additionals that are not there", set(10, 0xff, 0xff))
	raw("answers that are not there", set(6, 0xff, 0xff))
	for i := range 4 {
		raw(fmt.Sprintf("garbage %d", i), func([]byte) []byte {
			r := rand.NewChaCha8([32]byte{byte(i)})
			b := make([]byte, 20+i*60)
			r.Read(b)
			return b
		})
	}
	return shapes
}()

// ednsOptions are those that others than resolvers may send, well-formed or not.
var ednsOptions = []struct {
	name    string
	code    uint16
	data    []byte
	version uint8
}{
	{"0", 0, nil, 0}, {"LLQ", 1, make([]byte, 18), 0}, {"UL", 2, make([]byte, 4), 0}, {"NSID with data", 3, []byte("x"), 0}, {"DAU", 5, []byte{8, 13}, 0}, {"DHU", 6, []byte{2}, 0},
	{"N3U", 7, []byte{1}, 0}, {"no subnet", 8, []byte{0, 1, 0, 0}, 0}, {"subnet of IPv6", 8, []byte{0, 2, 32, 0, 0x20, 1, 0x0d, 0xb8}, 0}, {"subnet with a scope", 8, []byte{0, 1, 24, 24, 192, 0, 2}, 0},
	{"subnet that is cut", 8, []byte{0, 1, 24}, 0}, {"subnet of no family", 8, []byte{0, 9, 24, 0, 192, 0, 2}, 0}, {"subnet with more bits", 8, []byte{0, 1, 8, 0, 192, 255}, 0}, {"EXPIRE", 9, nil, 0},
	{"EXPIRE of 1", 9, []byte{1}, 0}, {"keepalive", 11, nil, 0}, {"keepalive of 1", 11, []byte{1}, 0},
	{"CHAIN", 13, []byte{0}, 0}, {"KEY-TAG", 14, []byte{0x4a, 0x5c}, 0}, {"error", 15, []byte{0, 18}, 0}, {"error that is cut", 15, []byte{0}, 0}, {"report channel", 18, nil, 0}, {"ZONEVERSION", 19, nil, 0},
	{"100", 100, nil, 0}, {"100 of version 1", 100, nil, 1}, {"65001", 65001, []byte{1, 2, 3, 4, 5, 6}, 0}, {"65535", 65535, make([]byte, 300), 0},
}

// An asker sends packets from the pod and gathers the answers by their IDs.
type asker struct {
	conn *net.UDPConn
	id   uint16
	buf  [4096 * 16]byte
}

func (n *node) asker(to netip.AddrPort) (*asker, error) {
	a := new(asker)
	err := n.Pod.Do(func() (err error) {
		a.conn, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
		return err
	})
	return a, err
}

// ask sends queries at once, with IDs of its own, and returns the answers without
// their IDs. An answer that does not come is nil.
func (a *asker) ask(patience time.Duration, queries ...[]byte) ([][]byte, error) {
	first := a.id
	for _, q := range queries {
		q = bytes.Clone(q)
		if len(q) >= 2 {
			q[0], q[1] = byte(a.id>>8), byte(a.id)
		}
		a.id++
		if _, err := a.conn.Write(q); err != nil {
			return nil, err
		}
	}
	answers := make([][]byte, len(queries))
	a.conn.SetReadDeadline(time.Now().Add(patience))
	for left := len(queries); left > 0; {
		k, err := a.conn.Read(a.buf[:])
		if os.IsTimeout(err) {
			return answers, nil
		}
		if err != nil {
			return nil, err
		}
		if k < 2 {
			return nil, fmt.Errorf("an answer of %d bytes", k)
		}
		i := uint16(a.buf[0])<<8 + uint16(a.buf[1]) - first
		if int(i) < len(answers) && answers[i] == nil {
			answers[i] = bytes.Clone(a.buf[2:k])
			left--
		}
	}
	return answers, nil
}
