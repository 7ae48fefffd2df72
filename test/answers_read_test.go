package e2e

import (
	"bytes"
	enc "encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/miekg/dns"
)

// How the comparison reads answers: by itself, since what is compared is built on the DNS library.

// A seenRecord is one of an answer.
type seenRecord struct {
	spelled string // the owner name, labels with their lengths
	typ     uint16
	class   uint16
	ttl     uint32
	data    string // its names in full
}

// A seenAnswer is an answer, taken apart. Its id is left out.
type seenAnswer struct {
	size     int
	flags    uint16
	rcode    int
	question []byte
	sections [3][]seenRecord
	opts     int
	optClass uint16 // the size that is offered
	optTTL   uint32
	options  []string
	ttlAt    []int // where the TTLs are
	end      int   // what follows is not of the message
}

var errUnreadable = errors.New("not a DNS message")

// readName returns a name in full and where it ends.
func readName(b []byte, at int) (name []byte, end int, err error) {
	for hops := 0; at < len(b); {
		switch n := int(b[at]); {
		case n == 0:
			if end == 0 {
				end = at + 1
			}
			return append(name, 0), end, nil
		case n >= 0xc0 && at+1 < len(b):
			if end == 0 {
				end = at + 2
			}
			if hops++; hops > 100 {
				return nil, 0, errUnreadable
			}
			at = n&0x3f<<8 | int(b[at+1])
		case n < 0x40 && at+1+n <= len(b) && len(name) < 255:
			name = append(name, b[at:at+1+n]...)
			at += 1 + n
		default:
			return nil, 0, errUnreadable
		}
	}
	return nil, 0, errUnreadable
}

// namesIn is where there are names in the data of those types in which they can be compressed: so
// many bytes, then so many names.
var namesIn = map[uint16][2]int{
	dns.TypeNS: {0, 1}, dns.TypeMD: {0, 1}, dns.TypeMF: {0, 1}, dns.TypeCNAME: {0, 1}, dns.TypeSOA: {0, 2}, dns.TypeMB: {0, 1}, dns.TypeMG: {0, 1}, dns.TypeMR: {0, 1},
	dns.TypePTR: {0, 1}, dns.TypeMINFO: {0, 2}, dns.TypeMX: {2, 1}, dns.TypeRP: {0, 2}, dns.TypeAFSDB: {2, 1}, dns.TypeRT: {2, 1}, dns.TypePX: {2, 2}, dns.TypeSRV: {6, 1},
	dns.TypeKX: {2, 1}, dns.TypeDNAME: {0, 1},
}

// readAnswer takes an answer apart; b lacks the id.
func readAnswer(b []byte) (*seenAnswer, error) {
	b = append([]byte{0, 0}, b...)
	if len(b) < 12 {
		return nil, errUnreadable
	}
	a := &seenAnswer{size: len(b), flags: enc.BigEndian.Uint16(b[2:])}
	a.rcode = int(a.flags & 0xf)
	at := 12
	for range enc.BigEndian.Uint16(b[4:]) {
		_, end, err := readName(b, at)
		if err != nil || end+4 > len(b) {
			return nil, errUnreadable
		}
		a.question = append(a.question, b[at:end+4]...)
		at = end + 4
	}
	for s := range a.sections {
		for range enc.BigEndian.Uint16(b[6+2*s:]) {
			owner, end, err := readName(b, at)
			if err != nil || end+10 > len(b) {
				return nil, errUnreadable
			}
			r := seenRecord{spelled: string(owner), typ: enc.BigEndian.Uint16(b[end:]), class: enc.BigEndian.Uint16(b[end+2:]), ttl: enc.BigEndian.Uint32(b[end+4:])}
			from := end + 10
			to := from + int(enc.BigEndian.Uint16(b[end+8:]))
			if to > len(b) {
				return nil, errUnreadable
			}
			at = to
			if r.typ == dns.TypeOPT && s == 2 {
				a.opts++
				a.optClass, a.optTTL = r.class, r.ttl
				a.rcode |= int(r.ttl>>24) << 4
				a.options = append(a.options, optionsIn(b[from:to])...)
				continue
			}
			a.ttlAt = append(a.ttlAt, end+4-2)
			r.data = dataIn(b, from, to, r.typ)
			a.sections[s] = append(a.sections[s], r)
		}
	}
	a.end = at
	return a, nil
}

func optionsIn(b []byte) (all []string) {
	for len(b) >= 4 {
		n := min(4+int(enc.BigEndian.Uint16(b[2:])), len(b))
		all = append(all, fmt.Sprintf("%d:%x", enc.BigEndian.Uint16(b), b[4:n]))
		b = b[n:]
	}
	if len(b) > 0 {
		all = append(all, fmt.Sprintf("rest:%x", b))
	}
	return all
}

// dataIn is a record's data with its names in full, or as it is.
func dataIn(b []byte, from, to int, typ uint16) string {
	plain := string(b[from:to])
	layout, ok := namesIn[typ]
	if !ok || from+layout[0] > to {
		return plain
	}
	out := bytes.Clone(b[from : from+layout[0]])
	at := from + layout[0]
	for range layout[1] {
		name, end, err := readName(b[:to], at)
		if err != nil {
			return plain
		}
		out = append(out, bytes.ToLower(name)...) // compression may have changed it
		at = end
	}
	return string(out) + string(b[at:to])
}

// key is what makes a record: all but its spelling and its TTL.
func (r seenRecord) key() string {
	return fmt.Sprintf("%s %d %d %x", strings.ToLower(r.spelled), r.typ, r.class, r.data)
}

func keysOf(rs []seenRecord) (keys []string) {
	for _, r := range rs {
		keys = append(keys, r.key())
	}
	return keys
}

// sameButTTLs tells whether two answers are the same bytes, but for TTLs that differ as they do
// when one has been cached a second or so after the other.
func sameButTTLs(a, b []byte) bool {
	if bytes.Equal(a, b) {
		return true
	}
	if len(a) != len(b) || a == nil || b == nil {
		return false
	}
	x, err := readAnswer(a)
	if err != nil {
		return false
	}
	a, b = bytes.Clone(a), bytes.Clone(b)
	for _, at := range x.ttlAt {
		s, t := int64(enc.BigEndian.Uint32(a[at:])), int64(enc.BigEndian.Uint32(b[at:]))
		if s-t > 20 || t-s > 20 {
			return false
		}
		copy(a[at:at+4], b[at:at+4])
	}
	return bytes.Equal(a, b)
}

// A difference is one between two answers to the same question: in what, and what each has.
type difference struct{ in, first, second string }

func differs[T comparable](in string, a, b T) []difference {
	if a == b {
		return nil
	}
	return []difference{{in, fmt.Sprint(a), fmt.Sprint(b)}}
}

func rcodeName(n int) string {
	if n == dns.RcodeBadVers {
		return "BADVERS" // for the library it is BADSIG too
	}
	if s, ok := dns.RcodeToString[n]; ok {
		return s
	}
	return fmt.Sprint("RCODE", n)
}

// briefly is what an answer comes to, in a few words.
func briefly(b []byte) string {
	if b == nil {
		return "no answer"
	}
	a, err := readAnswer(b)
	if err != nil {
		return err.Error()
	}
	words := []string{rcodeName(a.rcode)}
	for _, f := range []struct {
		name string
		bit  int
	}{{"TC", 9}, {"AA", 10}, {"RA", 7}, {"AD", 5}, {"CD", 4}, {"Z", 6}} {
		if a.flags>>f.bit&1 == 1 {
			words = append(words, f.name)
		}
	}
	words = append(words, fmt.Sprintf("%d+%d+%d records, %d bytes", len(a.sections[0]), len(a.sections[1]), len(a.sections[2]), a.size))
	if a.opts == 0 {
		return strings.Join(append(words, "no OPT"), " ")
	}
	words = append(words, fmt.Sprintf("%d OPT version %d", a.opts, a.optTTL>>16&0xff))
	if a.optTTL>>15&1 == 1 {
		words = append(words, "DO")
	}
	if z := a.optTTL & 0x7fff; z != 0 {
		words = append(words, fmt.Sprintf("flags %#x", z))
	}
	return strings.Join(append(words, a.options...), " ")
}

// differencesOf takes two answers apart, and says in what they differ.
func differencesOf(a, b []byte) (all []difference) {
	state := func(w []byte) (*seenAnswer, string) {
		if w == nil {
			return nil, "none"
		}
		x, err := readAnswer(w)
		if err != nil {
			return nil, "unreadable"
		}
		return x, "there"
	}
	x, sx := state(a)
	y, sy := state(b)
	if x == nil || y == nil {
		return differs("answer", sx, sy)
	}
	if x.rcode != y.rcode {
		return differs("rcode", rcodeName(x.rcode), rcodeName(y.rcode)) // of which the rest follows
	}
	for _, f := range []struct {
		name string
		bit  int
	}{{"AA", 10}, {"TC", 9}, {"RD", 8}, {"RA", 7}, {"Z", 6}, {"AD", 5}, {"CD", 4}} {
		all = append(all, differs("flag "+f.name, x.flags>>f.bit&1, y.flags>>f.bit&1)...)
	}
	all = append(all, differs("opcode", x.flags>>11&15, y.flags>>11&15)...)
	switch {
	case bytes.Equal(x.question, y.question):
	case bytes.EqualFold(x.question, y.question):
		all = append(all, difference{"question", "spelled", "otherwise"})
	default:
		all = append(all, differs("question", fmt.Sprint(len(x.question) > 0), fmt.Sprint(len(y.question) > 0))...)
	}
	all = append(all, differs("OPT records", x.opts, y.opts)...)
	if x.opts > 0 && y.opts > 0 {
		all = append(all, differs("EDNS size", x.optClass, y.optClass)...)
		all = append(all, differs("EDNS version", x.optTTL>>16&0xff, y.optTTL>>16&0xff)...)
		all = append(all, differs("DO", x.optTTL>>15&1, y.optTTL>>15&1)...)
		all = append(all, differs("EDNS flags", x.optTTL&0x7fff, y.optTTL&0x7fff)...)
	}
	all = append(all, differs("EDNS options", strings.Join(x.options, " "), strings.Join(y.options, " "))...)
	if (x.flags|y.flags)&(1<<9) != 0 {
		return all // of a truncated answer anything may be there
	}
	for s, name := range []string{"answer section", "authority", "additional"} {
		all = append(all, differencesIn(name, x.sections[s], y.sections[s])...)
	}
	return all
}

func differencesIn(name string, x, y []seenRecord) []difference {
	a, b := keysOf(x), keysOf(y)
	if slices.Equal(a, b) {
		for i := range x {
			switch {
			case x[i].spelled != y[i].spelled:
				return []difference{{name, "owners spelled", "otherwise"}}
			case x[i].ttl != y[i].ttl:
				d := int64(x[i].ttl) - int64(y[i].ttl)
				if d < -20 || d > 20 {
					return []difference{{name, "TTL", map[bool]string{true: "longer", false: "shorter"}[d < 0]}}
				}
			}
		}
		return nil
	}
	slices.Sort(a)
	slices.Sort(b)
	switch {
	case slices.Equal(a, b):
		return []difference{{name, "order", "another"}}
	case len(a) == 0:
		return []difference{{name, "nothing", "records"}}
	case len(b) == 0:
		return []difference{{name, "records", "nothing"}}
	}
	first, second := "the same", "the same"
	for _, k := range a {
		if !slices.Contains(b, k) {
			first = "more"
		}
	}
	for _, k := range b {
		if !slices.Contains(a, k) {
			second = "more"
		}
	}
	return []difference{{name, first, second}}
}
