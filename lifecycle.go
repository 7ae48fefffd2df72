package nodecache

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/coredns/caddy"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/footprint"
	"github.com/contentful-labs/coredns-nodecache/internal/life"
	"github.com/contentful-labs/coredns-nodecache/internal/plan"
	"github.com/contentful-labs/coredns-nodecache/internal/serverblocks"
	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
)

// This file is what the callbacks of CoreDNS come to: they are the events that lead a
// process from one phase of its life to the next (package life).

// start puts on the node what cfg wants, beside what is there for the
// configuration in force. It is OnStartup: CoreDNS has not listened yet.
func (n *node) start(cfg *config) error {
	return n.do(func() error {
		if n.exited() {
			return errors.New("the process is on its way out")
		}
		err := n.bring(cfg)
		if n.life.Kind == life.Absent && n.auto == backendIPT && cfg.auto() && isFirewallError(err) && n.exiting.Err() == nil {
			log.Warningf("iptables does not work here, trying nftables: %v", err)
			n.auto = backendNFT
			delete(n.firewalls, backendIPT)
			err = n.bring(cfg)
		}
		return err
	})
}

// bring is start's work.
func (n *node) bring(cfg *config) error {
	began := time.Now()
	was := n.want
	cfg.held = nil // of a try that has failed
	target := cfg.state(n.resolve)
	want := was.Union(target)
	// Shown before anything is made: who leaves meanwhile leaves it in place.
	if err := n.show(want, n.serves()); err != nil {
		return err
	}
	err := n.inTurn(func() error {
		n.added = nil
		err := n.tryPorts(cfg)
		if err == nil {
			n.added, err = n.raise(want)
		}
		if err == nil {
			want, err = n.holdBack(cfg, was, want)
		}
		if err == nil {
			return nil
		}
		err = count(err)
		if undo := n.undo(was); undo != nil {
			err = fmt.Errorf("%w; and taking back what had been done: %w", err, undo)
		}
		return err
	})
	if err != nil {
		if n.life.Kind == life.Absent {
			n.member.Hide()
		} else if err := n.show(was, n.serves()); err != nil {
			log.Errorf("%v", err)
		}
		return err
	}
	// What cfg does not have is left while the old servers still read: they stop to
	// read, with their sockets open, as soon as the new ones listen.
	n.want = want
	n.on(life.Begins, cfg)
	n.giveUp(n.exiting, was.Minus(target))
	if n.life.Kind == life.Changing {
		n.enforce(was.Only(target))
		n.readOut()
	}
	n.tick(cfg.sync())
	if !want.Empty() {
		n.watch()
	}
	starting := !caddy.Started()
	if n.life.Kind == life.Rising && !starting {
		// The instance in force has no callback of ours that would tell of a failure.
		for _, i := range caddy.Instances() {
			if configOf(i) != cfg {
				i.OnRestartFailed = append(i.OnRestartFailed, func() error { n.abandon(cfg); return nil })
			}
		}
	}
	go n.await(cfg, starting, began)
	return nil
}

// tryPorts tells whether CoreDNS will be able to listen on what cfg names beside what is in
// force.
func (n *node) tryPorts(cfg *config) error {
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
			return serverblocks.ErrorAt(cfg.wants[e].at, "%w", err)
		}
	}
	return nil
}

// abandon takes everything back when a reload that brought the directive failed.
func (n *node) abandon(cfg *config) {
	n.do(func() error {
		if n.on(life.Fails, cfg) {
			n.settleInto()
		}
		return nil
	})
}

// settleInto has the node come to what the configuration in force wants, and nothing more;
// to nothing where there is none.
func (n *node) settleInto() {
	cfg := n.life.InForce
	want := cfg.state(n.resolve)
	if cfg == nil {
		n.ready.Store(false)
		n.syncTick.Stop()
		n.fast.Only(nil)
	}
	done := n.reduceTo(want)
	n.enforce(want)
	if cfg == nil && done {
		log.Infof("no server block in force has nodecache; nothing of it is on the node any more")
	}
}

// on notes an event, and tells whether it changes the phase.
func (n *node) on(e life.Event, cfg *config) (changes bool) {
	was := n.life
	n.life, changes = n.life.On(e, cfg)
	if changes {
		log.Debugf("%s: from %s to %s", e, was.Kind, n.life.Kind)
	}
	return changes
}

func (n *node) exited() bool { return n.life.Kind == life.Gone }

// serves returns what CoreDNS listens on for the configuration in force, and goes on to.
func (n *node) serves() []desired.Endpoint {
	if n.life.InForce == nil || n.exited() {
		return nil
	}
	return n.life.InForce.listeners()
}

// await waits until CoreDNS listens on everything of cfg and completes its start.
// starting is true for the process's first instance: if that fails the process ends.
func (n *node) await(cfg *config, starting bool, began time.Time) {
	es := cfg.listeners()
	since := time.Time{}
	for {
		time.Sleep(listenPoll)
		ok, err := sockets.Listening(es)
		switch {
		case err != nil:
			log.Errorf("%v; taking it that CoreDNS listens", err)
			since = began
		case !ok:
			since = time.Time{}
		case since.IsZero():
			since = time.Now()
		}
		over := false
		n.do(func() error {
			switch {
			case !n.life.Has(cfg) || n.exited():
				over = true
			case !since.IsZero() && (starting || n.life.InForce == cfg || time.Since(since) >= settle):
				if over = true; len(cfg.held) == 0 {
					n.complete(cfg, began)
					return nil
				}
				n.enforce(cfg.state(n.resolve)) // the rest
				go n.arrive(cfg, join(slices.SortedFunc(maps.Keys(cfg.held), netip.Addr.Compare)), began)
			}
			return nil
		})
		if over {
			return
		}
	}
}

// complete is called once CoreDNS listens on everything of cfg.
func (n *node) complete(cfg *config, began time.Time) {
	target := cfg.state(n.resolve)
	if n.exits == nil {
		var err error
		if n.exits, err = n.member.HearLastWords(); err != nil {
			log.Warningf("%v; exits of other processes are not counted", err)
		}
	}
	n.enforce(target)
	if err := sockets.DeepenAll(cfg.listeners()); err != nil {
		log.Warningf("making room for more unread queries: %v", err)
	}
	if n.on(life.Listens, cfg) && n.life.Kind == life.Serving {
		// Nothing of this process to wait for: what a process before it has left
		// beyond its needs can go.
		n.fast.Only(cfg.fastAddrs())
		n.reduceTo(target)
	}
	n.ready.Store(true)
	if err := footprint.Trim(); err != nil {
		log.Debugf("%v", err)
	}
	lastSync.SetToCurrentTime()
	n.describe(target)
	n.examineFirst(cfg)
	var kinds, fws []string
	for name, i := range n.netifs {
		how := "adopted"
		if i.made {
			how = "made"
		}
		kinds = append(kinds, fmt.Sprintf("%s (%s, %s)", name, i.kind, how))
	}
	for name := range target.Rules {
		fws = append(fws, n.firewalls[name].String())
	}
	slices.Sort(kinds)
	slices.Sort(fws)
	log.Infof("in place after %s: %s on %s, out of connection tracking by %s", time.Since(began).Round(time.Millisecond), cfg,
		orNone(kinds, "no interface of ours"), orNone(fws, "no firewall"))
}

func orNone(s []string, none string) string {
	if len(s) == 0 {
		return none
	}
	return strings.Join(s, ", ")
}

// giveUp begins to give up going, and says so to the others: what nobody else stays
// for gets no new UDP queries, and the node's own programs do not send from its
// addresses any more. The next reduce ends this state.
func (n *node) giveUp(ctx context.Context, going desired.State) {
	if going.Empty() && !n.exited() {
		return
	}
	err := n.inTurn(func() error {
		n.leaving = going
		if err := n.show(n.want, n.serves()); err != nil {
			log.Errorf("%v", err)
		}
		has := plan.Have{Stage: plan.Stage{State: n.want}}
		_, err := n.carryOut(ctx, plan.Plan(has, plan.Stage{State: n.want, Leaving: going}, n.heed(desired.State{})).Rules)
		return err
	})
	if err != nil {
		log.Errorf("leaving: %v", count(err))
	}
}

// restarting notes that the instance of cfg is being replaced, or was not.
func (n *node) restarting(cfg *config, yes bool) {
	n.do(func() error { cfg.restarting = yes; return nil })
}

// revert is OnRestartFailed of the instance of cfg, which goes on.
func (n *node) revert(cfg *config) {
	if stopped(cfg) {
		// Another plugin's OnShutdown has failed, after the new instance had taken over.
		n.restarting(cfg, true)
		n.replaced(cfg)
		return
	}
	n.do(func() error {
		if n.on(life.Stays, cfg) {
			n.tick(cfg.sync())
			n.settleInto()
		}
		return nil
	})
}

// stopped tells whether CoreDNS has stopped the instance of cfg, in favour of another.
func stopped(cfg *config) bool { return len(caddy.Instances()) > 0 && !inForce(cfg) }

// inForce tells whether CoreDNS has an instance of cfg that it has not stopped.
func inForce(cfg *config) bool {
	return slices.ContainsFunc(caddy.Instances(), func(i *caddy.Instance) bool { return configOf(i) == cfg })
}

// isInForce tells whether a configuration is, and whether it will not be again.
func (n *node) isInForce(cfg *config) (is, over bool) {
	n.do(func() error {
		is = n.life.InForce == cfg && !n.exited()
		over = !n.life.Has(cfg) || n.exited()
		return nil
	})
	return is, over
}

// configOf returns the config of an instance, or nil where no block of it has nodecache.
func configOf(i *caddy.Instance) *config {
	i.StorageMu.RLock()
	defer i.StorageMu.RUnlock()
	cfg, _ := i.Storage[configKey{}].(*config)
	return cfg
}

// replaced is OnShutdown of the instance of cfg. In a reload its servers have
// stopped and the new instance serves. At an exit nothing is done here, but that its
// time begins: the servers still answer, health may let its lameduck pass, and exit
// follows.
func (n *node) replaced(cfg *config) {
	called, exit := time.Now(), inForce(cfg) // a reload has stopped it before
	if exit && !caddy.Started() {
		n.beginExit() // the start is given up, whatever it waits for
	}
	n.do(func() error {
		if (exit || !cfg.restarting) && n.exitBegan.IsZero() {
			n.exitBegan = called // a repair under way may have taken its time
		}
		if after, ok := n.life.On(life.Stops, cfg); ok && cfg.restarting && !exit {
			n.fast.Only(after.InForce.fastAddrs())
		}
		return nil
	})
	n.fast.Finish(stopLimit)
	n.do(func() error {
		if cfg.restarting && !exit && n.on(life.Stops, cfg) {
			n.settleInto()
		}
		return nil
	})
}

// readOut has the old servers read, in a reload, what has arrived for what they
// leave: they stop to read soon, and what they have not read then is lost.
func (n *node) readOut() {
	if len(n.leaving.Rules) == 0 {
		return
	}
	time.Sleep(underWay)
	for _, es := range n.leaving.Rules {
		if err := sockets.ReadOut(es, time.Now().Add(readOutLimit)); err != nil {
			log.Errorf("leaving: %v", err)
		}
	}
}

// onlyShared returns what of want other processes serve too.
func (n *node) onlyShared() desired.State {
	s := desired.State{Rules: map[string][]desired.Endpoint{}}
	for b, es := range n.want.Rules {
		for _, e := range es {
			if n.others.Serves[e] {
				s.Rules[b] = append(s.Rules[b], e)
			}
		}
	}
	return s
}

// dropped is called when a Corefile without the directive has been read. The
// instance in force is about to stop if that Corefile turns out to be good; else
// revert follows.
func (n *node) dropped() {
	n.do(func() error {
		if cfg := n.life.InForce; cfg != nil && cfg.restarting && n.on(life.Drops, cfg) {
			n.giveUp(n.exiting, n.want)
			n.enforce(n.onlyShared())
			n.readOut()
		}
		return nil
	})
}
