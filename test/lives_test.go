package e2e

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// The memory of the manifests: what Go is told, and the container's limit.
const (
	goMemoryLimit = "GOMEMLIMIT=144MiB"
	memoryLimit   = 192 << 20
)

// After many reloads and many lives of a twin a cache has nothing more than at the start,
// and no query was lost. LAB_LIVES is how many of each: make lives has it.
func TestLives(t *testing.T) {
	reloads, twins := scale(20), scale(5)
	if n, err := strconv.Atoi(os.Getenv("LAB_LIVES")); err == nil {
		reloads, twins = n, n
	}
	for _, b := range backends {
		t.Run(strings.ReplaceAll(b.String(), " ", "-"), func(t *testing.T) {
			t.Parallel()
			n := newNode(t, b)
			empty := n.snapshot()
			corefile := func(i int, at string) string {
				bind := allAddrs
				if i%2 == 1 {
					bind += " 169.254.20.11"
				}
				var properties []string
				if b == nftables {
					properties = append(properties, "fastpath")
				}
				return strings.Replace(n.block(".:53", bind, properties...), "errors", "errors\n    prometheus "+at, 1)
			}
			const at, twinsAt = "127.0.0.1:9253", "127.0.0.1:9254"
			p := n.serveWith(corefile(0, at), lab.Options{Env: []string{goMemoryLimit}})
			n.answersEverybody(false, addrs...)

			// Every other reload takes an address away again, and so the last one has to.
			n.inARow(p, at, "reloads", reloads+reloads%2, func(i int) { p.reload(corefile(i, at)) })
			n.inARow(p, at, "twins", twins, func(int) {
				// Not serve, which would print the logs of them all.
				c, err := n.Start(binary(t), corefile(0, twinsAt), lab.Options{Env: []string{goMemoryLimit}})
				n.must(err)
				twin := &process{c, n}
				if err := twin.WaitLog(0, inPlace); err != nil {
					t.Fatalf("%v:\n%s", err, twin.Log())
				}
				twin.exit(syscall.SIGTERM)
			})
			p.exit(syscall.SIGTERM)
			n.same("after the exit", empty, n.snapshot())
		})
	}
}

// inARow does something many times under a light load, and compares the process and the
// node with how they were before.
func (n *node) inARow(p *process, at, what string, times int, do func(i int)) {
	n.Helper()
	var out strings.Builder
	w := sampleTable(&out, what)
	whole := n.snapshot()
	first := p.sample(at)
	first.row(w, "0")
	flows := map[string]*lab.Flowing{}
	for _, c := range n.clients() {
		f, err := lab.Flow{From: c.ns, To: addrs, Rate: 50, Tag: tag(what, c.name)}.Start()
		n.must(err)
		n.Cleanup(func() { f.Stop() })
		flows[c.name] = f
	}
	begun := time.Now()
	var took time.Duration
	for i := 1; i <= times; i++ {
		do(i)
		if i == times {
			took = time.Since(begun)
		} else if i%max(times/10, 1) == 0 {
			one := p.sample(at)
			one.row(w, strconv.Itoa(i))
			if one.goroutines > 2*first.goroutines {
				n.Errorf("after %d %s there are %d goroutines, and were %d at first: they pile up", i, what, one.goroutines, first.goroutines)
			}
		}
	}
	var sum lab.Tally
	for _, f := range flows {
		until := f.Sent() + 50
		if !eventually(func() bool { return f.Sent() >= until }) {
			n.Fatal("a flow came to a halt")
		}
		results, err := f.Stop()
		n.must(err)
		for _, r := range results {
			sum.Add(&r.Tally)
		}
	}
	// What was opened for the last query may still be closing.
	var last sample
	if !eventually(func() bool { last = p.sample(at); return len(last.beyond(first)) == 0 }) {
		n.Errorf("after %d %s there is more than before: %s", times, what, strings.Join(last.beyond(first), "; "))
	}
	last.row(w, strconv.Itoa(times))
	if last.resident > memoryLimit {
		n.Errorf("after %d %s there are %d bytes, more than the manifest allows", times, what, last.resident)
	}
	n.same(fmt.Sprintf("after %d %s", times, what), whole, n.snapshot())
	if sum.Sent == 0 || sum.Bad() > 0 {
		n.Errorf("%d %s: of %d queries %d were lost, %d refused, %d answered wrongly:\n\t%s",
			times, what, sum.Sent, sum.Lost, sum.Refused, sum.Wrong, strings.Join(sum.Errors, "\n\t"))
	}
	w.Flush()
	n.Logf("%d %s in %v with %s: %d queries, %d lost, %d refused, %d wrong\n%s",
		times, what, took.Round(time.Second), n.backend, sum.Sent, sum.Lost, sum.Refused, sum.Wrong, &out)
}
