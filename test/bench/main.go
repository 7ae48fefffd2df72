// Bench measures what a cached answer costs, of nodecache and of other caches, in one
// run on one machine.
//
//	make bench
//
// Every server forwards to the same authoritative server, has one CPU, and is asked for
// names that it has in its cache, over UDP: 1,000, 200, 5,000 and 20,000 times a second, and
// as fast as it answers. The queries come from another CPU. In each round every server
// is started anew and measured for a few seconds, so that what else happens on the
// machine meets all of them alike. Everything takes place in a network namespace of its
// own. It prints tables in Markdown; -h lists what can be chosen.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

var (
	coredns  = flag.String("binary", "./coredns", "the CoreDNS `program` with nodecache")
	rounds   = flag.Int("rounds", 3, "how often every server is measured")
	which    = flag.String("subjects", "", "only these `servers`, separated by commas, of "+strings.Join(names(subjects), ", ")+"; by default those that are installed")
	duration = flag.Duration("duration", 2*time.Second, "how long a server is measured at each rate; three times that below 5,000 queries a second")
	entries  = flag.Int("entries", 5000, "how many names are asked for, each for A and AAAA")
	shared   = flag.Bool("shared", false, "measure fastpath on two CPUs also where the load has no third one to itself")
	wanted   = flag.String("rates", "1000,200,5000,20000,0", "the queries a `second` at which each is measured, separated by commas; 0: as many as it answers")
	gogc     = flag.String("gogc", "", "a `percentage` in place of the manifest's GOGC")
	limit    = flag.Duration("limit", 30*time.Minute, "when to give up")
	verbose  = flag.Bool("v", false, "print every measurement as it is made")
)

// rates are the measured rates in queries a second; 0: as fast as they are answered.
// The first is by default what a busy node asks.
var rates []int

func parseRates(text string) (all []int, err error) {
	for _, word := range strings.Split(text, ",") {
		n, err := strconv.Atoi(word)
		if err != nil || n < 0 || slices.Contains(all, n) {
			return nil, fmt.Errorf("-rates %s: %q is no rate, or is there twice", text, word)
		}
		all = append(all, n)
	}
	return all, nil
}

// length is how long a rate is measured: a slow one for longer, as it has few answers.
func length(rate int) time.Duration {
	if rate > 0 && rate < 5000 {
		return 3 * *duration
	}
	return *duration
}

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

func run() (err error) {
	if os.Geteuid() != 0 {
		return errors.New("network namespaces take root")
	}
	if *rounds < 1 || *duration < 100*time.Millisecond || *entries < 1 || *entries > maxEntries {
		return fmt.Errorf("at least one round, 100ms, and 1 to %d entries are needed", maxEntries)
	}
	if rates, err = parseRates(*wanted); err != nil {
		return err
	}
	if *coredns, err = filepath.Abs(*coredns); err != nil {
		return err
	}
	if _, err := os.Stat(*coredns); err != nil {
		return fmt.Errorf("looking for the program to measure: %w; run make, or name it with -binary", err)
	}
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	cpus, err := layOut()
	if err != nil {
		return err
	}
	chosen, missing, err := choose(cpus)
	if err != nil {
		return err
	}

	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	ns, err := lab.NewNamespace("bench")
	if err != nil {
		return err
	}
	b := &bench{ns: ns, dir: dir, cpus: cpus, zone: newZone(*entries)}
	up, err := b.startUpstream()
	if err != nil {
		return err
	}
	defer up.stop()

	fmt.Print(b.heading(chosen, missing))
	t := newTable(chosen)
	for round := range *rounds {
		for _, s := range chosen {
			r, err := b.measure(s)
			if err != nil {
				return fmt.Errorf("%s in round %d: %w", s.name, round+1, err)
			}
			t.add(s, r)
			if *verbose {
				fmt.Fprintf(os.Stderr, "round %d, %s: %v\n", round+1, s.name, r)
			}
		}
	}
	fmt.Print(t)
	return nil
}

// choose returns the servers to measure, and what could be installed to measure more.
func choose(cpus layout) (chosen []*subject, missing []string, err error) {
	var asked []string
	if *which != "" {
		asked = strings.Split(*which, ",")
	}
	for _, name := range asked {
		if !slices.Contains(names(subjects), name) {
			return nil, nil, fmt.Errorf("no server is called %s; there are %s", name, strings.Join(names(subjects), ", "))
		}
	}
	for _, s := range subjects {
		if asked != nil && !slices.Contains(asked, s.name) {
			continue
		}
		if s.cpus > 1 && !cpus.spare && !*shared {
			if asked != nil {
				return nil, nil, fmt.Errorf("%s takes %d CPUs, and one more for the load; -shared measures it with fewer", s.name, s.cpus)
			}
			continue
		}
		if s.path = *coredns; s.program != "" {
			if s.path, err = exec.LookPath(s.program); err != nil && asked != nil {
				return nil, nil, fmt.Errorf("finding %s: %w; apt-get install %s", s.name, err, s.pkg)
			} else if err != nil {
				missing = append(missing, s.pkg)
				continue
			}
		}
		chosen = append(chosen, s)
	}
	if len(chosen) == 0 {
		return nil, nil, errors.New("nothing is left to measure")
	}
	if _, err := exec.LookPath("nsd"); err != nil {
		missing = append(missing, "nsd")
	}
	return chosen, missing, nil
}

// heading says what is measured, how, and where.
func (b *bench) heading(chosen []*subject, missing []string) string {
	var h strings.Builder
	kernel, _ := exec.Command("uname", "-sr").Output()
	fmt.Fprintf(&h, "`%s`, %s, %d × %s, %s\n\n", strings.Join(os.Args, " "),
		strings.TrimSpace(string(kernel)), b.cpus.count, cpuModel(), time.Now().Format(time.DateOnly))
	var versions []string
	for _, s := range chosen {
		v := s.label
		if s.version != "" {
			v += " " + version(s.path, s.version)
		}
		versions = append(versions, v)
	}
	fmt.Fprintf(&h, "%s; %s behind; %d names, A and AAAA; %d rounds of %v at each rate.\n",
		strings.Join(versions, ", "), b.upstream, *entries, *rounds, *duration)
	if len(missing) > 0 {
		fmt.Fprintf(&h, "Not installed: apt-get install --no-install-recommends %s\n", strings.Join(missing, " "))
	}
	if !b.cpus.spare {
		what := "fastpath on two CPUs is left out; -shared measures it all the same"
		if *shared {
			what = "fastpath on two CPUs shares one of them with the load"
		}
		fmt.Fprintf(&h, "Two CPUs for a server and one for the load would take three: %s.\n", what)
	}
	h.WriteByte('\n')
	return h.String()
}

func version(path, option string) string {
	text, _ := exec.Command(path, option).CombinedOutput()
	return string(regexp.MustCompile(`\d+(\.\d+)+`).Find(text))
}

func cpuModel() string {
	text, _ := os.ReadFile("/proc/cpuinfo")
	if m := regexp.MustCompile(`(?m)^model name\s*:\s*(.*)$`).FindSubmatch(text); m != nil {
		return string(m[1])
	}
	return "CPU"
}
