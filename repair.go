package nodecache

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/life"
	"github.com/contentful-labs/coredns-nodecache/internal/plan"
)

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
	missing, err := n.putBack(links)
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

// putBack is repair's work. It returns by object how many were missing.
func (n *node) putBack(links bool) (missing map[string]int, err error) {
	want := plan.Stage{State: n.want, Leaving: n.leaving}
	nothing := plan.Have{Stage: plan.Stage{Leaving: n.leaving}}
	if links {
		c, err := n.carryOut(n.exiting, plan.Plan(nothing, want, plan.Others{}).Add)
		return c.missing, err
	}
	err = n.inTurn(func() error {
		others := n.heed(desired.State{})
		steps := plan.Plan(nothing, want, others)
		// What some addresses lack keeps no rules from others.
		added, err := n.carryOut(n.exiting, steps.Add)
		ruled, more := n.carryOut(n.exiting, steps.Rules)
		missing = added.missing
		missing[objectRule] = ruled.missing[objectRule]
		if err := errors.Join(err, more); err != nil || n.life.Next != nil {
			return err
		}
		err = n.trim(n.exiting, n.has(), want, others)
		n.sweep(n.exiting)
		return err
	})
	return missing, err
}
