package nodecache

import (
	"cmp"
	"context"
	"errors"
	"time"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/life"
	"github.com/contentful-labs/coredns-nodecache/internal/peers"
	"github.com/contentful-labs/coredns-nodecache/internal/plan"
	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
)

// exit takes everything off the node, less what skipteardown keeps, once what
// has arrived is answered. It is called on every way out and a second call waits
// for the first.
func (n *node) exit() {
	n.beginExit() // what is under way is cut short
	n.do(func() error {
		if !n.on(life.Exits, nil) {
			return nil
		}
		n.ready.Store(false)
		cfg := cmp.Or(n.life.InForce, n.life.Next)
		if cfg == nil {
			return nil
		}
		began := time.Now()
		by := began.Add(exitLimit)
		if !n.exitBegan.IsZero() {
			by = n.exitBegan.Add(exitLimit)
		}
		if least := began.Add(2 * exitLeast); by.Before(least) {
			by = least
		}
		kept := cfg.kept(n.resolve)
		// While it waits to leave, it answers all that comes.
		soon, cancel := context.WithDeadline(context.Background(), later(began, by.Add(-drainLimit-exitLeast)).Add(exitLeast/5))
		n.giveUp(soon, n.want.Minus(kept))
		cancel()
		es := cfg.listeners()
		if next := n.life.Next; next != nil && next != cfg {
			es = append(es, next.listeners()...)
		}
		givenUp := n.drain(es, !kept.Empty(), earlier(time.Now().Add(drainLimit), by.Add(-exitLeast)))
		left := n.reduceBy(kept, by)
		took := time.Since(began).Round(time.Millisecond)
		n.member.SayLastWords(peers.LastWords{Seconds: took.Seconds(), GivenUp: givenUp})
		if n.exits != nil {
			n.exits.Close()
		}
		switch _, rulesGo := n.firewalls[backendNFT]; {
		case left != nil:
			log.Errorf("left after %s, but not all of nodecache is off the node: %v; the next nodecache process here takes over what has stayed, which is without effect on queries until then", took, count(left))
		case !n.others.Wants.Empty() || n.others.Unknown:
			log.Infof("left after %s; what another process serves stays in place", took)
		case kept.Empty():
			log.Infof("left after %s; nothing of nodecache is on the node any more", took)
		case rulesGo:
			log.Infof("left after %s; skipteardown keeps the addresses, but nftables' rules go with the process", took)
		default:
			log.Infof("left after %s; skipteardown keeps the addresses and the rules in place", took)
		}
		return nil
	})
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// reduceBy tries to reach what is to stay after an exit until it has or its time is up,
// and returns what has failed then.
func (n *node) reduceBy(kept desired.State, by time.Time) error {
	ctx, cancel := context.WithDeadline(context.Background(), by)
	defer cancel()
	for {
		err := n.reduce(ctx, kept)
		if err == nil {
			return nil
		}
		// What iptables can't read it will not be able to in a moment.
		if time.Until(by) < retryFirst || errors.As(err, new(unreadableError)) {
			// Nobody listens any more, so rules that have stayed are out of force,
			// and no query needs the addresses.
			going := n.want.Minus(kept)
			n.want = kept
			return errors.Join(err, n.trim(ctx, n.has(), plan.Stage{State: kept}, n.heed(going)))
		}
		log.Warningf("leaving: %v; trying again", err)
		time.Sleep(retryFirst / 5)
	}
}

// drain answers what has arrived on es. First the sockets whose queries another
// process takes over are parked. The others answer on: their addresses may have
// nobody else, and new queries to a ClusterIP do not come any more, but for TCP,
// whose rules must stay for the connections that there are. So then the listening
// sockets go, and with them the guard lets new connections pass by. Where address
// and rules stay (kept), the same goes for UDP in the end.
func (n *node) drain(es []desired.Endpoint, kept bool, deadline time.Time) (open int64) {
	var shared, tcp, udp []desired.Endpoint
	for _, e := range es {
		switch {
		case n.others.Serves[e]:
			shared = append(shared, e)
		case e.Proto == "tcp":
			tcp = append(tcp, e)
		case kept:
			udp = append(udp, e)
		}
	}
	began := time.Now()
	for i, leaving := range [][]desired.Endpoint{shared, tcp, udp} {
		if i == 2 && len(leaving) == 0 {
			continue
		}
		if i == 1 {
			// The node's own programs have no guard that knows of sockets.
			n.enforce(n.onlyShared())
		}
		err := sockets.Park(leaving)
		if err == nil {
			var left int64
			left, err = n.answering.Drain(es, time.Until(deadline))
			open = max(open, left) // those that one step left open, the next does not count
		}
		if err != nil {
			log.Errorf("leaving: %v", err)
		}
	}
	if open > 0 {
		log.Warningf("%d queries were not answered within %s", open, time.Since(began).Round(time.Millisecond))
	}
	return open
}
