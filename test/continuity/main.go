// Continuity measures what clients notice of what can happen to a node's cache:
// reloads, exits, crashes, updates, and other programs that remove what it needs.
//
//	make continuity
//
// It asks 2,000 queries a second, from a pod and from the node itself, over sockets
// that are new for each query and over kept ones, for names that are cached, that are
// not, and that the cluster is slow to answer. Beside nodecache it measures plain
// CoreDNS, the same binary without the directive, with addresses and NOTRACK rules
// made once by ip and iptables. Everything takes place in network namespaces of its
// own. It prints a table in Markdown; -h lists what can be chosen.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// A subject is a way to have a cache on a node.
type subject struct {
	name     string
	iptables lab.Iptables
	firewall string // "" for plain CoreDNS
	fastpath bool
	busy     bool // programs compute on all CPUs meanwhile
}

var subjects = []subject{
	{"iptables-nft", lab.NFT, "iptables", false, false},
	{"iptables-legacy", lab.Legacy, "iptables", false, false},
	{"nftables", lab.NFT, "nftables", false, false},
	{"fastpath", lab.NFT, "nftables", true, false},
	{"fastpath-busy", lab.NFT, "nftables", true, true},
	{"plain", lab.NFT, "", false, false},
}

var (
	binary  = flag.String("binary", "./coredns", "the CoreDNS `program` with nodecache")
	rate    = flag.Int("rate", 2000, "queries a second")
	after   = flag.Duration("duration", 2*time.Second, "how long queries are sent after each event")
	choose  = flag.String("events", "", "only events whose name has one of these `words`, separated by commas")
	which   = flag.String("subjects", "iptables-nft,nftables,fastpath,fastpath-busy,plain", "what is measured, of iptables-nft, iptables-legacy, nftables (nodecache with that backend), fastpath (nftables, with that option), fastpath-busy and plain, or all")
	limit   = flag.Duration("limit", 20*time.Minute, "when to give up")
	times   = flag.Int("repairs", 0, "rather than that, remove what the cache needs so many `times` each, and measure how long the repair takes")
	many    = flag.Bool("rules", false, "rather than that, measure how long 1, 50 and 500 addresses take")
	verbose = flag.Bool("v", false, "print what went wrong with queries, and the logs of CoreDNS")
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

func run() (err error) {
	if os.Geteuid() != 0 {
		return errors.New("network namespaces take root")
	}
	if *binary, err = filepath.Abs(*binary); err != nil {
		return err
	}
	if _, err := os.Stat(*binary); err != nil {
		return fmt.Errorf("looking for the program to measure: %w; run make, or name it with -binary", err)
	}
	chosen := subjects
	if *which != "all" {
		chosen = slices.DeleteFunc(slices.Clone(subjects), func(s subject) bool { return !slices.Contains(strings.Split(*which, ","), s.name) })
	}
	if len(chosen) == 0 {
		return fmt.Errorf("no subject is called %s", *which)
	}
	kernel, _ := exec.Command("uname", "-sr").Output()
	fmt.Printf("`%s`, %s, %s\n\n", strings.Join(os.Args, " "), strings.TrimSpace(string(kernel)), time.Now().Format(time.DateOnly))
	switch {
	case *times > 0:
		return repairs(*times, chosen)
	case *many:
		return rules(chosen)
	}
	fmt.Println("| event | cache | sent | pod to ClusterIP | gap | whole after | host to ClusterIP | gap | whole after | link-local | gap | whole after | entries | full |")
	fmt.Println("|---|---|" + strings.Repeat("--:|", 12))
	for _, e := range events {
		if !e.chosen() {
			continue
		}
		for _, s := range chosen {
			if e.skips != nil && e.skips(s) {
				continue
			}
			row, err := measure(e, s)
			if err != nil {
				return fmt.Errorf("%s with %s: %w", e.name, s.name, err)
			}
			fmt.Println(row)
		}
	}
	fmt.Print(legend)
	return nil
}

const legend = `
The figures are queries lost / refused. lost: no answer within 5 s, or a wrong one;
refused: an ICMP error or a TCP reset; gap: the longest without an answer to any client
of one kind; whole after: from the event until the last query was sent that got no
answer, or until what was removed was back; entries: of the cache's addresses in the
connection tracking table at the end; full: queries for which a socket had no room left,
as nobody read it in time: a machine that is too slow for this has some too.

Half of the queries go to the cluster's DNS service (ClusterIP), half to the node's own
address (link-local), over IPv4 and IPv6. iptables-nft, iptables-legacy and nftables are
nodecache with that backend, fastpath is nftables with that option, and fastpath-busy the same
while two programs a CPU compute; plain is CoreDNS without nodecache, with static addresses and
static NOTRACK rules.

¹ Nobody is left to answer there: only a node's cache has the address.
² Over UDP sockets that host clients keep: their own address is the ClusterIP too, and
they can send nothing while it is not on the node.
`

func (e event) chosen() bool {
	return *choose == "" || slices.ContainsFunc(strings.Split(*choose, ","), func(w string) bool { return strings.Contains(e.name, w) })
}
