package fastpath

import (
	"net/netip"
	"os"
	"testing"

	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
)

// What the tests of all packages share, by short names.
var (
	needRoot   = testkit.NeedRoot
	eventually = testkit.Eventually
	must       = testkit.Must
	counted    = testkit.Counted
)

func TestMain(m *testing.M) { os.Exit(testkit.Main(m)) }

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func packed(t testing.TB, m *dns.Msg) []byte {
	t.Helper()
	b, err := m.Pack()
	must(t, err)
	return b
}

func question(name string, qtype uint16) *dns.Msg { return new(dns.Msg).SetQuestion(name, qtype) }
