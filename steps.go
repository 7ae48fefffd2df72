package nodecache

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
	"github.com/contentful-labs/coredns-nodecache/internal/plan"
	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
)

// outcome is what came of steps.
type outcome struct {
	missing map[string]int          // by object: what was not there
	added   map[string][]netip.Addr // by link that is ours from now on
}

// carryOut carries out lists of steps until ctx is done. Of one list each step is tried, and
// when one of them has failed no later list is begun.
func (n *node) carryOut(ctx context.Context, lists ...[]plan.Step) (outcome, error) {
	c := outcome{missing: map[string]int{}, added: map[string][]netip.Addr{}}
	for _, steps := range lists {
		var errs []error
		for _, s := range steps {
			errs = append(errs, n.step(ctx, s, &c))
		}
		if err := errors.Join(errs...); err != nil {
			return c, err
		}
	}
	return c, nil
}

func (n *node) step(ctx context.Context, s plan.Step, c *outcome) error {
	switch s := s.(type) {
	case plan.Add:
		i := n.netif(s.Link)
		if l, err := nodelinks.ByName(s.Link); err == nil && l == nil {
			c.missing[objectLink]++
		}
		missing, err := i.ensure(s.Addrs)
		c.missing[objectAddress] += len(missing)
		if err == nil || i.made || len(missing) > 0 {
			c.added[s.Link] = missing
		} else if len(n.want.Links[s.Link]) == 0 {
			delete(n.netifs, s.Link) // not ours
		}
		return err
	case plan.Unprefer:
		n.netif(s.Link).unprefer(s.Addrs)
	case plan.Prefer:
		n.netif(s.Link).prefer(s.Addrs)
	case plan.Withdraw:
		fw, err := n.backend(s.Backend)
		if err != nil {
			return err
		}
		return fw.withdraw(ctx, s.Gone)
	case plan.Apply:
		fw, err := n.backend(s.Backend)
		if err != nil {
			return err
		}
		missing, err := fw.apply(ctx, s.Own, s.Standing)
		delete(n.doubtful, s.Backend)
		if err != nil {
			n.doubtful[s.Backend] = true
		}
		c.missing[objectRule] += missing
		return err
	case plan.Trim:
		err := n.netif(s.Link).trim(s.Addrs, s.Whole)
		if err == nil && s.Over {
			delete(n.netifs, s.Link)
		}
		return err
	}
	return nil
}

// netif returns this process's part in the link of that name.
func (n *node) netif(name string) *netif {
	if n.netifs[name] == nil {
		n.netifs[name] = &netif{name: name}
	}
	return n.netifs[name]
}

// look returns what is on the links that this process has.
func (n *node) look() (found desired.State, err error) {
	found.Links = map[string][]netip.Addr{}
	for name, i := range n.netifs {
		addrs, e := i.look()
		found.Links[name] = addrs
		err = errors.Join(err, e)
	}
	return found, err
}

// has returns what this process has made.
func (n *node) has() plan.Have {
	return plan.Have{Stage: plan.Stage{State: n.want, Leaving: n.leaving}, Doubtful: slices.Collect(maps.Keys(n.doubtful))}
}

// heed returns what the others want, as of this process's last turn, in which it gives up
// going.
func (n *node) heed(going desired.State) plan.Others {
	o := plan.Others{Wants: n.others.Wants, Stays: n.others.Stays, Unknown: n.others.Unknown}
	if o.Unknown && n.exited() && !going.Empty() {
		var es []desired.Endpoint
		for _, rules := range going.Rules {
			es = append(es, rules...)
		}
		if n.life.InForce != nil {
			es = append(es, n.life.InForce.listeners()...)
		}
		o.Alone = going.Minus(o.Wants).Except(sockets.Strangers(es))
	}
	return o
}
