package e2e

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

var update = flag.Bool("update", false, "write what was measured into the documentation")

// capabilities are what each way of running needs, as docs/security.md says.
var capabilities = []struct {
	name     string
	variant  lab.Iptables
	block    string // in nodecache
	bind     string
	caps     []string
	ownsNode bool
}{
	{"iptables, legacy", lab.Legacy, "firewall iptables", allAddrs, []string{"NET_ADMIN", "NET_BIND_SERVICE", "NET_RAW"}, true},
	{"iptables, nft", lab.NFT, "firewall iptables", allAddrs, []string{"NET_ADMIN", "NET_BIND_SERVICE"}, true},
	{"nftables", lab.NFT, "firewall nftables", allAddrs, []string{"NET_ADMIN", "NET_BIND_SERVICE"}, true},
	{"none, with `interface none`", lab.NFT, "firewall none\n        interface none", podIP + " fd00:3::2", []string{"NET_BIND_SERVICE"}, false},
}

// Each way of running works with exactly its capabilities, and with none of them
// missing. What is said then is in the documentation, as it was said here.
func TestCapabilities(t *testing.T) {
	var table strings.Builder
	table.WriteString("| Backend | Capabilities | Without | CoreDNS says |\n|---------|--------------|---------|--------------|\n")
	for _, c := range capabilities {
		first := func(missing string) (who, caps string) {
			if missing == c.caps[0] {
				return c.name, strings.Join(c.caps, ", ")
			}
			return "", ""
		}
		start := func(t *testing.T, caps []string) (*node, *process, string) {
			n := newNode(t, backend{iptables: c.variant})
			if !c.ownsNode {
				n.eth0()
			}
			before := n.snapshot()
			return n, n.launch(plainBlock(".:53", c.bind, "nodecache {\n        "+c.block+"\n    }"), lab.Options{Via: privileged(caps...)}), before
		}
		t.Run(c.name, func(t *testing.T) {
			n, p, before := start(t, c.caps)
			n.must(p.WaitServing())
			n.must(p.WaitLog(0, inPlace))
			n.has(capSets(n, p.Pid), strings.Join(c.caps, ","))
			if c.ownsNode {
				n.answersEverybody(false, addrs...)
			}
			p.exit(syscall.SIGTERM)
			n.quiet(p.Log())
			n.same("after the exit", before, n.snapshot())
		})
		for _, missing := range c.caps {
			t.Run(c.name+" without "+missing, func(t *testing.T) {
				rest := slices.DeleteFunc(slices.Clone(c.caps), func(c string) bool { return c == missing })
				n, p, before := start(t, rest)
				state, err := p.Wait()
				if err != nil || state.ExitCode() < 1 {
					t.Fatalf("works without %s: %v, %v", missing, state, err)
				}
				n.same("after a start that failed", before, n.snapshot())
				said := complaint(p)
				t.Log(said)
				who, caps := first(missing)
				fmt.Fprintf(&table, "| %s | %s | %s | `%s` |\n", who, caps, missing, said)
			})
		}
	}
	want := 0
	for _, c := range capabilities {
		want += len(c.caps)
	}
	if rows := strings.Count(table.String(), "\n") - 2; t.Failed() || rows < want {
		return // -run has chosen some, or root is missing
	}
	documented(t, "security.md", "capabilities", table.String())
}

// varying is what differs between machines and runs: which address came first, which
// of the two iptables, and its version.
var varying = regexp.MustCompile(`\S+:53/(udp|tcp)|ip6?tables-save v\S+ |ip6?tables`)

// complaint is the last thing that a process said, without where in the Corefile.
func complaint(p *process) string {
	lines := strings.Split(strings.TrimSpace(p.Log()), "\n")
	said := lines[len(lines)-1]
	if _, what, ok := strings.Cut(said, " - Error during parsing: "); ok {
		said = what
	}
	return varying.ReplaceAllStringFunc(said, func(s string) string {
		switch {
		case strings.Contains(s, ":53/"):
			return "…"
		case strings.Contains(s, "-save v"):
			return "iptables-save … "
		}
		return "iptables"
	})
}

// documented compares a part of a page, between two comments, with what was measured.
func documented(t *testing.T, page, part, want string) {
	t.Helper()
	file := filepath.Join("..", "docs", page)
	begin, end := "<!-- "+part+" -->\n", "<!-- end of "+part+" -->"
	text := read(t, file)
	before, rest, ok := strings.Cut(text, begin)
	got, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no part %s", file, part)
	}
	if got == want {
		return
	}
	if *update {
		if err := os.WriteFile(file, []byte(before+begin+want+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Errorf("%s has\n%s\nmeasured was\n%s\nIf this is right, write it there with go test ./test -run %s -update", file, got, want, t.Name())
}
