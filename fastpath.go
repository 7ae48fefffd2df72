package nodecache

import (
	"context"
	"errors"
	"fmt"
	"net"
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
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/cache"
	prom "github.com/coredns/coredns/plugin/metrics"
	"github.com/coredns/coredns/plugin/pkg/transport"
	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"

	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
)

// exact are the plugins that may stand before cache in a block with fastpath: what
// they do to a query that cache answers depends on nothing but its bytes, and none has
// to see each query. (prometheus has to, and is done justice by counts.)
var exact = []string{
	"any", "bufsize", "cancel", "chaos", "errors", "health", "local", "metadata", "nodecache", "nsid", "prometheus", "ready",
}

// fastBlock is a server block with fastpath.
type fastBlock struct {
	at       string // of the option, "file:line"
	entries  int
	ports    []string // of its keys
	config   *dnsserver.Config
	next     plugin.Handler // behind nodecache
	items    *items
	settings cacheSettings
	metrics  *prom.Metrics // nil: the block has no prometheus
}

// attach checks that a block's plugins allow a fast way, and puts a marker behind its
// cache plugin. The chain of plugins has been compiled.
func (b *fastBlock) attach() error {
	if _, err := layout(); err != nil {
		return errorAt(b.at, "fastpath: this build has a plugin cache that nodecache does not know: %w", err)
	}
	refuse := func(name string) error {
		return errorAt(b.at, "fastpath can't go with the plugin %s in a server block: its answers are not the same for everybody, or it has to see every query; take one of the two out", name)
	}
	order := func(name string) int { return slices.Index(dnsserver.Directives, name) }
	for _, h := range b.config.Handlers() {
		if order(h.Name()) < order(directiveName) && !slices.Contains(exact, h.Name()) {
			return refuse(h.Name())
		}
	}
	h := b.next
	for {
		if h == nil {
			return errorAt(b.at, "fastpath needs the plugin cache in the same server block: it sends again what cache has answered")
		}
		if _, ok := h.(*cache.Cache); ok {
			break
		}
		if !slices.Contains(exact, h.Name()) {
			if b.config.Handler("cache") == nil {
				return errorAt(b.at, "fastpath needs the plugin cache in the same server block: it sends again what cache has answered")
			}
			return refuse(h.Name())
		}
		h = nextOf(h)
	}
	c := h.(*cache.Cache)
	var err error
	if b.settings, err = readSettings(c); err != nil {
		return errorAt(b.at, "fastpath: this build has a plugin cache that nodecache does not know: %w", err)
	}
	if m, ok := b.config.Handler("prometheus").(*prom.Metrics); ok {
		b.metrics = m
	}
	b.items = newItems(b.entries, b.settings.staleUpTo)
	if c.Next != nil {
		c.Next = marker{next: c.Next, items: b.items}
	}
	return nil
}

// nextOf returns the plugin behind h, or nil.
func nextOf(h plugin.Handler) plugin.Handler {
	v := reflect.Indirect(reflect.ValueOf(h))
	if v.Kind() != reflect.Struct {
		return nil
	}
	f := v.FieldByName("Next")
	if !f.IsValid() || !f.CanInterface() {
		return nil
	}
	next, _ := f.Interface().(plugin.Handler)
	return next
}

// attachFast gets the blocks with fastpath ready. CoreDNS has made its servers and
// does not listen yet.
func (cfg *config) attachFast(ctx caddy.Context) error {
	if len(cfg.fast) == 0 {
		return nil
	}
	all, err := allConfigs(ctx)
	if err != nil {
		return errorAt(cfg.fast[0].at, "fastpath: this build has a CoreDNS that nodecache does not know: %w", err)
	}
	for _, b := range cfg.fast {
		ours := reflect.ValueOf(b.config.UDPDecorateWriterFunc).Pointer()
		for _, c := range all {
			if c.Transport != transport.DNS || !slices.Contains(b.ports, c.Port) || !slices.ContainsFunc(c.ListenHosts, func(h string) bool { return slices.Contains(b.config.ListenHosts, h) }) {
				continue
			}
			what := ""
			switch f := c.UDPDecorateWriterFunc; {
			case len(c.FilterFuncs) > 0 || c.ViewName != "":
				what = "view"
			case c.ProxyProtoConnPolicy != nil:
				what = "proxyproto"
			case c.NumSockets > 1:
				what = "multisocket"
			case f != nil && reflect.ValueOf(f).Pointer() != ours:
				what = "shed"
			}
			if what != "" {
				return errorAt(b.at, "fastpath can't go with the plugin %s in any server block that listens on the same address: take one of the two out", what)
			}
		}
		if err := b.attach(); err != nil {
			return err
		}
	}
	return nil
}

// allConfigs returns the configurations of all server blocks. CoreDNS has no function
// for that.
func allConfigs(ctx caddy.Context) ([]*dnsserver.Config, error) {
	v := reflect.Indirect(reflect.ValueOf(ctx))
	if v.Kind() != reflect.Struct {
		return nil, fmt.Errorf("its context is a %T", ctx)
	}
	f := v.FieldByName("configs")
	if !f.IsValid() || f.Type() != reflect.TypeFor[[]*dnsserver.Config]() {
		return nil, fmt.Errorf("%T has no list of configurations", ctx)
	}
	var all []*dnsserver.Config
	for i := range f.Len() {
		all = append(all, (*dnsserver.Config)(f.Index(i).UnsafePointer()))
	}
	return all, nil
}

type fastKey struct{}

// A fastQuery is one that takes the ordinary way, with what is needed to answer it and
// to keep the answer. For the DNS library it is the client's address.
type fastQuery struct {
	raw    []byte
	socket *fastSocket
	from   sockaddr
	plain  bool // its answer may be kept
	asked  dns.Question
	// open counts it until it is answered; what is not plain, which the DNS library may
	// drop, until that has it.
	open *atomic.Int64

	// Set by the block that it comes to.
	block   *fastBlock
	key     uint64
	item    *item // nil: its answer can't be kept
	version uint64
	began   int64
	missed  atomic.Bool // the cache plugin did not know it, or refreshes it
}

// Network implements net.Addr.
func (q *fastQuery) Network() string { return "udp" }

// String implements net.Addr.
func (q *fastQuery) String() string { return q.from.addr().String() }

// enter is called when the query comes to a block with fastpath, and also with what a
// plugin asks CoreDNS on the way to its answer, or for a prefetch at the same time.
func (q *fastQuery) enter(b *fastBlock, r *dns.Msg) {
	if !q.plain || len(r.Question) != 1 || r.Question[0] != q.asked {
		return
	}
	q.block = b
	q.key = b.items.key(r)
	q.item, q.version = b.items.look(q.key)
	q.began = sinceEpoch()
}

// A serving is one listen address of one instance.
type serving struct {
	server *dnsserver.Server
	table  *answerTable
	misses *missConn
	dns    *dns.Server // for what the table does not have
	using  atomic.Int64
	ctx    context.Context
	mu     sync.Mutex
	counts map[countsKey]*counts
}

func newServing(s *dnsserver.Server, local netip.AddrPort, entries int) *serving {
	v := &serving{server: s, table: newAnswerTable(entries), counts: map[countsKey]*counts{}}
	v.misses = &missConn{local: net.UDPAddrFromAddrPort(local), queries: make(chan *fastQuery, batch), past: make(chan struct{})}
	// As (*dnsserver.Server).ServePacket does.
	v.ctx = context.WithValue(context.WithValue(context.Background(), dnsserver.Key{}, s), dnsserver.LoopKey{}, 0)
	v.dns = &dns.Server{
		PacketConn: v.misses, Net: "udp", Handler: v, TsigSecret: s.TsigSecret, MsgAcceptFunc: acceptFunc(s),
	}
	started := make(chan struct{})
	v.dns.NotifyStartedFunc = func() { close(started) }
	go func() {
		if err := v.dns.ActivateAndServe(); err != nil {
			log.Errorf("serving %s: %v", local, err)
		}
	}()
	<-started
	return v
}

// acceptFunc returns the server's own rule, which it has where a plugin takes further
// opcodes.
func acceptFunc(s *dnsserver.Server) dns.MsgAcceptFunc {
	v := reflect.ValueOf(s).Elem().FieldByName("allowedOpcodes")
	if !v.IsValid() || v.Kind() != reflect.Map || v.Len() == 0 {
		return nil
	}
	return func(h dns.Header) dns.MsgAcceptAction {
		action := dns.DefaultMsgAcceptFunc(h)
		opcode := int(h.Bits>>11) & 0xf
		if action != dns.MsgRejectNotImplemented || !v.MapIndex(reflect.ValueOf(opcode)).IsValid() {
			return action
		}
		if h.Qdcount != 1 {
			return dns.MsgReject
		}
		return dns.MsgAccept
	}
}

// ServeDNS implements dns.Handler: the ordinary way.
func (v *serving) ServeDNS(w dns.ResponseWriter, r *dns.Msg) {
	q := w.RemoteAddr().(*fastQuery)
	ctx := v.ctx
	if q.plain {
		defer q.open.Add(-1)
		q.asked = r.Question[0]
		ctx = context.WithValue(ctx, fastKey{}, q)
	}
	v.server.ServeDNS(ctx, &fastWriter{ResponseWriter: w, serving: v, query: q}, r)
}

// stop lets what is under way be answered, and then frees what v has.
func (v *serving) stop() {
	for v.using.Load() > 0 || len(v.misses.queries) > 0 {
		time.Sleep(sockets.Poll)
	}
	ctx, cancel := context.WithTimeout(context.Background(), drainLimit)
	defer cancel()
	v.dns.ShutdownContext(ctx)
}

// fastWriter sends an answer, and keeps it if it can be sent again.
type fastWriter struct {
	dns.ResponseWriter
	serving *serving
	query   *fastQuery
}

// RemoteAddr implements dns.ResponseWriter.
func (w *fastWriter) RemoteAddr() net.Addr { return w.query.from.addr() }

// WriteMsg implements dns.ResponseWriter.
func (w *fastWriter) WriteMsg(m *dns.Msg) error {
	q := w.query
	if q.item == nil || q.missed.Load() {
		return w.ResponseWriter.WriteMsg(m)
	}
	wire, err := m.Pack()
	if err != nil {
		return err
	}
	_, err = w.Write(wire)
	if err == nil {
		w.serving.keep(q, m, wire)
	}
	return err
}

// keep puts an answer into the table if the cache plugin made it from an item that is
// known.
func (v *serving) keep(q *fastQuery, m *dns.Msg, wire []byte) {
	if m.Truncated || len(wire) > maxWire || q.missed.Load() {
		return
	}
	sh := shape{rcode: m.Rcode, answer: len(m.Answer), ns: len(m.Ns), extras: len(m.Extra)}
	compress := m.Compress
	m.Compress = false
	size := m.Len()
	m.Compress = compress
	if m.IsEdns0() != nil {
		sh.extras--
		size -= optLen // it comes last
	}
	ttl, ok := commonTTL(m)
	if !ok {
		return
	}
	b, now := q.block, sinceEpoch()
	keepttl := b.settings.keepttl
	s, hits, ok := b.items.confirm(q.key, q.item, q.version, sh, ttl, keepttl, q.began, now)
	if !ok || hits < b.settings.prefetch {
		return
	}
	ttls, ok := ttlOffsets(wire)
	if !ok {
		return
	}
	a := &answer{wire: wire, ttls: ttls, source: q.item, version: q.version, key: q.raw[2:]}
	a.querySize, a.responseSize = uint16(len(q.raw)), uint16(min(size, 1<<16-1))
	life := int64(s.ttl) * int64(time.Second)
	a.lo, a.hi = s.lo+life, s.hi+life
	if keepttl {
		a.ttls, a.constant = nil, ttl
	}
	if b.settings.prefetch > 0 {
		// The cache plugin forgets its count when it has not seen a hit for duration.
		a.every = int64(b.settings.duration) / 4
		left := (int64(s.ttl)*int64(b.settings.percentage) + 99) / 100
		a.urgent = a.lo - left*int64(time.Second)
		a.passed.Store(now)
	}
	a.counts = v.countsFor(q, m, !s.answering)
	v.table.add(a, now)
}

// commonTTL returns the TTL of all records, which the cache plugin makes the same. It
// is false if they have none.
func commonTTL(m *dns.Msg) (ttl uint32, ok bool) {
	for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			h := rr.Header()
			switch {
			case h.Rrtype == dns.TypeOPT:
			case !ok:
				ttl, ok = h.Ttl, true
			case h.Ttl != ttl:
				return 0, false
			}
		}
	}
	return ttl, ok
}

// missConn hands the DNS library what the table does not have.
type missConn struct {
	local   *net.UDPAddr
	queries chan *fastQuery
	past    chan struct{} // closed when a read deadline has passed
	once    sync.Once
}

// ReadFrom implements net.PacketConn.
func (c *missConn) ReadFrom(b []byte) (int, net.Addr, error) {
	select {
	case q := <-c.queries:
		if !q.plain {
			q.open.Add(-1)
		}
		return copy(b, q.raw), q, nil
	case <-c.past:
		return 0, nil, net.ErrClosed
	}
}

// WriteTo implements net.PacketConn.
func (c *missConn) WriteTo(b []byte, to net.Addr) (int, error) {
	q := to.(*fastQuery)
	return q.socket.send(b, &q.from)
}

// SetReadDeadline implements net.PacketConn. Only a shutdown sets one long past; that of
// a read can have passed too, if the process was stopped for a while.
func (c *missConn) SetReadDeadline(t time.Time) error {
	if t.Before(epoch) {
		c.Close()
	}
	return nil
}

// Close implements net.PacketConn.
func (c *missConn) Close() error {
	c.once.Do(func() { close(c.past) })
	return nil
}

// LocalAddr implements net.PacketConn.
func (c *missConn) LocalAddr() net.Addr { return c.local }

// SetDeadline implements net.PacketConn.
func (c *missConn) SetDeadline(time.Time) error { return nil }

// SetWriteDeadline implements net.PacketConn.
func (c *missConn) SetWriteDeadline(time.Time) error { return nil }

// A fastListener is a listen address with sockets of our own. It outlives instances.
type fastListener struct {
	at      desired.Endpoint
	sockets []*fastSocket
	serving atomic.Pointer[serving]
	closing atomic.Bool
	done    sync.WaitGroup
}

// fastpath is the listeners of the process. It has a lock of its own, since CoreDNS
// calls it from where its servers begin.
type fastpath struct {
	answering *sockets.Counter
	mu        sync.Mutex
	listeners map[desired.Endpoint]*fastListener
	cpus      int
	following bool         // see follow
	ending    atomic.Int64 // servings and listeners with queries under way
}

// end calls stop, which finish waits for.
func (f *fastpath) end(stop func()) {
	f.ending.Add(1)
	go func() {
		stop()
		f.ending.Add(-1)
	}()
}

// finish waits until what an instance has under way is answered: its servers do not
// know of it when they stop, and soon its plugins and addresses go.
func (f *fastpath) finish(limit time.Duration) {
	for deadline := time.Now().Add(limit); f.ending.Load() > 0 && time.Now().Before(deadline); {
		time.Sleep(sockets.Poll)
	}
}

// spare sees to it that Go's scheduler has a P to spare while there are workers. A
// worker that waits in the kernel keeps its own only if there is another that is idle;
// else the runtime's monitor takes it away within 20 us, each time, which doubles what
// a query costs at moderate rates.
func (f *fastpath) spare(yes bool) {
	if yes {
		f.cpus = runtime.GOMAXPROCS(0)
	}
	if f.cpus > 1 {
		return
	}
	if yes {
		runtime.GOMAXPROCS(2)
	} else {
		runtime.GOMAXPROCS(1)
	}
}

// serve is called when CoreDNS begins to serve an address: all of its sockets are
// open, so that the configuration is in force. From here on no answer of another one
// is sent from the table.
func (f *fastpath) serve(cfg *config, s *dnsserver.Server) {
	at, err := netip.ParseAddrPort(strings.TrimPrefix(s.Addr, transport.DNS+"://"))
	if err != nil || at.Addr().Zone() != "" {
		return // an address of bind's interface, which is good for one link only
	}
	e := desired.Endpoint{Addr: at.Addr(), Proto: "udp", Port: at.Port()}
	entries := cfg.fastAt[e]
	f.mu.Lock()
	defer f.mu.Unlock()
	if l := f.listeners[e]; l != nil {
		f.use(l, newServing(s, at, entries))
		return
	}
	if entries == 0 {
		return
	}
	v := newServing(s, at, entries)
	if len(f.listeners) == 0 {
		f.spare(true)
	}
	l := &fastListener{at: e}
	l.serving.Store(v)
	if err := l.open(f.cpus, f.answering); err != nil {
		log.Errorf("fastpath: opening sockets on %s, which CoreDNS serves alone now: %v", e, err)
		go v.stop()
		if len(f.listeners) == 0 {
			f.spare(false)
		}
		return
	}
	f.listeners[e] = l
	if err := l.park(false); err != nil {
		log.Errorf("fastpath: parking CoreDNS's own socket on %s, so that it still gets a share of the queries: %v", e, err)
	}
}

// park parks this process's sockets on the address: CoreDNS's own, so that all queries
// come to ours, or ours.
func (l *fastListener) park(ours bool) error {
	all, err := sockets.Own()
	if err != nil {
		return err
	}
	var errs []error
	for _, fd := range all[l.at] {
		if slices.ContainsFunc(l.sockets, func(s *fastSocket) bool { return s.fd == fd }) == ours {
			errs = append(errs, sockets.ParkUDP(fd, l.at))
		}
	}
	return errors.Join(errs...)
}

// only closes the sockets on the addresses that the instance in force, of cfg or
// without nodecache, does not listen on. The others stay, also where fastpath is off
// now, and queries go from there to CoreDNS: its own sockets can't be released again,
// since in Linux a disconnected IPv6 socket goes on to take its former peer's packets
// only (sk_v6_daddr outlives __udp_disconnect in net/ipv4/udp.c; seen on 6.18).
func (f *fastpath) only(cfg *config) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for e, l := range f.listeners {
		if cfg != nil && cfg.fastAt[e] > 0 {
			continue
		}
		if s := serverAt(e); s != nil {
			if l.serving.Load().server != s {
				f.use(l, newServing(s, netip.AddrPortFrom(e.Addr, e.Port), 0))
			}
			continue
		}
		delete(f.listeners, e)
		if err := l.park(true); err != nil {
			log.Errorf("fastpath: leaving %s: %v", e, err)
		}
		f.end(l.close)
		if len(f.listeners) == 0 {
			f.spare(false)
		}
	}
	follow := cfg == nil && len(f.listeners) > 0
	if follow && !f.following {
		go f.follow()
	}
	f.following = follow
}

// follow sees to the sockets while no configuration has nodecache, whose later reloads
// nobody tells us of.
func (f *fastpath) follow() {
	for following := true; following; {
		time.Sleep(settle)
		if len(caddy.Instances()) == 1 { // no reload is under way
			f.mu.Lock()
			following = f.following
			f.mu.Unlock()
			if following {
				f.only(nil)
			}
		}
	}
}

// serverAt returns the server on an address of CoreDNS's newest instance, or nil. Caddy
// has them, but no function that returns one.
func serverAt(e desired.Endpoint) *dnsserver.Server {
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
		if at, err := netip.ParseAddrPort(strings.TrimPrefix(s.Addr, transport.DNS+"://")); err == nil && at == netip.AddrPortFrom(e.Addr, e.Port) {
			return s
		}
	}
	return nil
}

// use has queries go to v from now on.
func (f *fastpath) use(l *fastListener, v *serving) { f.end(l.serving.Swap(v).stop) }

// open opens a socket a CPU and begins to answer on them.
func (l *fastListener) open(cpus int, answering *sockets.Counter) error {
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
		l.done.Go(func() { s.run(l, answering) })
	}
	return nil
}

// close answers what the sockets hold, and closes them. They are parked.
func (l *fastListener) close() {
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
func (f *fastpath) entries() (n int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, l := range f.listeners {
		n += l.serving.Load().table.entries.Load()
	}
	return n
}
