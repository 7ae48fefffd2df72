package fastpath

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"slices"

	"github.com/miekg/dns"
)

// A record is where one stands in a packed answer.
type record struct {
	at, end uint16
	fixed   uint16 // where its type, class, TTL and length are
	rrtype  uint16
	section int // 0: answer, 1: authority, 2: additional
}

// A laidOut is a packed answer to one question, and where its records are.
type laidOut struct {
	wire     []byte
	question int  // where the question's name ends
	pointers bool // names are compressed
	records  []record
}

// layOut finds the records of a packed answer. It is false for what is no such answer.
func layOut(m []byte) (l laidOut, ok bool) {
	if len(m) < headerLen || len(m) > 1<<16-1 || binary.BigEndian.Uint16(m[4:]) > 1 {
		return l, false
	}
	l.wire, l.question = m, headerLen
	off := headerLen
	if m[5] == 1 {
		if l.question = skipName(m, off); l.question < 0 || l.question+4 > len(m) {
			return l, false
		}
		off = l.question + 4
	}
	for section := range 3 {
		for range binary.BigEndian.Uint16(m[6+2*section:]) {
			fixed := skipName(m, off)
			if fixed < 0 || fixed+rrFixedLen > len(m) {
				return l, false
			}
			end := fixed + rrFixedLen + int(binary.BigEndian.Uint16(m[fixed+8:]))
			if end > len(m) {
				return l, false
			}
			l.records = append(l.records, record{uint16(off), uint16(end), uint16(fixed), binary.BigEndian.Uint16(m[fixed:]), section})
			off = end
		}
	}
	return l, off == len(m)
}

// ttls returns where the TTLs are; an OPT record has none.
func (l laidOut) ttls() (offs []uint16) {
	for _, r := range l.records {
		if r.rrtype != typeOPT {
			offs = append(offs, r.fixed+4)
		}
	}
	return offs
}

// points tells whether a record's owner is a pointer to the question's name.
func (l laidOut) points(r record) bool {
	return r.fixed-r.at == 2 && l.wire[r.at] == 0xc0 && l.wire[r.at+1] == headerLen
}

// isAddress tells whether a type is one of addresses, whose records have no name but the owner.
func isAddress(t uint16) bool { return t == dns.TypeA || t == dns.TypeAAAA }

// simple tells whether a record is one that compression makes the same of, whatever the names
// are and in which order the records come: an address of the question's name.
func (l laidOut) simple(r record) bool { return isAddress(r.rrtype) && l.points(r) }

// A turn is records next to each other that all have the same chance to come first.
type turn struct{ records []record }

const (
	turnSize  = 10 // bytes that a record takes in a turn
	mostTurns = 96 // records
)

func records(turns []turn) (n int) {
	for _, t := range turns {
		n += len(t.records)
	}
	return n
}

// turned returns what the plugin loadbalance shuffles: in each section the addresses, and the
// mail exchangers, which it has put next to each other. It is false where that would make
// another message of it than the same records in another order.
func (l laidOut) turned() (turns []turn, ok bool) {
	kind := func(r record) int {
		switch {
		case isAddress(r.rrtype):
			return 1
		case r.rrtype == dns.TypeMX:
			return 2
		}
		return 0
	}
	for i := 0; i < len(l.records); {
		first, j := l.records[i], i+1
		for j < len(l.records) && kind(l.records[j]) == kind(first) && l.records[j].section == first.section {
			j++
		}
		if kind(first) > 0 && j-i > 1 {
			turns = append(turns, turn{l.records[i:j:j]})
		}
		i = j
	}
	if len(turns) == 0 {
		return nil, true
	}
	if records(turns) > mostTurns {
		return nil, false
	}
	for _, t := range turns {
		if l.pointers && slices.ContainsFunc(t.records, func(r record) bool { return !l.simple(r) }) {
			return nil, false
		}
	}
	return turns, true
}

// shuffle puts the records of a message into an order as loadbalance would.
func (t turn) shuffle(m []byte) {
	n := len(t.records)
	var order [mostTurns]uint8
	for i := range n {
		order[i] = uint8(i)
	}
	random := func() int { return int(uint16(rand.Uint32())) }
	if n == 2 {
		if random()%2 != 0 {
			return
		}
		order[0], order[1] = 1, 0
	} else {
		for j := range n {
			p := j + random()%(n-j)
			order[j], order[p] = order[p], order[j]
		}
	}
	var was [maxWire]byte
	start, end := t.records[0].at, t.records[n-1].end
	copy(was[:], m[start:end])
	to := m[start:]
	for _, i := range order[:n] {
		r := t.records[i]
		to = to[copy(to, was[r.at-start:r.end-start]):]
	}
}

// spell has a answer its question however the name is spelled, by the key in lower case, if the
// plugin shield would answer just so: with the question's spelling wherever a record has that
// name.
func (a *answer) spell(l laidOut, key []byte) {
	if l.pointers && slices.ContainsFunc(l.records, func(r record) bool { return r.rrtype != typeOPT && !l.simple(r) }) {
		return
	}
	name := l.wire[headerLen:l.question]
	spelled := []uint16{headerLen}
	for _, r := range l.records {
		owner := l.wire[r.at:r.fixed]
		if len(owner) == len(name) && bytes.Equal(lowered(owner), lowered(name)) {
			spelled = append(spelled, r.at)
		}
	}
	a.key, a.spelled = key, spelled
}

// lowered returns a name in lower case.
func lowered(name []byte) []byte {
	n := bytes.Clone(name)
	lowerLabels(n)
	return n
}
