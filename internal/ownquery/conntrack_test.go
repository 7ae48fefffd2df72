package ownquery

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
)

func TestMain(m *testing.M) { os.Exit(testkit.Main(m)) }

// The kernel tells what it tracks from what a rule has it not track, in both families.
func TestIsTracked(t *testing.T) {
	testkit.NeedRoot(t)
	cmd := exec.Command("nft", `table inet t { chain o { type filter hook output priority -300; th dport 5300 notrack; th sport 5300 notrack; }; chain c { type filter hook input priority 0; ct state new accept; }; }`)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() { exec.Command("nft", "delete table inet t").Run() })
	for _, host := range []string{"127.0.0.1", "::1"} {
		for port, want := range map[string]bool{"5300": false, "5301": true} {
			for _, proto := range []string{"udp", "tcp"} {
				to := net.JoinHostPort(host, port)
				if proto == "tcp" {
					l, err := net.Listen(proto, to)
					testkit.Must(t, err)
					defer l.Close()
				}
				c, err := net.Dial(proto, to)
				testkit.Must(t, err)
				defer c.Close()
				if _, err := c.Write([]byte("x")); err != nil {
					t.Fatal(err)
				}
				if got := isTracked(proto, netip.MustParseAddrPort(c.LocalAddr().String()), netip.MustParseAddrPort(to)); got != want {
					t.Errorf("%s %s: tracked: %v, want %v", proto, to, got, want)
				}
			}
		}
	}
}
