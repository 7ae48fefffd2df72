package nodecache

import (
	"slices"
	"testing"
)

func TestAbandonedStartLeavesNodeAsItWas(t *testing.T) {
	for name, begin := range map[string]func(*node, *config){
		"before CoreDNS listens": func(n *node, cfg *config) { must(t, n.start(cfg)) },
		"when all is in place":   func(n *node, cfg *config) { up(t, n, cfg) },
	} {
		t.Run(name, func(t *testing.T) {
			n, fw := newTestNode(t)
			must(t, n.takeBack()) // nothing yet
			before := links(t)
			begin(n, demand(t, "skipteardown", "", "169.254.20.10", "fd00:20::10"))
			must(t, n.takeBack())
			if after := links(t); !slices.Equal(before, after) {
				t.Errorf("the links read %q, want %q", after, before)
			}
			if rules, served := fw.stand(); len(rules) > 0 || len(served) > 0 {
				t.Errorf("rules are for %v, in force for %v", rules, served)
			}
			if n.ready.Load() {
				t.Error("it is ready")
			}
			wantError(t, n.start(demand(t, "", "", "169.254.20.10")), "on its way out")
			must(t, n.takeBack())
			n.exit()
		})
	}
}

func TestAbandonedStartSparesTwin(t *testing.T) {
	a, fw := newTestNode(t)
	must(t, a.start(demand(t, "", "", "169.254.20.10", "10.96.0.10")))
	b, _ := newTwin(t)
	up(t, b, demand(t, "", "", "10.96.0.10"))
	gone := watchAddrs(t)
	must(t, a.takeBack())
	wantCarried(t, testLink, "10.96.0.10")
	if got := gone(); !slices.Equal(got, []string{"169.254.20.10"}) {
		t.Errorf("gone, if only for a moment, are %v", got)
	}
	wantRulesOf(t, "the one that is abandoned", fw, "", "10.96.0.10")
	b.exit()
	if carried(t, testLink) != nil {
		t.Error("the link is left")
	}
}
