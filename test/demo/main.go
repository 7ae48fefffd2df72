// Command demo shows what nodecache is for: it starts the real coredns with the
// Corefile beside this file on a node of network namespaces, asks it real queries,
// and says in plain words what it saw. Nothing of the machine's own network is
// touched. Its exit status is 1 when something was not as it should be.
package main

import (
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

//go:embed Corefile
var corefile string

// addrs are those of the Corefile.
var addrs = []netip.Addr{lab.LinkLocal, lab.ClusterIP, lab.Local6, lab.ClusterIP6}

// inPlace is what nodecache logs when everything stands.
const inPlace = "plugin/nodecache: in place"

func main() {
	binary := flag.String("coredns", "coredns", "the binary that make builds")
	variant := flag.String("iptables", string(lab.NFT), "the variant of iptables, nft or legacy")
	flag.Parse()
	d := &demo{held: true}
	if err := d.run(*binary, lab.Iptables(*variant)); err != nil {
		fmt.Fprintf(os.Stderr, "\nThe demo could not go on: %v\n", err)
		os.Exit(1)
	}
	if !d.held {
		fmt.Println("\nNot everything was as it should be: see the lines with NO.")
		os.Exit(1)
	}
	fmt.Println("\nEverything was as it should be.")
}

// demo is a run of it.
type demo struct {
	*lab.Lab
	held bool
}

// say prints what was seen, and whether that is as it should be.
func (d *demo) say(ok bool, format string, args ...any) {
	mark := "yes"
	if !ok {
		mark, d.held = "NO ", false
	}
	fmt.Printf("  %s  %s\n", mark, fmt.Sprintf(format, args...))
}

func (d *demo) run(binary string, variant lab.Iptables) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("network namespaces take root: run it with sudo")
	}
	if binary, err = filepath.Abs(binary); err != nil {
		return err
	}
	if d.Lab, err = lab.New(variant); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	before, err := d.Snapshot()
	if err != nil {
		return err
	}

	fmt.Println("A node, a pod and a cluster's DNS, each in a network namespace of its own, and coredns on the node:")
	p, err := d.serve(binary, corefile)
	if err != nil {
		return err
	}
	for line := range strings.Lines(p.Log()) {
		if strings.Contains(line, inPlace) {
			fmt.Print("       ", line)
		}
	}
	for _, step := range []func(string, *lab.CoreDNS) error{d.answers, d.untracked, d.reload} {
		if err := step(binary, p); err != nil {
			return fmt.Errorf("%w; coredns said:\n%s", err, p.Log())
		}
	}
	return d.ends(binary, p, before)
}

// serve starts coredns and waits until everything stands.
func (d *demo) serve(binary, corefile string) (*lab.CoreDNS, error) {
	p, err := d.Start(binary, corefile, lab.Options{})
	if err != nil {
		return nil, err
	}
	return p, p.WaitLog(0, inPlace)
}

// clients are those who ask.
func (d *demo) clients() map[string]*lab.Namespace {
	return map[string]*lab.Namespace{"the pod": d.Pod, "the node itself": d.Node}
}

func on(addrs ...netip.Addr) (to []netip.AddrPort) {
	for _, a := range addrs {
		to = append(to, netip.AddrPortFrom(a, 53))
	}
	return to
}

// answers asks over everything there is.
func (d *demo) answers(string, *lab.CoreDNS) error {
	fmt.Println("\nWho asks gets answers from the cache:")
	for _, who := range []string{"the pod", "the node itself"} {
		for _, proto := range []string{"udp", "tcp"} {
			asked := d.Cluster.Queries()
			r, err := lab.Load{From: d.clients()[who], Proto: proto, To: on(addrs...), Count: 400, Tag: who[4:7] + proto}.Run()
			if err != nil {
				return err
			}
			d.say(r.AllAnswered(false), "%d queries over %s from %s, IPv4 and IPv6: %d answered, and the cluster was asked %d times",
				r.Sent, strings.ToUpper(proto), who, r.Answered, d.Cluster.Queries()-asked)
		}
	}
	return nil
}

// untracked counts connection tracking entries with the rules and without.
func (d *demo) untracked(binary string, p *lab.CoreDNS) error {
	fmt.Println("\nConnection tracking, whose table is what a busy node runs out of:")
	count := func(l *lab.Load) (entries int, err error) {
		if err := d.FlushConntrack(); err != nil {
			return 0, err
		}
		r, err := l.Run()
		if err == nil && !r.AllAnswered(false) {
			err = fmt.Errorf("counting entries: not every query was answered: %v", r)
		}
		if err != nil {
			return 0, err
		}
		return d.Conntrack(addrs...)
	}
	load := lab.Load{From: d.Pod, Proto: "udp", To: on(lab.LinkLocal, lab.Local6), Count: 1000}
	with, err := count(&load)
	if err != nil {
		return err
	}
	// The same Corefile, less the rules.
	plain := strings.Replace(corefile, "    nodecache\n", "    nodecache {\n        firewall none\n    }\n", 1)
	if _, err := p.Stop(syscall.SIGTERM); err != nil {
		return err
	}
	q, err := d.serve(binary, plain)
	if err != nil {
		return err
	}
	without, err := count(&load)
	if err != nil {
		return err
	}
	if _, err := q.Stop(syscall.SIGTERM); err != nil {
		return err
	}
	d.say(with == 0, "1,000 queries with nodecache's rules leave %d entries", with)
	// Two of the thousand sockets can have had the same port.
	d.say(without > 900, "1,000 queries without them leave %d", without)
	return nil
}

// reload changes the addresses under load.
func (d *demo) reload(binary string, _ *lab.CoreDNS) error {
	fmt.Println("\nReloads under load, each adding an address or dropping it again:")
	p, err := d.serve(binary, corefile)
	if err != nil {
		return err
	}
	running, err := lab.Load{From: d.Pod, Proto: "udp", To: on(addrs...), Count: 1e6, Rate: 2000}.Start()
	if err != nil {
		return err
	}
	more := strings.Replace(corefile, "bind ", "bind 169.254.20.11 ", 1)
	const reloads = 10
	for i := range reloads {
		if err := p.Reload([]string{more, corefile}[i%2]); err != nil {
			return errors.Join(err, stopped(running.Stop()))
		}
	}
	r, err := running.Stop()
	if err != nil {
		return err
	}
	d.say(r.AllAnswered(false), "%d reloads at 2,000 queries a second: %d queries, %d lost, %d refused", reloads, r.Sent, r.Lost, r.Refused)
	p.Kill()
	return nil
}

func stopped(_ *lab.Result, err error) error { return err }

// ends shows what becomes of the queries when coredns is gone.
func (d *demo) ends(binary string, _ *lab.CoreDNS, before string) error {
	fmt.Println("\nkill -9 has just ended coredns, and nobody cleaned up:")
	r, err := lab.Load{From: d.Pod, Proto: "udp", To: on(lab.ClusterIP, lab.ClusterIP6), Count: 100}.Run()
	if err != nil {
		return err
	}
	d.say(r.AllAnswered(true), "of %d queries of the pod to the ClusterIP the cluster answered %d, from the first one on", r.Sent, r.FromCluster)
	took, err := d.fallsBack()
	if err != nil {
		return err
	}
	d.say(true, "those of the node itself reach the cluster too, after %.1f s", took.Seconds())
	p, err := d.serve(binary, corefile)
	if err != nil {
		return err
	}
	if r, err = (lab.Load{From: d.Pod, Proto: "udp", To: on(addrs...), Count: 100}).Run(); err != nil {
		return err
	}
	d.say(r.AllAnswered(false), "started again it takes over what was left: %d queries, %d answered by the cache", r.Sent, r.Answered-r.FromCluster)

	fmt.Println("\nA planned end, SIGTERM, with queries under way that take the cluster 1.5 s:")
	asked := d.Cluster.Queries()
	slow, err := lab.Load{From: d.Pod, Proto: "udp", To: on(addrs...), Names: lab.Slow, Count: 40, Workers: 40}.Start()
	if err != nil {
		return err
	}
	for d.Cluster.Queries() < asked+40 { // all are on their way
		time.Sleep(time.Millisecond)
	}
	if _, err := p.Stop(syscall.SIGTERM); err != nil {
		return err
	}
	if r, err = slow.Wait(); err != nil {
		return err
	}
	d.say(r.AllAnswered(false), "%d queries under way, %d answered before the addresses went", r.Sent, r.Answered)
	after, err := d.Snapshot()
	if err != nil {
		return err
	}
	d.say(before == after, "links, addresses, routes and rules of the node are what they were before")
	return nil
}

// fallsBack waits until the cluster answers the node's own programs.
func (d *demo) fallsBack() (time.Duration, error) {
	began := time.Now()
	for time.Since(began) < lab.Patience {
		r, err := lab.Load{From: d.Node, Proto: "udp", To: on(lab.ClusterIP, lab.ClusterIP6), Count: 2, Timeout: time.Second}.Run()
		if err != nil {
			return 0, err
		}
		if r.AllAnswered(true) {
			return time.Since(began), nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return 0, errors.New("the cluster does not answer the node's own programs")
}
