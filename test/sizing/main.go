// Command sizing measures how much memory the real binary takes, against the answers in
// its cache, the number of server blocks and the queries that wait for the cluster. It
// prints a table, and what fits it, for docs/sizing.md.
//
// It takes root, and the binary that make builds (or the one that COREDNS names).
package main

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// A run is one start of the binary.
type run struct {
	kind    kind
	blocks  int
	entries int
	waiting int // queries that are not answered while memory is measured
	gogc    int
	limit   int // GOMEMLIMIT in MiB, 0 for none
}

// measured is what a run came to.
type measured struct {
	run
	cached  int     // what coredns_cache_entries says
	peak    float64 // MiB, at most
	seconds float64 // of CPU for a million queries
}

func main() {
	if err := measureAll(); err != nil {
		fmt.Fprintln(os.Stderr, "sizing:", err)
		os.Exit(1)
	}
}

func measureAll() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("network namespaces take root")
	}
	binary, err := filepath.Abs(cmp.Or(os.Getenv("COREDNS"), "coredns"))
	if err != nil {
		return err
	}
	fmt.Println("| Answers | Blocks | In the cache | Waiting | GOGC | GOMEMLIMIT | Memory | CPU, a million misses |")
	fmt.Println("|---------|--------|--------------|---------|------|------------|--------|-----------------------|")
	var parts [][]float64 // 1, blocks, waiting queries, and thousands of answers of each kind
	var peaks []float64
	for _, r := range runs() {
		m, err := measure(binary, r)
		if err != nil {
			return fmt.Errorf("measuring %+v: %w", r, err)
		}
		limit, cpu := "", ""
		if r.limit > 0 {
			limit = fmt.Sprintf("%d MiB", r.limit)
		}
		if r.entries > 0 {
			cpu = fmt.Sprintf("%.0f s", m.seconds)
		}
		fmt.Printf("| %s | %d | %d | %d | %d | %s | %.1f MiB | %s |\n", r.kind, r.blocks, m.cached, r.waiting, r.gogc, limit, m.peak, cpu)
		if r.gogc == 100 && r.limit == 0 {
			part := make([]float64, 3+len(kinds))
			part[0], part[1], part[2] = 1, float64(r.blocks), float64(r.waiting)/1000
			part[3+int(r.kind)] = float64(m.cached) / 1000
			parts, peaks = append(parts, part), append(peaks, m.peak)
		}
	}
	c, off, err := fit(parts, peaks)
	if err != nil {
		return err
	}
	fmt.Printf("\nFitted, off by %.1f MiB at most:\n\n", off)
	fmt.Println("| For | Memory |")
	fmt.Println("|-----|--------|")
	fmt.Printf("| the process | %.0f MiB |\n| a server block | %.2f MiB |\n| a query that waits | %.1f KiB |\n", c[0], c[1], c[2]*1.024)
	for _, k := range kinds {
		fmt.Printf("| an answer, %s | %.2f KiB |\n", k, c[3+int(k)]*1.024)
	}
	return nil
}

// runs are what is measured.
func runs() (all []run) {
	for _, k := range kinds {
		for _, blocks := range []int{2, 32} {
			for _, entries := range []int{0, 20000, 80000} {
				all = append(all, run{kind: k, blocks: blocks, entries: entries, gogc: 100})
			}
		}
	}
	const usual = 39936 // of two blocks with the plugin's usual capacities
	for _, r := range []run{
		{gogc: 100}, {gogc: 50}, {gogc: 200}, {gogc: 100, limit: 80}, {gogc: 100, limit: 64}, {gogc: 100, waiting: 2000},
	} {
		r.kind, r.blocks, r.entries = chain, 2, usual
		all = append(all, r)
	}
	return all
}

func measure(binary string, r run) (m measured, err error) {
	m.run = r
	l, err := lab.New(lab.NFT)
	if err != nil {
		return m, err
	}
	defer l.Close()
	up, err := serve(l.DNS)
	if err != nil {
		return m, err
	}
	defer up.close()

	o := lab.Options{Env: []string{"GOGC=" + strconv.Itoa(r.gogc)}}
	if r.limit > 0 {
		o.Env = append(o.Env, fmt.Sprintf("GOMEMLIMIT=%dMiB", r.limit))
	}
	p, err := l.Start(binary, corefile(r.blocks), o)
	if err != nil {
		return m, err
	}
	if err := p.WaitLog(0, "plugin/nodecache: in place"); err != nil {
		return m, fmt.Errorf("%w\n%s", err, p.Log())
	}
	before, err := cpu(p.Pid)
	if err != nil {
		return m, err
	}
	if err := fill(l.Pod, r); err != nil {
		return m, err
	}
	after, err := cpu(p.Pid)
	if err != nil {
		return m, err
	}
	if r.entries > 0 {
		m.seconds = (after - before) / float64(r.entries) * 1e6
	}
	if r.waiting > 0 {
		if err := up.hold(l.Pod, r.waiting); err != nil {
			return m, err
		}
	}
	if m.peak, err = peak(p.Pid); err != nil {
		return m, err
	}
	if m.cached, err = cached(l.Node); err != nil {
		return m, err
	}
	if m.cached < r.entries*99/100 {
		return m, fmt.Errorf("only %d answers are in the cache", m.cached)
	}
	up.release()
	_, err = p.Stop(syscall.SIGTERM)
	return m, err
}

// corefile has blocks as those of k8s/, for the zones 0.test and so on.
func corefile(blocks int) string {
	var s strings.Builder
	for i := range blocks {
		fmt.Fprintf(&s, "%d.test:53 {\n bind 169.254.20.10\n nodecache {\n  firewall nftables\n }\n prometheus 127.0.0.1:9253\n errors\n loop\n", i)
		if i == 0 {
			s.WriteString(" health 169.254.20.10:8080\n ready 169.254.20.10:8181\n")
		}
		fmt.Fprintf(&s, " cache {\n  success 1000000 3600\n  denial 1000000 3600\n  prefetch 10 1m 10%%\n  serve_stale 1h verify 1s 5s\n }\n forward . %s\n}\n", upstreamAt)
	}
	return s.String()
}
