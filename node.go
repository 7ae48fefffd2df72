package nodecache

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coredns/caddy"
	"golang.org/x/time/rate"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"

	"github.com/contentful-labs/coredns-nodecache/internal/doctor"
	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
)

const (
	// listenPoll is how often a start looks whether CoreDNS listens by now.
	listenPoll = 5 * time.Millisecond
	// settle is how long CoreDNS has had all sockets before a start counts as
	// successful: when one more of them fails, the reload has been reverted by then.
	settle = 50 * time.Millisecond
	// exitLimit bounds an exit from the moment it begins, lameduck included: its turns,
	// waits for locks and the drain share it. Kubernetes gives a pod 30 s.
	exitLimit = 25 * time.Second
	// exitLeast is what of exitLimit is left after a lameduck, however long it was, and
	// after a drain: enough to take away what has to go.
	exitLeast = 5 * time.Second
	// drainLimit bounds the wait for answers at an exit.
	drainLimit = 10 * time.Second
	// politeness is how long all turns of an exit wait together for other processes that
	// are changing the node, or have stopped half way.
	politeness = 500 * time.Millisecond
	// retryFirst is how soon what could not be taken away is tried again; each further
	// pause is twice as long, up to the sync interval.
	retryFirst = time.Second
	// stopLimit bounds the wait of a reload for answers of fastpath's, as CoreDNS bounds
	// its own.
	stopLimit = 5 * time.Second
	// readOutLimit bounds the wait of a reload for what is queued on sockets that it
	// gives up. To an address without firewall rules queries never cease.
	readOutLimit = 100 * time.Millisecond
	// underWay is how long a packet that has passed the rules may take to its socket
	// on a busy machine, where the kernel puts that off.
	underWay = 10 * time.Millisecond
	// burst is how long changes that the kernel reports are gathered before one
	// repair serves them all.
	burst = 10 * time.Millisecond
)

// theNode is what this process has on the node. It outlives instances: a reload
// hands it from one to the next.
var theNode = newNode()

// node owns the process's link, addresses and rules. One goroutine, that of run,
// changes them and the fields below its channels; the callbacks of CoreDNS hand
// it their work through do.
type node struct {
	work      chan func()
	poked     chan struct{} // rules of ours may be gone
	reported  chan struct{} // links or addresses have changed, ours or others
	ruleset   chan struct{} // nf_tables have changed, ours or others
	retry     chan struct{} // what is owed may be tried again
	startOnce sync.Once
	exiting   context.Context // done when an exit begins
	beginExit context.CancelFunc
	ready     atomic.Bool
	answering sockets.Counter
	fast      fastpath
	tcp       sockets.Clients

	member   *member
	others   others // as of this process's last turn
	watching watched
	calm     *rate.Limiter // of repairs
	fighting bool          // that limit was reached
	leaving  desired.State // of want, what this process is about to give up
	alone    desired.State // of leaving at an exit, what goes although somebody is silent
	deadline time.Time     // of an exit's work, or of a start's undoing; zero: none
	left     leftRules

	running  *config       // in force, nil before the first
	starting *config       // of an instance that is on its way up
	want     desired.State // what was last made to stand
	added    made          // by the last start, beside what was there
	// goal is what the last reduction was to leave; owing says that it has not been
	// reached, since something failed, and is tried again after pause.
	goal      desired.State
	owing     bool
	pause     time.Duration
	netifs    map[string]*netif
	firewalls map[string]firewall
	auto      string // what the backend auto has come out as
	exited    bool
	exitBegan time.Time       // zero before
	patience  time.Duration   // what of politeness is left
	faulty    map[string]bool // backends whose last ensure failed
	exits     *net.UnixConn   // where other processes tell of theirs
	syncTick  *time.Ticker
	syncEvery time.Duration
	doctor    *doctor.Doctor
	// examineTick has the node looked at for faults.
	examineTick *time.Ticker
}

func newNode() *node {
	n := &node{
		work:      make(chan func()),
		poked:     make(chan struct{}, 1),
		reported:  make(chan struct{}, 1),
		ruleset:   make(chan struct{}, 1),
		retry:     make(chan struct{}, 1),
		patience:  politeness,
		member:    newMember(),
		calm:      rate.NewLimiter(rate.Every(time.Second), 10),
		netifs:    map[string]*netif{},
		firewalls: map[string]firewall{},
		faulty:    map[string]bool{},
		syncTick:  time.NewTicker(defaultSync),
		doctor:    doctor.New(doctor.Common),

		examineTick: time.NewTicker(examineEvery),
	}
	n.syncTick.Stop()
	n.exiting, n.beginExit = context.WithCancel(context.Background())
	n.fast = fastpath{answering: &n.answering, listeners: map[desired.Endpoint]*fastListener{}}
	return n
}

// do has the owning goroutine run f and waits for it.
func (n *node) do(f func() error) error {
	n.startOnce.Do(func() { go n.run() })
	done := make(chan error, 1)
	n.work <- func() { done <- f() }
	return <-done
}

func (n *node) run() {
	for {
		// What CoreDNS waits for, an exit above all, goes before all that can wait.
		select {
		case f := <-n.work:
			f()
			continue
		default:
		}
		select {
		case f := <-n.work:
			f()
		case <-n.syncTick.C:
			n.repair(false, "the check every "+n.syncEvery.String())
		case <-n.examineTick.C:
			n.examineAgain()
		case <-n.retry:
			n.settle()
		case <-n.poked:
			n.onReport(n.poked, false)
		case <-n.reported:
			n.onReport(n.reported, true)
		case <-n.ruleset:
			if t, ok := n.firewalls[backendIPT].(*iptables); ok && !t.stands() {
				poke(n.poked)
			}
		}
	}
}

// tick has everything looked at every d.
func (n *node) tick(d time.Duration) {
	n.syncEvery = d
	syncInterval.Set(d.Seconds())
	n.syncTick.Reset(d)
}

// onReport repairs what c has told of. Against a program that removes our things
// again and again, it does so once a second.
func (n *node) onReport(c chan struct{}, links bool) {
	if n.calm.Tokens() < 1 {
		if !n.fighting {
			n.fighting = true
			log.Warningf("another program removes what nodecache needs again and again; it is put back once a second from now on")
		}
		time.AfterFunc(time.Second, func() { poke(c) })
		return
	}
	n.repair(links, "a report of the kernel")
}

// poke has c hold one token.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// links returns the names of the links that the configuration in force has, and
// those of other processes: when they leave, their addresses go with them.
func (n *node) links() (names []string) {
	n.do(func() error {
		names = slices.Collect(maps.Keys(n.netifs))
		o, err := n.member.ask(askLimit)
		names = slices.AppendSeq(names, maps.Keys(o.wants.Links))
		return err
	})
	return names
}

// inTurn runs f while no other process changes the node, knowing what they want. An exit
// waits for a turn as long as its politeness lasts, and then goes on without.
func (n *node) inTurn(f func() error) error {
	ctx, within, answers := n.exiting, turnLimit, askLimit
	if n.exited {
		ctx, within, answers = context.Background(), n.patience, askLimitAtExit
	}
	began := time.Now()
	end, err := turn(ctx, within)
	if n.exited {
		n.patience -= min(time.Since(began), n.patience)
	}
	if err != nil {
		return err
	}
	defer end()
	if n.others, err = n.member.ask(answers); err != nil {
		return err
	}
	return f()
}

// show tells the other processes what this one wants, and what it serves.
func (n *node) show(want desired.State, serves []desired.Endpoint) error {
	p := presence{
		Links: want.Links, Rules: show(want.Rules[backendIPT]), Serves: show(serves),
		LeavingLinks: n.leaving.Links, LeavingRules: show(n.leaving.Rules[backendIPT]),
	}
	if t, ok := n.firewalls[backendIPT].(interface{ variant() string }); ok {
		p.Variant = t.variant()
	}
	return n.member.show(p)
}

// start puts on the node what cfg wants, beside what is there for the
// configuration in force. It is OnStartup: CoreDNS has not listened yet.
func (n *node) start(cfg *config) error {
	return n.do(func() error {
		if n.exited {
			return errors.New("the process is on its way out")
		}
		err := n.bring(cfg)
		if n.running == nil && n.auto == backendIPT && cfg.auto() && isFirewallError(err) {
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
	target := cfg.state(false, n.resolve)
	want := was.Union(target)
	// Shown before anything is made: who leaves meanwhile leaves it in place.
	if err := n.show(want, n.serves()); err != nil {
		return err
	}
	err := n.inTurn(func() error {
		made, err := n.prepare(cfg, want)
		n.added = made
		if err == nil {
			_, err = n.ensure(want)
		}
		if err == nil {
			return nil
		}
		err = count(err)
		if undo := n.undo(was, made); undo != nil {
			err = fmt.Errorf("%w; and taking back what had been done: %w", err, undo)
		}
		return err
	})
	if err != nil {
		if n.running == nil {
			n.member.hide()
		} else if err := n.show(was, n.serves()); err != nil {
			log.Errorf("%v", err)
		}
		return err
	}
	// What cfg does not have is left while the old servers still read: they stop to
	// read, with their sockets open, as soon as the new ones listen.
	n.want, n.starting = want, cfg
	n.leave(was.Minus(target))
	if n.running != nil {
		n.serve(was.Only(target))
		n.readOut()
	}
	n.tick(cfg.sync())
	if !want.Empty() {
		n.watch()
	}
	first := !caddy.Started()
	if n.running == nil && !first {
		// The instance in force has no callback of ours that would tell of a failure.
		for _, i := range caddy.Instances() {
			if configOf(i) != cfg {
				i.OnRestartFailed = append(i.OnRestartFailed, func() error { n.abandon(cfg); return nil })
			}
		}
	}
	go n.await(cfg, first, began)
	return nil
}

// abandon takes everything back when a reload that brought the directive failed.
func (n *node) abandon(cfg *config) {
	n.do(func() error {
		if n.starting != cfg && n.running != cfg || n.exited {
			return nil
		}
		n.running, n.starting = nil, nil
		n.over()
		return nil
	})
}

// over takes everything back, for want of a configuration.
func (n *node) over() {
	n.ready.Store(false)
	n.syncTick.Stop()
	n.fast.only(nil)
	if n.reduceTo(desired.State{}) {
		log.Infof("no server block in force has nodecache; nothing of it is on the node any more")
	}
	n.serve(desired.State{})
}

// serves returns what CoreDNS listens on for the configuration in force, and goes on to.
func (n *node) serves() []desired.Endpoint {
	if n.running == nil || n.exited {
		return nil
	}
	return n.running.listeners()
}

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
	if n.running != nil {
		for _, e := range n.running.listeners() {
			mine[e] = true
		}
	}
	for _, e := range cfg.listeners() {
		if mine[e] || e.Proto == "udp" && cfg.addrs[e.Addr].foreign {
			continue
		}
		if err := sockets.TryPort(e); err != nil {
			return added, errorAt(cfg.wants[e].at, "%w", err)
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
		gone, err := fw.ensure(ctx, want.Rules[b], n.standing(b))
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
		_, err := fw.ensure(ctx, want.Rules[name], n.standing(name))
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
		time.AfterFunc(n.pause, func() { poke(n.retry) })
		n.pause = min(2*n.pause, max(n.syncEvery, retryFirst))
	}
	return !n.owing
}

// settle tries again what is owed, unless a start is on its way, which has a reduction of
// its own to follow.
func (n *node) settle() {
	if n.owing && n.starting == nil && !n.exited {
		n.tryGoal()
	}
}

// reduce takes from the node what is there beyond want and the wants of other
// processes: rules first, since an address that goes before its rules is a
// black hole. It shows the others the new want in the same turn, so that the last
// one to leave knows that it is.
func (n *node) reduce(want desired.State) error {
	defer n.observe()
	if n.exited || n.running == nil {
		// Before the others are asked: of two that leave at once, without a turn if
		// need be, at least one knows that it is the last.
		n.member.hide()
	}
	return n.inTurn(func() error {
		left := n.leaving
		n.leaving = desired.State{}
		if n.exited && n.others.unknown {
			n.alone = n.servedAlone(n.want.Minus(want))
		}
		if !n.exited && n.running != nil {
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
	if n.others.unknown {
		return n.pruneAlone()
	}
	var errs []error
	all := want.Union(n.others.wants)
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
	if n.running != nil {
		es = append(es, n.running.listeners()...)
	}
	shared, served := map[netip.Addr]bool{}, sockets.Strangers(es)
	for e := range served {
		shared[e.Addr] = true
	}
	s = s.Minus(n.others.wants)
	a := desired.State{Links: map[string][]netip.Addr{}, Rules: map[string][]desired.Endpoint{}}
	for name, addrs := range s.Links {
		a.Links[name] = slices.DeleteFunc(slices.Clone(addrs), func(x netip.Addr) bool { return shared[x] })
	}
	for backend, rules := range s.Rules {
		a.Rules[backend] = slices.DeleteFunc(slices.Clone(rules), func(e desired.Endpoint) bool { return served[e] != "" })
	}
	return a
}

// await waits until CoreDNS listens on everything of cfg and completes its start.
// first is true for the process's first instance: if that fails the process ends.
func (n *node) await(cfg *config, first bool, began time.Time) {
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
			case n.starting != cfg && n.running != cfg || n.exited:
				over = true
			case !since.IsZero() && (first || n.running == cfg || time.Since(since) >= settle):
				n.complete(cfg, began)
				over = true
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
	target := cfg.state(false, n.resolve)
	if n.exits == nil {
		var err error
		if n.exits, err = hearLastWords(n.member.id()); err != nil {
			log.Warningf("%v; exits of other processes are not counted", err)
		}
	}
	n.serve(target)
	if err := sockets.DeepenAll(cfg.listeners()); err != nil {
		log.Warningf("making room for more unread queries: %v", err)
	}
	if n.running == nil {
		// Nothing of this process to wait for: what a process before it has left
		// beyond its needs can go.
		n.running, n.starting = cfg, nil
		n.fast.only(cfg)
		n.reduceTo(target)
	}
	n.ready.Store(true)
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

// leave begins to give up going, and says so to the others: what nobody else stays
// for gets no new UDP queries, and the node's own programs do not send from its
// addresses any more. The next reduce ends this state.
func (n *node) leave(going desired.State) {
	if going.Empty() && !n.exited {
		return
	}
	err := n.inTurn(func() error {
		n.leaving = going
		if err := n.show(n.want, n.serves()); err != nil {
			log.Errorf("%v", err)
		}
		gone := going.Minus(n.others.stays)
		for name, addrs := range gone.Links {
			if i := n.netifs[name]; i != nil {
				i.unprefer(addrs)
			}
		}
		ctx, cancel := n.limit()
		defer cancel()
		var errs []error
		for name, es := range gone.Rules {
			if fw := n.firewalls[name]; fw != nil {
				errs = append(errs, fw.leave(ctx, es))
			}
		}
		return errors.Join(errs...)
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
		if (n.starting == nil || n.starting == cfg) && n.leaving.Empty() || n.exited {
			return nil
		}
		n.running, n.starting = cfg, nil
		n.tick(cfg.sync())
		n.reduceTo(cfg.state(false, n.resolve))
		n.serve(n.goal)
		return nil
	})
}

// stopped tells whether CoreDNS has stopped the instance of cfg, in favour of another.
func stopped(cfg *config) bool {
	instances := caddy.Instances()
	return len(instances) > 0 && !slices.ContainsFunc(instances, func(i *caddy.Instance) bool { return configOf(i) == cfg })
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
	ours := func() bool { return cfg.restarting && !n.exited && (n.running == cfg || n.starting == cfg) }
	n.do(func() error {
		if !cfg.restarting && n.exitBegan.IsZero() {
			n.exitBegan = time.Now()
		}
		if ours() {
			next := n.starting
			if next == cfg {
				next = nil
			}
			n.fast.only(next)
		}
		return nil
	})
	n.fast.finish(stopLimit)
	n.do(func() error {
		if !ours() {
			return nil
		}
		n.running = n.starting
		if n.running == cfg {
			n.running = nil
		}
		n.starting = nil
		if n.running == nil {
			n.over()
			return nil
		}
		want := n.running.state(false, n.resolve)
		n.reduceTo(want)
		n.serve(want)
		return nil
	})
}

// exit takes everything off the node, less what skipteardown keeps, once what
// has arrived is answered. It is called on every way out and a second call waits
// for the first.
func (n *node) exit() {
	n.beginExit() // what is under way is cut short
	n.do(func() error {
		if n.exited {
			return nil
		}
		n.exited = true
		n.ready.Store(false)
		cfg := n.running
		if cfg == nil {
			cfg = n.starting
		}
		if cfg == nil {
			return nil
		}
		began := time.Now()
		by := began.Add(exitLimit)
		if !n.exitBegan.IsZero() {
			by = n.exitBegan.Add(exitLimit)
		}
		if least := began.Add(exitLeast); by.Before(least) {
			by = least
		}
		kept := cfg.state(true, n.resolve)
		// While it waits to leave, it answers all that comes.
		n.deadline = later(began, by.Add(-drainLimit-exitLeast)).Add(exitLeast / 5)
		n.leave(n.want.Minus(kept))
		es := cfg.listeners()
		if n.starting != nil && n.starting != cfg {
			es = append(es, n.starting.listeners()...)
		}
		givenUp := n.drain(es, !kept.Empty(), earlier(time.Now().Add(drainLimit), by.Add(-exitLeast)))
		n.deadline = by
		left := n.reduceBy(kept, by)
		took := time.Since(began).Round(time.Millisecond)
		lastWords{Seconds: took.Seconds(), GivenUp: givenUp}.tell(n.member.id())
		if n.exits != nil {
			n.exits.Close()
		}
		switch _, rulesGo := n.firewalls[backendNFT]; {
		case left != nil:
			log.Errorf("left after %s, but not all of nodecache is off the node: %v; the next nodecache process here takes over what has stayed, which is without effect on queries until then", took, count(left))
		case !n.others.wants.Empty() || n.others.unknown:
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
	for {
		err := n.reduce(kept)
		if err == nil {
			return nil
		}
		if time.Until(by) < retryFirst {
			// Nobody listens any more, so rules that have stayed are out of force,
			// and no query needs the addresses.
			n.want = kept
			return errors.Join(err, n.prune(kept))
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
		case n.others.serves[e]:
			shared = append(shared, e)
		case e.Proto == "tcp":
			tcp = append(tcp, e)
		case kept:
			udp = append(udp, e)
		}
	}
	for i, leaving := range [][]desired.Endpoint{shared, tcp, udp} {
		if i == 2 && len(leaving) == 0 {
			continue
		}
		if i == 1 {
			// The node's own programs have no guard that knows of sockets.
			n.serve(n.onlyShared())
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
		log.Warningf("%d queries were not answered within %s", open, drainLimit)
	}
	return open
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
			if n.others.serves[e] {
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
		if n.running != nil && n.running.restarting && !n.exited {
			n.leave(n.want)
			n.serve(n.onlyShared())
			n.readOut()
		}
		return nil
	})
}

// repair puts back what somebody else has removed; with links, only links and
// addresses, which takes no process.
func (n *node) repair(links bool, why string) {
	if n.exited || n.exiting.Err() != nil {
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
			if err == nil && n.starting == nil {
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
		n.ready.Store(err == nil && n.running != nil)
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
	if n.running != nil && n.starting == nil {
		n.serve(n.want)
	}
}

// serve tells the firewalls that what want has rules for is listened on.
func (n *node) serve(want desired.State) {
	for name, fw := range n.firewalls {
		fw.serve(want.Rules[name])
	}
}
