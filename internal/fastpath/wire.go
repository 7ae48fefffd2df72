package fastpath

import "encoding/binary"

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
// one question of the class IN, and no record but at most one OPT of version 0
// without options. Only the answers to such are kept: all that CoreDNS answers them
// by is in their bytes.
func plainQuery(q []byte) bool {
	if len(q) < headerLen+5 || q[2]&0xf8 != 0 {
		return false // too short, a response, or another opcode
	}
	if binary.BigEndian.Uint16(q[4:]) != 1 || binary.BigEndian.Uint32(q[6:]) != 0 {
		return false
	}
	extra := binary.BigEndian.Uint16(q[10:])
	off := headerLen
	for q[off] != 0 {
		if q[off]&0xc0 != 0 {
			return false // compressed
		}
		off += int(q[off]) + 1
		if off >= len(q) || off-headerLen >= maxNameLen {
			return false
		}
	}
	off++
	if len(q) < off+4 || binary.BigEndian.Uint16(q[off+2:]) != classIN {
		return false
	}
	off += 4
	switch extra {
	case 0:
		return off == len(q)
	case 1:
		o := q[off:]
		// Root, OPT, any size, no extended rcode, version 0, any flags, no options.
		return len(o) == optLen && o[0] == 0 && binary.BigEndian.Uint16(o[1:]) == typeOPT &&
			o[5] == 0 && o[6] == 0 && o[9] == 0 && o[10] == 0
	}
	return false
}

// ttlOffsets returns where in a packed answer the TTLs of its records are, except
// that of an OPT record, which is none. It is false for what is no such answer.
func ttlOffsets(m []byte) ([]uint16, bool) {
	if len(m) < headerLen || len(m) > 1<<16-1 {
		return nil, false
	}
	questions := int(binary.BigEndian.Uint16(m[4:]))
	records := int(binary.BigEndian.Uint16(m[6:])) + int(binary.BigEndian.Uint16(m[8:])) + int(binary.BigEndian.Uint16(m[10:]))
	off := headerLen
	for range questions {
		if off = skipName(m, off); off < 0 || off+4 > len(m) {
			return nil, false
		}
		off += 4
	}
	var ttls []uint16
	for range records {
		if off = skipName(m, off); off < 0 || off+rrFixedLen > len(m) {
			return nil, false
		}
		if binary.BigEndian.Uint16(m[off:]) != typeOPT {
			ttls = append(ttls, uint16(off+4))
		}
		off += rrFixedLen + int(binary.BigEndian.Uint16(m[off+8:]))
	}
	return ttls, off == len(m)
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
