package sockets

import (
	"net/netip"
	"os"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
)

// What the tests of all packages share, by short names.
var (
	needRoot   = testkit.NeedRoot
	eventually = testkit.Eventually
	must       = testkit.Must
	wantError  = testkit.WantError
	serveOn    = testkit.ServeOn
	local      = testkit.Local
	dialUDP    = testkit.DialUDP
	dnsOn      = testkit.DNSOn
	handOver   = testkit.HandOver
	reuseport  = testkit.ReusePort
)

type socket = testkit.Socket

func TestMain(m *testing.M) { os.Exit(testkit.Main(m)) }

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// newTestLink has the addresses on a link.
func newTestLink(t testing.TB, on ...string) { testkit.Link(t, "nctest0", on...) }
