package nodecache

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/nftables"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/peers"
)

// nftRun runs nft as somebody else would.
func nftRun(t testing.TB, nft string, args ...string) string {
	t.Helper()
	out, err := exec.Command(nft, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("nft %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// unreadable puts a rule into a table of iptables-nft that its programs can't print.
// readable takes it away again.
func unreadable(t testing.TB, nft, table, chain string) (readable func()) {
	t.Helper()
	nftRun(t, nft, "add", "table", "ip", table)
	hook := map[string]string{"INPUT": "input priority 0", "PREROUTING": "prerouting priority -300"}[chain]
	nftRun(t, nft, "add", "chain", "ip", table, chain, "{ type filter hook "+hook+"; }")
	nftRun(t, nft, "add", "rule", "ip", table, chain, "ct", "state", "new", "accept")
	return func() {
		t.Helper()
		c, err := nftables.New()
		must(t, err)
		rules, err := c.GetRules(nftTable(ipv4, table), &nftables.Chain{Name: chain})
		must(t, err)
		for _, r := range rules {
			if jumpTo([]*nftables.Rule{r}, "NODECACHE-"+chain) < 0 {
				must(t, c.DelRule(r))
			}
		}
		must(t, c.Flush())
	}
}

// A table that iptables-nft can't print is no empty one: nothing is added to it at
// each check, and the exit takes everything away all the same.
func TestTableThatCannotBeRead(t *testing.T) {
	nft := lookPath(t, "nft")
	needRoot(t)
	for _, in := range []struct{ table, chain string }{{"filter", "INPUT"}, {"raw", "PREROUTING"}} {
		t.Run(in.table, func(t *testing.T) {
			v := newVariant(t, "nft")
			before := v.rules(t)
			es := dnsOn("169.254.20.10")
			readable := unreadable(t, nft, in.table, in.chain)
			fw := newIPTables(nil)
			for range 2 {
				_, err := fw.apply(t.Context(), es, standing{})
				wantError(t, err, "iptables can't read the table "+in.table)
				wantError(t, err, "use firewall nftables")
				if !isFirewallError(err) {
					t.Errorf("%v is not known for the backend's failure", err)
				}
			}
			if got := nftRun(t, nft, "list", "ruleset"); strings.Contains(got, "NODECACHE") {
				t.Errorf("written was\n%s", got)
			}
			readable()
			_, err := fw.apply(t.Context(), es, standing{})
			must(t, err)
			stood := nftRun(t, nft, "list", "ruleset")
			readable = unreadable(t, nft, in.table, in.chain)
			with := nftRun(t, nft, "list", "ruleset")
			for range 3 {
				_, err := fw.apply(t.Context(), es, standing{})
				wantError(t, err, "iptables can't read the table "+in.table)
			}
			if got := nftRun(t, nft, "list", "ruleset"); got != with {
				t.Errorf("the rules read\n%s\nwant\n%s", got, with)
			}
			readable()
			n, err := fw.apply(t.Context(), es, standing{})
			must(t, err)
			if got := nftRun(t, nft, "list", "ruleset"); n != 0 || got != stood {
				t.Errorf("%d were missing; the rules read\n%s\nwant\n%s", n, got, stood)
			}
			readable = unreadable(t, nft, in.table, in.chain)
			// Another process's rules stay.
			_, err = fw.apply(t.Context(), nil, standing{Others: es})
			wantError(t, err, "iptables can't read the table "+in.table)
			remove(t, fw)
			if got := nftRun(t, nft, "list", "ruleset"); strings.Contains(got, "NODECACHE") || !strings.Contains(got, "ct state new accept") {
				t.Errorf("after the removal the rules read\n%s", got)
			}
			readable()
			if after := v.rules(t); after != before {
				t.Errorf("the rules read afterwards\n%s\nand before\n%s", after, before)
			}
		})
	}
}

// addLegacy has v's PATH hold the legacy programs by their own names too.
func addLegacy(t *testing.T, v *variant) {
	t.Helper()
	t.Setenv("PATH", v.dir+":/usr/sbin")
	legacy := lookPath(t, "iptables-legacy-save")
	t.Setenv("PATH", v.dir+":"+filepath.Dir(legacy))
}

// What a process of one variant has left, killed or gone, one of the other removes: not
// before no other process may need it.
func TestRulesOfOtherVariantAreRemoved(t *testing.T) {
	needRoot(t)
	for _, c := range []struct{ was, is, backend string }{
		{"legacy", "nft", backendIPT}, {"nft", "legacy", backendIPT}, {"legacy", "nft", backendNFT}, {"nft", "legacy", backendNFT}, {"legacy", "legacy", backendNFT},
	} {
		t.Run(c.was+" to "+c.is+" "+c.backend, func(t *testing.T) {
			path := os.Getenv("PATH")
			v := newVariant(t, c.was)
			before := v.rules(t)
			killed := newIPTables(nil)
			es := dnsOn("169.254.20.10", "fd00:20::10")
			_, err := killed.apply(t.Context(), es, standing{})
			must(t, err)

			// iptables-legacy-save is in PATH only where the name iptables is not the legacy one.
			t.Setenv("PATH", path)
			w := newVariant(t, c.is)
			wasBefore := w.rules(t)
			if c.is == "nft" {
				addLegacy(t, w)
			}
			cleanLinks(t)
			n := newNode()
			t.Cleanup(n.exit)
			cfg := demand(t, "", "", "169.254.20.10", "fd00:20::10")
			if c.backend == backendNFT {
				cfg.links[testLink].backend = backendNFT
			}
			other := peers.New(backendIPT, badLinkName)
			t.Cleanup(other.Hide)
			must(t, other.Show(peers.Shown{Wants: desired.State{Rules: map[string][]desired.Endpoint{backendIPT: dnsOn("169.254.20.10")}}}))
			must(t, n.start(cfg))
			serveOn(t, cfg.listeners()...)
			eventually(t, "the start is complete", n.ready.Load)
			check := func() {
				t.Helper()
				must(t, n.do(func() error { n.repair(false, "this test"); return nil }))
			}
			check()
			if lines := v.ours(t); len(lines) != 28 {
				t.Errorf("another process may need them, and %d rules are left", len(lines))
			}
			other.Hide()
			check()
			if c.was != c.is || c.backend == backendNFT {
				if after := v.rules(t); after != before {
					t.Errorf("the rules of %s read afterwards\n%s\nand before\n%s", c.was, after, before)
				}
			}
			if lines := w.ours(t); c.backend == backendIPT && len(lines) != 28 {
				t.Errorf("its own rules are\n%s", strings.Join(lines, "\n"))
			}
			n.exit()
			if after := w.rules(t); c.was != c.is && after != wasBefore {
				t.Errorf("the rules of %s read afterwards\n%s\nand before\n%s", c.is, after, wasBefore)
			}
			if after := v.rules(t); after != before {
				t.Errorf("the rules of %s read afterwards\n%s\nand before\n%s", c.was, after, before)
				v.flush(t)
			}
		})
	}
}

// Without the programs of the other variant it is said, once, how to remove the rules.
func TestRulesOfOtherVariantAreTold(t *testing.T) {
	needRoot(t)
	path := os.Getenv("PATH")
	v := newVariant(t, "legacy")
	before := v.rules(t)
	killed := newIPTables(nil)
	_, err := killed.apply(t.Context(), dnsOn("169.254.20.10"), standing{})
	must(t, err)
	t.Setenv("PATH", path)
	newVariant(t, "nft")
	n, err := listenStart(t, "169.254.20.10")
	must(t, err)
	for range 2 {
		must(t, n.do(func() error { n.repair(false, "this test"); return nil }))
	}
	if len(n.left.said) != 1 {
		t.Errorf("said is %v", n.left.said)
	}
	for text := range n.left.said {
		if !strings.Contains(text, "iptables-legacy-save -t $t | grep -v NODECACHE- | iptables-legacy-restore -T $t") {
			t.Errorf("said is %s", text)
		}
	}
	n.exit()
	// The command that is said does it.
	cmd := exec.Command("/bin/sh", "-c", "for t in raw filter; do iptables-legacy-save -t $t | grep -v NODECACHE- | iptables-legacy-restore -T $t; done")
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	if after := v.rules(t); after != before {
		t.Errorf("the rules read afterwards\n%s\nand before\n%s", after, before)
		v.flush(t)
	}
}
