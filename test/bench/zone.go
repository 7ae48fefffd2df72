package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"

	"github.com/miekg/dns"
)

// zoneName is a zone as a cluster has it.
const zoneName = "default.svc.cluster.local."

// maxEntries is how many names a zone can have, for each has an address of 10.0.0.0/8.
const maxEntries = 1 << 20

// ttl outlasts every run.
const ttl = 24 * 60 * 60

// A zone is names with an A and an AAAA record each, and the queries for them.
type zone struct {
	queries [][]byte // with the ID 0
	answers [][]byte // the RDATA to each
}

func newZone(entries int) *zone {
	z := new(zone)
	for i := range entries {
		a, aaaa := addresses(i)
		for _, q := range []struct {
			typ  uint16
			addr netip.Addr
		}{{dns.TypeA, a}, {dns.TypeAAAA, aaaa}} {
			m := new(dns.Msg)
			m.SetQuestion(name(i), q.typ)
			m.Id = 0
			wire, err := m.Pack()
			if err != nil {
				panic(err) // a name that does not fit
			}
			z.queries = append(z.queries, wire)
			z.answers = append(z.answers, q.addr.AsSlice())
		}
	}
	return z
}

func name(i int) string { return fmt.Sprintf("service-%d.%s", i, zoneName) }

func addresses(i int) (a, aaaa netip.Addr) {
	v4 := binary.BigEndian.AppendUint32(nil, 10<<24+uint32(i))
	v6 := append([]byte{0xfd, 15: 0}[:12], v4...)
	a, _ = netip.AddrFromSlice(v4)
	aaaa, _ = netip.AddrFromSlice(v6)
	return a, aaaa
}

// write writes the zone as a master file (RFC 1035, 5).
func (z *zone) write(w io.Writer) {
	fmt.Fprintf(w, "$ORIGIN %s\n$TTL %d\n@ IN SOA ns hostmaster 1 3600 600 86400 60\n@ IN NS ns\nns IN A %v\n@ IN A %[3]v\n", zoneName, ttl, upstreamAddr.Addr())
	for i := range len(z.queries) / 2 {
		a, aaaa := addresses(i)
		short := strings.TrimSuffix(name(i), "."+zoneName)
		fmt.Fprintf(w, "%s IN A %v\n%[1]s IN AAAA %[3]v\n", short, a, aaaa)
	}
}

// errWrong says that a server has sent what is no answer to the query.
var errWrong = errors.New("wrong answer")

// check compares an answer with the n-th query but for the ID.
func (z *zone) check(n int, a []byte) error {
	q := z.queries[n]
	if len(a) < len(q) {
		return fmt.Errorf("%w: %d bytes to a query of %d", errWrong, len(a), len(q))
	}
	const qr, tc = 0x80, 0x02
	if a[2]&qr == 0 || a[2]&tc != 0 || a[3]&0xf != dns.RcodeSuccess {
		return fmt.Errorf("%w: flags %x", errWrong, a[2:4])
	}
	if binary.BigEndian.Uint16(a[4:]) != 1 || binary.BigEndian.Uint16(a[6:]) != 1 {
		return fmt.Errorf("%w: %d questions and %d answers, want one each", errWrong, binary.BigEndian.Uint16(a[4:]), binary.BigEndian.Uint16(a[6:]))
	}
	if !bytes.Equal(a[12:len(q)], q[12:]) {
		return fmt.Errorf("%w: to another question", errWrong)
	}
	// The name is that of the question, and nearly always a pointer to it.
	rr := a[len(q):]
	if len(rr) >= 2 && rr[0] == 0xc0 && rr[1] == 12 {
		rr = rr[2:]
	} else if name := q[12 : len(q)-4]; bytes.HasPrefix(rr, name) {
		rr = rr[len(name):]
	} else {
		return fmt.Errorf("%w: a record of another name", errWrong)
	}
	want := z.answers[n]
	if len(rr) < 10+len(want) || !bytes.Equal(rr[:4], q[len(q)-4:]) || int(binary.BigEndian.Uint16(rr[8:])) != len(want) || !bytes.Equal(rr[10:10+len(want)], want) {
		return fmt.Errorf("%w: another record", errWrong)
	}
	return nil
}
