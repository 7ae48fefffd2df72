package upstream

import (
	"encoding/hex"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

// said is an answer to "x. IN HTTPS" with records in hex, of which the last ones are additional.
func said(t testing.TB, records ...string) []byte {
	t.Helper()
	b := []byte{0, 1, 0x81, 0x80, 0, 1, 0, byte(len(records)), 0, 0, 0, 0, 1, 'x', 0, 0, 65, 0, 1}
	for _, r := range records {
		if strings.HasPrefix(r, "00 0029") { // OPT
			b[7]--
			b[11]++
		}
		data, err := hex.DecodeString(strings.ReplaceAll(r, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		b = append(b, data...)
	}
	return b
}

const (
	httpsHead  = "c00c 0041 0001 0000003c "
	disordered = httpsHead + "0012 0001 00 0004 0004 c0000201 0001 0003 026832 "
	ordered    = httpsHead + "0012 0001 00 0001 0003 026832 0004 0004 c0000201"
	aRecord    = "c00c 0001 0001 0000003c 0004 c0000201"
	withError  = "00 0029 04d0 00008000 0006 000f 0002 0016"
	brokenOpt  = "00 0029 04d0 01008000 0006 000f 0040 0016"
)

// What the DNS library can't read goes on as it came, where that can be.
func TestRecordsThatCantBeRead(t *testing.T) {
	for _, c := range []struct {
		name    string
		records []string
		goesOn  bool
		rcode   int
	}{
		{"all is well", []string{ordered, withError}, true, 0},
		{"keys out of order", []string{disordered, aRecord}, true, 0},
		{"keys out of order, with OPT", []string{aRecord, disordered, ordered, withError}, true, 0},
		{"a protocol without a name", []string{httpsHead + "0008 0001 00 0001 0001 00", aRecord}, true, 0},
		{"an OPT that can't be read", []string{aRecord, brokenOpt}, true, 16},
		{"an address of 3 bytes", []string{"c00c 0001 0001 0000003c 0003 c00002"}, false, 0},
		{"a mail exchanger that points beyond", []string{"c00c 000f 0001 0000003c 0004 000a cfff"}, false, 0},
		{"data beyond the end", []string{httpsHead + "0040 0001 00"}, false, 0},
		{"half a record", []string{disordered, "c00c 0041"}, false, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			wire := said(t, c.records...)
			m, err := unpack(wire)
			if (err == nil) != c.goesOn {
				t.Fatalf("%v, %v", m, err)
			}
			if err != nil {
				return
			}
			if m.Rcode != c.rcode || m.Id != 1 || len(m.Question) != 1 {
				t.Errorf("%v", m)
			}
			// All but the OPT record's options is as it was.
			again, err := m.Pack()
			if err != nil {
				t.Fatal(err)
			}
			want := strings.NewReplacer("c00c", "017800", "0006000f00400016", "0000").Replace(hex.EncodeToString(wire))
			if got := hex.EncodeToString(again); got != want {
				t.Errorf("got %s, want %s", got, want)
			}
		})
	}
}

// The client gets them, over UDP and TCP.
func TestAsksForRecordsThatCantBeRead(t *testing.T) {
	f := serve(t, false, func(w dns.ResponseWriter, r *dns.Msg) {
		wire := said(t, disordered)
		wire[0], wire[1] = byte(r.Id>>8), byte(r.Id)
		w.Write(wire)
	})
	for _, options := range []string{"prefer_udp", "force_tcp"} {
		u := start(t, "upstream . "+f.at+" {\n"+options+"\n}")
		m := askFor(u, new(dns.Msg).SetQuestion("x.", dns.TypeHTTPS))
		if m.Rcode != dns.RcodeSuccess || len(m.Answer) != 1 || m.Answer[0].Header().Rrtype != dns.TypeHTTPS {
			t.Errorf("%s: %v", options, m)
		}
	}
}

func FuzzUnpack(f *testing.F) {
	f.Add(said(f, ordered, withError))
	f.Add(said(f, disordered, aRecord, brokenOpt))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < headerLen {
			return // such an answer is none, for conn
		}
		m, err := unpack(b)
		if err != nil {
			return
		}
		plain := new(dns.Msg)
		if plain.Unpack(b) == nil && plain.String() != m.String() {
			t.Errorf("%v\nis not\n%v", m, plain)
		}
		_ = m.Copy().Len()
		_, _ = m.Pack()
	})
}
