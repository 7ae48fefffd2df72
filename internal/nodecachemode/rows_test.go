package nodecachemode

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
)

var update = flag.Bool("update", false, "write what comes out into the rows")

// Each row of testdata is a command line, an environment and files, and what comes of them. The
// end-to-end tests take the same rows to the real programs.
func TestRows(t *testing.T) {
	defer func(was func(string) ([]string, error)) { links = was }(links)
	mayNetAdmin = func() bool { return true }
	links = func(string) ([]string, error) { return []string{"eth0", "lo"}, nil } // a pod's
	rows, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(rows) < 20 {
		t.Fatalf("%d rows, %v", len(rows), err)
	}
	for _, path := range rows {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txt"), func(t *testing.T) {
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			row := testkit.Sections(string(text))
			dir := t.TempDir()
			write := func(name, text string) {
				if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			write("kube-dns/unrelated", "")
			for section, text := range row {
				switch name, isFile := strings.CutPrefix(section, "file "); {
				case isFile:
					write(name, text)
				case section == "template":
					write("Corefile.base", text)
				case section == "corefile":
					write("Corefile", text)
				case section == "stubDomains" || section == "upstreamNameservers":
					write("kube-dns/"+section, text)
				}
			}
			for line := range strings.Lines(row["env"]) {
				name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
				t.Setenv(name, value)
			}
			args := append(strings.Fields(row["args"]), "-basecorefile", filepath.Join(dir, "Corefile.base"), "-conf", filepath.Join(dir, "Corefile"), "-kubednscm", filepath.Join(dir, "kube-dns"))
			source, err := source(args...)
			if err != nil {
				t.Fatal(err)
			}
			r, err := source.Read()
			says := strings.Join(r.Notes, "\n")
			if r.Invalid != nil {
				says += "\n" + r.Invalid.Error()
			}
			if err != nil {
				says += "\n" + err.Error()
			}
			got := "-- Corefile --\n" + r.Corefile
			if says = strings.TrimSpace(strings.ReplaceAll(says, dir, "DIR")); says != "" {
				got += "-- says --\n" + says + "\n"
			}
			before, want, _ := strings.Cut(string(text), "-- Corefile --\n")
			if want = "-- Corefile --\n" + want; got == want {
				return
			}
			if *update {
				if err := os.WriteFile(path, []byte(before+got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			t.Errorf("got\n%s\nwant\n%s", got, want)
		})
	}
}

// source is what a command line makes, with the flags that CoreDNS has itself.
func source(args ...string) (*Source, error) {
	set := flag.NewFlagSet(Name, flag.ContinueOnError)
	set.SetOutput(new(strings.Builder))
	set.String("conf", "", "")
	set.String("pidfile", "", "")
	set.String("dns.port", "53", "")
	s := new(Source)
	s.Register(set)
	if err := set.Parse(args); err != nil {
		return nil, err
	}
	return s, s.Check()
}
