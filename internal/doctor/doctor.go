// Package doctor looks for what commonly goes wrong on a node although everything of the
// cache stands, and tells of it with its remedy. It is given what it has to know of this
// process (Site), looks at the node itself, and changes nothing.
package doctor

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coredns/coredns/plugin"
	clog "github.com/coredns/coredns/plugin/pkg/log"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/outlive"
	"github.com/contentful-labs/coredns-nodecache/internal/ruleset"
)

var log = clog.NewWithPlugin("nodecache")

var nodeFaults = promauto.NewGaugeVec(prometheus.GaugeOpts{
	Namespace: plugin.Namespace,
	Subsystem: "nodecache",
	Name:      "node_faults",
	Help:      "Gauge of what was found wrong with the node the last time it was looked at, each of which the log explains.",
}, []string{"fault"})

// Common are the faults that nodes have. Each one is told with its remedy in the log when
// it comes up. A look that fails finds nothing.
var Common = []Fault{
	{"rules_of_node_cache", rulesOfNodeCache},
	{"shared_port", sharedPort},
	{"address_elsewhere", addressElsewhere},
	{ForeignRuleFirst, foreignRuleFirst},
	{"firewall_drops", firewallDrops},
	{"conntrack_full", conntrackFull},
	{"bridge_netfilter_off", bridgeNetfilterOff},
	{"networkmanager", networkManager},
	{"networkd", networkd},
	{"foreign_address", foreignAddress},
	{"foreign_route", foreignRoute},
	{"both_iptables_variants", bothVariants},
	{"upstream_tcp", upstreamTCP},
	{"upstream_silent", upstreamSilent},
	{UpstreamServiceGone, upstreamServiceGone},
	{"resolvers_changed", resolversChanged},
}

// Fault is one of them. Find returns a sentence for each place where it is.
type Fault struct {
	Name string
	Find func(Site) []string
}

// Site is what a look has to know of this process.
type Site struct {
	Links     map[string]bool        // its links, by name
	Addrs     map[netip.Addr]Address // those that the configuration binds
	Listeners []desired.Endpoint
	Untracked []desired.Endpoint // of Listeners, those that a firewall backend has rules for
	// Others asks the other caches on the node what they serve. It returns false where
	// one of them has not said, or is on its way in or out.
	Others func() (serves map[desired.Endpoint]bool, known bool)
	// Zones are a zone of each of Untracked that answers plain DNS.
	Zones map[desired.Endpoint]string
	// Ordered tells of a chain that a firewall backend keeps its rules first there. Displaced
	// are those of Untracked for which it has given that up, with what it says of the rule
	// before its own. Where there is no such backend both are nil.
	Ordered   func(ruleset.Chain) bool
	Displaced map[desired.Endpoint]string
	// NotInForce, where it is not nil, is told how many of Untracked have rules that stand
	// and are not in force.
	NotInForce func(int)
	// Upstreams are whom the configuration asks. Services keeps what is learned of those that are
	// Services, and Moved is told when one (namespace/name) answers at another address.
	Upstreams []Upstream
	Services  *Services
	Moved     func(service string, from, to netip.Addr)

	askOnce func() map[netip.AddrPort]answers // of one examination
}

// Address says how an address came to be on the node.
type Address struct {
	Foreign bool // another link carried it when the configuration was read
	AsAsked bool // the configuration leaves it to somebody else to put it there (interface none)
}

// examined begins the line that ends an examination.
const examined = "looked for what commonly goes wrong on a node: "

// Doctor examines a node again and again.
type Doctor struct {
	faults   []Fault
	patience time.Duration // bounds the look for one fault

	configurations atomic.Int64 // how many have come to be examined

	mu    sync.Mutex      // keeps two examinations from running at once
	found map[string]int  // by fault, in the last examination
	busy  map[string]bool // looks that have not come to an end in time
}

// New returns a doctor who looks for these faults.
func New(faults []Fault) *Doctor {
	for _, f := range faults {
		nodeFaults.WithLabelValues(f.Name) // present from the start
	}
	return &Doctor{faults: faults, patience: 30 * time.Second, busy: map[string]bool{}, found: map[string]int{}}
}

// Examine begins to look for faults and to tell of each, and returns what is closed when that
// is over; again says that it has done so before for this configuration, and that only news
// count. Of those that wait for one under way, as after reloads in a row, only that of the
// last configuration is made.
func (d *Doctor) Examine(s Site, again bool) (over <-chan struct{}) {
	if !again {
		d.configurations.Add(1)
	}
	asked, done := d.configurations.Load(), make(chan struct{})
	go func() {
		defer close(done)
		d.mu.Lock()
		defer d.mu.Unlock()
		if asked == d.configurations.Load() {
			d.examine(s, again, func(Fault) bool { return true })
		}
	}()
	return done
}

// Recheck looks, between two examinations, for the faults of these names only. Where an
// examination is under way it leaves it at that.
func (d *Doctor) Recheck(s Site, names ...string) {
	if !d.mu.TryLock() {
		return
	}
	defer d.mu.Unlock()
	d.examine(s, true, func(f Fault) bool { return slices.Contains(names, f.Name) })
}

// examine looks for some faults. d.mu is held.
func (d *Doctor) examine(s Site, again bool, wanted func(Fault) bool) {
	s.askOnce = sync.OnceValue(s.askAll)
	total, found := 0, maps.Clone(d.found)
	for _, f := range d.faults {
		if !wanted(f) {
			total += found[f.Name]
			continue
		}
		texts := d.look(f, s)
		if !again || len(texts) > d.found[f.Name] {
			for _, text := range texts {
				log.Warningf("%s", text)
			}
		}
		total += len(texts)
		found[f.Name] = len(texts)
		nodeFaults.WithLabelValues(f.Name).Set(float64(len(texts)))
	}
	if !again || !maps.Equal(found, d.found) {
		log.Infof("%s%d found", examined, total)
	}
	d.found = found
}

// look is f.Find, which may neither end this process nor hold up the looks for other faults.
// d.mu is held.
func (d *Doctor) look(f Fault, s Site) []string {
	if d.busy[f.Name] {
		return nil
	}
	result := make(chan []string, 1)
	go func() {
		var texts []string
		defer func() { result <- texts }()
		defer outlive.Panic("looking for the fault " + f.Name)
		texts = f.Find(s)
	}()
	select {
	case texts := <-result:
		return texts
	case <-time.After(d.patience):
	}
	log.Warningf("looking for the fault %s: no result within %s", f.Name, d.patience)
	d.busy[f.Name] = true
	go func() {
		<-result
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.busy, f.Name)
	}()
	return nil
}

// maxNamed is how many of a kind a warning names.
const maxNamed = 8

// some lists vs for a warning, of which there may be many.
func some[T fmt.Stringer](vs []T) string {
	var named []string
	for _, v := range vs[:min(len(vs), maxNamed)] {
		named = append(named, v.String())
	}
	list := strings.Join(named, ", ")
	if len(vs) > maxNamed {
		return fmt.Sprintf("%s and %d more", list, len(vs)-maxNamed)
	}
	return list
}
