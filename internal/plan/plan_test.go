package plan

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

const (
	backend = "iptables"
	one     = "10.0.0.1"
	two     = "10.0.0.2"
	three   = "fd00::3"
)

// on wants DNS over UDP on addresses of a link.
func on(link string, addresses ...string) desired.State {
	s := desired.State{Links: map[string][]netip.Addr{}, Rules: map[string][]desired.Endpoint{}}
	for _, text := range addresses {
		a := netip.MustParseAddr(text)
		s.Links[link] = append(s.Links[link], a)
		s.Rules[backend] = append(s.Rules[backend], desired.Endpoint{Addr: a, Proto: "udp", Port: 53})
	}
	return s.Sorted()
}

func has(s desired.State) Have    { return Have{Stage: Stage{State: s}} }
func stage(s desired.State) Stage { return Stage{State: s} }

// links is s without its rules.
func links(s desired.State) desired.State { return desired.State{Links: s.Links} }

func TestPlan(t *testing.T) {
	silent := Others{Unknown: true}
	for name, c := range map[string]struct {
		have Have
		want Stage
		o    Others
		is   string
	}{
		"nothing": {},
		"a first start": {Have{}, stage(on("a", one, two)), Others{},
			"add [10.0.0.1 10.0.0.2] to a; apply [10.0.0.1:53/udp 10.0.0.2:53/udp] by iptables"},
		"of two links": {Have{}, stage(on("b", one).Union(on("a", two))), Others{},
			"add [10.0.0.2] to a; add [10.0.0.1] to b; apply [10.0.0.1:53/udp 10.0.0.2:53/udp] by iptables"},
		"beside others": {Have{}, stage(on("a", one)), Others{Wants: on("a", one, two), Stays: on("a", one, two)},
			"add [10.0.0.1] to a; apply [10.0.0.1:53/udp] by iptables beside [10.0.0.1:53/udp 10.0.0.2:53/udp]"},
		"what stands already": {has(on("a", one)), stage(on("a", one)), Others{},
			"trim [] off a"},
		"an address that is gone": {has(desired.State{Links: on("a", one).Links, Rules: on("a", one, two).Rules}), stage(on("a", one, two)), Others{},
			"add [10.0.0.2] to a; trim [] off a"},
		"rules that may be gone": {Have{Stage: stage(on("a", one)), Doubtful: []string{backend}}, stage(on("a", one)), Others{},
			"apply [10.0.0.1:53/udp] by iptables; trim [] off a"},
		"one address less": {has(on("a", one, two)), stage(on("a", one)), Others{},
			"apply [10.0.0.1:53/udp] by iptables; trim [10.0.0.2] off a"},
		"which another needs": {has(on("a", one, two)), stage(on("a", one)), Others{Wants: on("a", two)},
			"apply [10.0.0.1:53/udp] by iptables beside [10.0.0.2:53/udp]; trim [] off a"},
		"one that somebody has left": {has(on("a", one).Union(links(on("a", two)))), stage(on("a", one)), Others{},
			"trim [10.0.0.2] off a"},
		"nothing any more": {has(on("a", one)), Stage{}, Others{},
			"apply [] by iptables; trim [10.0.0.1] off a, the link too"},
		"nothing, beside others": {has(on("a", one, two)), Stage{}, Others{Wants: on("a", two)},
			"apply [] by iptables beside [10.0.0.2:53/udp]; trim [10.0.0.1] off a"},
		"another link": {has(on("a", one)), stage(on("b", two)), Others{},
			"add [10.0.0.2] to b; apply [10.0.0.2:53/udp] by iptables; trim [10.0.0.1] off a, the link too"},
		"a link that was there before": {Have{Stage: stage(links(on("a", one)))}, Stage{State: desired.State{Links: map[string][]netip.Addr{"a": nil}}}, Others{},
			"trim [10.0.0.1] off a"},
		"beginning to leave": {has(on("a", one, two)), Stage{on("a", one, two), on("a", two)}, Others{},
			"unprefer [10.0.0.2] on a; withdraw [10.0.0.2:53/udp] by iptables; trim [] off a"},
		"where another stays": {has(on("a", one, two)), Stage{on("a", one, two), on("a", one, two)}, Others{Wants: on("a", one), Stays: on("a", one)},
			"unprefer [10.0.0.2] on a; withdraw [10.0.0.2:53/udp] by iptables; trim [] off a"},
		"a check while it leaves": {Have{Stage: Stage{Leaving: on("a", one)}}, Stage{on("a", one), on("a", one)}, Others{},
			"add [10.0.0.1] to a; apply [10.0.0.1:53/udp] by iptables leaving [10.0.0.1:53/udp]"},
		"which another stays for": {Have{Stage: Stage{Leaving: on("a", one)}}, Stage{on("a", one), on("a", one)}, Others{Wants: on("a", one), Stays: on("a", one)},
			"add [10.0.0.1] to a; apply [10.0.0.1:53/udp] by iptables beside [10.0.0.1:53/udp]"},
		"staying after all": {Have{Stage: Stage{on("a", one, two), on("a", two)}}, stage(on("a", one, two)), Others{},
			"apply [10.0.0.1:53/udp 10.0.0.2:53/udp] by iptables; prefer [10.0.0.2] on a; trim [] off a"},
		"somebody is silent": {has(on("a", one, two).Union(links(on("a", three)))), stage(on("a", one)), silent,
			"apply [10.0.0.1:53/udp] by iptables sparing all but []"},
		"and serves one of what the last one leaves": {has(on("a", one, two).Union(links(on("a", three)))), Stage{}, Others{Unknown: true, Alone: on("a", one)},
			"apply [] by iptables sparing all but [10.0.0.1:53/udp]; trim [10.0.0.1] off a, the link too"},
	} {
		p := Plan(c.have, c.want, c.o)
		var is []string
		for _, s := range slices.Concat(p.Add, p.Rules, p.Trim) {
			is = append(is, s.String())
		}
		if got := strings.Join(is, "; "); got != c.is {
			t.Errorf("%s: the steps are\n%s\nwant\n%s", name, got, c.is)
		}
	}
}

func TestOneBackendForAnother(t *testing.T) {
	before, after := on("a", one), on("a", one)
	after.Rules = map[string][]desired.Endpoint{"nftables": before.Rules[backend]}
	if got, want := fmt.Sprint(Plan(has(before), stage(after), Others{}).Rules), "[apply [] by iptables apply [10.0.0.1:53/udp] by nftables]"; got != want {
		t.Errorf("the steps are %s, want %s", got, want)
	}
}
