package nodecache

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
)

func TestStartPutsAddressesBeforeRulesAndServesWhenListening(t *testing.T) {
	n, fw := newTestNode(t)
	cfg := demand(t, "", "", "169.254.20.10", "10.96.0.10", "fd00:20::10")
	es := dnsOf("10.96.0.10", "169.254.20.10", "fd00:20::10")
	must(t, n.start(cfg))
	wantCarried(t, testLink, "10.96.0.10", "169.254.20.10", "fd00:20::10")
	wantCalls(t, fw, "apply "+es+" on 10.96.0.10,169.254.20.10,fd00:20::10")

	// One socket is missing yet: nothing may be in force.
	ls := cfg.listeners()
	serveOn(t, ls[1:]...)
	if n.ready.Load() || len(fw.heard()) != 0 {
		t.Error("it is complete before CoreDNS listens everywhere")
	}
	serveOn(t, ls[0])
	eventually(t, "the start is complete", n.ready.Load)
	wantCalls(t, fw, "enforce "+es+" on 10.96.0.10,169.254.20.10,fd00:20::10")
}

func TestStartAdoptsWhatKilledProcessHasLeft(t *testing.T) {
	n, _ := newTestNode(t)
	_, err := (&netif{name: testLink}).ensure(addrs("169.254.20.10", "192.0.2.99"))
	must(t, err)
	before, err := nodelinks.ByName(testLink)
	must(t, err)
	must(t, n.start(demand(t, "", "", "169.254.20.10", "fd00:20::10")))
	// Until it serves, nothing goes that somebody may use.
	wantCarried(t, testLink, "169.254.20.10", "192.0.2.99", "fd00:20::10")
	serveOn(t, dnsOn("169.254.20.10", "fd00:20::10")...)
	eventually(t, "the surplus address is gone", func() bool { return len(carried(t, testLink)) == 2 })
	wantCarried(t, testLink, "169.254.20.10", "fd00:20::10")
	after, err := nodelinks.ByName(testLink)
	must(t, err)
	if before.Attrs().Index != after.Attrs().Index {
		t.Error("the link is another one")
	}
}

func TestFailedStartLeavesEverythingAsBefore(t *testing.T) {
	type fault struct {
		name      string
		bring     func(t *testing.T, fw *fakeFirewall) // what will make it fail
		shouldErr string
	}
	faults := []fault{
		{"UDP port taken", func(t *testing.T, fw *fakeFirewall) {
			c, err := freebind.ListenPacket(t.Context(), "udp", "10.96.0.10:53")
			must(t, err)
			t.Cleanup(func() { c.Close() })
		}, "Testfile:1 - Error during parsing: 10.96.0.10:53/udp is taken by "},
		{"TCP port taken", func(t *testing.T, fw *fakeFirewall) {
			l, err := freebind.Listen(t.Context(), "tcp", "10.96.0.10:53")
			must(t, err)
			t.Cleanup(func() { l.Close() })
		}, "Testfile:1 - Error during parsing: 10.96.0.10:53/tcp is taken by "},
		{"IPv6 switched off", func(t *testing.T, fw *fakeFirewall) {
			sysctl(t, "net/ipv6/conf/default/disable_ipv6", "1")
			if l, _ := nodelinks.ByName(testLink); l != nil {
				t.Skip("the link has its own switch, which takes its addresses")
			}
		}, "IPv6 is switched off here"},
		{"no firewall", func(t *testing.T, fw *fakeFirewall) {
			failed := false
			fw.say(func() {
				fw.fault = func(what string) error {
					if what == "apply" && !failed {
						failed = true
						return setupError(errFirewall, errors.New("no rules today"))
					}
					return nil
				}
			})
		}, "no rules today"},
	}
	for _, f := range faults {
		for _, reload := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, reload=%v", f.name, reload), func(t *testing.T) {
				n, fw := newTestNode(t)
				var want []desired.Endpoint
				old := demand(t, "", "", "127.0.0.53", "fd00:20::9")
				if reload {
					up(t, n, old)
					want = dnsOn("127.0.0.53", "fd00:20::9")
				}
				f.bring(t, fw)
				before, linksBefore := links(t), n.linksInUse()
				wantBefore, errorsBefore := n.want, metric(t, "coredns_nodecache_setup_errors_total", errFirewall)
				if reload {
					n.restarting(old, true)
				}
				err := n.start(demand(t, "", "", "10.96.0.10", "fd00:20::10"))
				wantError(t, err, f.shouldErr)
				if after := links(t); !slices.Equal(before, after) {
					t.Errorf("the links read %q, want %q", after, before)
				}
				if after := n.linksInUse(); !slices.Equal(linksBefore, after) {
					t.Errorf("links of ours are %v, want %v", after, linksBefore)
				}
				if rules, served := fw.stand(); list(rules) != list(want) || list(served) != list(want) {
					t.Errorf("rules are for %v, in force for %v, want %v", rules, served, want)
				}
				if fmt.Sprint(n.want) != fmt.Sprint(wantBefore) {
					t.Errorf("wanted is %v, want %v", n.want, wantBefore)
				}
				if f.name == "no firewall" {
					if after := metric(t, "coredns_nodecache_setup_errors_total", errFirewall); after != errorsBefore+1 {
						t.Errorf("the metric of errors went from %v to %v", errorsBefore, after)
					}
				}
				if n.ready.Load() != reload {
					t.Errorf("ready is %v", n.ready.Load())
				}
				if reload { // as caddy does then
					n.restarting(old, false)
					n.revert(old)
					wantCarried(t, testLink, "127.0.0.53", "fd00:20::9")
				}
			})
		}
	}
}

func TestFailedStartBesideForeignLink(t *testing.T) {
	n, fw := newTestNode(t)
	newOtherLink(t, testLink)
	before := links(t)
	err := n.start(demand(t, "", "", "169.254.20.10"))
	wantError(t, err, "a link of this name exists")
	if after := links(t); !slices.Equal(before, after) {
		t.Errorf("the links read %q, want %q", after, before)
	}
	if rules, _ := fw.stand(); len(rules) > 0 {
		t.Errorf("rules stand for %v", rules)
	}
	if names := n.linksInUse(); len(names) != 0 {
		t.Errorf("%v count as ours", names)
	}
}

// What a killed process has left, and a link that an operator has made, stay as they are.
func TestFailedStartLeavesWhatItHasAdopted(t *testing.T) {
	for _, left := range [][]string{{}, {"169.254.20.10", "192.0.2.99"}} {
		t.Run(fmt.Sprint(left), func(t *testing.T) {
			newTestLink(t, left...)
			n, fw := newTestNode(t)
			before := links(t)
			fw.say(func() {
				fw.fault = func(string) error { fw.fault = nil; return errors.New("no rules today") }
			})
			wantError(t, n.start(demand(t, "", "", "169.254.20.10", "10.96.0.10")), "no rules today")
			if after := links(t); !slices.Equal(before, after) {
				t.Errorf("the links read %q, want %q", after, before)
			}
			if names := n.linksInUse(); len(names) != 0 {
				t.Errorf("%v count as ours", names)
			}
		})
	}
}

func TestFailedUndoIsReported(t *testing.T) {
	n, fw := newTestNode(t)
	fw.say(func() { fw.fault = func(string) error { return errors.New("never") } })
	err := n.start(demand(t, "", "", "169.254.20.10"))
	wantError(t, err, "never; and taking back what had been done: never")
	if carried(t, testLink) != nil {
		t.Error("the link is left")
	}
	fw.say(func() { fw.fault = nil })
}
