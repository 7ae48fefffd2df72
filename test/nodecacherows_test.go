package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
)

// reference is the program of node-cache itself, which NODE_CACHE names: `go build ./cmd/node-cache`
// in sigs.k8s.io/node-local-dns makes it. Without it "", and what it has done is in the rows.
func reference() string { return os.Getenv("NODE_CACHE") }

// A row is a command line of node-cache, its environment and files, and what comes of them.
type row struct {
	name     string
	sections map[string]string
	args     []string
	env      []string
	caps     []string // of the container
}

const rowsDir = "../internal/nodecachemode/testdata"

func rows(t *testing.T) (all []row) {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(rowsDir, "*.txt"))
	if err != nil || len(paths) == 0 {
		t.Fatalf("rows in %s: %v", rowsDir, err)
	}
	for _, path := range paths {
		r := row{name: strings.TrimSuffix(filepath.Base(path), ".txt"), sections: testkit.Sections(read(t, path))}
		r.caps = []string{"NET_ADMIN", "NET_BIND_SERVICE", "NET_RAW"}
		r.args, r.env = strings.Fields(r.sections["args"]), strings.Fields(r.sections["env"])
		all = append(all, r)
	}
	return all
}

// rowNamed is one of the rows.
func rowNamed(t *testing.T, name string) row {
	t.Helper()
	all := rows(t)
	i := slices.IndexFunc(all, func(r row) bool { return r.name == name })
	if i < 0 {
		t.Fatalf("no row %s", name)
	}
	return all[i]
}

// files are what a row has in /etc, by the path from there.
func (r row) files() map[string]string {
	files := map[string]string{}
	for section, text := range r.sections {
		name, isFile := strings.CutPrefix(section, "file ")
		switch {
		case isFile:
			files[name] = text
		case section == "template":
			files["coredns/Corefile.base"] = text
		case section == "corefile":
			files["Corefile"] = text
		case section == "stubDomains" || section == "upstreamNameservers":
			files["kube-dns/"+section] = text
		}
	}
	return files
}

// etc lays a row's files out, and returns the row's arguments for this place.
func (r row) etc(t *testing.T) (dir string, args []string) {
	t.Helper()
	dir = t.TempDir()
	for name, text := range r.files() {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	args = append(args, r.args...)
	args = append(args, "-conf", filepath.Join(dir, "Corefile"), "-basecorefile", filepath.Join(dir, "coredns/Corefile.base"))
	if _, err := os.Stat(filepath.Join(dir, "kube-dns")); err == nil {
		args = append(args, "-kubednscm", filepath.Join(dir, "kube-dns"))
	}
	return dir, args
}

var (
	directive = regexp.MustCompile(`(?m)^    nodecache( skipteardown)?( \{\n(        .*\n)*    \})?\n`)
	zones     = regexp.MustCompile(`(?ms)^\S+ \{\n.*?^ *\}\n`)
)

// Each row's command line prints its Corefile. node-cache itself makes the same one, but for the
// directive nodecache and the order of the stub domains, or the row says why not.
func TestNodeCacheCorefiles(t *testing.T) {
	for _, r := range rows(t) {
		t.Run(r.name, func(t *testing.T) {
			want := r.sections["Corefile"]
			dir, args := r.etc(t)
			cmd := exec.Command(binary(t), append(append([]string{"node-cache"}, args...), "-print")...)
			cmd.Env = append(os.Environ(), r.env...)
			var stderr strings.Builder
			cmd.Stderr = &stderr
			var out []byte
			var err error
			if r.name == "own-network" {
				err = newNode(t, iptablesNFT).Pod.Do(func() error { out, err = cmd.Output(); return err })
			} else {
				out, err = cmd.Output()
			}
			if (err != nil) != (want == "") || string(out) != want {
				t.Errorf("%v; printed\n%s\nwant\n%s", err, out, want)
			}
			for line := range strings.Lines(r.sections["says"]) {
				if said := strings.ReplaceAll(strings.ReplaceAll(stderr.String(), dir+"/coredns/", "DIR/"), dir, "DIR"); !strings.Contains(said, strings.TrimSpace(line)) {
					t.Errorf("said\n%s\nwant\n%s", said, line)
				}
			}
			if reference() == "" {
				return
			}
			n := newNode(t, iptablesNFT)
			dir, args = r.etc(t)
			// It writes the Corefile, then can't serve: the addresses are nowhere.
			args = append(args, "-setupinterface=false", "-setupiptables=false")
			words := append([]string{"PATH=" + os.Getenv("PATH")}, r.env...)
			words = append(append(words, "timeout", "5", reference()), args...)
			log, _ := n.Node.Run("env", words...)
			text, err := os.ReadFile(filepath.Join(dir, "Corefile"))
			same := err == nil && alike(string(text)) == alike(directive.ReplaceAllString(want, "")) && (want == "") == (len(text) == 0)
			if why := r.sections["node-cache"]; same != (why == "") {
				t.Errorf("node-cache wrote (%v)\n%s\nthe row says %q and wants\n%s\nits log:\n%s", err, text, why, want, log)
			}
		})
	}
}

// alike is a Corefile with its blocks in order, and without blanks and comments at a line's end or of their own.
func alike(corefile string) string {
	blocks := map[string]bool{}
	for _, b := range zones.FindAllString(corefile, -1) {
		var lines []string
		for line := range strings.Lines(b) {
			line, _, _ = strings.Cut(line, "#")
			if line = strings.TrimSpace(line); line != "" {
				lines = append(lines, line)
			}
		}
		blocks[strings.Join(lines, "\n")] = true
	}
	return fmt.Sprint(blocks) // which sorts
}
