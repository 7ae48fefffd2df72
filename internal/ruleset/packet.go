package ruleset

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// PacketsOf returns the packets of a client on another host with a server on this one: a
// query, and an answer, which nobody tracks; and a query of the node's own. proto is udp or
// tcp.
func PacketsOf(proto string, server netip.AddrPort) (query, answer, own Packet) {
	number := byte(unix.IPPROTO_UDP)
	if proto == "tcp" {
		number = unix.IPPROTO_TCP
	}
	query = Packet{Proto: number, Dst: server.Addr(), DstPort: server.Port(), State: StateUntracked}
	answer = Packet{Proto: number, Src: server.Addr(), SrcPort: server.Port(), State: StateUntracked}
	own = query
	own.Src, own.Loopback = server.Addr(), true
	return query, answer, own
}

// registers are those of nf_tables: 64 bytes, named in steps of 16 and of 4.
type registers struct {
	data, known [64]byte
	from        [16]value // by their first word: what was loaded there
}

// value is what a rule compares: bytes, the bits of which are known or not.
type value struct {
	data, known []byte
	kind        kind
	masked      bool     // some bits have been cleared
	oneOf       [][]byte // what it may be, where that is known
}

// kind says of a value that is not known what it is not.
type kind int

const (
	anyValue   kind = iota
	linkName        // of a link that is not lo
	linkIndex       // as linkName
	remoteAddr      // an address of another host
	remoteType      // the type of such an address
)

const (
	loopback    = 1   // the index of lo
	loopbackNet = 127 // the first byte of its addresses
)

var ones = bytes.Repeat([]byte{0xff}, 64)

// all is that all bits of n bytes are known. It is not to be written to.
func all(n int) []byte {
	if n <= len(ones) {
		return ones[:n:n]
	}
	return bytes.Repeat([]byte{0xff}, n)
}

// offset returns where a register stands, or -1.
func offset(register uint32) int {
	switch {
	case register >= 1 && register <= 4:
		return int(register-1) * 16
	case register >= 8 && register < 24:
		return int(register-8) * 4
	}
	return -1
}

func (r *registers) load(register uint32, v value) {
	at := offset(register)
	if at < 0 {
		return
	}
	n := min(len(v.data), len(v.known), len(r.data)-at)
	copy(r.data[at:], v.data[:n])
	copy(r.known[at:], v.known[:n])
	// The kernel clears the rest of the last word.
	for i := at + n; i < min(at+(n+3)/4*4, len(r.data)); i++ {
		r.data[i], r.known[i] = 0, 0xff
	}
	for i := at / 4; i < (at+n+3)/4 && i < len(r.from); i++ {
		r.from[i] = value{}
	}
	r.from[at/4] = value{kind: v.kind, masked: v.masked, oneOf: v.oneOf}
}

func (r *registers) value(register uint32, n int) value { return r.valueAt(register, 0, n) }

// valueAt returns n bytes from a register's byte at on; those beyond the last register are
// not known.
func (r *registers) valueAt(register uint32, at, n int) value {
	v := value{data: make([]byte, n), known: make([]byte, n)}
	if start := offset(register); start >= 0 && start+at < len(r.data) {
		copy(v.data, r.data[start+at:])
		copy(v.known, r.known[start+at:])
		if at%4 == 0 {
			from := r.from[(start+at)/4]
			v.kind, v.masked, v.oneOf = from.kind, from.masked, from.oneOf
		}
	}
	return v
}

// bounds returns the least and the greatest that a value can be.
func (v value) bounds() (low, high []byte) {
	low, high = make([]byte, len(v.data)), make([]byte, len(v.data))
	for i := range v.data {
		low[i] = v.data[i] & v.known[i]
		high[i] = v.data[i] | ^v.known[i]
	}
	return low, high
}

// within tells whether the value is from one to another, both included.
func (v value) within(from, to []byte) maybe {
	if len(from) != len(v.data) || len(to) != len(v.data) {
		return perhaps
	}
	low, high := v.bounds()
	switch {
	case bytes.Compare(from, low) <= 0 && bytes.Compare(high, to) <= 0:
		return yes
	case bytes.Compare(high, from) < 0 || bytes.Compare(low, to) > 0 || v.isNot(from, to):
		return no
	}
	if bytes.Equal(from, to) {
		for i := range from {
			if (from[i]^v.data[i])&v.known[i] != 0 {
				return no
			}
		}
	}
	return perhaps
}

// isNot tells that the value, of what kind it is, is nothing of a range.
func (v value) isNot(from, to []byte) bool {
	one := bytes.Equal(from, to)
	switch v.kind {
	case linkName:
		return one && len(from) > 2 && string(bytes.TrimRight(from, "\x00")) == "lo"
	case linkIndex:
		return one && len(from) == 4 && binary.NativeEndian.Uint32(from) == loopback
	case remoteType:
		return one && len(from) == 4 && binary.NativeEndian.Uint32(from) == unix.RTN_LOCAL
	case remoteAddr:
		switch len(from) {
		case 1, 2, 3, 4:
			return from[0] == loopbackNet && to[0] == loopbackNet
		case 16:
			return one && !v.masked && netip.AddrFrom16([16]byte(from)) == netip.IPv6Loopback()
		}
	}
	return false
}

// maxNumbers bounds the values that are gone through one by one.
const maxNumbers = 128

// numbers is one of n numbers from first on.
func numbers(first, n uint32) value {
	v := value{data: make([]byte, 4), known: make([]byte, 4)}
	for i := uint32(0); i < n && n <= maxNumbers; i++ {
		v.oneOf = append(v.oneOf, binary.NativeEndian.AppendUint32(nil, first+i))
	}
	return v
}

func (x *run) bitwise(e *expr.Bitwise) {
	n := int(e.Len)
	if n > 64 {
		n = 64
	}
	v := x.value(e.SourceRegister, n)
	v.oneOf = nil
	if len(e.Mask) != n || len(e.Xor) != n {
		// A shift, or what newer kernels do with two registers.
		x.load(e.DestRegister, value{data: make([]byte, n), known: make([]byte, n)})
		return
	}
	for i := range n {
		v.data[i] = v.data[i]&e.Mask[i] ^ e.Xor[i]
		v.known[i] |= ^e.Mask[i]
		v.masked = v.masked || e.Mask[i] != 0xff
		if e.Xor[i] != 0 {
			v.kind = anyValue
		}
	}
	if v.masked && (v.kind != remoteAddr || e.Mask[0] != 0xff) {
		v.kind = anyValue
	}
	x.load(e.DestRegister, v)
}

// addrs returns the addresses that may stand in a register.
func (x *run) addrs(register uint32) (as []netip.Addr) {
	n := 4
	if x.packet.family() == unix.NFPROTO_IPV6 {
		n = 16
	}
	if offset(register) < 0 {
		return nil
	}
	v := x.value(register, n)
	if bytes.Equal(v.known, all(n)) {
		v.oneOf = [][]byte{v.data}
	}
	for _, b := range v.oneOf {
		if len(b) >= n {
			a, _ := netip.AddrFromSlice(b[:n])
			as = append(as, a)
		}
	}
	return as
}

// meta is what a rule sees of a packet beside its headers.
func (p Packet) meta(key expr.MetaKey) value {
	known := func(data ...byte) value { return value{data: data, known: all(len(data))} }
	unknown := func(n int, k kind) value { return value{data: make([]byte, n), known: make([]byte, n), kind: k} }
	switch key {
	case expr.MetaKeyNFPROTO:
		return known(p.family())
	case expr.MetaKeyL4PROTO:
		return known(p.Proto)
	case expr.MetaKeyPROTOCOL:
		if p.family() == unix.NFPROTO_IPV4 {
			return known(binary.BigEndian.AppendUint16(nil, unix.ETH_P_IP)...)
		}
		return known(binary.BigEndian.AppendUint16(nil, unix.ETH_P_IPV6)...)
	case expr.MetaKeyOIFNAME, expr.MetaKeyOIF:
		if p.Loopback {
			if key == expr.MetaKeyOIF {
				return known(binary.NativeEndian.AppendUint32(nil, loopback)...)
			}
			return known(append([]byte("lo"), make([]byte, unix.IFNAMSIZ-2)...)...)
		}
	}
	if incoming := key == expr.MetaKeyIIFNAME || key == expr.MetaKeyIIF; p.Link.Name != "" && incoming == p.Dst.IsValid() {
		switch key {
		case expr.MetaKeyIIFNAME, expr.MetaKeyOIFNAME:
			name := make([]byte, unix.IFNAMSIZ)
			copy(name, p.Link.Name)
			return known(name...)
		case expr.MetaKeyIIF, expr.MetaKeyOIF:
			return known(binary.NativeEndian.AppendUint32(nil, uint32(p.Link.Index))...)
		}
	}
	switch key {
	case expr.MetaKeyIIFNAME, expr.MetaKeyOIFNAME:
		return unknown(unix.IFNAMSIZ, linkName)
	case expr.MetaKeyIIF, expr.MetaKeyOIF:
		return unknown(4, linkIndex)
	case expr.MetaKeyBRIIIFNAME, expr.MetaKeyBRIOIFNAME:
		return unknown(unix.IFNAMSIZ, anyValue)
	}
	return unknown(8, anyValue)
}

// fib is what the routing table says of a packet.
func (p Packet) fib(e *expr.Fib) value {
	v := value{data: make([]byte, 16), known: make([]byte, 16)}
	if !e.ResultADDRTYPE || e.FlagIIF || e.FlagOIF || e.FlagSADDR == e.FlagDADDR {
		return v
	}
	v.data, v.known = v.data[:4], v.known[:4]
	if p.local(e.FlagSADDR) {
		return value{data: binary.NativeEndian.AppendUint32(nil, unix.RTN_LOCAL), known: all(4)}
	}
	v.kind = remoteType
	return v
}

// local tells whether the packet's source, or its destination, is this node's.
func (p Packet) local(source bool) bool {
	if source {
		return p.Src.IsValid()
	}
	return p.Dst.IsValid()
}

// payload returns n bytes of a header.
func (p Packet) payload(base expr.PayloadBase, at, n int) value {
	if n < 0 || n > 64 || at < 0 {
		n = 0
	}
	v := value{data: make([]byte, n), known: make([]byte, n)}
	var header, known []byte
	put := func(at int, data ...byte) {
		copy(header[at:], data)
		copy(known[at:], all(len(data)))
	}
	switch {
	case base == expr.PayloadBaseTransportHeader:
		header, known = make([]byte, 20), make([]byte, 20)
		for i, port := range []uint16{p.SrcPort, p.DstPort} {
			if port != 0 {
				put(2*i, binary.BigEndian.AppendUint16(nil, port)...)
			} else {
				header[2*i], known[2*i] = clientPorts>>8, clientPorts>>8 // that bit
			}
		}
	case base != expr.PayloadBaseNetworkHeader:
		return v
	default:
		proto, src, dst, size := 9, 12, 16, 20
		if p.family() == unix.NFPROTO_IPV6 {
			proto, src, dst, size = 6, 8, 24, 40
		}
		header, known = make([]byte, size), make([]byte, size)
		put(proto, p.Proto)
		put(src, p.Src.AsSlice()...)
		put(dst, p.Dst.AsSlice()...)
		if peers := p.Link.Peers; peers.IsValid() && peers.Addr().Is4() == p.own().Is4() {
			theirs := src
			if p.Src.IsValid() {
				theirs = dst
			}
			copy(header[theirs:], peers.Masked().Addr().AsSlice())
			copy(known[theirs:], net.CIDRMask(peers.Bits(), peers.Addr().BitLen()))
		}
		if at == src && !p.Src.IsValid() || at == dst && !p.Dst.IsValid() {
			v.kind = remoteAddr
		}
	}
	if at < len(header) {
		copy(v.data, header[at:])
		copy(v.known, known[at:])
	}
	return v
}
