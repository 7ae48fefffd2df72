package nodecache

import (
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
)

const (
	// listenPoll is how often a start looks whether CoreDNS listens by now.
	listenPoll = 5 * time.Millisecond
	// settle is how long CoreDNS has had all sockets before a start counts as
	// successful: when one more of them fails, the reload has been reverted by then.
	settle = 50 * time.Millisecond
	// drainLimit bounds the wait for answers at an exit. With the lock's wait it
	// stays within the 30 s that Kubernetes gives a pod.
	drainLimit = 10 * time.Second
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
	startOnce sync.Once
	ready     atomic.Bool
	answering counter
	fast      fastpath

	member   *member
	others   others // as of this process's last turn
	watching bool
	calm     *rate.Limiter // of repairs
	fighting bool          // that limit was reached
	leaving  state         // of want, what this process is about to give up

	running   *config // in force, nil before the first
	starting  *config // of an instance that is on its way up
	want      state   // what was last made to stand
	netifs    map[string]*netif
	firewalls map[string]firewall
	auto      string // what the backend auto has come out as
	exited    bool
	faulty    map[string]bool // backends whose last ensure failed
	exits     *net.UnixConn   // where other processes tell of theirs
	syncTick  *time.Ticker
	syncEvery time.Duration
	// examineTick has the node looked at for faults.
	examineTick *time.Ticker
}

func newNode() *node {
	n := &node{
		work:      make(chan func()),
		poked:     make(chan struct{}, 1),
		reported:  make(chan struct{}, 1),
		ruleset:   make(chan struct{}, 1),
		member:    newMember(),
		calm:      rate.NewLimiter(rate.Every(time.Second), 10),
		netifs:    map[string]*netif{},
		firewalls: map[string]firewall{},
		faulty:    map[string]bool{},
		syncTick:  time.NewTicker(defaultSync),

		examineTick: time.NewTicker(examineEvery),
	}
	n.syncTick.Stop()
	n.fast = fastpath{answering: &n.answering, listeners: map[endpoint]*fastListener{}}
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
		select {
		case f := <-n.work:
			f()
		case <-n.syncTick.C:
			n.repair(false, "the check every "+n.syncEvery.String())
		case <-n.examineTick.C:
			n.examineAgain()
		case <-n.poked:
			n.onReport(n.poked, false)
		case <-n.reported:
			n.onReport(n.reported, true)
		case <-n.ruleset:
			time.Sleep(burst)
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

// onReport repairs what c has told of, and all else that comes in the same
// burst. Against a program that removes our things again and again, it does so
// once a second.
func (n *node) onReport(c chan struct{}, links bool) {
	if n.calm.Tokens() < 1 {
		if !n.fighting {
			n.fighting = true
			log.Warningf("another program removes what nodecache needs again and again; it is put back once a second from now on")
		}
		time.AfterFunc(time.Second, func() { poke(c) })
		return
	}
	time.Sleep(burst)
	select {
	case <-c:
	default:
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
		o, err := n.member.ask()
		names = slices.AppendSeq(names, maps.Keys(o.wants.links))
		return err
	})
	return names
}

// inTurn runs f while no other process changes the node, knowing what they want.
func (n *node) inTurn(f func() error) error {
	end, err := turn()
	if err != nil {
		return err
	}
	defer end()
	if n.others, err = n.member.ask(); err != nil {
		return err
	}
	return f()
}

// show tells the other processes what this one wants, and what it serves.
func (n *node) show(want state, serves []endpoint) error {
	return n.member.show(presence{
		Links: want.links, Rules: show(want.rules[backendIPT]), Serves: show(serves),
		LeavingLinks: n.leaving.links, LeavingRules: show(n.leaving.rules[backendIPT]),
	})
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
	want := was.union(target)
	// Shown before anything is made: who leaves meanwhile leaves it in place.
	if err := n.show(want, n.serves()); err != nil {
		return err
	}
	err := n.inTurn(func() error {
		made, err := n.prepare(cfg, want)
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
	n.leave(was.minus(target))
	if n.running != nil {
		n.serve(was.only(target))
		n.readOut()
	}
	n.tick(cfg.sync())
	if !want.empty() {
		n.watch()
	}
	first := !caddy.Started()
	if n.running == nil && !first {
		// The instance in force has no callback of ours that would tell of a failure.
		for _, i := range caddy.Instances() {
			i.StorageMu.RLock()
			own := i.Storage[configKey{}] == cfg
			i.StorageMu.RUnlock()
			if !own {
				i.OnRestartFailed = append(i.OnRestartFailed, func() error { return n.abandon(cfg) })
			}
		}
	}
	go n.await(cfg, first, began)
	return nil
}

// abandon takes everything back when a reload that brought the directive failed.
func (n *node) abandon(cfg *config) error {
	return n.do(func() error {
		if n.starting != cfg && n.running != cfg || n.exited {
			return nil
		}
		n.running, n.starting = nil, nil
		return n.over()
	})
}

// over takes everything back, for want of a configuration.
func (n *node) over() error {
	n.ready.Store(false)
	n.syncTick.Stop()
	n.fast.only(nil)
	err := count(n.reduce(state{}))
	n.serve(state{})
	n.member.hide()
	log.Infof("no server block in force has nodecache; nothing of it is on the node any more")
	return err
}

// serves returns what CoreDNS listens on for the configuration in force, and goes on to.
func (n *node) serves() []endpoint {
	if n.running == nil || n.exited {
		return nil
	}
	return n.running.listeners()
}

// made is what a start has added, to be taken back when it fails.
type made map[*netif][]netip.Addr

// prepare makes the links, tries the ports, and adds the addresses.
func (n *node) prepare(cfg *config, want state) (made, error) {
	added := made{}
	for name := range want.links {
		if n.netifs[name] == nil {
			n.netifs[name] = &netif{name: name}
		}
		_, err := n.netifs[name].ensureLink()
		if n.netifs[name].made {
			added[n.netifs[name]] = nil
		}
		if err != nil {
			if !n.netifs[name].made && len(n.want.links[name]) == 0 {
				delete(n.netifs, name) // not ours
			}
			return added, err
		}
	}
	mine := map[endpoint]bool{}
	if n.running != nil {
		for _, e := range n.running.listeners() {
			mine[e] = true
		}
	}
	for _, e := range cfg.listeners() {
		if mine[e] || e.proto == "udp" && cfg.addrs[e.addr].foreign {
			continue
		}
		if err := tryPort(e); err != nil {
			return added, errorAt(cfg.wants[e].at, "%w", err)
		}
	}
	for name, addrs := range want.links {
		missing, err := n.netifs[name].ensure(addrs)
		added[n.netifs[name]] = append(added[n.netifs[name]], missing...)
		if err != nil {
			return added, err
		}
	}
	return added, nil
}

// undo leads back from a start that failed to the state before it.
func (n *node) undo(was state, added made) error {
	errs := []error{n.rules(was)}
	for i, addrs := range added {
		l, err := linkByName(i.name)
		switch {
		case err != nil:
			errs = append(errs, err)
		case l == nil:
		case i.made && len(was.links[i.name]) == 0:
			errs = append(errs, i.prune(nil))
		default:
			errs = append(errs, i.remove(l, addrs))
		}
		if len(was.links[i.name]) == 0 {
			delete(n.netifs, i.name)
		}
	}
	return errors.Join(errs...)
}

// ensure adds to the node what of want is missing, addresses before rules, and
// counts it by object. It takes away rules that want does not have, no address.
func (n *node) ensure(want state) (missing map[string]int, err error) {
	missing = map[string]int{}
	var errs []error
	for name, addrs := range want.links {
		if n.netifs[name] == nil {
			n.netifs[name] = &netif{name: name}
		}
		l, err := linkByName(name)
		if err == nil && l == nil {
			missing[objectLink]++
		}
		gone, err := n.netifs[name].ensure(addrs)
		missing[objectAddress] += len(gone)
		errs = append(errs, err)
	}
	for b := range want.rules {
		fw, err := n.backend(b)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		n.heed(b, fw, want)
		gone, err := fw.ensure(n.withOthers(want).rules[b])
		n.faulty[b] = err != nil
		missing[objectRule] += gone
		errs = append(errs, err)
	}
	return missing, errors.Join(errs...)
}

// withOthers returns want and what other processes want of what all share.
func (n *node) withOthers(want state) state { return want.union(n.others.wants) }

// heed tells a firewall what to heed when this process wants want.
func (n *node) heed(backend string, fw firewall, want state) {
	stays := want.minus(n.leaving).union(n.others.stays)
	fw.heed(n.leaving.union(n.others.leaving).minus(stays).rules[backend], n.others.unknown)
}

// rules makes the rules of want stand, and no others of ours.
func (n *node) rules(want state) error {
	var errs []error
	for name, fw := range n.firewalls {
		n.heed(name, fw, want)
		_, err := fw.ensure(n.withOthers(want).rules[name])
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// reduce takes from the node what is there beyond want and the wants of other
// processes: rules first, since an address that goes before its rules is a
// black hole. It shows the others the new want in the same turn, so that the last
// one to leave knows that it is.
func (n *node) reduce(want state) error {
	defer n.observe()
	return n.inTurn(func() error {
		left := n.leaving
		n.leaving = state{}
		if n.exited {
			n.member.hide()
		} else if err := n.show(want, n.serves()); err != nil {
			return err
		}
		var err error
		if !left.empty() || !maps.EqualFunc(want.rules, n.want.rules, slices.Equal) {
			err = n.rules(want)
		}
		for name, i := range n.netifs {
			i.prefer(want.minus(want.minus(left)).links[name]) // what stays after all
		}
		n.sweep()
		n.want = want
		return errors.Join(err, n.prune(want))
	})
}

// sweep removes what a killed process with the backend iptables has left, where
// this one has nftables and so would never look there.
func (n *node) sweep() {
	if n.firewalls[backendNFT] == nil || n.firewalls[backendIPT] != nil || n.others.unknown || len(n.others.wants.rules[backendIPT]) > 0 || !iptablesLeft() {
		return
	}
	if err := newIPTables(func() {}).sweep(); err != nil {
		log.Warningf("looking for iptables rules that another nodecache process has left: %v", err)
	}
}

// prune takes from our links what nobody wants, and links left empty.
func (n *node) prune(want state) error {
	if n.others.unknown {
		return nil
	}
	var errs []error
	all := n.withOthers(want)
	for name, i := range n.netifs {
		errs = append(errs, i.prune(all.links[name]))
		if len(want.links[name]) == 0 {
			delete(n.netifs, name)
		}
	}
	return errors.Join(errs...)
}

// await waits until CoreDNS listens on everything of cfg and completes its start.
// first is true for the process's first instance: if that fails the process ends.
func (n *node) await(cfg *config, first bool, began time.Time) {
	es := cfg.listeners()
	since := time.Time{}
	for {
		time.Sleep(listenPoll)
		ok, err := listening(es)
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
	if err := deepenAll(cfg.listeners()); err != nil {
		log.Warningf("making room for more unread queries: %v", err)
	}
	if n.running == nil {
		// Nothing of this process to wait for: what a process before it has left
		// beyond its needs can go.
		n.running, n.starting = cfg, nil
		n.fast.only(cfg)
		if err := n.reduce(target); err != nil {
			log.Errorf("%v", count(err))
			return
		}
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
	for name := range target.rules {
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
func (n *node) leave(going state) {
	if going.empty() && !n.exited {
		return
	}
	err := n.inTurn(func() error {
		n.leaving = going
		if err := n.show(n.want, n.serves()); err != nil {
			log.Errorf("%v", err)
		}
		gone := going.minus(n.others.stays)
		for name, addrs := range gone.links {
			if i := n.netifs[name]; i != nil {
				i.unprefer(addrs)
			}
		}
		var errs []error
		for name, es := range gone.rules {
			if fw := n.firewalls[name]; fw != nil {
				n.heed(name, fw, n.want)
				errs = append(errs, fw.leave(n.withOthers(n.want).rules[name], es))
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
func (n *node) revert(cfg *config) error {
	return n.do(func() error {
		if (n.starting == nil || n.starting == cfg) && n.leaving.empty() || n.exited {
			return nil
		}
		n.running, n.starting = cfg, nil
		n.tick(cfg.sync())
		err := count(n.reduce(cfg.state(false, n.resolve)))
		n.serve(n.want)
		return err
	})
}

// replaced is OnShutdown of the instance of cfg. In a reload its servers have
// stopped and the new instance serves. At an exit nothing is done here: the
// servers still answer, and exit follows.
func (n *node) replaced(cfg *config) error {
	ours := func() bool { return cfg.restarting && !n.exited && (n.running == cfg || n.starting == cfg) }
	n.do(func() error {
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
	return n.do(func() error {
		if !ours() {
			return nil
		}
		n.running = n.starting
		if n.running == cfg {
			n.running = nil
		}
		n.starting = nil
		if n.running == nil {
			return n.over()
		}
		want := n.running.state(false, n.resolve)
		err := count(n.reduce(want))
		n.serve(want)
		return err
	})
}

// exit takes everything off the node, less what skipteardown keeps, once what
// has arrived is answered. It is called on every way out and a second call waits
// for the first.
func (n *node) exit() {
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
		kept := cfg.state(true, n.resolve)
		n.leave(n.want.minus(kept))
		es := cfg.listeners()
		if n.starting != nil && n.starting != cfg {
			es = append(es, n.starting.listeners()...)
		}
		givenUp := n.drain(es, !kept.empty(), began.Add(drainLimit))
		if err := n.reduce(kept); err != nil {
			log.Errorf("%v", count(err))
			return nil
		}
		took := time.Since(began).Round(time.Millisecond)
		lastWords{Seconds: took.Seconds(), GivenUp: givenUp}.tell(n.member.id())
		if n.exits != nil {
			n.exits.Close()
		}
		switch _, rulesGo := n.firewalls[backendNFT]; {
		case !n.others.wants.empty() || n.others.unknown:
			log.Infof("left after %s; what another process serves stays in place", took)
		case kept.empty():
			log.Infof("left after %s; nothing of nodecache is on the node any more", took)
		case rulesGo:
			log.Infof("left after %s; skipteardown keeps the addresses, but nftables' rules go with the process", took)
		default:
			log.Infof("left after %s; skipteardown keeps the addresses and the rules in place", took)
		}
		return nil
	})
}

// drain answers what has arrived on es. First the sockets whose queries another
// process takes over are parked. The others answer on: their addresses may have
// nobody else, and new queries to a ClusterIP do not come any more, but for TCP,
// whose rules must stay for the connections that there are. So then the listening
// sockets go, and with them the guard lets new connections pass by. Where address
// and rules stay (kept), the same goes for UDP in the end.
func (n *node) drain(es []endpoint, kept bool, deadline time.Time) (open int64) {
	var shared, tcp, udp []endpoint
	for _, e := range es {
		switch {
		case n.others.serves[e]:
			shared = append(shared, e)
		case e.proto == "tcp":
			tcp = append(tcp, e)
		case kept:
			udp = append(udp, e)
		}
	}
	for i, leaving := range [][]endpoint{shared, tcp, udp} {
		if i == 2 && len(leaving) == 0 {
			continue
		}
		if i == 1 {
			// The node's own programs have no guard that knows of sockets.
			n.serve(n.onlyShared())
		}
		err := park(leaving)
		if err == nil {
			var left int64
			left, err = n.answering.drain(es, time.Until(deadline))
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
	if len(n.leaving.rules) == 0 {
		return
	}
	time.Sleep(underWay)
	for _, es := range n.leaving.rules {
		if err := readOut(es, time.Now().Add(readOutLimit)); err != nil {
			log.Errorf("leaving: %v", err)
		}
	}
}

// onlyShared returns what of want other processes serve too.
func (n *node) onlyShared() state {
	s := state{rules: map[string][]endpoint{}}
	for b, es := range n.want.rules {
		for _, e := range es {
			if n.others.serves[e] {
				s.rules[b] = append(s.rules[b], e)
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
	if n.want.empty() || n.exited {
		return
	}
	var missing map[string]int
	var err error
	if links {
		missing, err = n.ensure(state{links: n.want.links})
	} else {
		err = n.inTurn(func() (err error) {
			missing, err = n.ensure(n.want)
			if err == nil && n.starting == nil {
				err = n.prune(n.want)
			}
			return err
		})
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
func (n *node) serve(want state) {
	for name, fw := range n.firewalls {
		fw.serve(want.rules[name])
	}
}
