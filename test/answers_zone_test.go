package e2e

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/miekg/dns"
)

// What the upstream of the comparison says, by kind.

// typeTexts are a record of every type that dig knows and that stands in zones. Of the
// types that the DNS library does not know they are in the form of RFC 3597.
var typeTexts = []string{
	"A 192.0.2.1", "A 192.0.2.2", "NS ns.corpus.example.", "MD md.corpus.example.", "MF mf.corpus.example.", "CNAME host.corpus.example.",
	"SOA ns.corpus.example. hostmaster.corpus.example. 1 3600 600 86400 3000", "MB mb.corpus.example.", "MG mg.corpus.example.",
	"MR mr.corpus.example.", `NULL \# 4 01020304`, `TYPE11 \# 6 c00002010601`, "PTR host.corpus.example.", `HINFO "a cpu" ""`,
	"MINFO a.corpus.example. b.corpus.example.", "MX 10 mail.corpus.example.", "MX 20 MAIL2.Corpus.Example.", `TXT "one" "" "t\"w\\o\000\255"`,
	"RP a.corpus.example. b.corpus.example.", "AFSDB 1 a.corpus.example.", `X25 311061700956`, `ISDN "150862028003217" "004"`,
	"RT 2 a.corpus.example.", `TYPE22 \# 5 4700058000`, "NSAP-PTR host.corpus.example.",
	"SIG A 13 3 3000 20400101000000 20200101000000 1 corpus.example. c2lnbmF0dXJl", "KEY 256 3 13 a2V5", "PX 10 a.corpus.example. b.corpus.example.",
	`GPOS -32.6882 116.8652 10.0`, "AAAA 2001:db8::1", "AAAA ::ffff:192.0.2.1", "LOC 51 30 12.748 N 0 7 39.611 W 0.00m 1.00m 10000.00m 10.00m",
	"NXT a.corpus.example. A NS", "EID 0102", "NIMLOC 0102", "SRV 0 5 53 ns.corpus.example.", `TYPE34 \# 3 000102`,
	`NAPTR 100 10 "u" "E2U+sip" "!^.*$!sip:info@example.com!" .`, `NAPTR 100 50 "s" "z3950" "" NS.corpus.example.`, "KX 10 a.corpus.example.",
	"CERT 1 0 0 Y2VydA==", `TYPE38 \# 17 0020010db8000000000000000000000001`, "DNAME target.corpus.example.", `TYPE40 \# 4 01020304`,
	"APL 1:192.168.32.0/21 !1:192.168.38.0/28 2:ff00::/8", "DS 60485 13 2 d4b7d520e7bb5f0f67674a0cceb1e3e0614b93c4f9e99b8383f6a1e4469da50a",
	"SSHFP 4 2 d4b7d520e7bb5f0f67674a0cceb1e3e0614b93c4f9e99b8383f6a1e4469da50a", "IPSECKEY 10 1 2 192.0.2.38 a2V5",
	"IPSECKEY 10 3 2 gw.corpus.example. a2V5", "RRSIG A 13 3 3000 20400101000000 20200101000000 1 corpus.example. c2lnbmF0dXJl",
	`NSEC \000.corpus.example. A MX RRSIG NSEC TYPE1234`, "DNSKEY 257 3 13 a2V5a2V5", "DHCID AAIBY2/AuCccgoJbsaxcQc9TUapptP69lOjxfNuVAA2kjEA=",
	"NSEC3 1 1 12 aabbccdd 2T7B4G4VSA5SMI47K61MV5BV1A22BOJR A RRSIG", "NSEC3PARAM 1 0 0 -", "TLSA 3 1 1 " + strings.Repeat("ab", 32),
	"SMIMEA 3 1 1 " + strings.Repeat("cd", 32), "HIP 2 200100107B1A74DF365639CC39F1D578 AwEAAbdxyhNuSutc5EMzxTs9LBPCIkOFH8cIvM4p9+LrV4e19WzK00+CI6zBCQTdtWsuxKbWIy87UOoJTwkUs7lBu+Upr1gsNrut79ryra+bSRGQb1slImA8YVJyuIDsj7kwzG7jnERNqnWxZ48AWkskmdHaVDP4BcelrTI3rMXdXF5D rvs.corpus.example.",
	`NINFO "info"`, "RKEY 0 3 13 a2V5", "TALINK a.corpus.example. b.corpus.example.", "CDS 0 0 0 00", "CDNSKEY 0 3 0 AA==", "OPENPGPKEY a2V5",
	"CSYNC 66 3 A NS AAAA", "ZONEMD 1 1 1 " + strings.Repeat("ef", 48), `TYPE66 \# 8 003b010035016100`, `TYPE67 \# 3 010203`, `TYPE68 \# 3 010203`,
	"SVCB 1 svc.corpus.example. alpn=h2", "HTTPS 1 . alpn=h2,h3", `SPF "v=spf1 -all"`, `UINFO "x"`, "UID 1000", "GID 1000", `TYPE103 \# 2 0102`,
	"NID 10 0014:4fff:ff20:ee64", "L32 10 10.1.2.0", "L64 10 2001:0DB8:1140:1000", "LP 10 l64.corpus.example.", "EUI48 00-00-5e-00-53-2a",
	"EUI64 00-00-5e-ef-10-00-00-2a", `URI 10 1 "ftp://ftp1.example.com/public"`, `CAA 0 issue "ca.example.net"`, `CAA 128 IODEF "mailto:a@example.com"`,
	`AVC "x"`, `TYPE259 \# 12 000000010000000201000078`, "AMTRELAY 10 0 1 203.0.113.15", "AMTRELAY 10 1 3 relay.corpus.example.", `RESINFO "qnamemin" "exterr=15,16,17"`,
	`TYPE262 \# 4 03425443`, `TYPE263 \# 2 0161`, `TYPE264 \# 4 00000001`, "TA 60485 13 2 " + strings.Repeat("ab", 32), "DLV 60485 13 2 " + strings.Repeat("ab", 32),
	`TYPE65280 \# 4 01020304`, `TYPE65281 \# 0`, `TYPE65534 \# 5 0d12340001`,
}

var typeRecords = func() (all []wireRecord) {
	for _, t := range typeTexts {
		all = append(all, record("= 3000 IN "+t))
	}
	return all
}()

// corpusTypes are all that is asked for: those, and the ones that stand in no zone.
var corpusTypes = func() (types []uint16) {
	for _, rr := range typeRecords {
		types = append(types, rr.typ)
	}
	types = append(types, 0, dns.TypeOPT, dns.TypeNXNAME, dns.TypeTKEY, dns.TypeTSIG, dns.TypeIXFR, dns.TypeAXFR, dns.TypeMAILB, dns.TypeMAILA, dns.TypeANY, 65535)
	slices.Sort(types)
	return slices.Compact(types)
}()

// serviceParams are service bindings with each key, as SVCB and HTTPS have them.
var serviceParams = []string{
	"0 svc.corpus.example.", "0 .", "1 .", "16 svc.corpus.example. mandatory=alpn,ipv4hint alpn=h2 ipv4hint=192.0.2.1", "1 . alpn=h2,h3", "1 . alpn=h3 no-default-alpn",
	"1 . port=8443", "1 . ipv4hint=192.0.2.1,192.0.2.2", "1 . ech=AEj+DQBEAQAgACAdd+scUi0IYFsXnUIU7ko2Nd9+F8M26pAGZVpz/KrWPgAEAAEAAQAVZWNoLXNpdGVzLmV4YW1wbGUubmV0AAA=",
	"1 . ipv6hint=2001:db8::1,2001:db8::2", "1 doh.corpus.example. alpn=h2 dohpath=/dns-query{?dns}", "1 . alpn=h2 ohttp", "1 . key9=%00%1d", "1 . key10=a", "1 . key667=hello",
	"1 . key65280=x", "1 . key65534=", "65535 svc.corpus.example. alpn=h2,h3 port=1 ipv4hint=192.0.2.1 ech=AAAA ipv6hint=2001:db8::1 dohpath=/{?dns} ohttp key9=ab key65000=x",
}

func textOf(size int) (all []wireRecord) {
	for i := 0; size > 0; i++ {
		n := min(size, 1000)
		var data []byte
		for left := n; left > 0; left -= 251 {
			part := fmt.Sprintf("%04d", i) + strings.Repeat("x", min(left, 247))
			data = append(append(data, byte(len(part))), part...)
		}
		all = append(all, wireRecord{typ: dns.TypeTXT, ttl: 3000, data: data})
		size -= n
	}
	return all
}

// A saying makes a reply.
type saying func(in inquiry) *reply

func always(a *reply) saying { return func(inquiry) *reply { return a } }

var addresses = recordsOf("= 3000 IN A 192.0.2.1", "= 3000 IN AAAA 2001:db8::1", `= 3000 IN TXT "text"`)

// owned gives records an owner.
func owned(owner string, all []wireRecord) (out []wireRecord) {
	for _, rr := range all {
		rr.owner = record(owner + " 0 IN A 0.0.0.0").owner
		out = append(out, rr)
	}
	return out
}

// alias is a reply with aliases, followed by what another one has.
func alias(a *reply, aliases ...wireRecord) *reply {
	b := *a
	b.sections[0] = append(slices.Clone(aliases), a.sections[0]...)
	return &b
}

// corpusSays has what is said, by the label above corpus.example.
var corpusSays = map[string]saying{
	"types": func(in inquiry) *reply {
		if in.qtype == dns.TypeANY {
			return having(in.qtype, addresses...)
		}
		if in.qtype == dns.TypeCNAME {
			return denial(0) // nothing may stand beside one
		}
		return having(in.qtype, typeRecords...)
	},
	"svcb": func(in inquiry) *reply {
		p := serviceParams[argNumber(in.arg)%len(serviceParams)]
		return having(in.qtype, recordsOf("= 3000 IN SVCB "+p, "= 3000 IN HTTPS "+p)...)
	},
	"chain": func(in inquiry) *reply {
		arg, begin, done := in.arg, in.name, 0
		if strings.HasPrefix(arg, "step") { // one asks where it leads to
			done = argNumber(arg) + 1
			_, begin, _ = strings.Cut(in.name, ".")
			arg, _, _ = strings.Cut(begin, "-")
		}
		var aliases []wireRecord
		owner := "="
		for i := done; i < argNumber(arg); i++ {
			to := fmt.Sprintf("step%d.%s", i, begin)
			aliases = append(aliases, record(owner+" 3000 IN CNAME "+to))
			owner = to
		}
		if in.qtype == dns.TypeCNAME && len(aliases) > 0 {
			return having(in.qtype, aliases[0])
		}
		switch arg[0] {
		case 'd':
			return alias(denial(dns.RcodeNameError), aliases...)
		case 'e':
			return alias(denial(0), aliases...)
		case 'o': // it leads to where this server knows nothing
			return &reply{sections: [3][]wireRecord{aliases}}
		case 'l': // a loop
			return &reply{sections: [3][]wireRecord{append(aliases, record(owner+" 3000 IN CNAME "+begin))}}
		}
		end := addresses
		if owner != "=" {
			end = owned(owner, addresses)
		}
		return alias(having(in.qtype, end...), aliases...)
	},
	"dname": func(in inquiry) *reply {
		d := record("dname.corpus.example. 3000 IN DNAME wild.corpus.example.")
		to := strings.TrimSuffix(in.name, "dname.corpus.example.") + "wild.corpus.example."
		if in.arg[0] == 'b' { // without what follows from it
			return &reply{sections: [3][]wireRecord{{d}}}
		}
		return alias(having(in.qtype, owned(to, addresses)...), d, record("= 3000 IN CNAME "+to))
	},
	"wild":  func(in inquiry) *reply { return having(in.qtype, addresses...) },
	"odd":   func(in inquiry) *reply { return having(in.qtype, addresses...) },
	"empty": always(denial(0)), "nowhere": always(denial(dns.RcodeNameError)),
	"empty0": always(&reply{}), "nowhere0": always(&reply{rcode: dns.RcodeNameError}),
	"big": func(in inquiry) *reply { return having(in.qtype, textOf(argNumber(in.arg))...) },
	"many": func(in inquiry) *reply {
		var all []wireRecord
		for i := range max(1, argNumber(in.arg)) {
			all = append(all, record(fmt.Sprintf("= 3000 IN A 198.51.100.%d", i+1)), record(fmt.Sprintf("= 3000 IN AAAA 2001:db8::%d", i+1)))
		}
		return having(in.qtype, all...)
	},
	"signed": func(in inquiry) *reply {
		a := having(in.qtype, addresses...)
		if in.do && len(a.sections[0]) > 0 {
			a.sections[0] = append(a.sections[0], record(fmt.Sprintf("= 3000 IN RRSIG TYPE%d 13 3 3000 20400101000000 20200101000000 1 corpus.example. c2lnbmF0dXJl", in.qtype)))
		}
		if in.do || in.ad {
			a.flags |= flagAD
		}
		return a
	},
	"glue": func(in inquiry) *reply {
		a := having(in.qtype, recordsOf("= 3000 IN MX 10 mail.corpus.example.", "= 3000 IN SRV 0 5 53 mail.corpus.example.", "= 3000 IN NS mail.corpus.example.")...)
		a.sections[1] = append(a.sections[1], record("corpus.example. 3000 IN NS ns.corpus.example."))
		a.sections[2] = recordsOf("mail.corpus.example. 3000 IN A 192.0.2.25", "mail.corpus.example. 3000 IN AAAA 2001:db8::25", "ns.corpus.example. 3000 IN A 192.0.2.53")
		return a
	},
	"referral": always(&reply{sections: [3][]wireRecord{1: recordsOf("referral.corpus.example. 3000 IN NS ns.referral.corpus.example."), 2: recordsOf("ns.referral.corpus.example. 3000 IN A 192.0.2.53")}}),
	"ttl": func(in inquiry) *reply {
		ttls := [][]uint32{{0}, {1 << 31}, {1<<32 - 1}, {3000, 100000}, {100000}, {1000000}}[argNumber(in.arg)%6]
		if in.qtype != dns.TypeA {
			return denial(0)
		}
		a := &reply{}
		for i, ttl := range ttls {
			a.sections[0] = append(a.sections[0], wireRecord{typ: dns.TypeA, ttl: ttl, data: []byte{192, 0, 2, byte(i)}})
		}
		return a
	},
	"rcode": func(in inquiry) *reply { return &reply{rcode: argNumber(in.arg)} },
	"option": func(in inquiry) *reply {
		a := having(in.qtype, addresses...)
		o := optionTexts[argNumber(in.arg)%len(optionTexts)]
		a.options, a.opts = unhex(o.data), o.more
		return a
	},
	"flags": func(in inquiry) *reply {
		a := having(in.qtype, addresses...)
		switch argNumber(in.arg) % 6 {
		case 0:
			a.flags = flagAA
		case 1:
			a.unset = flagRA
		case 2:
			a.flags = flagAD
		case 3:
			a.flags = flagZ
		case 4:
			a.unset = 1 << 8 // RD is not given back
		case 5:
			a.flags = flagTC
			a.sections[0] = nil
		}
		return a
	},
}

// optionTexts are what OPT records of the upstream have.
var optionTexts = []struct {
	data string
	more int
}{
	{"", 0}, {"", -1}, {"", 1}, // none, no OPT, two OPTs
	{"000f 0006 0012 626c6f62", 0}, {"000f 0002 0003", 0}, {"000f 0002 0003 000f 0002 0004", 0}, // errors
	{"0003 0004 6e736964", 0}, {"000a 0010 01234567 89abcdef 01020304 05060708", 0}, {"0008 0007 0001 1818 c00002", 0}, // NSID, a cookie, a subnet
	{"000c 0004 00000000", 0}, {"0009 0004 00000e10", 0}, {"000b 0002 0064", 0}, // padding, EXPIRE, keepalive
	{"fde9 0003 010203", 0}, {"0012 0009 0361676503636f6d 00", 0}, {"0013 0002 0100", 0}, // unknown, report channel, ZONEVERSION
}

// brokenData are records whose data is not what it should be, by a label above broken.example.
var brokenData = map[string]struct {
	typ  uint16
	data string
}{
	"svcb-order": {dns.TypeHTTPS, "0001 00 0004 0004 c0000201 0001 0003 02 6832"}, "svcb-twice": {dns.TypeHTTPS, "0001 00 0003 0002 01bb 0003 0002 01bb"},
	"svcb-alpn": {dns.TypeHTTPS, "0001 00 0001 0001 00"}, "svcb-alpn-over": {dns.TypeHTTPS, "0001 00 0001 0003 056832"}, "svcb-no-alpn": {dns.TypeHTTPS, "0001 00 0002 0001 00"},
	"svcb-port": {dns.TypeHTTPS, "0001 00 0003 0001 bb"}, "svcb-hint": {dns.TypeSVCB, "0001 00 0004 0003 c00002"}, "svcb-no-hint": {dns.TypeSVCB, "0001 00 0004 0000"},
	"svcb-hint6": {dns.TypeSVCB, "0001 00 0006 0010 00000000000000000000ffffc0000201"}, "svcb-mandatory": {dns.TypeHTTPS, "0001 00 0000 0001 00"},
	"svcb-mandatory-order": {dns.TypeHTTPS, "0001 00 0000 0004 0003 0001 0001 0003 02 6832 0003 0002 01bb"}, "svcb-65535": {dns.TypeHTTPS, "0001 00 ffff 0001 00"},
	"svcb-over": {dns.TypeHTTPS, "0001 00 0001 0010 02 6832"}, "svcb-short": {dns.TypeHTTPS, "0001"}, "svcb-empty": {dns.TypeHTTPS, ""},
	"svcb-alias": {dns.TypeHTTPS, "0000 00 0001 0003 02 6832"}, "svcb-pointer": {dns.TypeHTTPS, "0001 c00c"}, "svcb-no-name": {dns.TypeHTTPS, "0001 03 6162"},
	"a-short": {dns.TypeA, "c00002"}, "a-long": {dns.TypeA, "c000020101"}, "a-empty": {dns.TypeA, ""}, "aaaa-short": {dns.TypeAAAA, "20010db8"}, "aaaa-long": {dns.TypeAAAA, "20010db8000000000000000000000001 00"},
	"mx-short": {dns.TypeMX, "000a"}, "mx-loop": {dns.TypeMX, "000a c02c"}, "mx-beyond": {dns.TypeMX, "000a cfff"}, "mx-label": {dns.TypeMX, "000a 41 6162"}, "mx-more": {dns.TypeMX, "000a 00 00"},
	"ns-empty": {dns.TypeNS, ""}, "cname-long": {dns.TypeCNAME, strings.Repeat("3f"+strings.Repeat("61", 63), 5) + "00"}, "soa-short": {dns.TypeSOA, "00 00 00000001"},
	"txt-over": {dns.TypeTXT, "05 6162"}, "txt-empty": {dns.TypeTXT, ""}, "caa-over": {dns.TypeCAA, "00 09 6973"}, "caa-no-tag": {dns.TypeCAA, "00 00"}, "caa-short": {dns.TypeCAA, "00"},
	"ds-short": {dns.TypeDS, "0001 0d"}, "ds-no-digest": {dns.TypeDS, "0001 0d 02"}, "dnskey-short": {dns.TypeDNSKEY, "0100 03"}, "rrsig-short": {dns.TypeRRSIG, "0001 0d 02"},
	"nsec-order": {dns.TypeNSEC, "00 01 01 40 00 01 40"}, "nsec-window": {dns.TypeNSEC, "00 00 21 40"}, "nsec-zero": {dns.TypeNSEC, "00 00 02 4000"}, "nsec-none": {dns.TypeNSEC, "00"},
	"nsec3-salt": {dns.TypeNSEC3, "01 00 000a ff aa"}, "nsec3-hash": {dns.TypeNSEC3, "01 00 000a 00 ff aa"}, "nsec3param-salt": {dns.TypeNSEC3PARAM, "01 00 000a 05 aa"},
	"loc-version": {dns.TypeLOC, "01 12 16 13 80000000 80000000 00989680"}, "loc-short": {dns.TypeLOC, "00 12 16"}, "loc-size": {dns.TypeLOC, "00 ff ff ff ffffffff ffffffff ffffffff"},
	"apl-family": {dns.TypeAPL, "0003 08 01 c0"}, "apl-prefix": {dns.TypeAPL, "0001 40 01 c0"}, "apl-zeros": {dns.TypeAPL, "0001 18 04 c0000200"}, "apl-over": {dns.TypeAPL, "0001 18 08 c0"},
	"tlsa-short": {dns.TypeTLSA, "03 01"}, "tlsa-empty": {dns.TypeTLSA, "03 01 01"}, "sshfp-short": {dns.TypeSSHFP, "01"}, "uri-short": {dns.TypeURI, "000a"}, "uri-empty": {dns.TypeURI, "000a 0001"},
	"srv-short": {dns.TypeSRV, "0000 0005"}, "srv-no-name": {dns.TypeSRV, "0000 0005 0035"}, "srv-pointer": {dns.TypeSRV, "0000 0005 0035 c00c"}, "naptr-over": {dns.TypeNAPTR, "0001 0001 09 75"},
	"hip-short": {dns.TypeHIP, "10 02"}, "hip-over": {dns.TypeHIP, "10 02 0004 2001"}, "ipseckey-kind": {dns.TypeIPSECKEY, "0a 09 02 aabb"}, "ipseckey-short": {dns.TypeIPSECKEY, "0a 01 02 c000"},
	"amtrelay-kind": {dns.TypeAMTRELAY, "0a 05 aabb"}, "cert-short": {dns.TypeCERT, "0001 00"}, "csync-order": {dns.TypeCSYNC, "00000001 0000 01 01 40 00 01 40"}, "zonemd-short": {dns.TypeZONEMD, "00000001 01"},
	"dhcid-empty": {dns.TypeDHCID, ""}, "eui48-short": {dns.TypeEUI48, "0000"}, "eui64-long": {dns.TypeEUI64, "000000000000000000"}, "hinfo-one": {dns.TypeHINFO, "01 61"}, "nid-short": {dns.TypeNID, "000a"},
	"l32-long": {dns.TypeL32, "000a 0a010200 00"}, "px-short": {dns.TypePX, "000a 00"}, "kx-pointer": {dns.TypeKX, "000a c00c"}, "dname-pointer": {dns.TypeDNAME, "c00c"}, "rp-one": {dns.TypeRP, "00"},
	"minfo-one": {dns.TypeMINFO, "00"}, "gpos-text": {dns.TypeGPOS, "01 78 01 79 01 7a"}, "gpos-short": {dns.TypeGPOS, "01 78"}, "uid-short": {dns.TypeUID, "0000"}, "x25-empty": {dns.TypeX25, ""}, "isdn-empty": {dns.TypeISDN, ""},
	"openpgpkey-empty": {dns.TypeOPENPGPKEY, ""}, "key-short": {dns.TypeKEY, "0100"}, "null-empty": {dns.TypeNULL, ""}, "resinfo-over": {dns.TypeRESINFO, "09 61"}, "nxt-short": {dns.TypeNXT, "00"}, "talink-one": {dns.TypeTALINK, "00"},
}

// brokenMessages are answers that are no DNS as a whole.
var brokenMessages = map[string]*reply{
	"opt-over": {options: unhex("000f 0040 0012")}, "opt-error": {options: unhex("000f 0001 00")}, "opt-cookie": {options: unhex("000a 0003 010203")}, "opt-subnet": {options: unhex("0008 0003 000101")},
	"opt-cut": {options: unhex("000f 00")}, "opt-keepalive": {options: unhex("000b 0001 00")}, "opt-subnet-family": {options: unhex("0008 0005 0009 1800 c0")},
	"more-answers": {change: func(b []byte) []byte { b[7] += 3; return b }}, "more-additional": {change: func(b []byte) []byte { b[11] += 3; return b }},
	"trailing": {change: func(b []byte) []byte { return append(b, 1, 2, 3) }}, "cut": {change: func(b []byte) []byte { return b[:len(b)-3] }},
	"two-questions": {change: func(b []byte) []byte { b[5] = 2; return b }}, "no-question": {rcode: dns.RcodeFormatError, change: func(b []byte) []byte {
		q := 12 + bytes.IndexByte(b[12:], 0) + 5
		b[5] = 0
		return append(b[:12:12], b[q:]...)
	}},
	"class": {change: func(b []byte) []byte { q := 12 + bytes.IndexByte(b[12:], 0) + 5; b[q+5] = 3; return b }},
	"owner": {sections: [3][]wireRecord{owned("other.example.", addresses[:1])}}, "stranger": {sections: [3][]wireRecord{append(owned("other.example.", addresses[:1]), addresses[0])}},
	"two-aliases": {sections: [3][]wireRecord{recordsOf("= 3000 IN CNAME a.example.", "= 3000 IN CNAME b.example.", "a.example. 3000 IN A 192.0.2.1")}},
	"other-type":  {sections: [3][]wireRecord{recordsOf(`= 3000 IN TXT "not what was asked for"`)}}, "pointer": {change: func(b []byte) []byte {
		q := 12 + bytes.IndexByte(b[12:], 0) + 5
		b[q], b[q+1] = 0xcf, 0xff
		return b
	}},
	"late-denial": {rcode: dns.RcodeNameError, sections: [3][]wireRecord{addresses[:1]}},
}

// brokenSays is what is said by a label above broken.example.
func brokenSays(kind string) *reply {
	if a := brokenMessages[kind]; a != nil {
		b := *a
		if b.sections[0] == nil {
			b.sections[0] = addresses[:1]
		}
		return &b
	}
	if d, ok := brokenData[kind]; ok {
		return &reply{sections: [3][]wireRecord{{{typ: d.typ, ttl: 3000, data: unhex(d.data)}}}}
	}
	return denial(dns.RcodeNameError)
}
func unhex(s string) []byte {
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		panic(err)
	}
	return b
}
