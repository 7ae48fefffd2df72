package nodecache

import (
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/doctor"
	"github.com/contentful-labs/coredns-nodecache/internal/loops"
	"github.com/contentful-labs/coredns-nodecache/internal/ownquery"
	"github.com/contentful-labs/coredns-nodecache/internal/peers"
)

// examineEvery is how long after an examination there is another, whatever sync is.
var examineEvery = 5 * time.Minute

// site returns what the doctor has to know of n, with cfg in force.
func (n *node) site(cfg *config) doctor.Site {
	s := doctor.Site{Links: map[string]bool{}, Addrs: map[netip.Addr]doctor.Address{}, Listeners: cfg.listeners(), Others: n.othersServe,
		Upstreams: cfg.upstreams, Services: &n.services, Moved: follow}
	for name := range n.netifs {
		s.Links[name] = true
	}
	for a, p := range cfg.addrs {
		s.Addrs[a] = doctor.Address{Foreign: p.foreign, AsAsked: p.link == noInterface}
	}
	for _, es := range n.want.Rules {
		s.Untracked = append(s.Untracked, slices.DeleteFunc(slices.Clone(es), func(e desired.Endpoint) bool { return e.Extra })...)
	}
	s.Zones = map[desired.Endpoint]string{}
	for _, e := range s.Untracked {
		if o := cfg.wants[e]; o != nil && o.zone != "" {
			s.Zones[e] = o.zone
		}
	}
	if t, ok := n.firewalls[backendIPT].(*iptables); ok {
		s.Ordered, s.Displaced = t.orders(), t.displaced()
	}
	s.NotInForce = func(k int) { n.notInForce.Store(int64(k)) }
	return s
}

// upstreamsOf resolves what is asked, as the plugins do it at the same time.
func upstreamsOf(askers []loops.Asker) (all []doctor.Upstream) {
	for _, a := range askers {
		if a.Plugin == "grpc" {
			continue
		}
		for _, text := range a.To {
			all = append(all, doctor.Upstream{At: a.At, Plugin: a.Plugin, Text: text, Zone: a.Zone, OnlyTCP: a.OnlyTCP,
				Follows: a.Plugin == "upstream", Servers: doctor.Servers(text)})
		}
	}
	return all
}

// othersServe returns what the other caches on the node serve, and whether that is
// known of all of them.
func (n *node) othersServe() (map[desired.Endpoint]bool, bool) {
	o, err := n.member.Ask(peers.AskLimit)
	return o.Serves, err == nil && !o.Unknown && o.States[peers.Idle]+o.States[peers.Silent] == 0
}

// examineFirst has the node examined for a configuration that is in force from now on.
func (n *node) examineFirst(cfg *config) {
	n.examineTick.Reset(examineEvery)
	n.doctor.Examine(n.site(cfg), false)
}

// ownQueryLost is the fault that queries of this process's own do not come here.
const ownQueryLost = "own_query_lost"

// askItself finds what becomes of queries of this process's own.
func (n *node) askItself(s doctor.Site) []string {
	return n.asker.Round(n.exiting, ownquery.Site{Zones: s.Zones, Others: s.Others})
}

// recheck has that looked at which others may change at any time.
func (n *node) recheck() {
	if cfg := n.life.InForce; cfg != nil && !n.exited() {
		s := n.site(cfg)
		s.Upstreams = s.OfServices()
		go n.doctor.Recheck(s, doctor.ForeignRuleFirst, ownQueryLost, doctor.UpstreamServiceGone)
	}
}

// examineAgain has it examined from time to time.
func (n *node) examineAgain() {
	if cfg := n.life.InForce; cfg != nil && !n.exited() {
		n.doctor.Examine(n.site(cfg), true)
	}
}

// follow has a Service asked at the address that it has now. Kubernetes tells a container the
// addresses of Services when it starts, by variables: with these changed the Corefile means the
// new one. To end, so that kubelet starts the container with them, would leave the node without
// a cache for as long as kubelet likes, and all that is cached would be gone.
func follow(service string, from, to netip.Addr) {
	variables := doctor.VariablesOf(from)
	if len(variables) == 0 {
		return // it has been followed
	}
	for _, v := range variables {
		if err := os.Setenv(v, to.String()); err != nil {
			log.Errorf("following the Service %s to %s: %v", service, to, err)
			return
		}
	}
	log.Warningf("the Service %s is at %s now, where its DNS answers, and not at %s any more: reloading with %s=%s", service, to, from, strings.Join(variables, ", "), to)
	if err := syscall.Kill(os.Getpid(), syscall.SIGUSR1); err != nil {
		log.Errorf("following the Service %s to %s: %v", service, to, err)
	}
}
