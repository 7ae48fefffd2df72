package nodecache

import (
	"context"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/contentful-labs/coredns-nodecache/internal/arrival"
	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/outlive"
	"github.com/contentful-labs/coredns-nodecache/internal/plan"
)

// This file has a start take the queries to an address over from the cluster only when it can
// answer them. Until then the address is on the node and CoreDNS listens there, but no rules
// keep queries to it from those of kube-proxy.

// arriveLimit is how long a start waits for upstreams; then it takes the queries over anyway.
const arriveLimit = 10 * time.Second

// holdBack takes the rules for what is held back off again, which stand beside those of was. They
// have not been in force, as nobody has listened yet; that they can be made has been seen. It is
// called in turn, and returns what is wanted until all is taken over.
func (n *node) holdBack(cfg *config, was, want desired.State) (desired.State, error) {
	cfg.held = n.answeredElsewhere(cfg, was)
	if len(cfg.held) == 0 {
		return want, nil
	}
	for link, addrs := range want.Links {
		// From the address itself, which the node's own programs would choose, no answer of the
		// cluster could come.
		n.netif(link).unprefer(cfg.heldOf(addrs))
	}
	less := was.Union(cfg.state(n.resolve))
	have := plan.Have{Stage: plan.Stage{State: want, Leaving: n.leaving}}
	_, err := n.carryOut(n.exiting, plan.Plan(have, plan.Stage{State: less, Leaving: n.leaving}, n.heed(desired.State{})).Rules)
	return less, err
}

// answeredElsewhere returns those addresses of cfg that the cluster answers now and no cache of
// this node does, this process included, as of was.
func (n *node) answeredElsewhere(cfg *config, was desired.State) map[netip.Addr]bool {
	known := map[netip.Addr]bool{}
	for _, rules := range was.Rules {
		for _, e := range rules {
			known[e.Addr] = true
		}
	}
	for e := range n.others.Serves {
		known[e.Addr] = true
	}
	var es []desired.Endpoint
	for _, rules := range cfg.state(n.resolve).Rules {
		for _, e := range rules {
			if !e.Extra && !known[e.Addr] && !e.Addr.IsLinkLocalUnicast() {
				es = append(es, e)
			}
		}
	}
	if len(es) == 0 || len(cfg.askers) == 0 {
		return nil
	}
	held := map[netip.Addr]bool{}
	defer outlive.Panic("looking whether the cluster answers") // then nothing more is held back
	addrs, err := arrival.Elsewhere(es)
	if err != nil {
		log.Debugf("looking whether the cluster answers: %v", err)
	}
	for _, a := range addrs {
		held[a] = true
	}
	return held
}

// arrive takes over what is held back once all upstreams answer, and completes the start of
// cfg. CoreDNS listens; held names the addresses.
func (n *node) arrive(cfg *config, held string, began time.Time) {
	log.Debugf("the cluster answers %s until the upstreams of this cache do", held)
	ctx, cancel := context.WithTimeout(n.exiting, arriveLimit)
	defer cancel()
	n.do(func() error {
		// Once more, since the kernel may have made an IPv6 address's own route only after it.
		for link, addrs := range n.want.Links {
			n.netif(link).unprefer(cfg.heldOf(addrs))
		}
		return nil
	})
	since := time.Now()
	if silent := arrival.Await(ctx, cfg.upstreamPlugins()); len(silent) > 0 && n.exiting.Err() == nil {
		log.Warningf("the upstreams of %s have not answered for %s, or with SERVFAIL only; taking the queries to %s over from the cluster all the same", strings.Join(silent, " "), arriveLimit, held)
	} else if took := time.Since(since); took > time.Second {
		log.Infof("the cluster has answered the queries to %s for %s more, until the upstreams of this cache did", held, took.Round(time.Millisecond))
	}
	for over := false; !over; {
		n.do(func() error {
			if over = !n.life.Has(cfg) || n.exited(); over {
				return nil
			}
			if err := n.takeOver(cfg); err != nil {
				log.Errorf("taking the queries to %s over from the cluster: %v; trying again", held, count(err))
				return nil
			}
			n.complete(cfg, began)
			over = true
			return nil
		})
		if !over {
			time.Sleep(retryFirst)
		}
	}
}

// takeOver adds the rules of what is held back.
func (n *node) takeOver(cfg *config) error {
	held := cfg.held
	cfg.held = nil
	want := n.want.Union(cfg.state(n.resolve))
	err := n.show(want, n.serves())
	if err == nil {
		err = n.inTurn(func() error {
			_, err := n.raise(want)
			return err
		})
	}
	if err != nil {
		cfg.held = held
		return err
	}
	for link, addrs := range want.Links {
		n.netif(link).prefer(slices.DeleteFunc(slices.Clone(addrs), func(a netip.Addr) bool { return !held[a] }))
	}
	for _, c := range []*config{n.life.InForce, n.life.Next} {
		if c != nil { // a reload may be under way
			maps.DeleteFunc(c.held, func(a netip.Addr, _ bool) bool { return held[a] })
		}
	}
	n.want = want
	if n.owing { // what is tried again is not to take it away
		n.goal = n.goal.Union(cfg.state(n.resolve))
	}
	n.watch() // of iptables, of which nothing may have stood before
	return nil
}

// upstreamPlugins returns what has to answer before the cluster need not.
func (c *config) upstreamPlugins() (all []arrival.Block) {
	for _, a := range c.askers {
		all = append(all, arrival.Block{Zone: a.Zone, Next: a.Next()})
	}
	return all
}

// heldOf returns those of addrs that are held back.
func (c *config) heldOf(addrs []netip.Addr) []netip.Addr {
	return slices.DeleteFunc(slices.Clone(addrs), func(a netip.Addr) bool { return !c.held[a] })
}
