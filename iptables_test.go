package nodecache

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

// dnsOn returns the endpoints of port 53 on each address.
func extraPort(a string, port uint16) desired.Endpoint {
	return desired.Endpoint{Addr: addr(a), Proto: "tcp", Port: port, Extra: true}
}

// printed is a table as a variant's program prints it.
func (v *variant) printed(t testing.TB, f family, name string) *table {
	t.Helper()
	got, err := readTable(name, v.run(t, f.program()+"-save", "-t", name))
	must(t, err)
	return got
}

func TestEnsureMakesExactlyTheRules(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		fw := newIPTables(nil)
		es := append(dnsOn("169.254.20.10", "10.96.0.10", "fd00:20::10"), extraPort("169.254.20.10", 8080), extraPort("fd00:20::10", 8080))
		n, err := fw.apply(t.Context(), es, standing{})
		must(t, err)
		all := 0
		for f, x := range fw.families {
			for _, h := range hooks {
				all += 1 + len(x.rules(h, ofFamily(es, f), nil)) // the jump
			}
		}
		if n != all {
			t.Errorf("%d were missing, want all %d", n, all)
		}
		for f, x := range fw.families {
			if x.noRecent {
				t.Errorf("IPv%d: the match recent is given up", f)
			}
			wantRules(t, v, x, ofFamily(es, f))
		}
		if got, want := fw.String(), map[string]string{"nft": "(nf_tables)", "legacy": "(legacy)"}[v.name]; !regexp.MustCompile(`^iptables \d+\.\d+\.\d+ `).MatchString(got) || !strings.HasSuffix(got, want) {
			t.Errorf("the backend calls itself %q, want the version and %s", got, want)
		}
		// Fewer endpoints, then another family only.
		_, err = fw.apply(t.Context(), es[:2], standing{})
		must(t, err)
		wantRules(t, v, fw.families[ipv4], ofFamily(es[:2], ipv4))
		if text := v.rules(t); strings.Contains(text, "fd00:20::10") {
			t.Errorf("rules for IPv6 are left:\n%s", text)
		}
		remove(t, fw)
	})
}

func TestSecondEnsureWritesNothing(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		v.count(t)
		fw := newIPTables(nil)
		es := append(dnsOn("169.254.20.10", "fd00:20::10"), extraPort("169.254.20.10", 8080))
		_, err := fw.apply(t.Context(), es, standing{})
		must(t, err)
		v.called(t)
		if n, err := fw.apply(t.Context(), es, standing{}); n != 0 || err != nil {
			t.Errorf("a second apply found %d missing, error %v", n, err)
		}
		for _, c := range v.called(t) {
			if !strings.HasSuffix(c, "-save") {
				t.Errorf("a second apply has run %s", c)
			}
		}
		remove(t, fw)
		v.called(t)
		remove(t, fw)
		if calls := v.called(t); slices.ContainsFunc(calls, func(c string) bool { return strings.HasSuffix(c, "-restore") }) {
			t.Errorf("a second removal has run %v", calls)
		}
	})
}

// foreign puts rules and chains of somebody else's around ours.
func foreign(t *testing.T, v *variant) {
	for _, p := range []string{"iptables", "ip6tables"} {
		for _, c := range []string{"FOREIGN", "NODECACHE-OUTPUT-2", "OLD-NODECACHE-INPUT"} {
			v.run(t, p, "-t", "filter", "-N", c)
			v.run(t, p, "-t", "filter", "-A", c, "-p", "udp", "--dport", "53", "-m", "comment", "--comment", "nodecache: of somebody else's", "-j", "ACCEPT")
		}
		v.run(t, p, "-t", "filter", "-A", "INPUT", "-j", "FOREIGN")
		v.run(t, p, "-t", "filter", "-A", "OUTPUT", "-j", "NODECACHE-OUTPUT-2")
		v.run(t, p, "-t", "filter", "-A", "INPUT", "-j", "OLD-NODECACHE-INPUT")
		v.run(t, p, "-t", "raw", "-A", "PREROUTING", "-p", "udp", "--dport", "53", "-j", "NOTRACK")
		v.run(t, p, "-t", "raw", "-A", "OUTPUT", "-p", "tcp", "--sport", "53", "-j", "NOTRACK")
	}
	t.Cleanup(func() { v.flush(t) })
}

func TestForeignRulesAreUntouched(t *testing.T) {
	needRoot(t)
	for _, name := range []string{"nft", "legacy"} {
		t.Run(name, func(t *testing.T) {
			v := newVariant(t, name)
			foreign(t, v)
			before := v.rules(t)
			withoutOurs := func() string {
				var out strings.Builder
				for line := range strings.Lines(v.rules(t)) {
					if !slices.ContainsFunc(hooks, func(h hook) bool {
						return strings.HasPrefix(line, ":"+h.chain+" ") || strings.HasPrefix(line, "-A "+h.chain+" ") || strings.HasSuffix(line, " -j "+h.chain+"\n")
					}) {
						out.WriteString(line)
					}
				}
				return out.String()
			}
			fw := newIPTables(nil)
			for _, es := range [][]desired.Endpoint{dnsOn("169.254.20.10", "fd00:20::10"), dnsOn("fd00:20::10"), dnsOn("10.96.0.10")} {
				_, err := fw.apply(t.Context(), es, standing{})
				must(t, err)
				for f, x := range fw.families {
					if x.written {
						wantRules(t, v, x, ofFamily(es, f))
					}
				}
				must(t, fw.withdraw(t.Context(), es))
				if got := withoutOurs(); got != before {
					t.Errorf("foreign rules read\n%s\nwant\n%s", got, before)
				}
			}
			remove(t, fw)
			if got := v.rules(t); got != before {
				t.Errorf("after the removal the rules read\n%s\nwant\n%s", got, before)
			}
		})
	}
}

func TestEnsureRepairs(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		for _, program := range []string{"iptables", "ip6tables"} {
			es := dnsOn("169.254.20.10")
			if program == "ip6tables" {
				es = dnsOn("fd00:20::10")
			}
			f := familyOf(es[0].Addr)
			fw := newIPTables(nil)
			_, err := fw.apply(t.Context(), es, standing{})
			must(t, err)
			jump := []string{"-m", "comment", "--comment", "nodecache: DNS cache of this node", "-j"}
			for _, h := range hooks {
				rules := len(fw.families[f].rules(h, es, nil))
				for _, damage := range []struct {
					what    string
					args    [][]string
					missing int
				}{
					{"a flushed chain", [][]string{{"-F", h.chain}}, rules},
					{"a deleted jump", [][]string{append([]string{"-D", h.builtin}, append(jump, h.chain)...)}, 1},
					{"a doubled jump", [][]string{append([]string{"-A", h.builtin}, append(jump, h.chain)...)}, 0},
					{"a removed rule", [][]string{{"-D", h.chain, "1"}}, 1},
					{"an extra rule", [][]string{{"-A", h.chain, "-p", "udp", "-j", "ACCEPT"}}, 0},
					{"a flushed table", [][]string{{"-F"}, {"-X"}}, -1},
				} {
					for _, args := range damage.args {
						v.run(t, program, append([]string{"-t", h.table}, args...)...)
					}
					n, err := fw.apply(t.Context(), es, standing{})
					if err != nil || damage.missing >= 0 && n != damage.missing || damage.missing < 0 && n == 0 {
						t.Errorf("%s %s %s: %d were missing, want %d; error %v", program, damage.what, h.chain, n, damage.missing, err)
					}
					wantRules(t, v, fw.families[f], es)
					if t.Failed() {
						t.Fatalf("%s: %s of %s %s is not repaired", program, damage.what, h.table, h.chain)
					}
				}
			}
			remove(t, fw)
		}
	})
}

func TestRulesOfKilledProcessAreAdopted(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		killed := newIPTables(nil) // its rules stay, and nothing of its memory
		old := dnsOn("169.254.20.10", "fd00:20::10")
		_, err := killed.apply(t.Context(), old, standing{})
		must(t, err)

		fw := newIPTables(nil)
		es := dnsOn("10.96.0.10")
		_, err = fw.apply(t.Context(), es, standing{})
		must(t, err)
		wantRules(t, v, fw.families[ipv4], es)
		if text := v.rules(t); strings.Contains(text, "fd00:20::10") || strings.Contains(text, "169.254.20.10") {
			t.Errorf("rules of the killed process are left:\n%s", text)
		}
		remove(t, fw)
	})
}

// What the same rules of a killed process look like must not keep the next one
// from knowing that they are its own now.
func TestSameRulesOfKilledProcessAreRemoved(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		es := dnsOn("169.254.20.10", "fd00:20::10")
		_, err := newIPTables(nil).apply(t.Context(), es, standing{})
		must(t, err)
		fw := newIPTables(nil)
		n, err := fw.apply(t.Context(), es, standing{})
		must(t, err)
		if n != 0 {
			t.Errorf("%d rules were missing, want none", n)
		}
		remove(t, fw)
	})
}

func TestLeaveTakesRulesForNewUDPQueriesOnly(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		fw := newIPTables(nil)
		es := dnsOn("169.254.20.10", "10.96.0.10", "fd00:20::10")
		must(t, fw.withdraw(t.Context(), es)) // of nothing, before anything was made
		_, err := fw.apply(t.Context(), es, standing{})
		must(t, err)
		gone := dnsOn("169.254.20.10", "fd00:20::10")
		must(t, fw.withdraw(t.Context(), gone))
		for f, x := range fw.families {
			wantChains(t, v, x, ofFamily(es, f), ofFamily(gone, f))
		}
		for program, want := range map[string]struct{ gone, left []string }{
			"iptables-save": {
				[]string{"queries to 169.254.20.10:53/udp", "queries of this node to 169.254.20.10:53/udp"},
				[]string{"queries to 169.254.20.10:53/tcp", "queries of this node to 169.254.20.10:53/tcp", "answers from 169.254.20.10:53/udp", "queries to 10.96.0.10:53/udp"},
			},
			"ip6tables-save": {
				[]string{"queries to [fd00:20::10]:53/udp", "queries of this node to [fd00:20::10]:53/udp"},
				[]string{"queries to [fd00:20::10]:53/tcp", "answers from [fd00:20::10]:53/udp"},
			},
		} {
			raw := v.run(t, program, "-t", "raw")
			for _, what := range want.gone {
				if strings.Contains(raw, "nodecache: "+what) {
					t.Errorf("%q is still there:\n%s", what, raw)
				}
			}
			for _, what := range want.left {
				if !strings.Contains(raw, "nodecache: "+what) {
					t.Errorf("%q is gone:\n%s", what, raw)
				}
			}
		}
		if v.name == "nft" && !fw.stands() {
			t.Error("the rules that are left do not count as standing")
		}
		remove(t, fw)
	})
}

func TestStandsNoticesWhatIPTablesNFTDoes(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		if v.name != "nft" {
			t.Skip("legacy iptables' changes are in no table of nf_tables")
		}
		fw := newIPTables(nil)
		es := dnsOn("169.254.20.10", "fd00:20::10")
		if !fw.stands() {
			t.Error("nothing was made, and it does not stand")
		}
		_, err := fw.apply(t.Context(), es, standing{})
		must(t, err)
		if !fw.stands() {
			t.Fatal("what was just made does not stand")
		}
		jump := []string{"-m", "comment", "--comment", "nodecache: DNS cache of this node", "-j"}
		for _, program := range []string{"iptables", "ip6tables"} {
			for _, h := range hooks {
				for _, args := range [][]string{{"-F", h.chain}, append([]string{"-D", h.builtin}, append(jump, h.chain)...), {"-D", h.chain, "1"}, {"-F"}} {
					v.run(t, program, append([]string{"-t", h.table}, args...)...)
					if fw.stands() {
						t.Errorf("%s -t %s %v goes unnoticed", program, h.table, args)
					}
					_, err := fw.apply(t.Context(), es, standing{})
					must(t, err)
				}
			}
		}
		v.run(t, "iptables", "-t", "filter", "-A", "INPUT", "-j", "ACCEPT")
		if !fw.stands() {
			t.Error("a foreign rule counts as ours removed")
		}
		v.run(t, "iptables", "-t", "filter", "-D", "INPUT", "-j", "ACCEPT")
		remove(t, fw)
	})
}

// A node starts many pods at once and each iptables takes a lock: their number
// must not grow with that of the addresses.
func TestNumberOfProcesses(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		v.count(t)
		for _, k := range []int{1, 50} {
			var es []desired.Endpoint
			for i := range k {
				es = append(es, dnsOn(fmt.Sprintf("169.254.20.%d", i+1), fmt.Sprintf("fd00:20::%d", i+1))...)
			}
			slices.SortFunc(es, desired.Compare)
			fw := newIPTables(nil)
			_, err := fw.apply(t.Context(), es, standing{})
			must(t, err)
			perFamily := func(doing string) {
				calls := v.called(t)
				four := len(calls)
				for _, c := range calls {
					if strings.HasPrefix(c, "ip6") {
						four--
					}
				}
				if six := len(calls) - four; four == 0 || four > 5 || six == 0 || six > 5 {
					t.Errorf("%s of %d addresses takes %d processes for IPv4 and %d for IPv6, at most 5 each are wanted: %v", doing, k, four, six, calls)
				}
			}
			perFamily("the set-up")
			fw.enforce(es)
			must(t, fw.withdraw(t.Context(), es))
			remove(t, fw)
			perFamily("the removal")
		}
	})
}
