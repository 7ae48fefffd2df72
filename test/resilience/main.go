// Resilience shows what a pod sees of what can happen to the servers that a node's cache asks, and
// of answers that change: without a cache, with node-cache's Corefile, and with the shipped one.
//
//	make resilience
//
// Each row is one event, while a pod asks over UDP, once, and waits for 5 s, as a libc does. "Without" is the
// cluster's DNS alone: two servers behind a Service for the cluster's names, and for all others a CoreDNS
// as kubeadm sets it up. "node-cache" is that of Kubernetes' addon, in plain CoreDNS. "ours"
// is k8s/node-local.yaml. All three are the same program. Everything takes place in network
// namespaces of its own. It prints tables in Markdown; -h lists what can be chosen.
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

var (
	binary  = flag.String("binary", "./coredns", "the CoreDNS `program` with nodecache")
	choose  = flag.String("rows", "", "only rows whose name has one of these `words`, separated by commas")
	day     = flag.Duration("day", 96*time.Second, "how long a day in the life of the upstreams takes; 0: none is shown")
	limit   = flag.Duration("limit", 20*time.Minute, "when to give up")
	verbose = flag.Bool("v", false, "print the logs of CoreDNS")
)

func main() {
	flag.Parse()
	time.AfterFunc(*limit, func() {
		fmt.Fprintf(os.Stderr, "not done within %v\n", *limit)
		os.Exit(1)
	})
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	program, err := filepath.Abs(*binary)
	if err != nil {
		return err
	}
	fmt.Println("| What happens | | right | late | SERVFAIL | REFUSED | wrong | lost | worst |")
	fmt.Println("|--------------|-|------:|-----:|---------:|--------:|------:|-----:|------:|")
	for _, r := range rows {
		if !chosen(r.name) {
			continue
		}
		results, err := measure(program, r)
		if err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
		for i, t := range results {
			name := ""
			if i == 0 {
				name = r.name
			}
			fmt.Printf("| %s | %s | %s |\n", name, subjects[i], cells(t))
		}
	}
	if *choose != "" && !chosen("cost") {
		return nil
	}
	if *day > 0 && *choose == "" {
		if err := theDay(program); err != nil {
			return err
		}
	}
	return theCost(program)
}

func cells(t *lab.Outcome) string {
	return fmt.Sprintf("%d of %d | %d | %d | %d | %d | %d | %s", t.Right, t.Sent, t.Late, t.Servfail, t.Refused, t.Wrong, t.Lost, rounded(t.Worst))
}

func rounded(d time.Duration) string {
	if d < 100*time.Millisecond {
		return "< 100 ms"
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

func chosen(name string) bool {
	for _, w := range strings.Split(*choose, ",") {
		if strings.Contains(strings.ToLower(name), strings.ToLower(strings.TrimSpace(w))) {
			return true
		}
	}
	return false
}

// measure has a row happen to each subject, all at the same time, each with servers of its own.
func measure(program string, r row) ([]*lab.Outcome, error) {
	results, errs := make([]*lab.Outcome, len(subjects)), make([]error, len(subjects))
	var all sync.WaitGroup
	for i, s := range subjects {
		all.Go(func() {
			results[i], errs[i] = measureOne(program, s, r)
		})
	}
	all.Wait()
	for i, err := range errs {
		if err != nil {
			return nil, fmt.Errorf("%s: %w", subjects[i], err)
		}
	}
	return results, nil
}

func measureOne(program string, subject string, r row) (*lab.Outcome, error) {
	s, err := newSite(program, subject)
	if err != nil {
		return nil, err
	}
	defer s.close()
	if r.before != nil {
		if err := r.before(s); err != nil {
			return nil, err
		}
	}
	if err := s.start(); err != nil {
		return nil, err
	}
	return r.run(s)
}
