package fastpath

import (
	"bytes"
	"context"
	"math"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
)

// shutdownLimit bounds the wait for answers of a serving that is given up.
const shutdownLimit = 10 * time.Second

type queryKey struct{}

// A query is one that takes the ordinary way, with what is needed to answer it and
// to keep the answer. For the DNS library it is the client's address.
type query struct {
	raw    []byte
	socket *socket
	from   sockaddr
	plain  bool // its answer may be kept
	asked  dns.Question
	// open counts it until it is answered; what is not plain, which the DNS library may
	// drop, until that has it.
	open *atomic.Int64

	// Set by the block that it comes to.
	block   *Block
	key     uint64
	item    *item // nil: its answer can't be kept
	version uint64
	began   int64
	missed  atomic.Bool // the cache plugin did not know it, or refreshes it
}

// Network implements net.Addr.
func (q *query) Network() string { return "udp" }

// String implements net.Addr.
func (q *query) String() string { return q.from.addr().String() }

// enter is called when the query comes to a block with fastpath, and also with what a
// plugin asks CoreDNS on the way to its answer, or for a prefetch at the same time.
func (q *query) enter(b *Block, r *dns.Msg) {
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
	v.misses = &missConn{local: net.UDPAddrFromAddrPort(local), queries: make(chan *query, batch), past: make(chan struct{})}
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
	q := w.RemoteAddr().(*query)
	ctx := v.ctx
	if q.plain {
		defer q.open.Add(-1)
		q.asked = r.Question[0]
		ctx = context.WithValue(ctx, queryKey{}, q)
	}
	v.server.ServeDNS(ctx, &keepingWriter{ResponseWriter: w, serving: v, query: q}, r)
}

// stop lets what is under way be answered, and then frees what v has.
func (v *serving) stop() {
	for v.using.Load() > 0 || len(v.misses.queries) > 0 {
		time.Sleep(sockets.Poll)
	}
	ctx, cancel := context.WithTimeout(context.Background(), shutdownLimit)
	defer cancel()
	v.dns.ShutdownContext(ctx)
}

// keepingWriter sends an answer, and keeps it if it can be sent again.
type keepingWriter struct {
	dns.ResponseWriter
	serving *serving
	query   *query
}

// RemoteAddr implements dns.ResponseWriter.
func (w *keepingWriter) RemoteAddr() net.Addr { return w.query.from.addr() }

// WriteMsg implements dns.ResponseWriter.
func (w *keepingWriter) WriteMsg(m *dns.Msg) error {
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
func (v *serving) keep(q *query, m *dns.Msg, wire []byte) {
	if m.Truncated || len(wire) > maxWire || q.missed.Load() || q.block.isRewritten(q.asked) {
		return
	}
	sh := shape{rcode: m.Rcode, answer: len(m.Answer), ns: len(m.Ns), extras: len(m.Extra)}
	if q.block.alike && m.Rcode == dns.RcodeNameError {
		// shield takes an alias out of the authority section, where it has the cache plugin keep it.
		sh.answer, sh.ns = 0, sh.answer+sh.ns
	}
	compress := m.Compress
	m.Compress = false
	size := m.Len()
	m.Compress = compress
	pointers := size != len(wire)
	if o := m.IsEdns0(); o != nil {
		if slices.ContainsFunc(o.Option, func(e dns.EDNS0) bool { return e.Option() == dns.EDNS0EDE }) {
			return // of this moment
		}
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
	if !ok || s.hits == nil && hits < b.settings.prefetch {
		return
	}
	if b.logged(m, time.Now().UTC()) {
		return
	}
	l, ok := layOut(wire)
	if !ok {
		return
	}
	l.pointers = pointers
	a := &answer{wire: wire, ttls: l.ttls(), source: q.item, version: q.version, key: keyOf(q.raw, false)}
	if b.turns && m.Rcode == dns.RcodeSuccess {
		if a.turned, ok = l.turned(); !ok {
			return
		}
	}
	if b.alike {
		a.spell(l, keyOf(q.raw, true))
	}
	a.responseSize = uint16(min(size, 1<<16-1))
	life := int64(s.ttl) * int64(time.Second)
	a.lo, a.hi = s.lo+life, s.hi+life
	if keepttl {
		a.ttls, a.constant = nil, ttl
	}
	if b.settings.prefetch > 0 {
		// The cache plugin forgets its count when it has not seen a hit for duration.
		a.every = int64(b.settings.duration) / 4
		a.seen, a.window, a.wanted = s.hits, b.settings.duration, int32(min(b.settings.prefetch, math.MaxInt32))
		left := (int64(s.ttl)*int64(b.settings.percentage) + 99) / 100
		a.urgent = a.lo - left*int64(time.Second)
		a.passed.Store(now)
	}
	a.counts = v.countsFor(q, m, !s.answering)
	v.table.add(a, now)
}

// keyOf returns what the answer to a plain query is kept by.
func keyOf(q []byte, lower bool) []byte {
	var form [queryBuffer]byte
	if n := bare(form[:], q, lower); n > 0 {
		return bytes.Clone(form[2:n])
	}
	return q[2:]
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
	queries chan *query
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
	q := to.(*query)
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
