package fastpath

import (
	"errors"
	"net/netip"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin/pkg/transport"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
)

// followEvery is how often follow looks whether the instance in force has changed.
const followEvery = 50 * time.Millisecond

// A listener is a listen address with sockets of our own. It outlives instances.
type listener struct {
	at      netip.AddrPort
	sockets []*socket
	serving atomic.Pointer[serving]
	closing atomic.Bool
	done    sync.WaitGroup
}

// Listeners are those of the process. They have a lock of their own, since CoreDNS
// calls them from where its servers begin.
type Listeners struct {
	answering *sockets.Counter
	mu        sync.Mutex
	listeners map[netip.AddrPort]*listener
	following bool         // see follow
	ending    atomic.Int64 // servings and listeners with queries under way
}

// New returns the listeners of a process, none yet, that count in answering what is being
// answered. The metrics are those of the newest.
func New(answering *sockets.Counter) *Listeners {
	f := &Listeners{answering: answering, listeners: map[netip.AddrPort]*listener{}}
	newest.Store(f)
	return f
}

// newest are the listeners of the process; tests make others.
var newest atomic.Pointer[Listeners]

// endpoint returns a listen address as the sockets of a process are known by.
func endpoint(at netip.AddrPort) desired.Endpoint {
	return desired.Endpoint{Addr: at.Addr(), Proto: "udp", Port: at.Port()}
}

// end calls stop, which Finish waits for.
func (f *Listeners) end(stop func()) {
	f.ending.Add(1)
	go func() {
		stop()
		f.ending.Add(-1)
	}()
}

// Finish waits until what an instance has under way is answered: its servers do not
// know of it when they stop, and soon its plugins and addresses go.
func (f *Listeners) Finish(limit time.Duration) {
	for deadline := time.Now().Add(limit); f.ending.Load() > 0 && time.Now().Before(deadline); {
		time.Sleep(sockets.Poll)
	}
}

// Serve is called when CoreDNS begins to serve an address: all of its sockets are
// open, so that the configuration is in force. From here on no answer of another one
// is sent from the table. entries is how many answers are kept for the addresses that have
// fastpath.
func (f *Listeners) Serve(s *dnsserver.Server, entries map[netip.AddrPort]int) {
	at, err := netip.ParseAddrPort(strings.TrimPrefix(s.Addr, transport.DNS+"://"))
	if err != nil || at.Addr().Zone() != "" {
		return // an address of bind's interface, which is good for one link only
	}
	n := entries[at]
	f.mu.Lock()
	defer f.mu.Unlock()
	if l := f.listeners[at]; l != nil {
		f.use(l, newServing(s, at, n))
		return
	}
	if n == 0 {
		return
	}
	v := newServing(s, at, n)
	l := &listener{at: at}
	l.serving.Store(v)
	if err := l.open(runtime.GOMAXPROCS(0), f.answering); err != nil {
		log.Errorf("fastpath: opening sockets on %s, which CoreDNS serves alone now: %v", endpoint(at), err)
		go v.stop()
		return
	}
	f.listeners[at] = l
	if err := l.park(false); err != nil {
		log.Errorf("fastpath: parking CoreDNS's own socket on %s, so that it still gets a share of the queries: %v", endpoint(at), err)
	}
}

// park parks this process's sockets on the address: CoreDNS's own, so that all queries
// come to ours, or ours.
func (l *listener) park(ours bool) error {
	all, err := sockets.Own()
	if err != nil {
		return err
	}
	var errs []error
	for _, fd := range all[endpoint(l.at)] {
		if slices.ContainsFunc(l.sockets, func(s *socket) bool { return s.fd == fd }) == ours {
			errs = append(errs, sockets.ParkUDP(fd, endpoint(l.at)))
		}
	}
	return errors.Join(errs...)
}

// Only closes the sockets on the addresses that the instance in force does not listen on.
// The others stay, also where fastpath is off now, and queries go from there to CoreDNS:
// its own sockets can't be released again, since in Linux a disconnected IPv6 socket goes
// on to take its former peer's packets only (sk_v6_daddr outlives __udp_disconnect in
// net/ipv4/udp.c; seen on 6.18). entries are those of the configuration in force, and nil
// if that has no nodecache: then nobody tells of the next one.
func (f *Listeners) Only(entries map[netip.AddrPort]int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for at, l := range f.listeners {
		if entries[at] > 0 {
			continue
		}
		if s := serverAt(at); s != nil {
			if l.serving.Load().server != s {
				f.use(l, newServing(s, at, 0))
			}
			continue
		}
		delete(f.listeners, at)
		if err := l.park(true); err != nil {
			log.Errorf("fastpath: leaving %s: %v", endpoint(at), err)
		}
		f.end(l.close)
	}
	follow := entries == nil && len(f.listeners) > 0
	if follow && !f.following {
		go f.follow()
	}
	f.following = follow
}

// follow sees to the sockets while no configuration has nodecache, whose later reloads
// nobody tells us of.
func (f *Listeners) follow() {
	for following := true; following; {
		time.Sleep(followEvery)
		if len(caddy.Instances()) == 1 { // no reload is under way
			f.mu.Lock()
			following = f.following
			f.mu.Unlock()
			if following {
				f.Only(nil)
			}
		}
	}
}

// serverAt returns the server on an address of CoreDNS's newest instance, or nil. Caddy
// has them, but no function that returns one.
func serverAt(at netip.AddrPort) *dnsserver.Server {
	all := caddy.Instances()
	if len(all) == 0 {
		return nil
	}
	for _, listener := range all[len(all)-1].Servers() {
		f := reflect.ValueOf(listener).FieldByName("server")
		if !f.IsValid() || f.Kind() != reflect.Interface || f.Elem().Type() != reflect.TypeFor[*dnsserver.Server]() {
			continue
		}
		s := (*dnsserver.Server)(f.Elem().UnsafePointer())
		if of, err := netip.ParseAddrPort(strings.TrimPrefix(s.Addr, transport.DNS+"://")); err == nil && of == at {
			return s
		}
	}
	return nil
}

// use has queries go to v from now on.
func (f *Listeners) use(l *listener, v *serving) { f.end(l.serving.Swap(v).stop) }

// open opens a socket a CPU and begins to answer on them.
func (l *listener) open(cpus int, answering *sockets.Counter) error {
	for range cpus {
		s, err := openSocket(l.at)
		if err != nil {
			for _, s := range l.sockets {
				s.close()
			}
			return err
		}
		l.sockets = append(l.sockets, s)
	}
	for _, s := range l.sockets {
		w := &worker{socket: s, listener: l, answering: answering}
		l.done.Go(w.run)
	}
	return nil
}

// close answers what the sockets hold, and closes them. They are parked.
func (l *listener) close() {
	l.closing.Store(true)
	for _, s := range l.sockets {
		s.wake()
	}
	l.done.Wait()
	l.serving.Load().stop()
	for _, s := range l.sockets {
		s.close()
	}
}

// entries returns how many answers are kept in all.
func (f *Listeners) entries() (n int64) {
	if f == nil {
		return 0
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, l := range f.listeners {
		n += l.serving.Load().table.entries.Load()
	}
	return n
}
