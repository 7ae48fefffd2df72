package nodecache

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"

	"github.com/contentful-labs/coredns-nodecache/internal/outlive"
	"github.com/contentful-labs/coredns-nodecache/internal/peers"
)

// faults are what commonly goes wrong on a node although everything of ours stands.
// Each one is looked for after a start and a reload and then from time to time, and told
// with its remedy in the log when it comes up. A look changes nothing, and one that
// fails finds nothing.
var faults = []fault{
	{"rules_of_node_cache", rulesOfNodeCache},
	{"shared_port", sharedPort},
	{"address_elsewhere", addressElsewhere},
	{"firewall_drops", firewallDrops},
	{"conntrack_full", conntrackFull},
	{"bridge_netfilter_off", bridgeNetfilterOff},
	{"networkmanager", networkManager},
	{"networkd", networkd},
}

// fault is one of them. find returns a sentence for each place where it is.
type fault struct {
	name string
	find func(site) []string
}

// site is what a look has to know of this process.
type site struct {
	links     map[string]bool // ours, by name
	placed    map[netip.Addr]*placed
	listeners []desired.Endpoint
	untracked []desired.Endpoint // of listeners, those that a firewall backend has rules for
	ask       func() (peers.Others, error)
}

func (n *node) site(cfg *config) site {
	s := site{links: map[string]bool{}, placed: cfg.addrs, listeners: cfg.listeners(), ask: func() (peers.Others, error) { return n.member.Ask(peers.AskLimit) }}
	for name := range n.netifs {
		s.links[name] = true
	}
	for _, es := range n.want.Rules {
		s.untracked = append(s.untracked, slices.DeleteFunc(slices.Clone(es), func(e desired.Endpoint) bool { return e.Extra })...)
	}
	return s
}

// examined begins the line that ends an examination.
const examined = "looked for what commonly goes wrong on a node: "

var (
	// examineEvery is how long after an examination there is another, whatever sync is.
	examineEvery = 5 * time.Minute
	// examinePatience bounds the look for one fault.
	examinePatience = 30 * time.Second
)

// examination is the last one. Its lock keeps two from running at once.
var examination struct {
	sync.Mutex
	found map[string]int  // by fault
	busy  map[string]bool // looks that have not come to an end in time
}

// examineFirst has the node examined for a configuration that is in force from now on.
func (n *node) examineFirst(cfg *config) {
	n.examineTick.Reset(examineEvery)
	go n.examine(n.site(cfg), false)
}

// examineAgain has it examined from time to time.
func (n *node) examineAgain() {
	if cfg := n.life.InForce; cfg != nil && !n.exited() {
		go n.examine(n.site(cfg), true)
	}
}

// examine looks for faults and tells of each; again says that it has done so before for
// this configuration, and that only news count.
func (n *node) examine(s site, again bool) {
	examination.Lock()
	defer examination.Unlock()
	total, found := 0, map[string]int{}
	for _, f := range faults {
		texts := f.look(s)
		if !again || len(texts) > examination.found[f.name] {
			for _, text := range texts {
				log.Warningf("%s", text)
			}
		}
		total += len(texts)
		found[f.name] = len(texts)
		nodeFaults.WithLabelValues(f.name).Set(float64(len(texts)))
	}
	if !again || !maps.Equal(found, examination.found) {
		log.Infof("%s%d found", examined, total)
	}
	examination.found = found
}

// look is find, which may neither end this process nor hold up the looks for other faults.
// The examination's lock is held.
func (f fault) look(s site) []string {
	if examination.busy[f.name] {
		return nil
	}
	result := make(chan []string, 1)
	go func() {
		var texts []string
		defer func() { result <- texts }()
		defer outlive.Panic("looking for the fault " + f.name)
		texts = f.find(s)
	}()
	select {
	case texts := <-result:
		return texts
	case <-time.After(examinePatience):
	}
	log.Warningf("looking for the fault %s: no result within %s", f.name, examinePatience)
	if examination.busy == nil {
		examination.busy = map[string]bool{}
	}
	examination.busy[f.name] = true
	go func() {
		<-result
		examination.Lock()
		defer examination.Unlock()
		delete(examination.busy, f.name)
	}()
	return nil
}

// addrs returns the addresses that the configuration binds.
func (s site) addrs() []netip.Addr { return slices.SortedFunc(maps.Keys(s.placed), netip.Addr.Compare) }

func join[T fmt.Stringer](vs []T) string {
	var ss []string
	for _, v := range vs {
		ss = append(ss, v.String())
	}
	return strings.Join(ss, ", ")
}

// maxNamed is how many of a kind a warning names.
const maxNamed = 8

// some is join for what there may be many of.
func some[T fmt.Stringer](vs []T) string {
	if len(vs) > maxNamed {
		return fmt.Sprintf("%s and %d more", join(vs[:maxNamed]), len(vs)-maxNamed)
	}
	return join(vs)
}
