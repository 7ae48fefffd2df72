package e2e

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"
)

// A sample is what must not grow while a cache lives, and the memory that it has.
type sample struct {
	after                                                     time.Duration
	descriptors, netlink, goroutines, rules, routes, resident int
}

// sample looks at the process, whose metrics are at an address, and at the node.
func (p *process) sample(at string) (one sample) {
	p.n.Helper()
	one.descriptors = p.descriptors()
	one.netlink = p.netlinkSockets()
	m := p.n.metrics(at)
	one.goroutines, one.resident = int(m["go_goroutines"]), int(m["process_resident_memory_bytes"])
	text := p.n.snapshot()
	one.rules = strings.Count(text, "NODECACHE") + strings.Count(text, "nodecache-")
	for _, family := range []string{"-4", "-6"} {
		routes, err := p.n.Node.Run("ip", family, "route", "show", "table", "all")
		p.n.must(err)
		one.routes += strings.Count(routes, "\n")
	}
	return one
}

// netlinkSockets is how many of them the process has.
func (p *process) netlinkSockets() (count int) {
	p.n.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/netlink", p.Pid))
	p.n.must(err)
	inodes := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		if words := strings.Fields(line); len(words) > 0 {
			inodes["socket:["+words[len(words)-1]+"]"] = true
		}
	}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.Pid))
	p.n.must(err)
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err == nil && inodes[target] {
			count++
		}
	}
	return count
}

// beyond says what a sample has more of than another one.
func (one sample) beyond(most sample) (more []string) {
	for _, v := range []struct {
		what     string
		is, most int
	}{
		{"descriptors", one.descriptors, most.descriptors}, {"netlink sockets", one.netlink, most.netlink},
		{"goroutines", one.goroutines, most.goroutines}, {"rules", one.rules, most.rules}, {"routes", one.routes, most.routes},
	} {
		if v.is > v.most {
			more = append(more, fmt.Sprintf("%d %s, at most %d are expected", v.is, v.what, v.most))
		}
	}
	return more
}

// table returns a writer of a table whose first columns are those of a sample.
func sampleTable(out io.Writer, first string) *tabwriter.Writer {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, first+"\tdescriptors\tnetlink sockets\tgoroutines\trules\troutes\tMiB\t")
	return w
}

func (one sample) row(w io.Writer, first string) {
	fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%d\t%.1f\t\n", first, one.descriptors, one.netlink, one.goroutines, one.rules, one.routes, float64(one.resident)/(1<<20))
}
