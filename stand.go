package nodecache

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/life"
	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
	"github.com/contentful-labs/coredns-nodecache/internal/serverblocks"
	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
)

// This file carries out what a phase wants on the node: it adds, in turn with the other
// processes, takes away again, and puts back what somebody has removed.

// made is what a start has added, to be taken back when it fails.
type made map[*netif][]netip.Addr

// prepare makes the links, tries the ports, and adds the addresses.
func (n *node) prepare(cfg *config, want desired.State) (made, error) {
	added := made{}
	for name := range want.Links {
		if n.netifs[name] == nil {
			n.netifs[name] = &netif{name: name}
		}
		_, err := n.netifs[name].ensureLink()
		if n.netifs[name].made {
			added[n.netifs[name]] = nil
		}
		if err != nil {
			if !n.netifs[name].made && len(n.want.Links[name]) == 0 {
				delete(n.netifs, name) // not ours
			}
			return added, err
		}
	}
	mine := map[desired.Endpoint]bool{}
	if n.life.InForce != nil {
		for _, e := range n.life.InForce.listeners() {
			mine[e] = true
		}
	}
	for _, e := range cfg.listeners() {
		if mine[e] || e.Proto == "udp" && cfg.addrs[e.Addr].foreign {
			continue
		}
		if err := sockets.TryPort(e); err != nil {
			return added, serverblocks.ErrorAt(cfg.wants[e].at, "%w", err)
		}
	}
	for name, addrs := range want.Links {
		missing, err := n.netifs[name].ensure(addrs)
		added[n.netifs[name]] = append(added[n.netifs[name]], missing...)
		if err != nil {
			return added, err
		}
	}
	return added, nil
}

// undo leads back from a start that failed to the state before it.
func (n *node) undo(was desired.State, added made) error {
	// It may be an exit that has cut the start short.
	n.deadline = time.Now().Add(exitLeast)
	defer func() { n.deadline = time.Time{} }()
	errs := []error{n.rules(was)}
	for i, addrs := range added {
		l, err := nodelinks.ByName(i.name)
		switch {
		case err != nil:
			errs = append(errs, err)
		case l == nil:
		case i.made && len(was.Links[i.name]) == 0:
			errs = append(errs, i.prune(nil))
		default:
			errs = append(errs, i.remove(l, addrs))
		}
		if len(was.Links[i.name]) == 0 {
			delete(n.netifs, i.name)
		}
	}
	return errors.Join(errs...)
}

// ensure adds to the node what of want is missing, addresses before rules, and
// counts it by object. It takes away rules that want does not have, no address.
func (n *node) ensure(want desired.State) (missing map[string]int, err error) {
	missing = map[string]int{}
	ctx, cancel := n.limit()
	defer cancel()
	var errs []error
	for name, addrs := range want.Links {
		if n.netifs[name] == nil {
			n.netifs[name] = &netif{name: name}
		}
		l, err := nodelinks.ByName(name)
		if err == nil && l == nil {
			missing[objectLink]++
		}
		gone, err := n.netifs[name].ensure(addrs)
		missing[objectAddress] += len(gone)
		errs = append(errs, err)
	}
	for b := range want.Rules {
		fw, err := n.backend(b)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		gone, err := fw.apply(ctx, want.Rules[b], n.standing(b))
		n.faulty[b] = err != nil
		missing[objectRule] += gone
		errs = append(errs, err)
	}
	return missing, errors.Join(errs...)
}

// rules makes the rules of want stand, and no others of ours.
func (n *node) rules(want desired.State) error {
	ctx, cancel := n.limit()
	defer cancel()
	var errs []error
	for name, fw := range n.firewalls {
		_, err := fw.apply(ctx, want.Rules[name], n.standing(name))
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// reduceTo has the node come to what want says, now or, where something fails, later: it
// is tried again with growing pauses and at each sync. The callbacks that call it must not
// fail: for an error of OnShutdown caddy takes a reload as failed, although the new
// instance serves, and never reloads by itself again.
func (n *node) reduceTo(want desired.State) (done bool) {
	n.goal, n.pause = want, retryFirst
	return n.tryGoal()
}

func (n *node) tryGoal() (done bool) {
	err := n.reduce(n.goal)
	n.owing = err != nil
	if n.owing {
		log.Errorf("taking away what is not needed any more: %v; trying again in %s", count(err), n.pause)
		if n.retryAt != nil {
			n.retryAt.Stop() // a check has tried before it was due
		}
		n.retryAt = time.AfterFunc(n.pause, func() { poke(n.retry) })
		n.pause = min(2*n.pause, max(n.syncEvery, retryFirst))
	}
	return !n.owing
}

// settle tries again what is owed, unless a start is on its way, which has a reduction of
// its own to follow.
func (n *node) settle() {
	if n.owing && n.life.Next == nil && !n.exited() {
		n.tryGoal()
	}
}

// reduce takes from the node what is there beyond want and the wants of other
// processes: rules first, since an address that goes before its rules is a
// black hole. It shows the others the new want in the same turn, so that the last
// one to leave knows that it is.
func (n *node) reduce(want desired.State) error {
	defer n.observe()
	if n.exited() || n.life.InForce == nil {
		// Before the others are asked: of two that leave at once, without a turn if
		// need be, at least one knows that it is the last.
		n.member.Hide()
	}
	return n.inTurn(func() error {
		left := n.leaving
		n.leaving = desired.State{}
		if n.exited() && n.others.Unknown {
			n.alone = n.servedAlone(n.want.Minus(want))
		}
		if !n.exited() && n.life.InForce != nil {
			if err := n.show(want, n.serves()); err != nil {
				n.leaving = left
				return err
			}
		}
		if n.owing || !left.Empty() || !maps.EqualFunc(want.Rules, n.want.Rules, slices.Equal) {
			if err := n.rules(want); err != nil {
				n.leaving = left
				return err
			}
		}
		for name, i := range n.netifs {
			i.prefer(want.Minus(want.Minus(left)).Links[name]) // what stays after all
		}
		n.sweep()
		n.want = want
		return n.prune(want)
	})
}

// prune takes from our links what nobody wants, and links left empty.
func (n *node) prune(want desired.State) error {
	if n.others.Unknown {
		return n.pruneAlone()
	}
	var errs []error
	all := want.Union(n.others.Wants)
	for name, i := range n.netifs {
		errs = append(errs, i.prune(all.Links[name]))
		if len(want.Links[name]) == 0 {
			delete(n.netifs, name)
		}
	}
	return errors.Join(errs...)
}

// pruneAlone does so at an exit although somebody does not say what it wants: it takes
// away what nobody else serves.
func (n *node) pruneAlone() error {
	var errs []error
	for name, addrs := range n.alone.Links {
		l, err := nodelinks.ByName(name)
		if i := n.netifs[name]; err == nil && l != nil && i != nil {
			if err = i.remove(l, addrs); err == nil {
				err = i.removeBare(l)
			}
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// servedAlone returns what of s no other process wants, or has a socket on: a process that
// does not say what it wants may still serve.
func (n *node) servedAlone(s desired.State) desired.State {
	var es []desired.Endpoint
	for _, rules := range s.Rules {
		es = append(es, rules...)
	}
	if n.life.InForce != nil {
		es = append(es, n.life.InForce.listeners()...)
	}
	shared, served := map[netip.Addr]bool{}, sockets.Strangers(es)
	for e := range served {
		shared[e.Addr] = true
	}
	s = s.Minus(n.others.Wants)
	a := desired.State{Links: map[string][]netip.Addr{}, Rules: map[string][]desired.Endpoint{}}
	for name, addrs := range s.Links {
		a.Links[name] = slices.DeleteFunc(slices.Clone(addrs), func(x netip.Addr) bool { return shared[x] })
	}
	for backend, rules := range s.Rules {
		a.Rules[backend] = slices.DeleteFunc(slices.Clone(rules), func(e desired.Endpoint) bool { return served[e] != "" })
	}
	return a
}

// repair puts back what somebody else has removed; with links, only links and
// addresses, which takes no process.
func (n *node) repair(links bool, why string) {
	if n.exited() || n.exiting.Err() != nil {
		return
	}
	if !links && n.owing {
		n.settle()
	}
	if n.want.Empty() {
		return
	}
	var missing map[string]int
	var err error
	if links {
		missing, err = n.ensure(desired.State{Links: n.want.Links})
	} else {
		err = n.inTurn(func() (err error) {
			missing, err = n.ensure(n.want)
			if err == nil && n.life.Next == nil {
				err = n.prune(n.want)
				n.sweep()
			}
			return err
		})
	}
	if n.exiting.Err() != nil {
		return // which has cut it short
	}
	if err != nil {
		log.Errorf("repairing: %v", count(err))
	}
	if !links || err != nil {
		n.ready.Store(err == nil && n.life.InForce != nil)
	}
	var back []string
	for _, object := range slices.Sorted(maps.Keys(missing)) {
		if k := missing[object]; k > 0 {
			repairs.WithLabelValues(object).Add(float64(k))
			back = append(back, fmt.Sprintf("%d %s", k, object))
		}
	}
	if len(back) > 0 && n.calm.Allow() && !n.fighting {
		log.Warningf("put back what another program had removed (%s), noticed by %s", strings.Join(back, ", "), why)
	}
	n.fighting = n.fighting && n.calm.Tokens() < 5
	if !links && err == nil {
		lastSync.SetToCurrentTime()
	}
	n.observe()
	if n.life.Kind == life.Serving {
		// Not all of n.want, where something of it is still to be taken away.
		n.enforce(n.life.InForce.state(n.resolve))
	}
}

// enforce tells the firewalls that what want has rules for is listened on.
func (n *node) enforce(want desired.State) {
	for name, fw := range n.firewalls {
		fw.enforce(want.Rules[name])
	}
}
