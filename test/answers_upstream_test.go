package e2e

import (
	"bytes"
	enc "encoding/binary"
	"net"
	"strconv"
	"strings"

	"github.com/miekg/dns"
)

// The upstream of the comparison (answers_test.go). It puts its answers together byte by byte, so
// that it can say what no library would, and answers by the name alone: ARG-ANYTHING.KIND.corpus.example.

// Where it listens: what it says below broken.example. has an address of its own, since unbound
// goes by what a server has said before.
const (
	corpusAt   = "10.0.2.2:5300"
	brokenAt   = "10.0.2.2:5301"
	corpusZone = "corpus.example."
	brokenZone = "broken.example."
)

// A wireRecord is a record as it is sent.
type wireRecord struct {
	owner []byte // nil: that of the question
	typ   uint16
	ttl   uint32
	data  []byte
}

// A reply is what is said to a question.
type reply struct {
	rcode    int
	flags    uint16 // set beside QR and RA
	unset    uint16
	sections [3][]wireRecord
	options  []byte              // of the OPT record
	opts     int                 // further OPT records; -1: none
	change   func([]byte) []byte // the last thing that is done to it
}

// An inquiry is a question to the upstream.
type inquiry struct {
	arg   string // the first label up to a hyphen
	name  string // in lower case
	qtype uint16
	do    bool
	ad    bool
}

const (
	flagAA = 1 << 10
	flagTC = 1 << 9
	flagRA = 1 << 7
	flagZ  = 1 << 6
	flagAD = 1 << 5
)

// record makes one of its text, in which the owner = is that of the question.
func record(text string) wireRecord {
	own := strings.HasPrefix(text, "= ")
	if own {
		text = "x. " + text[2:]
	}
	rr, err := dns.NewRR(text)
	if err != nil {
		panic(err)
	}
	b := make([]byte, 70000)
	end, err := dns.PackRR(rr, b, 0, nil, false)
	if err != nil {
		panic(text + ": " + err.Error())
	}
	at := bytes.IndexByte(b, 0) + 1 // owners here have no zero byte
	r := wireRecord{nil, rr.Header().Rrtype, rr.Header().Ttl, bytes.Clone(b[at+10 : end])}
	if !own {
		r.owner = bytes.Clone(b[:at])
	}
	return r
}

func recordsOf(texts ...string) (all []wireRecord) {
	for _, t := range texts {
		all = append(all, record(t))
	}
	return all
}

// corpusServer implements dns.Handler.
type corpusServer struct{}

func (n *node) corpusUpstream() {
	n.Helper()
	n.must(n.DNS.Do(func() error {
		for _, at := range []string{corpusAt, brokenAt} {
			packets, err := net.ListenPacket("udp", at)
			if err != nil {
				return err
			}
			listener, err := net.Listen("tcp", at)
			if err != nil {
				return err
			}
			for _, s := range []*dns.Server{{PacketConn: packets, Handler: corpusServer{}, UDPSize: 4096}, {Listener: listener, Handler: corpusServer{}, MaxTCPQueries: -1}} {
				go s.ActivateAndServe()
			}
			n.Cleanup(func() { packets.Close(); listener.Close() })
		}
		return nil
	}))
}

// ServeDNS implements dns.Handler.
func (corpusServer) ServeDNS(w dns.ResponseWriter, r *dns.Msg) {
	q := r.Question[0]
	o := r.IsEdns0()
	in := inquiry{name: strings.ToLower(q.Name), qtype: q.Qtype, do: o != nil && o.Do(), ad: r.AuthenticatedData}
	labels := dns.SplitDomainName(in.name)
	in.arg = "apex"
	kind := ""
	if len(labels) >= 3 {
		kind = labels[len(labels)-3]
		in.arg, _, _ = strings.Cut(labels[0], "-")
	}
	var a *reply
	switch says := corpusSays[kind]; {
	case r.Opcode != dns.OpcodeQuery:
		a = &reply{rcode: dns.RcodeNotImplemented}
	case q.Qclass == dns.ClassCHAOS:
		a = &reply{sections: [3][]wireRecord{{{typ: dns.TypeTXT, data: []byte("\x05chaos")}}}}
	case q.Qclass != dns.ClassINET && q.Qclass != dns.ClassANY:
		a = &reply{rcode: dns.RcodeRefused}
	case strings.HasSuffix(in.name, "."+brokenZone):
		a = brokenSays(kind)
	case says == nil:
		a = denial(dns.RcodeNameError)
	default:
		a = says(in)
	}
	_, tcp := w.RemoteAddr().(*net.TCPAddr)
	size := dns.MaxMsgSize
	if !tcp {
		size = dns.MinMsgSize
		if o != nil {
			size = max(size, int(o.UDPSize()))
		}
	}
	b := a.wire(r, o != nil)
	if len(b) > size {
		t := *a
		t.sections, t.flags, t.change = [3][]wireRecord{}, t.flags|flagTC, nil
		b = t.wire(r, o != nil)
	}
	w.Write(b)
}

// wire is the reply to a query.
func (a *reply) wire(r *dns.Msg, edns bool) []byte {
	q := r.Question[0]
	b := enc.BigEndian.AppendUint16(nil, r.Id)
	flags := 1<<15 | uint16(r.Opcode)<<11 | flagRA | a.flags&^a.unset | uint16(a.rcode&0xf)
	if r.RecursionDesired {
		flags |= 1 << 8
	}
	if r.CheckingDisabled {
		flags |= 1 << 4
	}
	b = enc.BigEndian.AppendUint16(b, flags&^a.unset)
	opts := 1 + a.opts
	if !edns {
		opts = 0
	}
	for _, n := range []int{1, len(a.sections[0]), len(a.sections[1]), len(a.sections[2]) + opts} {
		b = enc.BigEndian.AppendUint16(b, uint16(n))
	}
	name := make([]byte, 300)
	end, err := dns.PackDomainName(q.Name, name, 0, nil, false)
	if err != nil {
		panic(err)
	}
	b = append(b, name[:end]...)
	b = enc.BigEndian.AppendUint16(b, q.Qtype)
	b = enc.BigEndian.AppendUint16(b, q.Qclass)
	class := q.Qclass
	if class == dns.ClassANY {
		class = dns.ClassINET
	}
	for _, s := range a.sections {
		for _, rr := range s {
			if rr.owner == nil {
				b = append(b, 0xc0, 12)
			} else {
				b = append(b, rr.owner...)
			}
			b = appendRecord(b, rr.typ, class, rr.ttl, rr.data)
		}
	}
	for range opts {
		ttl := uint32(a.rcode>>4) << 24
		if o := r.IsEdns0(); o.Do() {
			ttl |= 1 << 15
		}
		b = appendRecord(append(b, 0), dns.TypeOPT, 1232, ttl, a.options)
	}
	if a.change != nil {
		b = a.change(b)
	}
	return b
}

// appendRecord appends what follows the owner name.
func appendRecord(b []byte, typ, class uint16, ttl uint32, data []byte) []byte {
	b = enc.BigEndian.AppendUint16(b, typ)
	b = enc.BigEndian.AppendUint16(b, class)
	b = enc.BigEndian.AppendUint32(b, ttl)
	b = enc.BigEndian.AppendUint16(b, uint16(len(data)))
	return append(b, data...)
}

var corpusSOA = record(corpusZone + " 3000 IN SOA ns.corpus.example. hostmaster.corpus.example. 1 3600 600 86400 3000")

func denial(rcode int) *reply {
	return &reply{rcode: rcode, sections: [3][]wireRecord{1: {corpusSOA}}}
}

// having answers with those records that are of the type, and else denies it.
func having(qtype uint16, all ...wireRecord) *reply {
	a := &reply{}
	for _, rr := range all {
		if rr.typ == qtype || qtype == dns.TypeANY {
			a.sections[0] = append(a.sections[0], rr)
		}
	}
	if len(a.sections[0]) == 0 {
		return denial(0)
	}
	return a
}

// argNumber is that of an argument such as n12.
func argNumber(arg string) int {
	n, _ := strconv.Atoi(strings.TrimLeft(arg, "abcdefghijklmnopqrstuvwxyz"))
	return n
}
