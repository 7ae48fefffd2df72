package nodecache

import (
	"errors"
	"net/netip"
	"testing"
)

// What is still to be taken away when the queries to an address are taken over does not take
// the rules of that address away when it is tried again.
func TestTakenOverStaysWhatIsOwed(t *testing.T) {
	n, fw := newTestNode(t)
	cfg := demand(t, "", "", "169.254.20.10", "10.96.0.10")
	up(t, n, cfg)
	must(t, n.do(func() error {
		cfg.held = map[netip.Addr]bool{addr("10.96.0.10"): true}
		fw.fault = func(string) error { return errors.New("the lock is held") }
		if n.reduceTo(cfg.state(n.resolve)) {
			t.Error("nothing is owed")
		}
		fw.fault = nil
		if err := n.takeOver(cfg); err != nil {
			return err
		}
		n.settle()
		if n.owing {
			t.Error("it is still owed")
		}
		return nil
	}))
	if rules, _ := fw.stand(); list(rules) != dnsOf("169.254.20.10", "10.96.0.10") {
		t.Errorf("the rules are %s", list(rules))
	}
}
