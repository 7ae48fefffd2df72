package nodecache

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/miekg/dns"

	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/whoami"
)

// coreDNS is CoreDNS in this process, with a node of its own.
type coreDNS struct {
	t        *testing.T
	instance *caddy.Instance
}

func input(corefile string) caddy.Input {
	return caddy.CaddyfileInput{Filepath: "Corefile", Contents: []byte(corefile), ServerTypeName: "dns"}
}

// serverBlock is a Corefile's of one zone that binds to the addresses.
func serverBlock(zone, arguments string, addresses ...string) string {
	return fmt.Sprintf("%s:53 {\nbind %s\nnodecache %s {\ninterface %s\nfirewall nftables\n}\nwhoami\n}\n", zone, strings.Join(addresses, " "), arguments, testLink)
}

func newCoreDNS(t *testing.T) *coreDNS {
	t.Helper()
	testkit.NeedOwnedTables(t) // as its Corefiles have the backend nftables
	needRoot(t)
	cleanLinks(t)
	directives, node, quiet := dnsserver.Directives, theNode, dnsserver.Quiet
	dnsserver.Directives = []string{"bind", "nodecache", "whoami"}
	theNode, dnsserver.Quiet = newNode(), true
	c := &coreDNS{t: t}
	t.Cleanup(func() {
		theNode.exit() // while its servers answer, as on SIGTERM
		if c.instance != nil {
			must(t, c.instance.Stop())
		}
		dnsserver.Directives, theNode, dnsserver.Quiet = directives, node, quiet
	})
	return c
}

func (c *coreDNS) start(corefile string) error {
	i, err := caddy.Start(input(corefile))
	if err == nil {
		c.instance = i
		eventually(c.t, "it is ready", theNode.ready.Load)
	}
	return err
}

// reload is what the plugin reload does.
func (c *coreDNS) reload(corefile string) error {
	i, err := c.instance.Restart(input(corefile))
	if err == nil {
		c.instance = i
	}
	return err
}

func (c *coreDNS) wantAnswers(addresses ...string) {
	c.t.Helper()
	for _, a := range addresses {
		for _, network := range []string{"udp", "tcp"} {
			m := new(dns.Msg)
			m.SetQuestion("example.org.", dns.TypeA)
			client := dns.Client{Net: network, Timeout: 10 * time.Second}
			if _, _, err := client.Exchange(m, netip.AddrPortFrom(addr(a), 53).String()); err != nil {
				c.t.Errorf("%s over %s: %v", a, network, err)
			}
		}
	}
}

func TestCoreDNSServesOnAddressesThatWereNotThere(t *testing.T) {
	c := newCoreDNS(t)
	must(t, c.start(serverBlock("example.org", "", "169.254.20.10", "fd00:20::10")+serverBlock("example.net", "", "169.254.20.10")))
	wantCarried(t, testLink, "169.254.20.10", "fd00:20::10")
	c.wantAnswers("169.254.20.10", "fd00:20::10")
}

func TestCoreDNSReload(t *testing.T) {
	c := newCoreDNS(t)
	must(t, c.start(serverBlock("example.org", "", "169.254.20.10", "fd00:20::10")))
	gone := watchAddrs(t)
	must(t, c.reload(serverBlock("example.org", "", "fd00:20::10", "10.96.0.10")))
	wantCarried(t, testLink, "fd00:20::10", "10.96.0.10")
	c.wantAnswers("fd00:20::10", "10.96.0.10")
	if got := gone(); !slices.Equal(got, []string{"169.254.20.10"}) {
		t.Errorf("gone, if only for a moment, are %v", got)
	}
	// Without the directive, and with it again.
	must(t, c.reload("example.org:53 {\nbind 127.0.0.1\nwhoami\n}\n"))
	if got := carried(t, testLink); got != nil {
		t.Errorf("the link is left, with %v", got)
	}
	must(t, c.reload(serverBlock("example.org", "", "169.254.20.10")))
	eventually(t, "it is ready", theNode.ready.Load)
	c.wantAnswers("169.254.20.10")
}

func TestCoreDNSReloadThatFails(t *testing.T) {
	taken, err := freebind.Listen(t.Context(), "tcp", "10.96.0.10:53")
	must(t, err)
	defer taken.Close()
	for name, test := range map[string]struct{ corefile, shouldErr string }{
		"in the Corefile":        {serverBlock("example.org", "", "10.96.0.11") + "example.net:53 {\nbind nowhere0\n}\n", "nowhere0"},
		"in the directive":       {serverBlock("example.org", "keep", "10.96.0.11"), "unknown argument"},
		"at nodecache's start":   {serverBlock("example.org", "", "10.96.0.11", "10.96.0.10"), "10.96.0.10:53/tcp is taken"},
		"at CoreDNS's own start": {serverBlock("example.org", "", "10.96.0.11") + "example.net:53 {\nbind 192.0.2.77\nwhoami\n}\n", "192.0.2.77"},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCoreDNS(t)
			must(t, c.start(serverBlock("example.org", "", "169.254.20.10", "fd00:20::10")))
			gone := watchAddrs(t)
			wantError(t, c.reload(test.corefile), test.shouldErr)
			wantCarried(t, testLink, "169.254.20.10", "fd00:20::10")
			c.wantAnswers("169.254.20.10", "fd00:20::10")
			for _, a := range gone() {
				if a != "10.96.0.11" && a != "10.96.0.10" {
					t.Errorf("%s was gone for a moment", a)
				}
			}
			if !theNode.ready.Load() {
				t.Error("it is not ready any more")
			}
			wantElements(t, list(dnsOn("169.254.20.10", "fd00:20::10")), list(dnsOn("169.254.20.10", "fd00:20::10")), list(dnsOn("169.254.20.10", "fd00:20::10")))
			// The next one finds all as it should be.
			must(t, c.reload(serverBlock("example.org", "", "fd00:20::10")))
			wantCarried(t, testLink, "fd00:20::10")
		})
	}
}

func TestCoreDNSStartThatFails(t *testing.T) {
	c := newCoreDNS(t)
	wantError(t, c.start(serverBlock("example.org", "", "169.254.20.10", "0.0.0.0")), "wildcard")
	wantError(t, c.start(serverBlock("example.org", "", "169.254.20.10")+serverBlock("example.net", "", "169.254.20.10")+"example.org:53 {\nbind 169.254.20.10\n}\n"), "already defined")
	// A start that has failed is in nobody's way.
	must(t, c.start(serverBlock("example.org", "", "169.254.20.10")))
	c.wantAnswers("169.254.20.10")
}

func TestProcessExitRunsNodesExit(t *testing.T) {
	c := newCoreDNS(t)
	must(t, c.start(serverBlock("example.org", "", "169.254.20.10")))
	for _, f := range caddy.OnProcessExit {
		f()
	}
	if carried(t, testLink) != nil {
		t.Error("the link is left")
	}
	if theNode.ready.Load() {
		t.Error("it is still ready")
	}
}

// failsToShutDown is a plugin whose OnShutdown fails, which caddy takes for a reload that
// has failed although the new instance serves by then.
const failsToShutDown = "failstoshutdown"

func init() {
	plugin.Register(failsToShutDown, func(c *caddy.Controller) error {
		c.OnShutdown(func() error { return errors.New("not today") })
		return nil
	})
}

func TestAnotherPluginFailsToShutDown(t *testing.T) {
	for _, place := range []string{"before nodecache", "after nodecache"} {
		t.Run(place, func(t *testing.T) {
			c := newCoreDNS(t)
			dnsserver.Directives = []string{"bind", "nodecache", failsToShutDown, "whoami"}
			if place == "before nodecache" {
				dnsserver.Directives = []string{"bind", failsToShutDown, "nodecache", "whoami"}
			}
			must(t, c.start(strings.Replace(serverBlock("example.org", "", "169.254.20.10", "fd00:20::10"), "whoami", failsToShutDown+"\nwhoami", 1)))
			wantError(t, c.reload(serverBlock("example.org", "", "fd00:20::10", "10.96.0.10")), "not today")
			// In force is the new one, whatever CoreDNS says.
			for _, i := range caddy.Instances() {
				c.instance = i
			}
			wantCarried(t, testLink, "fd00:20::10", "10.96.0.10")
			c.wantAnswers("fd00:20::10", "10.96.0.10")
			must(t, c.reload(serverBlock("example.org", "", "169.254.20.10")))
			wantCarried(t, testLink, "169.254.20.10")
			c.wantAnswers("169.254.20.10")
		})
	}
}
