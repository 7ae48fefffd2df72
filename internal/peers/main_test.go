package peers

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
)

// What the tests of all packages share, by short names.
var (
	needRoot   = testkit.NeedRoot
	eventually = testkit.Eventually
	must       = testkit.Must
	wantError  = testkit.WantError
	dnsOn      = testkit.DNSOn
	as         = testkit.As
)

func TestMain(m *testing.M) { os.Exit(testkit.Main(m)) }

const (
	testLink   = "nctest0"
	testShared = "iptables"
)

// newMember returns a process, to which a name for an interface is good that is one word.
func newMember() *Member { return New(testShared, badLink) }

func badLink(name string) string {
	if name == "" || strings.ContainsAny(name, " \n\r\t\x00%\"'") {
		return "it is not one word"
	}
	return ""
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func addrs(list ...string) (as []netip.Addr) {
	for _, s := range list {
		as = append(as, addr(s))
	}
	return as
}

func list[T fmt.Stringer](vs []T) string {
	var s []string
	for _, v := range vs {
		s = append(s, v.String())
	}
	return strings.Join(s, ",")
}

func dnsOf(addresses ...string) string { return list(dnsOn(addresses...)) }

func extraPort(a string, port uint16) desired.Endpoint {
	return desired.Endpoint{Addr: addr(a), Proto: "tcp", Port: port, Extra: true}
}
