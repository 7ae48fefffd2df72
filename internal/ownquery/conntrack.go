package ownquery

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// What x/sys lacks of linux/netfilter/nfnetlink_conntrack.h.
const (
	ctGet       = 1 // IPCTNL_MSG_CT_GET
	ctTupleOrig = 1 // CTA_TUPLE_ORIG

	tupleIP, tupleProto            = 1, 2 // CTA_TUPLE_IP, CTA_TUPLE_PROTO
	ipSrc4, ipDst4, ipSrc6, ipDst6 = 1, 2, 3, 4
	protoNum, protoSrc, protoDst   = 1, 2, 3
)

// isTracked tells whether connection tracking has an entry for packets from one address and
// port to another, in its default zone. Where it can't be asked there is none.
func isTracked(proto string, src, dst netip.AddrPort) bool {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return false
	}
	defer conn.Close()
	if conn.SetDeadline(time.Now().Add(patience)) != nil {
		return false
	}
	number, family := byte(unix.IPPROTO_UDP), byte(unix.AF_INET)
	srcType, dstType := uint16(ipSrc4), uint16(ipDst4)
	if proto == "tcp" {
		number = unix.IPPROTO_TCP
	}
	if dst.Addr().Is6() {
		family, srcType, dstType = unix.AF_INET6, ipSrc6, ipDst6
	}
	ae := netlink.NewAttributeEncoder()
	ae.ByteOrder = binary.BigEndian
	ae.Nested(ctTupleOrig, func(ae *netlink.AttributeEncoder) error {
		ae.Nested(tupleIP, func(ae *netlink.AttributeEncoder) error {
			ae.Bytes(srcType, src.Addr().Unmap().AsSlice())
			ae.Bytes(dstType, dst.Addr().AsSlice())
			return nil
		})
		ae.Nested(tupleProto, func(ae *netlink.AttributeEncoder) error {
			ae.Uint8(protoNum, number)
			ae.Uint16(protoSrc, src.Port())
			ae.Uint16(protoDst, dst.Port())
			return nil
		})
		return nil
	})
	data, err := ae.Encode()
	if err != nil {
		return false
	}
	// The entry says that more follows (NLM_F_MULTI), and only the acknowledgement does.
	answers, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_CTNETLINK<<8 | ctGet), Flags: netlink.Request | netlink.Acknowledge},
		Data:   append([]byte{family, unix.NFNETLINK_V0, 0, 0}, data...),
	})
	return err == nil && slices.ContainsFunc(answers, func(m netlink.Message) bool { return m.Header.Type != netlink.Error })
}
