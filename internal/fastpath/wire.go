package fastpath

import (
	"encoding/binary"

	"github.com/coredns/coredns/plugin/pkg/edns"
	"github.com/miekg/dns"
)

const (
	headerLen   = 12 // of a DNS message, RFC 1035 4.1.1
	optLen      = 11 // of an OPT record without options, RFC 6891 6.1.2
	typeOPT     = 41
	classIN     = 1
	maxNameLen  = 255
	rrFixedLen  = 10 // type, class, TTL and length of a record
	queryBuffer = 512
)

// plainQuery tells whether a packet is a question of the usual kind: opcode QUERY,
// one question of the class IN, and no record but at most one OPT of version 0 without
// options, or with such as CoreDNS does not look at. Only the answers to such are kept: all
// that CoreDNS answers them by is in their bytes.
func plainQuery(q []byte) bool {
	opt := optOf(q)
	if opt < 0 || opt == len(q) {
		return opt > 0
	}
	o := q[opt:]
	// Root, OPT, any size, no extended rcode, version 0, any flags.
	if len(o) < optLen || o[0] != 0 || binary.BigEndian.Uint16(o[1:]) != typeOPT || o[5] != 0 || o[6] != 0 {
		return false
	}
	if int(binary.BigEndian.Uint16(o[9:])) != len(o)-optLen {
		return false
	}
	for o = o[optLen:]; len(o) > 0; {
		if len(o) < 4 {
			return false
		}
		n := 4 + int(binary.BigEndian.Uint16(o[2:]))
		if n > len(o) || !ignored(binary.BigEndian.Uint16(o)) {
			return false
		}
		o = o[n:]
	}
	return true
}

// ignored tells whether CoreDNS answers as if an EDNS option was not there. A plugin can have it
// sent back to the client. Of cookies and padding the DNS library takes any content.
func ignored(option uint16) bool {
	return (option == dns.EDNS0COOKIE || option == dns.EDNS0PADDING) && !edns.SupportedOption(option)
}

// optOf returns where the OPT record of a query begins, of which all but that record is of the
// usual kind. It is the query's length if there is none, and -1 for any other query.
func optOf(q []byte) int {
	if len(q) < headerLen+5 || q[2]&0xf8 != 0 {
		return -1 // too short, a response, or another opcode
	}
	if binary.BigEndian.Uint16(q[4:]) != 1 || binary.BigEndian.Uint32(q[6:]) != 0 {
		return -1
	}
	off := headerLen
	for q[off] != 0 {
		if q[off]&0xc0 != 0 {
			return -1 // compressed
		}
		off += int(q[off]) + 1
		if off >= len(q) || off-headerLen >= maxNameLen {
			return -1
		}
	}
	off++
	if len(q) < off+4 || binary.BigEndian.Uint16(q[off+2:]) != classIN {
		return -1
	}
	off += 4
	switch extra := binary.BigEndian.Uint16(q[10:]); {
	case extra == 0 && off == len(q), extra == 1 && off < len(q):
		return off
	}
	return -1
}

// bare puts a plain query into dst, which is large enough, without options and, if lower is
// set, with its name in lower case. It returns the query's length, or 0 if it has that form
// already or is not plain.
func bare(dst, q []byte, lower bool) int {
	if len(q) > len(dst) || !plainQuery(q) {
		return 0
	}
	n := copy(dst, q)
	changed := lower && lowerLabels(dst[headerLen:n])
	if opt := optOf(q); opt+optLen < n {
		n = opt + optLen
		dst[n-2], dst[n-1] = 0, 0
		changed = true
	}
	if !changed {
		return 0
	}
	return n
}

// skipName returns where the name at off ends, or -1.
func skipName(m []byte, off int) int {
	for off < len(m) {
		switch c := m[off]; {
		case c == 0:
			return off + 1
		case c&0xc0 == 0xc0:
			if off+2 > len(m) {
				return -1
			}
			return off + 2
		case c&0xc0 != 0:
			return -1
		default:
			off += int(c) + 1
		}
	}
	return -1
}

// nameLen returns how long the name of a plain query's question is.
func nameLen(q []byte) int {
	off := headerLen
	for q[off] != 0 {
		off += int(q[off]) + 1
	}
	return off + 1 - headerLen
}

// lowerLabels changes the name at the beginning of b into lower case, and tells whether that
// has changed it. It is false for what is no name.
func lowerLabels(b []byte) (changed bool) {
	for off := 0; off < len(b) && b[off] != 0; {
		if b[off]&0xc0 != 0 {
			return false
		}
		next := off + int(b[off]) + 1
		if next > len(b) {
			return false
		}
		for i := off + 1; i < next; i++ {
			if 'A' <= b[i] && b[i] <= 'Z' {
				b[i] += 'a' - 'A'
				changed = true
			}
		}
		off = next
	}
	return changed
}
