package nodecache

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

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
	fw.enforce(nil)
	_, err := fw.apply(t.Context(), nil, standing{})
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
func wantRules(t *testing.T, v *variant, x *xtables, es []desired.Endpoint) {
	t.Helper()
	wantChains(t, v, x, es, nil)
}

func wantChains(t *testing.T, v *variant, x *xtables, es, leaving []desired.Endpoint) {
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
