package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// A soak is the life of a cache in fast motion, with the memory that the manifests give it:
// under load it is reloaded, a twin comes and goes, others meddle, upstreams fall silent and
// come back, and flap.
type soak struct {
	*node
	cache   *process
	twins   lab.Options
	reloads int
	lost    map[string]*lab.Tally // by step
	names   []string              // of the steps, in order
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
			s.twins = s.limited()
			s.cache = s.serveWith(s.corefileOf(0), s.limited())
			begun := time.Now()
			var samples []sample
			for time.Since(begun) < long {
				s.cycle(len(samples))
				// What the last step has opened may still be closing.
				eventually(func() bool { return s.cache.descriptors() <= 64 })
				one := s.cache.sample("127.0.0.1:9253")
				one.after = time.Since(begun)
				samples = append(samples, one)
			}
			s.cache.exit(syscall.SIGTERM)
			s.same("after the exit", before, s.snapshot())
			s.report(samples)
		})
	}
}

// limited is what starts a process as in the manifests' container: with their GOMEMLIMIT, and
// in a cgroup past whose limit the kernel ends it.
func (n *node) limited() lab.Options {
	n.Helper()
	root, limit := "/sys/fs/cgroup", "memory.max"
	if _, err := os.Stat(root + "/memory"); err == nil { // version 1
		root, limit = root+"/memory", "memory.limit_in_bytes"
	} else if err := os.WriteFile(root+"/cgroup.subtree_control", []byte("+memory"), 0); err != nil {
		n.Fatalf("having cgroups limit memory: %v", err)
	}
	dir, err := os.MkdirTemp(root, "soak")
	n.must(err)
	n.Cleanup(func() {
		if !eventually(func() bool { return os.Remove(dir) == nil }) {
			n.Errorf("%s is still in use", dir)
		}
	})
	n.must(os.WriteFile(filepath.Join(dir, limit), []byte(strconv.Itoa(memoryLimit)), 0))
	return lab.Options{Env: []string{goMemoryLimit}, Via: []string{"sh", "-c", "echo $$ >" + dir + `/cgroup.procs && exec "$@"`, "sh"}}
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
	s.step("reload", 0, func(func(int)) {
		s.reloads++
		s.cache.reload(s.corefileOf(s.reloads))
	})
	twin := func(end func(p *process)) func(func(int)) {
		return func(func(int)) {
			p := s.serveWith(strings.Replace(s.corefileOf(s.reloads), ":9253", ":9254", 1), s.twins)
			end(p)
		}
	}
	s.step("twin comes, and leaves by SIGTERM", 0, twin(func(p *process) { p.exit(syscall.SIGTERM) }))
	s.step("twin comes, and is killed", 0, twin((*process).Kill))
	meddling := []string{"ip link del nodelocaldns", "ip addr del 169.254.20.10/32 dev nodelocaldns"}
	if s.backend.firewall == "iptables" {
		meddling = append(meddling, "iptables -t raw -F", "ip6tables -t raw -D PREROUTING 1")
	}
	command := meddling[i%len(meddling)]
	s.step("others meddle", 0, func(func(int)) {
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
	s.step("upstream silent, and back", 0, func(func(int)) {
		s.upstream("drop")
		until := time.Now().Add(3 * time.Second)
		eventually(func() bool { return time.Now().After(until) })
		s.upstream("accept")
	})
	s.step("upstream flaps", 20, func(more func(int)) {
		for range 5 {
			for _, how := range []string{"drop", "accept", "reject", "accept"} {
				s.upstream(how)
				more(20)
			}
		}
	})
}

// upstream has the cluster's DNS take no query, refuse or answer them.
func (s *soak) upstream(how string) {
	s.Helper()
	s.inDNS("nft add table inet silent")
	s.inDNS("nft delete table inet silent")
	if how != "accept" {
		s.inDNS("nft add table inet silent; add chain inet silent in { type filter hook input priority 0; }; add rule inet silent in meta l4proto { tcp, udp } " + how)
	}
}

func (s *soak) inDNS(command string) {
	s.Helper()
	words := strings.Fields(command)
	_, err := s.DNS.Run(words[0], words[1:]...)
	s.must(err)
}

// step does something under load, in which so many percent of the queries are misses, and
// adds up what was lost. What it does can have the flows send more.
func (s *soak) step(name string, misses int, do func(more func(int))) {
	s.Helper()
	var flows []*lab.Flowing
	for _, c := range s.clients() {
		f, err := lab.Flow{From: c.ns, To: clusterIPs, Rate: 50, Misses: misses, Tag: tag("soak", c.name)}.Start()
		s.must(err)
		flows = append(flows, f)
	}
	more := func(k int) {
		for _, f := range flows {
			until := f.Sent() + k
			if !eventually(func() bool { return f.Sent() >= until }) {
				s.Fatal("a flow came to a halt")
			}
		}
	}
	more(100)
	do(more)
	more(100)
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

// report prints what was seen, and fails where something has grown or a planned step has
// lost a query.
func (s *soak) report(samples []sample) {
	s.Helper()
	var out strings.Builder
	w := sampleTable(&out, "after")
	for i, one := range samples {
		if i < 3 || i%max(len(samples)/20, 1) == 0 || i == len(samples)-1 {
			one.row(w, one.after.Round(time.Second).String())
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
		most.descriptors = max(most.descriptors, one.descriptors+16)
		most.netlink = max(most.netlink, one.netlink)
		most.goroutines = max(most.goroutines, one.goroutines+16)
		most.rules = max(most.rules, one.rules)
		most.routes = max(most.routes, one.routes)
	}
	for _, more := range samples[len(samples)-1].beyond(most) {
		s.Errorf("at the end there are %s after the first cycles", more)
	}
	for _, one := range samples {
		if one.resident > memoryLimit {
			s.Errorf("%d bytes after %s are more than the manifest allows", one.resident, one.after)
		}
	}
}
