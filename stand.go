package nodecache

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/plan"
)

// This file leads the node to what a phase of the process's life wants, in turn with the other
// processes: it raises, reduces, and takes back a start that has failed. Package plan has the
// steps, steps.go carries them out.

// raise adds to the node what of want is not there yet, and returns what it has added.
func (n *node) raise(want desired.State) (added map[string][]netip.Addr, err error) {
	// Nothing is taken for granted: what stands may be of a process that was killed.
	have := plan.Have{Stage: plan.Stage{Leaving: n.leaving}}
	steps := plan.Plan(have, plan.Stage{State: want, Leaving: n.leaving}, n.heed(desired.State{}))
	c, err := n.carryOut(n.exiting, steps.Add, steps.Rules)
	return c.added, err
}

// undo leads back to want from what a start has added, which nobody else has had.
func (n *node) undo(want desired.State) error {
	o := n.heed(desired.State{})
	o.Wants.Links, o.Alone.Links = nil, n.added
	return n.takeOff(want, o)
}

// takeOff leads back to want from what a start has added. A link that was there before stays.
func (n *node) takeOff(want desired.State, o plan.Others) error {
	// It may be an exit that has cut the start short.
	ctx, cancel := context.WithTimeout(context.Background(), exitLeast)
	defer cancel()
	adopted := desired.State{Links: map[string][]netip.Addr{}}
	for name := range n.added {
		if !n.netif(name).made {
			adopted.Links[name] = nil
		}
	}
	have := plan.Have{Stage: plan.Stage{State: want.Union(desired.State{Links: n.added})}, Doubtful: slices.Collect(maps.Keys(n.firewalls))}
	steps := plan.Plan(have, plan.Stage{State: want.Union(adopted)}, o)
	_, rules := n.carryOut(ctx, steps.Rules)
	_, links := n.carryOut(ctx, steps.Trim)
	for name := range n.added {
		if len(want.Links[name]) == 0 {
			delete(n.netifs, name)
		}
	}
	return errors.Join(rules, links)
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
	err := n.reduce(n.exiting, n.goal)
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

// reduce takes from the node what is there beyond want and the wants of other processes. It
// shows the others the new want in the same turn, so that the last one to leave knows that
// it is.
func (n *node) reduce(ctx context.Context, want desired.State) error {
	defer n.observe()
	if n.exited() || n.life.InForce == nil {
		// Before the others are asked: of two that leave at once, without a turn if
		// need be, at least one knows that it is the last.
		n.member.Hide()
	}
	return n.inTurn(func() error {
		have, next, others := n.has(), plan.Stage{State: want}, n.heed(n.want.Minus(want))
		n.leaving = desired.State{}
		var err error
		if !n.exited() && n.life.InForce != nil {
			err = n.show(want, n.serves())
		}
		if err == nil {
			_, err = n.carryOut(ctx, plan.Plan(have, next, others).Rules)
		}
		if err != nil {
			n.leaving = have.Leaving
			return err
		}
		n.sweep(ctx)
		n.want = want
		return n.trim(ctx, have, next, others)
	})
}

// trim takes off this process's links what neither it nor others want.
func (n *node) trim(ctx context.Context, have plan.Have, want plan.Stage, others plan.Others) error {
	found, err := n.look()
	have.State = have.Union(found)
	_, more := n.carryOut(ctx, plan.Plan(have, want, others).Trim)
	return errors.Join(err, more)
}

// enforce tells the firewalls that what want has rules for is listened on.
func (n *node) enforce(want desired.State) {
	for name, fw := range n.firewalls {
		fw.enforce(want.Rules[name])
	}
}
