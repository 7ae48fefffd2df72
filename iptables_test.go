package nodecache

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "write the files testdata/*.golden anew")

// dnsOn returns the endpoints of port 53 on each address.
func dnsOn(list ...string) (es []endpoint) {
	for _, a := range addrs(list...) {
		es = append(es, endpoint{addr: a, proto: "udp", port: 53}, endpoint{addr: a, proto: "tcp", port: 53})
	}
	slices.SortFunc(es, compareEndpoints)
	return es
}

func extraPort(a string, port uint16) endpoint {
	return endpoint{addr: addr(a), proto: "tcp", port: port, extra: true}
}

// saved is a table as of an iptables-save's output, less its first and last line.
func saved(t testing.TB, name, text string) *table {
	t.Helper()
	got, err := readTable(name, "*"+name+"\n"+text+"COMMIT\n")
	must(t, err)
	return got
}

// printed is a table as a variant's program prints it.
func (v *variant) printed(t testing.TB, f family, name string) *table {
	t.Helper()
	got, err := readTable(name, v.run(t, f.program()+"-save", "-t", name))
	must(t, err)
	return got
}

func TestInputOfIPTablesRestore(t *testing.T) {
	v4, v6 := dnsOn("169.254.20.10", "10.96.0.10"), dnsOn("fd00:20::10")
	none := map[string]*table{"raw": saved(t, "raw", ""), "filter": saved(t, "filter", "")}
	// Two processes at once could leave a jump twice.
	doubled := map[string]*table{
		"raw": saved(t, "raw", `:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:NODECACHE-PREROUTING - [0:0]
:NODECACHE-OUTPUT - [0:0]
-A PREROUTING -m comment --comment "nodecache: DNS cache of this node" -j NODECACHE-PREROUTING
-A PREROUTING -p udp -j FOREIGN
-A PREROUTING -m comment --comment "nodecache: DNS cache of this node" -j NODECACHE-PREROUTING
-A OUTPUT -m comment --comment "nodecache: DNS cache of this node" -j NODECACHE-OUTPUT
`),
		"filter": saved(t, "filter", ":INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n"),
	}
	// Of another process and of another release, and one of nobody's.
	shared := map[string]*table{
		"raw": saved(t, "raw", `:NODECACHE-PREROUTING - [0:0]
-A NODECACHE-PREROUTING -d 10.9.9.9/32 -p udp -m udp --dport 53 -m socket --transparent -m comment --comment "nodecache: queries to 10.9.9.9:53/udp" -j NOTRACK
-A NODECACHE-PREROUTING -d 169.254.20.10/32 -p udp -m comment --comment "nodecache: new words for 169.254.20.10:53/udp" -j NOTRACK
-A NODECACHE-PREROUTING -d 10.8.8.8/32 -p udp -m comment --comment "nodecache: queries to 10.8.8.8:53/udp" -j NOTRACK
-A NODECACHE-PREROUTING -p udp -j ACCEPT
`),
		"filter": saved(t, "filter", ""),
	}
	script := func(x *xtables, have map[string]*table, own []endpoint, o standing) []byte {
		return x.plan(have, own, o).script()
	}
	for name, input := range map[string][]byte{
		"v4":        script(&xtables{family: ipv4}, none, v4, standing{}),
		"v6":        script(&xtables{family: ipv6}, none, v6, standing{}),
		"extra":     script(&xtables{family: ipv4}, none, append(dnsOn("169.254.20.10"), extraPort("169.254.20.10", 8080)), standing{}),
		"leaving":   script(&xtables{family: ipv4}, none, v4, standing{leaving: v4[:2]}),
		"no-recent": script(&xtables{family: ipv6, noRecent: true}, none, v6, standing{}),
		"repair":    script(&xtables{family: ipv4}, doubled, dnsOn("169.254.20.10"), standing{}),
		"removal":   script(&xtables{family: ipv4}, doubled, nil, standing{}),
		"nothing":   script(&xtables{family: ipv4}, none, nil, standing{}),
		"others":    script(&xtables{family: ipv4}, shared, dnsOn("169.254.20.10")[:1], standing{others: dnsOn("10.9.9.9", "169.254.20.10", "10.7.7.7")}),
		"last":      script(&xtables{family: ipv4}, shared, dnsOn("169.254.20.10")[:1], standing{}),
		"unknown":   script(&xtables{family: ipv4}, shared, dnsOn("169.254.20.10")[:1], standing{unknown: true, leaving: dnsOn("169.254.20.10")}),
	} {
		file := filepath.Join("testdata", "restore-"+name+".golden")
		if *update {
			must(t, os.MkdirAll("testdata", 0o755))
			must(t, os.WriteFile(file, input, 0o644))
		}
		want, err := os.ReadFile(file)
		must(t, err)
		if !bytes.Equal(input, want) {
			t.Errorf("%s differs; got\n%s", file, input)
		}
	}
}

// programs are those that the backend runs, for both families.
var programs = []string{"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"}

// variants runs test with each variant of iptables that is installed, found
// through PATH, and checks that the rules read as before in the end.
func variants(t *testing.T, test func(t *testing.T, v *variant)) {
	needRoot(t)
	for _, name := range []string{"nft", "legacy"} {
		t.Run(name, func(t *testing.T) {
			v := newVariant(t, name)
			before := v.rules(t)
			test(t, v)
			if after := v.rules(t); after != before {
				t.Errorf("the rules read afterwards\n%s\nand before\n%s", after, before)
				v.flush(t)
			}
		})
	}
}

// variant is one of iptables' two.
type variant struct {
	name  string // nft or legacy
	dir   string // what PATH names
	real  map[string]string
	calls string // the file of counted calls
}

func newVariant(t *testing.T, name string) *variant {
	t.Helper()
	v := &variant{name: name, dir: t.TempDir(), real: map[string]string{}}
	v.calls = filepath.Join(v.dir, "calls")
	for _, p := range programs {
		base, rest, _ := strings.Cut(p, "-")
		file := base + "-" + name
		if rest != "" {
			file += "-" + rest
		}
		real, err := filepath.EvalSymlinks(lookPath(t, file))
		must(t, err)
		v.real[p] = real // a program of many names: it goes by that of the link
		must(t, os.Symlink(real, filepath.Join(v.dir, p)))
	}
	t.Setenv("PATH", v.dir)
	// Other programs' changes are not to wait for these tests, nor the other way.
	t.Setenv("XTABLES_LOCKFILE", filepath.Join(v.dir, "lock"))
	return v
}

// script puts a shell script in a program's place. $real runs the program.
func (v *variant) script(t *testing.T, program, text string) {
	t.Helper()
	hidden := filepath.Join(v.dir, "real")
	must(t, os.MkdirAll(hidden, 0o755))
	link := filepath.Join(hidden, program)
	if err := os.Symlink(v.real[program], link); err != nil && !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
	file := filepath.Join(v.dir, program)
	must(t, os.Remove(file))
	must(t, os.WriteFile(file, []byte("#!/bin/sh\nreal="+link+"\n"+text+"\n"), 0o755))
}

// count has every program note its calls; called returns and forgets them.
func (v *variant) count(t *testing.T) {
	t.Helper()
	for _, p := range programs {
		v.script(t, p, fmt.Sprintf("echo %s >>%s\nexec $real \"$@\"", p, v.calls))
	}
}

func (v *variant) called(t *testing.T) []string {
	t.Helper()
	b, err := os.ReadFile(v.calls)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	must(t, err)
	must(t, os.Remove(v.calls))
	return strings.Fields(string(b))
}

// run runs one of the programs as somebody else would.
func (v *variant) run(t testing.TB, program string, args ...string) string {
	t.Helper()
	cmd := exec.Command(v.real[program], args...)
	cmd.Args[0] = program
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", program, strings.Join(args, " "), err, &stderr)
	}
	return string(out)
}

var counters = regexp.MustCompile(`\[\d+:\d+\]`)

// rules returns both families' rules as iptables-save prints them.
func (v *variant) rules(t testing.TB) string {
	t.Helper()
	var out strings.Builder
	for _, p := range []string{"iptables-save", "ip6tables-save"} {
		for _, table := range []string{"raw", "filter"} {
			for line := range strings.Lines(v.run(t, p, "-t", table)) {
				if !strings.HasPrefix(line, "#") {
					out.WriteString(counters.ReplaceAllString(line, ""))
				}
			}
		}
	}
	return out.String()
}

func (v *variant) flush(t testing.TB) {
	for _, p := range []string{"iptables", "ip6tables"} {
		for _, table := range []string{"raw", "filter"} {
			v.run(t, p, "-t", table, "-F")
			v.run(t, p, "-t", table, "-X")
		}
	}
}

// remove has fw remove everything of its own.
func remove(t testing.TB, fw firewall) {
	t.Helper()
	fw.serve(nil)
	_, err := fw.ensure(t.Context(), nil, standing{})
	must(t, err)
}

// options splits a match into its options: "-d 1.2.3.4 -p udp" into two.
func options(match string) (opts []string) {
	for o := range strings.SplitSeq(" "+match, " -") {
		if o != "" {
			opts = append(opts, "-"+o)
		}
	}
	return opts
}

var hostPrefix = regexp.MustCompile(`/(32|128)\b`)

// wantRules checks that the kernel has in our chains exactly the rules for es, in
// order, and one jump to each chain, the first of its built-in chain.
func wantRules(t *testing.T, v *variant, x *xtables, es []endpoint) {
	t.Helper()
	wantChains(t, v, x, es, nil)
}

func wantChains(t *testing.T, v *variant, x *xtables, es, leaving []endpoint) {
	t.Helper()
	for _, h := range hooks {
		have := v.printed(t, x.family, h.table)
		want := x.rules(h, es, set(leaving))
		lines := have.chains[h.chain]
		if len(lines) != len(want) {
			t.Errorf("%s %s has %d rules, want %d:\n%s", h.table, h.chain, len(lines), len(want), strings.Join(lines, "\n"))
			continue
		}
		for i, r := range want {
			line := hostPrefix.ReplaceAllString(lines[i], "")
			for _, o := range append(options(r.match), `--comment "`+r.comment()+`"`, "-j "+r.target) {
				if !strings.Contains(line, o) {
					t.Errorf("%s %s: rule %d is %q, want %q in it", h.table, h.chain, i, line, o)
				}
			}
		}
		from := have.chains[h.builtin]
		if len(from) == 0 || !strings.HasSuffix(from[0], " -j "+h.chain) || len(have.jumps(h)) != 1 {
			t.Errorf("%s %s has not one jump to %s, in the first place: %q", h.table, h.builtin, h.chain, from)
		}
	}
}

func TestEnsureMakesExactlyTheRules(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		fw := newIPTables(nil)
		es := append(dnsOn("169.254.20.10", "10.96.0.10", "fd00:20::10"), extraPort("169.254.20.10", 8080), extraPort("fd00:20::10", 8080))
		n, err := fw.ensure(t.Context(), es, standing{})
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
		_, err = fw.ensure(t.Context(), es[:2], standing{})
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
		_, err := fw.ensure(t.Context(), es, standing{})
		must(t, err)
		v.called(t)
		if n, err := fw.ensure(t.Context(), es, standing{}); n != 0 || err != nil {
			t.Errorf("a second ensure found %d missing, error %v", n, err)
		}
		for _, c := range v.called(t) {
			if !strings.HasSuffix(c, "-save") {
				t.Errorf("a second ensure has run %s", c)
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
			for _, es := range [][]endpoint{dnsOn("169.254.20.10", "fd00:20::10"), dnsOn("fd00:20::10"), dnsOn("10.96.0.10")} {
				_, err := fw.ensure(t.Context(), es, standing{})
				must(t, err)
				for f, x := range fw.families {
					if x.written {
						wantRules(t, v, x, ofFamily(es, f))
					}
				}
				must(t, fw.leave(t.Context(), es))
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
			f := familyOf(es[0].addr)
			fw := newIPTables(nil)
			_, err := fw.ensure(t.Context(), es, standing{})
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
					n, err := fw.ensure(t.Context(), es, standing{})
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
		_, err := killed.ensure(t.Context(), old, standing{})
		must(t, err)

		fw := newIPTables(nil)
		es := dnsOn("10.96.0.10")
		_, err = fw.ensure(t.Context(), es, standing{})
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
		_, err := newIPTables(nil).ensure(t.Context(), es, standing{})
		must(t, err)
		fw := newIPTables(nil)
		n, err := fw.ensure(t.Context(), es, standing{})
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
		must(t, fw.leave(t.Context(), es)) // of nothing, before anything was made
		_, err := fw.ensure(t.Context(), es, standing{})
		must(t, err)
		gone := dnsOn("169.254.20.10", "fd00:20::10")
		must(t, fw.leave(t.Context(), gone))
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
		_, err := fw.ensure(t.Context(), es, standing{})
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
					_, err := fw.ensure(t.Context(), es, standing{})
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

// withoutRecent has iptables-restore refuse the match recent, as it does where
// the kernel lacks the module.
func withoutRecent(t *testing.T, v *variant) {
	for _, p := range []string{"iptables-restore", "ip6tables-restore"} {
		v.script(t, p, `
input=
while IFS= read -r line; do
	case $line in *"-m recent"*) echo "$0: Couldn't load match 'recent'" >&2; exit 2;; esac
	input="$input$line
"
done
printf %s "$input" | $real "$@"`)
	}
}

func TestRulesWithoutMatchRecent(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		withoutRecent(t, v)
		fw := newIPTables(func() { t.Error("the rules count as gone") })
		es := dnsOn("169.254.20.10", "fd00:20::10")
		_, err := fw.ensure(t.Context(), es, standing{})
		must(t, err)
		fw.serve(es)
		for f, x := range fw.families {
			if !x.noRecent {
				t.Errorf("IPv%d: the match recent is not given up", f)
			}
			wantRules(t, v, x, ofFamily(es, f))
		}
		if text := v.rules(t); !strings.Contains(text, "--dst-type LOCAL") || strings.Contains(text, "recent") {
			t.Errorf("not the rules without recent:\n%s", text)
		}
		if len(fw.heart.addrs) != 0 {
			t.Errorf("the heart beats for %v, whose lists are not there", fw.heart.addrs)
		}
		if n, err := fw.ensure(t.Context(), es, standing{}); n != 0 || err != nil {
			t.Errorf("a second ensure found %d missing, error %v", n, err)
		}
		remove(t, fw)
	})
}

func TestErrorIsNotTakenForMissingMatch(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		v.script(t, "iptables-restore", "echo 'Operation not permitted' >&2\nexit 1")
		fw := newIPTables(nil)
		_, err := fw.ensure(t.Context(), dnsOn("169.254.20.10"), standing{})
		wantError(t, err, "running iptables-restore --noflush --wait 20: exit status 1: Operation not permitted (iptables needs the capabilities NET_ADMIN and NET_RAW)")
		if fw.families[ipv4].noRecent || fw.families[ipv4].written {
			t.Error("the failure has left a mark")
		}
		if !isFirewallError(err) {
			t.Error("it is not known for the backend's failure")
		}
		v.script(t, "iptables-save", "echo 'no such table' >&2\nexit 3")
		_, err = fw.ensure(t.Context(), dnsOn("169.254.20.10"), standing{})
		wantError(t, err, "running iptables-save -t raw: exit status 3: no such table")
		v.script(t, "iptables", "exit 1")
		_, err = newIPTables(nil).ensure(t.Context(), dnsOn("169.254.20.10"), standing{})
		wantError(t, err, "running iptables: ")
	})
}

// lock takes the lock of the legacy variant, as another iptables would.
func lock(t *testing.T) (inode uint64, unlock func()) {
	t.Helper()
	f, err := os.OpenFile(lockFile(), os.O_RDWR|os.O_CREATE, 0o600)
	must(t, err)
	must(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
	info, err := f.Stat()
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return info.Sys().(*syscall.Stat_t).Ino, func() { f.Close() }
}

func TestLockOfOtherProgramIsWaitedFor(t *testing.T) {
	needRoot(t)
	v := newVariant(t, "legacy")
	inode, unlock := lock(t)
	fw := newIPTables(nil)
	es := dnsOn("169.254.20.10")
	done := make(chan error, 1)
	go func() { _, err := fw.ensure(t.Context(), es, standing{}); done <- err }()
	// "1: -> FLOCK  ADVISORY  WRITE 123 fe:00:4711 0 EOF" is one that waits.
	eventually(t, "iptables-restore waits for the lock", func() bool {
		select {
		case err := <-done:
			t.Fatalf("it has not waited for the lock; error %v", err)
		default:
		}
		b, err := os.ReadFile("/proc/locks")
		must(t, err)
		return regexp.MustCompile(fmt.Sprintf(`-> FLOCK .*:%d `, inode)).Match(b)
	})
	unlock()
	must(t, <-done)
	wantRules(t, v, fw.families[ipv4], es)
	remove(t, fw)
}

func TestLockIsNotWaitedForWithoutEnd(t *testing.T) {
	needRoot(t)
	v := newVariant(t, "legacy")
	fw := newIPTables(nil)
	_, err := fw.ensure(t.Context(), dnsOn("169.254.20.10"), standing{})
	must(t, err)
	_, unlock := lock(t)
	before := metric(t, "coredns_nodecache_setup_errors_total", errFirewallLock)
	_, err = fw.ensure(t.Context(), dnsOn("10.96.0.10"), standing{})
	wantError(t, err, "another program has held the xtables lock ("+lockFile()+") for 3s")
	if !errors.As(count(err), new(lockError)) || isFirewallError(err) {
		t.Errorf("%v is not known for the lock's", err)
	}
	if after := metric(t, "coredns_nodecache_setup_errors_total", errFirewallLock); after != before+1 {
		t.Errorf("the metric went from %v to %v", before, after)
	}
	unlock()
	wantRules(t, v, fw.families[ipv4], dnsOn("169.254.20.10")) // as before
	remove(t, fw)
}

func TestFirstRulesWaitLongerForLock(t *testing.T) {
	// As iptables-restore ends when the time is over.
	needRoot(t)
	v := newVariant(t, "legacy")
	v.script(t, "iptables-restore", `echo "Another app is currently holding the xtables lock; still $3s 0us time ahead to have a chance to grab the lock..." >&2
echo "Another app is currently holding the xtables lock. Stopped waiting after $3s." >&2
exit 4`)
	fw := newIPTables(nil)
	_, err := fw.ensure(t.Context(), dnsOn("169.254.20.10"), standing{})
	wantError(t, err, "for 20s")
	wantError(t, err, "Stopped waiting after 20s")
	if !errors.As(err, new(lockError)) {
		t.Errorf("%v is not known for the lock's", err)
	}
	if fw.families[ipv4].noRecent {
		t.Error("a held lock counts as a missing match")
	}
}

func TestLockFile(t *testing.T) {
	t.Setenv("XTABLES_LOCKFILE", "")
	if got := lockFile(); got != "/run/xtables.lock" {
		t.Errorf("got %s", got)
	}
}

// A node starts many pods at once and each iptables takes a lock: their number
// must not grow with that of the addresses.
func TestNumberOfProcesses(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		v.count(t)
		for _, k := range []int{1, 50} {
			var es []endpoint
			for i := range k {
				es = append(es, dnsOn(fmt.Sprintf("169.254.20.%d", i+1), fmt.Sprintf("fd00:20::%d", i+1))...)
			}
			slices.SortFunc(es, compareEndpoints)
			fw := newIPTables(nil)
			_, err := fw.ensure(t.Context(), es, standing{})
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
			fw.serve(es)
			must(t, fw.leave(t.Context(), es))
			remove(t, fw)
			perFamily("the removal")
		}
	})
}

// lastSeen returns when an address was last renewed in its list, in jiffies.
func lastSeen(a netip.Addr) string {
	b, _ := os.ReadFile(recentPath(a))
	m := regexp.MustCompile(`last_seen: (\d+)`).FindSubmatch(b)
	if m == nil {
		return ""
	}
	return string(m[1])
}

func TestHeartRenewsLists(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		fw := newIPTables(func() { t.Error("the rules count as gone") })
		es := dnsOn("169.254.20.10", "fd00:20::10")
		_, err := fw.ensure(t.Context(), es, standing{})
		must(t, err)
		for _, a := range addrs("169.254.20.10", "fd00:20::10") {
			if got := lastSeen(a); got != "" {
				t.Errorf("%s is in its list (%s) before anybody listens", a, got)
			}
		}
		fw.serve(es)
		for _, a := range addrs("169.254.20.10", "fd00:20::10") {
			first := lastSeen(a)
			if first == "" {
				t.Errorf("%s is not in its list", a)
			}
			eventually(t, a.String()+" is renewed", func() bool { s := lastSeen(a); return s != "" && s != first })
		}
		// What is served no longer goes out of force at once.
		fw.serve(ofFamily(es, ipv6))
		if got := lastSeen(addr("169.254.20.10")); got != "" {
			t.Errorf("169.254.20.10 is still in its list (%s)", got)
		}
		if got := lastSeen(addr("fd00:20::10")); got == "" {
			t.Error("fd00:20::10 is no more in its list")
		}
		fw.serve(nil)
		if fw.heart.stop != nil {
			t.Error("the heart beats for nothing")
		}
		remove(t, fw)
	})
}

func TestHeartNoticesFlushedRules(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		var flushed atomic.Int32
		fw := newIPTables(func() { flushed.Add(1) })
		es := dnsOn("169.254.20.10")
		_, err := fw.ensure(t.Context(), es, standing{})
		must(t, err)
		fw.serve(es)
		v.run(t, "iptables", "-t", "raw", "-F")
		eventually(t, "flushed is called", func() bool { return flushed.Load() > 0 })
		_, err = fw.ensure(t.Context(), es, standing{})
		must(t, err)
		fw.serve(es)
		if lastSeen(addr("169.254.20.10")) == "" {
			t.Error("the address is not in the new list")
		}
		remove(t, fw)
	})
}
