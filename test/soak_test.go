package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// memoryLimit is that of the manifests.
const memoryLimit = 192 << 20

// A soak is the life of a cache in fast motion: under load it is reloaded, a twin comes and
// goes, others meddle, upstreams fall silent and come back.
type soak struct {
	*node
	cache   *process
	reloads int
	lost    map[string]*lab.Tally // by step
	names   []string              // of the steps, in order
}

// sample is what must not grow.
type sample struct {
	after                                                     time.Duration
	descriptors, netlink, goroutines, rules, routes, resident int
}

// LAB_SOAK is for how long: make soak has it.
func TestSoak(t *testing.T) {
	long, err := time.ParseDuration(os.Getenv("LAB_SOAK"))
	if err != nil {
		t.Skip("LAB_SOAK says for how long: make soak does")
	}
	for _, b := range []backend{iptablesNFT, nftables} {
		t.Run(b.firewall, func(t *testing.T) {
			t.Parallel()
			s := &soak{node: newNode(t, b), lost: map[string]*lab.Tally{}}
			before := s.snapshot()
			s.cache = s.serve(s.corefileOf(0))
			begun := time.Now()
			var samples []sample
			for time.Since(begun) < long {
				s.cycle(len(samples))
				one := s.sample()
				one.after = time.Since(begun)
				samples = append(samples, one)
			}
			s.cache.exit(syscall.SIGTERM)
			s.same("after the exit", before, s.snapshot())
			s.report(samples)
		})
	}
}

// corefileOf returns the i-th configuration: every other one has an address more.
func (s *soak) corefileOf(i int) string {
	bind := allAddrs
	if i%2 == 1 {
		bind += " 169.254.20.11"
	}
	properties := []string{"sync 1s"}
	if s.backend.firewall == "nftables" {
		properties = append(properties, "fastpath")
	}
	return strings.Replace(s.block(".:53", bind, properties...), "errors", "errors\n    prometheus 127.0.0.1:9253", 1)
}

// cycle does everything once.
func (s *soak) cycle(i int) {
	s.Helper()
	s.step("reload", func() {
		s.reloads++
		s.cache.reload(s.corefileOf(s.reloads))
	})
	twin := func(end func(p *process)) func() {
		return func() {
			p := s.serve(strings.Replace(s.corefileOf(s.reloads), ":9253", ":9254", 1))
			end(p)
		}
	}
	s.step("twin comes, and leaves by SIGTERM", twin(func(p *process) { p.exit(syscall.SIGTERM) }))
	s.step("twin comes, and is killed", twin((*process).Kill))
	meddling := []string{"ip link del nodelocaldns", "ip addr del 169.254.20.10/32 dev nodelocaldns"}
	if s.backend.firewall == "iptables" {
		meddling = append(meddling, "iptables -t raw -F", "ip6tables -t raw -D PREROUTING 1")
	}
	command := meddling[i%len(meddling)]
	s.step("others meddle", func() {
		mark := s.cache.Mark()
		s.runs(command)
		whole := func() bool {
			m := s.metrics("127.0.0.1:9253")
			for _, object := range []string{"link", "address", "rule"} {
				if m[`objects_in_place{object="`+object+`"}`] != m[`objects_wanted{object="`+object+`"}`] {
					return false
				}
			}
			return m["ready"] == 1
		}
		if !eventually(func() bool { return strings.Contains(s.cache.Log()[mark:], "put back") || whole() }) || !eventually(whole) {
			s.Fatalf("%s: not put back", command)
		}
	})
	// Hits are answered meanwhile.
	s.step("upstream silent, and back", func() {
		for _, command := range []string{
			"nft add table inet silent", "nft add chain inet silent in { type filter hook input priority 0; policy drop; }",
		} {
			s.inDNS(command)
		}
		until := time.Now().Add(3 * time.Second)
		eventually(func() bool { return time.Now().After(until) })
		s.inDNS("nft delete table inet silent")
	})
}

func (s *soak) inDNS(command string) {
	s.Helper()
	words := strings.Fields(command)
	_, err := s.DNS.Run(words[0], words[1:]...)
	s.must(err)
}

// step does something under load, and adds up what was lost.
func (s *soak) step(name string, do func()) {
	s.Helper()
	var flows []*lab.Flowing
	for _, c := range s.clients() {
		f, err := lab.Flow{From: c.ns, To: clusterIPs, Rate: 50, Tag: "-soak"}.Start()
		s.must(err)
		flows = append(flows, f)
	}
	more := func() {
		for _, f := range flows {
			until := f.Sent() + 100
			if !eventually(func() bool { return f.Sent() >= until }) {
				s.Fatal("a flow came to a halt")
			}
		}
	}
	more()
	do()
	more()
	if s.lost[name] == nil {
		s.lost[name] = new(lab.Tally)
		s.names = append(s.names, name)
	}
	for _, f := range flows {
		results, err := f.Stop()
		s.must(err)
		for _, r := range results {
			s.lost[name].Add(&r.Tally)
		}
	}
}

func (s *soak) sample() (one sample) {
	s.Helper()
	// What the last step has opened may still be closing.
	eventually(func() bool { return s.cache.descriptors() <= 64 })
	one.descriptors = s.cache.descriptors()
	one.netlink = s.netlinkSockets()
	m := s.metrics("127.0.0.1:9253")
	one.goroutines, one.resident = int(m["go_goroutines"]), int(m["process_resident_memory_bytes"])
	text := s.snapshot()
	one.rules = strings.Count(text, "NODECACHE") + strings.Count(text, "nodecache-")
	for _, family := range []string{"-4", "-6"} {
		routes, err := s.Node.Run("ip", family, "route", "show", "table", "all")
		s.must(err)
		one.routes += strings.Count(routes, "\n")
	}
	return one
}

// netlinkSockets is how many of them the cache has.
func (s *soak) netlinkSockets() (count int) {
	s.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/netlink", s.cache.Pid))
	s.must(err)
	inodes := map[string]bool{}
	for line := range strings.Lines(string(text)) {
		if words := strings.Fields(line); len(words) > 0 {
			inodes["socket:["+words[len(words)-1]+"]"] = true
		}
	}
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", s.cache.Pid))
	s.must(err)
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err == nil && inodes[target] {
			count++
		}
	}
	return count
}

// report prints what was seen, and fails where something has grown or a planned step has
// lost a query.
func (s *soak) report(samples []sample) {
	s.Helper()
	var out strings.Builder
	w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "after\tdescriptors\tnetlink sockets\tgoroutines\trules\troutes\tMiB\t")
	for i, one := range samples {
		if i < 3 || i%max(len(samples)/20, 1) == 0 || i == len(samples)-1 {
			fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%d\t%.1f\t\n", one.after.Round(time.Second), one.descriptors, one.netlink, one.goroutines, one.rules, one.routes, float64(one.resident)/(1<<20))
		}
	}
	fmt.Fprintln(w, "\nstep\ttimes\tsent\tlost\trefused\twrong\t\t")
	for _, name := range s.names {
		r := s.lost[name]
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%d\t\t\n", name, len(samples), r.Sent, r.Lost, r.Refused, r.Wrong)
		if (name == "reload" || strings.HasSuffix(name, "SIGTERM")) && r.Bad() > 0 {
			s.Errorf("%s: %s", name, strings.Join(r.Errors, "\n\t"))
		}
	}
	w.Flush()
	s.Logf("%d cycles with %s\n%s", len(samples), s.backend, &out)
	if len(samples) < 5 {
		return
	}
	// What a step leaves open for a moment differs from cycle to cycle: what counts is
	// whether it goes on growing.
	var most sample
	for _, one := range samples[:4] {
		most.descriptors = max(most.descriptors, one.descriptors)
		most.netlink = max(most.netlink, one.netlink)
		most.goroutines = max(most.goroutines, one.goroutines)
		most.rules = max(most.rules, one.rules)
		most.routes = max(most.routes, one.routes)
	}
	last := samples[len(samples)-1]
	for what, v := range map[string][2]int{
		"descriptors": {most.descriptors + 16, last.descriptors}, "netlink sockets": {most.netlink, last.netlink},
		"goroutines": {most.goroutines + 16, last.goroutines}, "rules": {most.rules, last.rules}, "routes": {most.routes, last.routes},
	} {
		if v[1] > v[0] {
			s.Errorf("%s: at most %d are expected after the first cycles, %d at the end", what, v[0], v[1])
		}
	}
	for _, one := range samples {
		if one.resident > memoryLimit {
			s.Errorf("%d bytes after %s are more than the manifest allows", one.resident, one.after)
		}
	}
}
