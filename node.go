package nodecache

import (
	"context"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/doctor"
	"github.com/contentful-labs/coredns-nodecache/internal/fastpath"
	"github.com/contentful-labs/coredns-nodecache/internal/life"
	"github.com/contentful-labs/coredns-nodecache/internal/ownquery"
	"github.com/contentful-labs/coredns-nodecache/internal/peers"
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
	// exitLeast is what of exitLimit is left after a lameduck, however long it was, for the
	// drain, and as much again after a drain: enough to take away what has to go.
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
	fast      *fastpath.Listeners
	tcp       sockets.Clients

	member   *peers.Member
	others   peers.Others // as of this process's last turn
	watching watched
	calm     *rate.Limiter // of repairs
	fighting bool          // that limit was reached
	leaving  desired.State // of want, what this process is about to give up
	left     leftRules
	// slowed is until when reports wait that would be looked at too often.
	slowed map[chan struct{}]time.Time

	life  life.Phase[config]
	want  desired.State           // what was last made to stand
	added map[string][]netip.Addr // by the last start to its links
	// goal is what the last reduction was to leave; owing says that it has not been
	// reached, since something failed, and is tried again after pause.
	goal      desired.State
	owing     bool
	pause     time.Duration
	retryAt   *time.Timer // the one try that is to come
	netifs    map[string]*netif
	firewalls map[string]firewall
	auto      string          // what the backend auto has come out as
	exitBegan time.Time       // zero before
	patience  time.Duration   // what of politeness is left
	doubtful  map[string]bool // backends whose rules were last applied in vain
	exits     *net.UnixConn   // where other processes tell of theirs
	syncTick  *time.Ticker
	syncEvery time.Duration
	doctor    *doctor.Doctor
	asker     ownquery.Asker // the doctor's
	services  doctor.Services
	// notInForce is how many endpoints have rules that stand and are not in force.
	notInForce atomic.Int64
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
		member:    peers.New(backendIPT, badLinkName),
		calm:      rate.NewLimiter(rate.Every(time.Second), 10),
		netifs:    map[string]*netif{},
		firewalls: map[string]firewall{},
		doubtful:  map[string]bool{},
		slowed:    map[chan struct{}]time.Time{},
		syncTick:  time.NewTicker(defaultSync),

		examineTick: time.NewTicker(examineEvery),
	}
	n.doctor = doctor.New(append(slices.Clone(doctor.Common), doctor.Fault{Name: ownQueryLost, Find: n.askItself}))
	n.syncTick.Stop()
	n.exiting, n.beginExit = context.WithCancel(context.Background())
	n.fast = fastpath.New(&n.answering)
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
			n.recheck()
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
		if now := time.Now(); !now.Before(n.slowed[c]) {
			n.slowed[c] = now.Add(time.Second) // for all reports until then
			time.AfterFunc(time.Second, func() { poke(c) })
		}
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

// linksInUse returns the names of the links that the configuration in force has, and
// those of other processes: when they leave, their addresses go with them.
func (n *node) linksInUse() (names []string) {
	n.do(func() error {
		names = slices.Collect(maps.Keys(n.netifs))
		o, err := n.member.Ask(peers.AskLimit)
		names = slices.AppendSeq(names, maps.Keys(o.Wants.Links))
		return err
	})
	return names
}

// inTurn runs f while no other process changes the node, knowing what they want. An exit
// waits for a turn as long as its politeness lasts, and then goes on without.
func (n *node) inTurn(f func() error) error {
	ctx, within, answers := n.exiting, peers.TurnLimit, peers.AskLimit
	if n.exited() {
		ctx, within, answers = context.Background(), n.patience, peers.AskLimitAtExit
	}
	began := time.Now()
	end, err := peers.Turn(ctx, within)
	if n.exited() {
		n.patience -= min(time.Since(began), n.patience)
	}
	if err != nil {
		return err
	}
	defer end()
	if n.others, err = n.member.Ask(answers); err != nil {
		return err
	}
	return f()
}

// show tells the other processes what this one wants, and what it serves.
func (n *node) show(want desired.State, serves []desired.Endpoint) error {
	s := peers.Shown{Wants: want, Leaving: n.leaving, Serves: serves}
	if t, ok := n.firewalls[backendIPT].(interface{ variant() string }); ok {
		s.Variant = t.variant()
	}
	return n.member.Show(s)
}
