package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	_ "github.com/contentful-labs/coredns-nodecache" // its metrics
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

func logsPage(t *testing.T) string { return read(t, filepath.Join("..", "docs", "logs.md")) }

// source is all of the package's code.
func source(t *testing.T) string {
	files, err := filepath.Glob(filepath.Join("..", "*.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no source: %v", err)
	}
	var b strings.Builder
	for _, f := range files {
		if !strings.HasSuffix(f, "_test.go") {
			b.WriteString(read(t, f))
		}
	}
	return b.String()
}

func readme(t *testing.T) string { return read(t, filepath.Join("..", "README.md")) }

// pages are the README and the pages of docs, by their paths.
func pages(t *testing.T) []string {
	t.Helper()
	docs, err := filepath.Glob("../docs/*.md")
	if err != nil || len(docs) == 0 {
		t.Fatalf("no pages in docs: %v", err)
	}
	return append([]string{"../README.md"}, docs...)
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
				if strings.Contains(line, "[ERROR]") || strings.Contains(line, "[WARNING] plugin/nodecache") {
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
