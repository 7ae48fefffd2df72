package ruleset

import (
	"bytes"
	"encoding/binary"
	"net/netip"

	"github.com/google/nftables/xt"
)

// xtMatch is a match of iptables. What is not here says perhaps.
func (x *run) xtMatch(name string, info any) maybe {
	switch i := info.(type) {
	case *xt.Comment:
		return yes
	case *xt.Udp:
		return min(
			portIn(x.packet.SrcPort, i.SrcPorts, i.InvFlags&xt.UdpInvSrcPorts != 0),
			portIn(x.packet.DstPort, i.DstPorts, i.InvFlags&xt.UdpInvDestPorts != 0))
	case *xt.Tcp:
		m := min(
			portIn(x.packet.SrcPort, i.SrcPorts, i.InvFlags&xt.TcpInvSrcPorts != 0),
			portIn(x.packet.DstPort, i.DstPorts, i.InvFlags&xt.TcpInvDestPorts != 0))
		if i.Option != 0 || i.FlagsMask != 0 {
			m = min(m, perhaps)
		}
		return m
	case *xt.ConntrackMtinfo3:
		return x.packet.conntrack(i.MatchFlags, i.InvertFlags, i.StateMask)
	case *xt.ConntrackMtinfo2:
		return x.packet.conntrack(i.MatchFlags, i.InvertFlags, i.StateMask)
	case *xt.AddrTypeV1:
		const invertSource, invertDest, limitIn, limitOut = 1, 2, 4, 8
		m := min(
			addrType(i.Source, x.packet.local(true)).invert(i.Source != 0 && i.Flags&invertSource != 0),
			addrType(i.Dest, x.packet.local(false)).invert(i.Dest != 0 && i.Flags&invertDest != 0))
		if i.Flags&(limitIn|limitOut) != 0 {
			m = min(m, perhaps)
		}
		return m
	case *xt.Unknown:
		switch {
		case name == "comment":
			return yes
		case name == "mark" && x.way != nil:
			return x.way.course.marked(*i)
		case name == "multiport":
			return x.packet.multiport(*i)
		case name == "state" && len(*i) >= 4 && x.packet.State != 0:
			return sure(binary.NativeEndian.Uint32(*i)&x.packet.State != 0)
		}
	}
	return perhaps
}

// portIn tells whether a port, 0 being a client's, is in a range.
func portIn(port uint16, ports [2]uint16, not bool) maybe {
	m := sure(ports[0] <= port && port <= ports[1])
	if port == 0 {
		m = between(ports[0] <= clientPorts && ports[1] == 0xffff, ports[1] >= clientPorts)
	}
	return m.invert(not)
}

// xtUntracked is StateUntracked to the match conntrack (XT_CONNTRACK_STATE_UNTRACKED).
const xtUntracked = 1 << 8

func (p Packet) conntrack(flags, inverted, states uint16) maybe {
	const state = uint16(xt.ConntrackState)
	if p.State == 0 {
		return perhaps
	}
	if flags&state == 0 {
		// Of a packet that is not tracked there is nothing else to compare.
		return min(perhaps, sure(p.State != StateUntracked))
	}
	own := uint16(p.State)
	if p.State == StateUntracked {
		own = xtUntracked
	}
	m := sure(states&own != 0).invert(inverted&state != 0)
	if flags != state && p.State != StateUntracked {
		m = min(m, perhaps)
	}
	return m
}

// addrType tells whether an address, local or another host's, is of one of the types.
func addrType(types uint16, local bool) maybe {
	const isLocal = 1 << 2 // XT_ADDRTYPE_LOCAL
	switch {
	case types == 0:
		return yes
	case local:
		return sure(types&isLocal != 0)
	}
	return min(perhaps, sure(types != isLocal))
}

// multiport is the match of that name (struct xt_multiport_v1): flags, count, 15 ports, 15
// marks of a range's first port, invert.
func (p Packet) multiport(info []byte) maybe {
	if len(info) < 48 {
		return perhaps
	}
	in := func(port uint16) maybe {
		m := no
		for i := 0; i < min(int(info[1]), 15); i++ {
			at := func(i int) uint16 { return binary.NativeEndian.Uint16(info[2+2*i:]) }
			ports := [2]uint16{at(i), at(i)}
			if info[32+i] != 0 && i < 14 {
				i++
				ports[1] = at(i)
			}
			m = max(m, portIn(port, ports, false))
		}
		return m
	}
	src, dst := in(p.SrcPort), in(p.DstPort)
	m := max(src, dst)
	switch info[0] {
	case 0:
		m = src
	case 1:
		m = dst
	}
	return m.invert(info[47] != 0)
}

// xtTarget is a target of iptables that is neither a chain nor a verdict of nf_tables.
func (x *run) xtTarget(name string, info any) (goesOn bool) {
	switch name {
	case "REJECT", "TARPIT", "DELUDE", "STEAL":
		return x.drops()
	case "DNAT":
		return x.translates(natAddr(info)...)
	case "REDIRECT":
		return x.translates()
	case "SNAT", "MASQUERADE", "NETMAP", "TPROXY":
		return x.accepts()
	case "LOG", "NFLOG", "ULOG", "AUDIT", "TRACE", "MARK", "CONNMARK", "SECMARK", "CONNSECMARK", "CT", "NOTRACK", "SET",
		"DSCP", "TOS", "TTL", "HL", "ECN", "TCPMSS", "TCPOPTSTRIP", "CHECKSUM", "CLASSIFY", "IDLETIMER", "LED", "RATEEST", "HMARK", "TEE":
		return true
	}
	x.unknown()
	return true
}

func natAddr(info any) []netip.Addr {
	var ip []byte
	switch i := info.(type) {
	case *xt.NatRange2:
		ip = i.MinIP
	case *xt.NatRange:
		ip = i.MinIP
	case *xt.NatIPv4MultiRangeCompat:
		if len(*i) > 0 {
			ip = (*i)[0].MinIP
		}
	}
	if a, ok := netip.AddrFromSlice(bytes.Clone(ip)); ok {
		return []netip.Addr{a.Unmap()}
	}
	return nil
}
