package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	_ "github.com/contentful-labs/coredns-nodecache" // its metrics
	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/ownquery"
	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func docsPage(t *testing.T, name string) string { return read(t, filepath.Join("..", "docs", name)) }

// sources are the files of the plugin's code: all but those of tests, of test/ and of the binary.
func sources(t *testing.T) (files []string) {
	err := filepath.WalkDir("..", func(path string, e os.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case e.IsDir() && slices.Contains([]string{"../test", "../cmd", "../build", "../.git"}, path):
			return filepath.SkipDir
		case strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, "_test.go"):
			files = append(files, path)
		}
		return nil
	})
	if err != nil || len(files) == 0 {
		t.Fatalf("no source: %v", err)
	}
	return files
}

// source is all of the plugin's code.
func source(t *testing.T) string {
	var b strings.Builder
	for _, f := range sources(t) {
		b.WriteString(read(t, f))
	}
	return b.String()
}

func readme(t *testing.T) string { return read(t, filepath.Join("..", "README.md")) }

// pages are the README, CONTRIBUTING and the pages of docs, by their paths.
func pages(t *testing.T) []string {
	t.Helper()
	docs, err := filepath.Glob("../docs/*.md")
	if err != nil || len(docs) == 0 {
		t.Fatalf("no pages in docs: %v", err)
	}
	return append([]string{"../README.md", "../CONTRIBUTING.md"}, docs...)
}

// A fenced is a block of code in a page.
type fenced struct {
	kind, text, page string
	line             int
}

func fences(t *testing.T) (all []fenced) {
	for _, page := range pages(t) {
		all = append(all, fencesOf(t, page)...)
	}
	return all
}

func fencesOf(t *testing.T, page string) (all []fenced) {
	var open *fenced
	number := 0
	for line := range strings.Lines(read(t, page)) {
		number++
		kind, fence := strings.CutPrefix(strings.TrimLeft(line, " "), "~~~")
		switch {
		case fence && open == nil:
			open = &fenced{kind: strings.TrimSpace(kind), page: filepath.Base(page), line: number}
		case fence:
			all = append(all, *open)
			open = nil
		case open != nil:
			open.text += line
		}
	}
	if open != nil {
		t.Fatalf("%s:%d: the block has no end", page, open.line)
	}
	return all
}

// The README is read in one sitting, and has what a plugin's README has, in its order.
func TestReadmeOneSitting(t *testing.T) {
	if n := strings.Count(readme(t), "\n"); n > 300 {
		t.Errorf("the README has %d lines, want at most 300: the rest goes to docs", n)
	}
	rest := readme(t)
	for _, h := range []string{
		"Try it", "On a cluster in five minutes",
		"Name", "Description", "Syntax", "Metrics", "Ready", "Examples", "See Also", "Bugs",
	} {
		var found bool
		if _, rest, found = strings.Cut(rest, "\n## "+h+"\n"); !found {
			t.Fatalf("the README has no section %q where it belongs", h)
		}
	}
}

// Every Corefile in the README and in docs works as it stands, on a node that has what a node and
// a reader have: resolvers, a certificate, and for "bind eth0" an eth0.
func TestReadmeCorefiles(t *testing.T) {
	found := 0
	for _, f := range fences(t) {
		if f.kind != "corefile" {
			continue
		}
		found++
		t.Run(fmt.Sprintf("%s-%d", f.page, f.line), func(t *testing.T) {
			n := newNode(t, backend{iptables: lab.NFT})
			resolvers := filepath.Join(n.Dir, "resolv.conf")
			n.must(os.WriteFile(resolvers, []byte("nameserver "+lab.DNSAddr.String()+"\n"), 0o644))
			cert, key := n.certificate()
			corefile := strings.NewReplacer(
				"/etc/resolv.conf", resolvers,
				"/etc/coredns/tls.crt", cert,
				"/etc/coredns/tls.key", key,
			).Replace(f.text)
			if strings.Contains(corefile, "bind eth0") {
				n.eth0()
			}
			// The upstreams that they name are there.
			for _, proto := range protos {
				n.commands(n.Node, "iptables -t nat -A OUTPUT -p "+proto+" --dport 53 -m addrtype ! --dst-type LOCAL -j DNAT --to-destination 10.0.2.2:53")
			}

			before := n.snapshot()
			p := n.serve(corefile)
			n.has(p.Log(), inPlace)
			during := n.snapshot()
			if changes := !strings.Contains(corefile, "interface none"); (during != before) != changes {
				n.Errorf("the node is changed: %v, want %v", during != before, changes)
			}
			p.exit(syscall.SIGTERM)
			want := before
			if strings.Contains(corefile, "skipteardown") {
				want = during
			}
			n.same("after the exit", want, n.snapshot())
			for line := range strings.Lines(p.Log()) {
				slow := strings.Contains(line, "is still running") // the machine is busy
				if strings.Contains(line, "[ERROR]") || strings.Contains(line, "[WARNING] plugin/nodecache") && !slow {
					n.Error(line)
				}
			}
		})
	}
	if found < 10 {
		t.Errorf("%d Corefiles in the pages, want at least 10", found)
	}
}

// eth0 gives the node what a pod has: an eth0 with an address of each family, and the
// link-local one that comes with it.
func (n *node) eth0() {
	n.Helper()
	for _, command := range []string{
		"ip link add eth0 type veth peer name eth0-peer",
		"ip link set eth0 addrgenmode none",
		"ip link set eth0-peer addrgenmode none",
		"ip link set eth0 up",
		"ip link set eth0-peer up",
		"ip addr add 10.0.3.2/24 dev eth0",
		"ip addr add fd00:3::2/64 dev eth0 nodad",
		"ip addr add fe80::3:2/64 dev eth0 nodad",
	} {
		words := strings.Fields(command)
		_, err := n.Node.Run(words[0], words[1:]...)
		n.must(err)
	}
	// The carrier comes somewhat later, and would be a difference of the node.
	for _, link := range []string{"eth0", "eth0-peer"} {
		up := func() bool {
			out, err := n.Node.Run("ip", "link", "show", link)
			n.must(err)
			return strings.Contains(out, " state UP ")
		}
		if !eventually(up) {
			n.Fatalf("%s does not come up", link)
		}
	}
}

// The README has every metric with its labels and its help, and no others.
func TestReadmeMetrics(t *testing.T) {
	const prefix = "coredns_nodecache_"
	// Which addresses there are nobody knows before a Corefile.
	new(ownquery.Asker).Round(t.Context(), ownquery.Site{Zones: map[desired.Endpoint]string{{Addr: netip.MustParseAddr("127.0.0.1"), Proto: "tcp", Port: 1}: "."}})
	families, err := prometheus.DefaultGatherer.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), prefix) {
			continue
		}
		var labels []string
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if !slices.Contains(labels, l.GetName()) {
					labels = append(labels, l.GetName())
				}
				if l.GetName() == "version" || l.GetName() == "address" {
					continue
				}
				if !strings.Contains(readme(t)+docsPage(t, "logs.md"), "`"+l.GetValue()+"`") {
					t.Errorf("the README has no %s=%q of %s", l.GetName(), l.GetValue(), f.GetName())
				}
			}
		}
		name := f.GetName()
		if len(labels) > 0 {
			name += "{" + strings.Join(labels, ", ") + "}"
		}
		want = append(want, fmt.Sprintf("* `%s` - %s", name, f.GetHelp()))
	}
	var got []string
	for line := range strings.Lines(readme(t)) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "* `"+prefix) {
			got = append(got, line)
		}
	}
	slices.Sort(want)
	slices.Sort(got)
	if len(want) == 0 || !slices.Equal(want, got) {
		t.Errorf("the README's metrics are\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	named := regexp.MustCompile(prefix + `\w+`)
	for _, page := range pages(t) {
		for _, name := range named.FindAllString(read(t, page), -1) {
			if all := strings.Join(want, "\n"); !strings.Contains(all, "`"+name+"{") && !strings.Contains(all, "`"+name+"`") {
				t.Errorf("%s names the metric %s, which is not there", page, name)
			}
		}
	}
}

// Whatever a page says to make can be made.
func TestReadmeMakeTargets(t *testing.T) {
	targets := regexp.MustCompile(`(?m)^([a-z0-9-]+):`)
	var have []string
	for _, m := range targets.FindAllStringSubmatch(read(t, filepath.Join("..", "Makefile")), -1) {
		have = append(have, m[1])
	}
	// `make x` in a sentence, and lines of code.
	var commands [][]string
	for _, page := range pages(t) {
		commands = append(commands, regexp.MustCompile("`(make [^`]*)`").FindAllStringSubmatch(read(t, page), -1)...)
	}
	for _, f := range fences(t) {
		for line := range strings.Lines(f.text) {
			if f.kind == "sh" && strings.HasPrefix(line, "make") {
				commands = append(commands, []string{line, line})
			}
		}
	}
	named := 0
	for _, c := range commands {
		words := strings.Fields(c[1])
		for _, w := range words[1:] {
			if strings.Contains(w, "=") {
				continue
			}
			named++
			if words[0] == "make" && !slices.Contains(have, w) {
				t.Errorf("a page says %q, and the Makefile has no %s", strings.TrimSpace(c[1]), w)
			}
		}
	}
	if named < 20 {
		t.Errorf("the pages name %d targets, want at least 20", named)
	}
}

// What a page links to is there, as is the heading, and the index links to each page, the README
// to the index. The pages that the manifests name are there too.
func TestPagesLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)]+)\)`)
	linked := map[string][]string{} // by the page that links
	for _, page := range pages(t) {
		for _, m := range link.FindAllStringSubmatch(read(t, page), -1) {
			target, heading, _ := strings.Cut(m[1], "#")
			if strings.Contains(target, "://") {
				continue
			}
			path := page
			if target != "" {
				path = filepath.Join(filepath.Dir(page), target)
			}
			linked[page] = append(linked[page], path)
			if _, err := os.Stat(path); err != nil {
				t.Errorf("%s links to %s: %v", page, m[1], err)
			} else if heading != "" && !slices.Contains(headings(t, path), heading) {
				t.Errorf("%s links to %s, which has no such heading", page, m[1])
			}
		}
	}
	const index = "../docs/README.md"
	for _, page := range pages(t) {
		if page != index && !slices.Contains(linked[index], page) {
			t.Errorf("%s does not link to %s", index, page)
		}
	}
	for _, page := range []string{index, "../CONTRIBUTING.md"} {
		if !slices.Contains(linked["../README.md"], page) {
			t.Errorf("the README does not link to %s", page)
		}
	}

	named := regexp.MustCompile(`docs/[\w-]+\.md`)
	err := filepath.WalkDir("../k8s", func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		for _, name := range named.FindAllString(read(t, path), -1) {
			if _, err := os.Stat(filepath.Join("..", name)); err != nil {
				t.Errorf("%s names %s: %v", path, name, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// The files that CONTRIBUTING says to look in are there.
func TestContributingFiles(t *testing.T) {
	_, table, _ := strings.Cut(read(t, "../CONTRIBUTING.md"), "\n## Where\n")
	table, _, _ = strings.Cut(table, "\n## ")
	files := 0
	for _, m := range regexp.MustCompile("`([^` ]+)`").FindAllStringSubmatch(table, -1) {
		files++
		if found, err := filepath.Glob(filepath.Join("..", m[1])); err != nil || len(found) == 0 {
			t.Errorf("CONTRIBUTING says to look in %s, which is not there: %v", m[1], err)
		}
	}
	if files < 10 {
		t.Errorf("%d files in CONTRIBUTING, want at least 10", files)
	}
}

// headings are what GitHub makes of a page's headings in links.
func headings(t *testing.T, path string) (hs []string) {
	for line := range strings.Lines(read(t, path)) {
		if strings.HasPrefix(line, "#") {
			h := strings.ToLower(strings.TrimSpace(strings.TrimLeft(line, "#")))
			h = regexp.MustCompile(`[^a-z0-9 _-]`).ReplaceAllString(h, "")
			hs = append(hs, strings.ReplaceAll(h, " ", "-"))
		}
	}
	return hs
}
