package upstream

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"slices"

	"github.com/miekg/dns"
)

// named are the types whose data can have names that are compressed (RFC 3597, section 4), so that
// it says nothing outside of its message, and those that other plugins look into.
var named = map[uint16]bool{
	dns.TypeA: true, dns.TypeAAAA: true, dns.TypeNS: true, dns.TypeMD: true, dns.TypeMF: true, dns.TypeCNAME: true, dns.TypeSOA: true,
	dns.TypeMB: true, dns.TypeMG: true, dns.TypeMR: true, dns.TypePTR: true, dns.TypeMINFO: true, dns.TypeMX: true, dns.TypeRP: true,
	dns.TypeAFSDB: true, dns.TypeRT: true, dns.TypeSIG: true, dns.TypePX: true, dns.TypeNXT: true, dns.TypeNAPTR: true, dns.TypeKX: true,
	dns.TypeSRV: true, dns.TypeDNAME: true, dns.TypeRRSIG: true, dns.TypeNSEC: true, dns.TypeTSIG: true, dns.TypeTKEY: true,
}

var errUnwritable = errors.New("a record of it can't be written again")

// unpack reads an answer. Records of which the DNS library can't make sense go on as they are, as
// those of unknown types do (RFC 3597): whether they are of use is for the client to say. An OPT
// record is for this hop alone, and loses its options instead.
func unpack(msg []byte) (*dns.Msg, error) {
	m := new(dns.Msg)
	unread := m.Unpack(msg)
	if unread == nil {
		if !slices.ContainsFunc(m.Answer, unwritable) && !slices.ContainsFunc(m.Extra, unwritable) {
			return m, nil
		}
		unread = errUnwritable
	}
	at := headerLen
	for range binary.BigEndian.Uint16(msg[countsFrom:]) {
		_, end, err := dns.UnpackDomainName(msg, at)
		if err != nil || end+4 > len(msg) {
			return nil, unread
		}
		at = end + 4
	}
	head := append(make([]byte, 0, at), msg[:at]...)
	clear(head[countsFrom+2 : headerLen])
	m = new(dns.Msg)
	if err := m.Unpack(head); err != nil {
		return nil, unread
	}
	for i, section := range []*[]dns.RR{&m.Answer, &m.Ns, &m.Extra} {
		for range binary.BigEndian.Uint16(msg[countsFrom+2+2*i:]) {
			rr, end := unpackRecord(msg, at)
			if rr == nil {
				return nil, unread
			}
			*section = append(*section, rr)
			at = end
		}
	}
	if o := m.IsEdns0(); o != nil {
		m.Rcode |= o.ExtendedRcode()
	}
	return m, nil
}

// unpackRecord reads a record, and returns where it ends; nil: it can't be told, or it can't go
// on as it is.
func unpackRecord(msg []byte, at int) (dns.RR, int) {
	name, from, err := dns.UnpackDomainName(msg, at)
	if err != nil || from+10 > len(msg) {
		return nil, 0
	}
	h := dns.RR_Header{
		Name: name, Rrtype: binary.BigEndian.Uint16(msg[from:]), Class: binary.BigEndian.Uint16(msg[from+2:]),
		Ttl: binary.BigEndian.Uint32(msg[from+4:]), Rdlength: binary.BigEndian.Uint16(msg[from+8:]),
	}
	from += 10
	end := from + int(h.Rdlength)
	if end > len(msg) {
		return nil, 0
	}
	if rr, _, err := dns.UnpackRR(msg, at); err == nil && !unwritable(rr) {
		return rr, end
	}
	switch {
	case h.Rrtype == dns.TypeOPT:
		return &dns.OPT{Hdr: h}, end
	case named[h.Rrtype]:
		return nil, 0
	}
	return &dns.RFC3597{Hdr: h, Rdata: hex.EncodeToString(msg[from:end])}, end
}

// unwritable tells whether a record can be read and not be written again, as a service binding with
// an empty protocol id: the client would get no answer at all.
func unwritable(rr dns.RR) bool {
	switch rr.(type) {
	case *dns.SVCB, *dns.HTTPS:
		_, err := dns.PackRR(rr, make([]byte, dns.Len(rr)), 0, nil, false)
		return err != nil
	}
	return false
}
