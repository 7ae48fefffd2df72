package sockets

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

func TestStrangersAreNamedWithoutThisProcess(t *testing.T) {
	newTestLink(t, "169.254.20.10", "fd00:20::10", "10.96.0.10")
	es := dnsOn("169.254.20.10", "fd00:20::10", "10.96.0.10")
	serveOn(t, es...)
	if got := Strangers(es); len(got) > 0 {
		t.Errorf("this process is a stranger to itself: %v", got)
	}
	c, err := reuseport.ListenPacket(t.Context(), "udp", "169.254.20.10:53")
	must(t, err)
	f, err := c.(*net.UDPConn).File()
	must(t, err)
	c.Close()
	// What it calls itself is its own choice, and is read by people in the log.
	pid := handOver(t, "a\nERROR b", f)
	e := desired.Endpoint{Addr: addr("169.254.20.10"), Proto: "udp", Port: 53}
	want := map[desired.Endpoint]string{e: fmt.Sprintf(` by "a\nERROR b" (process %d, bound to 169.254.20.10:53)`, pid)}
	if got := Strangers(es); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("the strangers are %q, want %q", got, want)
	}
	if got := Strangers([]desired.Endpoint{e})[e]; got != want[e] {
		t.Errorf("the stranger is %q, want %q", got, want[e])
	}
}

// Who listens on the wildcard address is in the way of all addresses of its family, and
// who listens anywhere is in the way of the wildcard address.
func TestHoldersOnWildcardAddress(t *testing.T) {
	newTestLink(t, "169.254.20.10", "fd00:20::10")
	for _, test := range []struct{ network, at, for4, for6, forAll string }{
		{"tcp4", "0.0.0.0:53", "0.0.0.0:53", "", "0.0.0.0:53"},
		{"tcp6", "[::]:53", "[::]:53", "[::]:53", "[::]:53"},
		{"tcp", "169.254.20.10:53", "169.254.20.10:53", "", "169.254.20.10:53"},
		{"tcp", "[fd00:20::10]:53", "", "[fd00:20::10]:53", "[fd00:20::10]:53"},
		{"tcp", "169.254.20.10:54", "", "", ""},
	} {
		l, err := net.Listen(test.network, test.at)
		must(t, err)
		for a, want := range map[string]string{"169.254.20.10": test.for4, "fd00:20::10": test.for6, "::": test.forAll} {
			e := desired.Endpoint{Addr: addr(a), Proto: "tcp", Port: 53}
			got := Holder(e)
			if want != "" && !strings.HasSuffix(got, ", bound to "+want+")") || want == "" && got != "" {
				t.Errorf("with a listener on %s, the holder of %s is %q", test.at, e, got)
			}
		}
		l.Close()
	}
}

// The doctor asks for all addresses of a node, which can be a thousand.
func TestStrangersOfManyAddressesCostOneLook(t *testing.T) {
	needRoot(t)
	on := func(n int) (es []desired.Endpoint) {
		for i := range n {
			es = append(es, desired.Endpoint{Addr: netip.AddrFrom4([4]byte{127, 1, byte(i >> 8), byte(i)}), Proto: "udp", Port: 53})
		}
		return es
	}
	thousand := on(1000)
	serveOn(t, thousand...)
	cost := func(es []desired.Endpoint) float64 { return testing.AllocsPerRun(1, func() { Strangers(es) }) }
	if one, all := cost(thousand[:1]), cost(thousand); all > 10*one {
		t.Errorf("to look for one of them takes %.0f allocations, for all of them %.0f", one, all)
	}
}

func BenchmarkStrangersOfThousandAddresses(b *testing.B) {
	var es []desired.Endpoint
	for i := range 1000 {
		es = append(es, desired.Endpoint{Addr: netip.AddrFrom4([4]byte{127, 1, byte(i >> 8), byte(i)}), Proto: "udp", Port: 53})
	}
	serveOn(b, es...)
	for b.Loop() {
		Strangers(es)
	}
}

func FuzzSocketTable(f *testing.F) {
	for _, table := range []string{"udp", "udp6", "tcp", "tcp6"} {
		text, err := os.ReadFile("/proc/net/" + table)
		if err == nil {
			f.Add(string(text), table[:3])
		}
	}
	f.Add("head\n   0: 0100007F:0035 00000000:0000 0A 0:0 00:0 0 0 0 18446744073709551616 1\n", "tcp")
	f.Add("head\n0: 0100007:FFFFF 0 0A 0 0 0 0 0 7\n0: :35 0 0A 0 0 0 0 0 7\n", "udp")
	f.Fuzz(func(t *testing.T, table, proto string) {
		for s := range boundSockets(strings.NewReader(table), proto) {
			if !s.at.IsValid() {
				t.Errorf("socket %d is bound to nothing", s.inode)
			}
		}
	})
}
