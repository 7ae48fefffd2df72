package nodecachemode

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coredns/caddy/caddyfile"
)

func TestWanted(t *testing.T) {
	for _, c := range []struct {
		args string
		want string // the arguments that are left, "no" if it is not
	}{
		{"", "no"},
		{"coredns", "no"},
		{"coredns -conf node-cache", "no"},
		{"/usr/bin/coredns -conf x node-cache", "no"},
		{"/node-cache", ""},
		{"node-cache -conf x", "-conf x"},
		{"coredns node-cache -conf x", "-conf x"},
		{"coredns -conf x -localip y", "-conf x -localip y"},
		{"coredns --localip=y", "--localip=y"},
		{"coredns -localips y", "no"},
	} {
		rest, yes := Wanted(strings.Fields(c.args))
		got := strings.Join(rest, " ")
		if !yes {
			got = "no"
		}
		if got != c.want {
			t.Errorf("%q: %q, want %q", c.args, got, c.want)
		}
	}
}

func TestFlagErrors(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"", "-localip is missing"},
		{"-localip 1.2.3", `-localip: "1.2.3"`},
		{"-localip 10.0.0.1,", `-localip: ""`},
		{"-localip ::", `-localip: "::"`},
		{"-localip fe80::1%eth0", `-localip: "fe80::1%eth0"`},
		{"-localip 10.0.0.1 -interfacename none", `-interfacename: "none"`},
		{"-localip 10.0.0.1 -interfacename a/b", `-interfacename: "a/b"`},
		{"-localip 10.0.0.1 -health-port 0", `-health-port: "0"`},
		{"-localip 10.0.0.1 -dns.port 65536", `-dns.port: "65536"`},
		{"-localip 10.0.0.1 -metrics-listen-address x", `-metrics-listen-address: "x"`},
		{"-localip 10.0.0.1 -prometheus-listen-address x", `-prometheus-listen-address: "x"`},
		{"-localip 10.0.0.1 -syncinterval 0", "-syncinterval"},
		{"-localip 10.0.0.1 -syncinterval 25h", "-syncinterval"},
		{"-localip 10.0.0.1 -syncinterval -1s", "-syncinterval"},
		{"-localip 10.0.0.1 -unknown", "not defined: -unknown"},
	} {
		if _, err := source(strings.Fields(c.args)...); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v, want %q", c.args, err, c.want)
		}
	}
}

func TestSyncInterval(t *testing.T) {
	for given, want := range map[string]time.Duration{
		"60": time.Minute, "60ns": time.Minute, "1ns": time.Second, "60s": time.Minute, "500ms": 500 * time.Millisecond, "5m": 5 * time.Minute,
	} {
		s, err := source("-localip", "10.0.0.1", "-syncinterval", given)
		if err != nil || s.Sync != want {
			t.Errorf("%s: %v, %v", given, s, err)
		}
	}
}

func TestIgnoredFlags(t *testing.T) {
	s, err := source("-localip", "10.0.0.1", "-setupebtables", "-initialdelay", "5")
	if err != nil || !slices.Equal(s.Ignored(), []string{"-initialdelay", "-setupebtables"}) {
		t.Errorf("%v, %v", s.Ignored(), err)
	}
}

func TestSettings(t *testing.T) {
	for _, c := range []struct{ stubs, upstreams, want string }{
		{"", "", ""},
		{`{}`, `[]`, ""},
		{`{"a.example": ["10.0.0.1:53", "fd00::1", "[fd00::1]:53"]}`, `["fd00::1", "[fd00::1]:5353"]`, ""},
		{`{`, "", "reading stubDomains"},
		{`["a"]`, "", "reading stubDomains"},
		{"", `"10.0.0.1"`, "reading upstreamNameservers"},
		{`{"A.example": ["10.0.0.1"]}`, "", `"A.example" is no domain`},
		{`{"a.example {": ["10.0.0.1"]}`, "", "is no domain"},
		{`{"a.example": ["10.0.0.1\n}\nwhoami"]}`, "", "is no address"},
		{`{"a.example": ["ns.example.org"]}`, "", "is no address"},
		{`{"a.example": ["10.0.0.1:0"]}`, "", "is no address"},
		{"", `["/etc/resolv.conf"]`, "is no address"},
		{"", `["10.0.0.1:dns"]`, "is no address"},
	} {
		dir := t.TempDir()
		for key, text := range map[string]string{"stubDomains": c.stubs, "upstreamNameservers": c.upstreams} {
			if text != "" {
				if err := os.WriteFile(filepath.Join(dir, key), []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}
		_, err := readSettings(dir)
		if got := fmt.Sprint(err); (c.want == "") != (err == nil) || !strings.Contains(got, strings.TrimSpace(c.want)) && c.want != "" {
			t.Errorf("%s %s: %v, want %q", c.stubs, c.upstreams, err, c.want)
		}
	}
	if _, err := readSettings("/nowhere"); err == nil {
		t.Error("a folder that is nowhere")
	}
}

// What the ConfigMap said last stays while it is wrong, and a stub domain goes that the template gets.
func TestSettingsStay(t *testing.T) {
	dir := t.TempDir()
	s, err := source("-localip", "10.0.0.1", "-basecorefile", dir+"/template", "-kubednscm", dir)
	if err != nil {
		t.Fatal(err)
	}
	read := func(template, stubs string) Reading {
		t.Helper()
		for name, text := range map[string]string{"template": template, "stubDomains": stubs} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		r, err := s.Read()
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	const root, both = ".:53 {\n bind 10.0.0.1\n whoami\n}\n", ".:53 a.example:53 {\n bind 10.0.0.1\n whoami\n}\n"
	first := read(root, `{"a.example": ["10.1.0.1"]}`)
	if !strings.Contains(first.Corefile, "forward . 10.1.0.1") || first.Invalid != nil {
		t.Fatalf("%+v", first)
	}
	if r := read(root, `{"a.example": ["nonsense"]}`); r.Corefile != first.Corefile || r.Invalid == nil {
		t.Errorf("%+v", r)
	}
	if r := read(both, `{"a.example": ["nonsense"]}`); strings.Contains(r.Corefile, "forward") || r.Invalid == nil {
		t.Errorf("%+v", r)
	}
}

func TestImports(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	s, err := source("-localip", "10.0.0.1", "-basecorefile", dir+"/none", "-conf", write("Corefile", ""))
	if err != nil {
		t.Fatal(err)
	}
	write("one.server", "a.example:53 {\n bind 10.0.0.1\n}\nimport two.*\n")
	write("two.server", "b.example:53 {\n bind 10.0.0.1\n}")
	write("self.conf", "import self.conf\n")
	write("bind.conf", "bind 10.0.0.1\n")
	for _, c := range []struct {
		text, want string
		blocks     int // with nodecache
	}{
		{"import one.server\n", "", 2},
		{"import none.*\n.:53 {\n bind 10.0.0.1\n}\n", "", 1},
		{".:53 {\n import bind.conf\n}\n", "", 1},
		{"(x) {\n bind 10.0.0.1\n}\n.:53 {\n import x\n}\n", "", 1},
		{".:53\nbind 10.0.0.1\n", "", 1},
		{"import nowhere.server\n", "nowhere.server: file does not exist", 0},
		{"import self.conf\n", "may import itself", 0},
		{"import {$NAME}\n", "environment variable", 0},
		{".:53 {\n import bind2.conf\n}\n", "bind2.conf", 0},
	} {
		write("Corefile", c.text)
		r, err := s.Read()
		if got := fmt.Sprint(err); c.want != "" && !strings.Contains(got, c.want) || c.want == "" && err != nil {
			t.Errorf("%s: %v, want %q", c.text, err, c.want)
		}
		if got := strings.Count(r.Corefile, "nodecache"); got != c.blocks {
			t.Errorf("%s: %d times nodecache in\n%s", c.text, got, r.Corefile)
		}
	}
}

// Whatever the template is, nothing but nodecache comes to the blocks that bind the address.
func FuzzAdapt(f *testing.F) {
	rows, _ := filepath.Glob("testdata/*.txt")
	for _, path := range rows {
		text, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		_, corefile, _ := strings.Cut(string(text), "-- Corefile --\n")
		f.Add(corefile)
	}
	for _, text := range []string{"{", "}", "a,\nb {\n}\n", "\"a b\" {\nbind \"169.254.20.10\" # x\n}\n", "a#b c {\nbind 169.254.20.10\n}\n", ".\nbind 169.254.20.10", "a{\nbind 169.254.20.10\n}\n", "() {\n}\n", "{ } 0\nbind 169.254.20.10\n} 0", "0 { {\nbind 169.254.20.10\n} "} {
		f.Add(text)
	}
	s, err := source("-localip", "169.254.20.10,fd00:20::10")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if strings.Contains(text, "import") || strings.Contains(text, "nodecache") || strings.Contains(text, "nodelocaldns") {
			t.Skip("files, and what would have to be told apart")
		}
		before, err := caddyfile.Parse("x", strings.NewReader(text), nil)
		if err != nil || !slices.ContainsFunc(before, s.names) {
			return
		}
		got, _, err := s.adapt(text, "x", Settings{})
		if err != nil {
			return // it says that it can't
		}
		after, err := caddyfile.Parse("x", strings.NewReader(got), nil)
		if err != nil || len(after) != len(before) {
			t.Fatalf("%v: %q became %q", err, text, got)
		}
		for i, b := range after {
			if (b.Tokens["nodecache"] != nil) != s.names(before[i]) {
				t.Errorf("%q became %q", text, got)
			}
			delete(b.Tokens, "nodecache")
			if !slices.Equal(b.Keys, before[i].Keys) || !slices.Equal(words(b), words(before[i])) {
				t.Errorf("%q became %q: %v, was %v", text, got, words(b), words(before[i]))
			}
		}
	})
}

// words are the tokens of a block without their places.
func words(b caddyfile.ServerBlock) (all []string) {
	for directive, tokens := range b.Tokens {
		line := directive + ":"
		for _, t := range tokens {
			line += fmt.Sprintf(" %q", t.Text)
		}
		all = append(all, line)
	}
	slices.Sort(all)
	return all
}
