package fastpath

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/cache"
	"github.com/coredns/coredns/plugin/cache/freq"
	"github.com/miekg/dns"
)

// An item is what is known of the cache plugin's items for one question: what it
// answers depends on the name, the type, and the DO and CD bits of a query, and it has
// up to one positive and one negative item for these.
type item struct {
	// version changes before a new item can be answered from, and once more after
	// it has been stored. An answer is made from a version and good for it only.
	version atomic.Uint64

	// Below the lock of the items.
	storing int    // how many are just being stored
	several bool   // one has been stored since storing was 0
	known   stored // of the newest item, if valid
	valid   bool
	mixed   int64 // until when it can't be told which of several items is answered from
	until   int64 // until when known can be answered from
	hits    int   // that were seen, while they are needed
}

// stored is what an answer from an item has to agree with.
type stored struct {
	hits   *freq.Freq // the cache plugin's count of the item's hits; nil: it may be one of several
	lo, hi int64      // when it was stored, in ns since the epoch; several at about the same time differ
	ttl    uint32
	shape
}

// shape is what tells the items for one question apart.
type shape struct {
	rcode              int
	answering          bool // the answer has what was asked for
	soa                bool // the authority section has a SOA record
	answer, ns, extras int  // numbers of records
}

// The cache plugin does not say when it has stored an item, to the nanosecond, or with
// which TTL, and how it was configured, so these are read out of its fields. layout is
// where they are. A CoreDNS whose plugin has others makes fastpath an error.
var layout = sync.OnceValues(findLayout)

type itemLayout struct {
	last                                                          uintptr // in cache.ResponseWriter
	ttl, stored, rcode, answering, answer, authority, extra, hits uintptr // in the item
}

func findLayout() (l itemLayout, err error) {
	field := func(t reflect.Type, name string, want reflect.Type) uintptr {
		f, ok := t.FieldByName(name)
		if !ok || want != nil && f.Type != want {
			err = errors.Join(err, fmt.Errorf("%s has no field %s of the type %v", t, name, want))
		}
		return f.Offset
	}
	w := reflect.TypeFor[cache.ResponseWriter]()
	l.last = field(w, "lastItem", nil)
	f, ok := w.FieldByName("lastItem")
	if !ok || f.Type.Kind() != reflect.Pointer || f.Type.Elem().Kind() != reflect.Struct {
		return l, errors.Join(err, fmt.Errorf("%s has no field lastItem that points to an item", w))
	}
	i := f.Type.Elem()
	rrs := reflect.TypeFor[[]dns.RR]()
	l.ttl = field(i, "origTTL", reflect.TypeFor[uint32]())
	l.stored = field(i, "stored", reflect.TypeFor[time.Time]())
	l.rcode = field(i, "Rcode", reflect.TypeFor[int]())
	l.answering = field(i, "answering", reflect.TypeFor[bool]())
	l.answer = field(i, "Answer", rrs)
	l.authority = field(i, "Ns", rrs)
	l.extra = field(i, "Extra", rrs)
	l.hits = field(i, "Freq", reflect.TypeFor[*freq.Freq]())
	return l, err
}

// lastItem returns what w has stored for the last response that was written to it.
func lastItem(w *cache.ResponseWriter) (s stored, ok bool) {
	l, _ := layout()
	i := *(*unsafe.Pointer)(unsafe.Add(unsafe.Pointer(w), l.last))
	if i == nil {
		return s, false
	}
	s.lo = int64((*time.Time)(unsafe.Add(i, l.stored)).Sub(epoch))
	s.hi = s.lo
	s.ttl = *(*uint32)(unsafe.Add(i, l.ttl))
	s.rcode = *(*int)(unsafe.Add(i, l.rcode))
	s.answering = *(*bool)(unsafe.Add(i, l.answering))
	s.answer = len(*(*[]dns.RR)(unsafe.Add(i, l.answer)))
	authority := *(*[]dns.RR)(unsafe.Add(i, l.authority))
	s.ns = len(authority)
	for _, rr := range authority {
		s.soa = s.soa || rr.Header().Rrtype == dns.TypeSOA
	}
	s.extras = len(*(*[]dns.RR)(unsafe.Add(i, l.extra)))
	s.hits = *(**freq.Freq)(unsafe.Add(i, l.hits))
	return s, true
}

// cacheSettings are those of a block's cache plugin that matter here.
type cacheSettings struct {
	prefetch   int // hits; 0: no prefetching
	duration   time.Duration
	percentage int // of the TTL
	keepttl    bool
	staleUpTo  time.Duration
	zones      string // the label of its metrics
}

func readSettings(c *cache.Cache) (s cacheSettings, err error) {
	v := reflect.ValueOf(c).Elem()
	field := func(name string, kind reflect.Kind) reflect.Value {
		f := v.FieldByName(name)
		if !f.IsValid() || f.Kind() != kind {
			err = errors.Join(err, fmt.Errorf("%s has no field %s of the kind %v", v.Type(), name, kind))
			return reflect.Zero(map[reflect.Kind]reflect.Type{
				reflect.Int: reflect.TypeFor[int](), reflect.Int64: reflect.TypeFor[int64](),
				reflect.Bool: reflect.TypeFor[bool](), reflect.String: reflect.TypeFor[string](),
			}[kind])
		}
		return f
	}
	s.prefetch = int(field("prefetch", reflect.Int).Int())
	s.duration = time.Duration(field("duration", reflect.Int64).Int())
	s.percentage = int(field("percentage", reflect.Int).Int())
	s.keepttl = field("keepttl", reflect.Bool).Bool()
	s.staleUpTo = time.Duration(field("staleUpTo", reflect.Int64).Int())
	s.zones = field("zonesMetricLabel", reflect.String).String()
	return s, err
}

// items is what is known of all the items of one cache plugin.
type items struct {
	seed   maphash.Seed
	stale  int64 // how long after their TTL items are answered from, in ns
	limit  int   // of a shard
	shards [16]struct {
		sync.Mutex
		m map[uint64]*item
	}
}

func newItems(limit int, stale time.Duration) *items {
	it := &items{seed: maphash.MakeSeed(), stale: int64(stale)}
	it.limit = max(limit/len(it.shards), 1)
	for i := range it.shards {
		it.shards[i].m = map[uint64]*item{}
	}
	return it
}

// key is the hash of what the cache plugin goes by.
func (it *items) key(r *dns.Msg) uint64 {
	var h maphash.Hash
	h.SetSeed(it.seed)
	q := r.Question[0]
	h.WriteString(strings.ToLower(q.Name))
	bits := byte(0)
	if o := r.IsEdns0(); o != nil && o.Do() {
		bits = 1
	}
	if r.CheckingDisabled {
		bits |= 2
	}
	h.Write([]byte{byte(q.Qtype >> 8), byte(q.Qtype), bits})
	return h.Sum64()
}

// begin notes that an item is about to be stored.
func (it *items) begin(key uint64) *item {
	s := &it.shards[key%uint64(len(it.shards))]
	s.Lock()
	defer s.Unlock()
	i := s.m[key]
	if i == nil {
		if len(s.m) >= it.limit {
			it.evict(s.m)
		}
		i = &item{}
		s.m[key] = i
	}
	i.version.Add(1)
	if i.storing == 0 {
		i.several = false
	}
	i.storing++
	return i
}

// evict forgets one of a few at random: one that is over or that no answer was made
// from, rather than one that is in use.
func (it *items) evict(m map[uint64]*item) {
	now := sinceEpoch()
	var victim uint64
	best, seen := -1, 0
	for key, i := range m {
		worth := 2
		switch {
		case i.storing > 0:
			continue
		case i.until < now:
			worth = 0
		case i.hits == 0:
			worth = 1
		}
		if best < 0 || worth < best {
			victim, best = key, worth
		}
		if seen++; best == 0 || seen == 8 {
			break
		}
	}
	if best >= 0 {
		m[victim].version.Add(1)
		delete(m, victim)
	}
}

// end notes that it was stored, or with new nil that it was not.
func (it *items) end(key uint64, i *item, new *stored) {
	s := &it.shards[key%uint64(len(it.shards))]
	s.Lock()
	defer s.Unlock()
	i.storing--
	i.version.Add(1)
	if new == nil {
		return
	}
	until := new.hi + int64(new.ttl)*int64(time.Second) + it.stale
	alike := i.known.shape == new.shape
	switch {
	case !i.valid && i.until == 0:
		i.known = *new
	case i.several && alike && i.known.ttl == new.ttl:
		// Which of the two has replaced the other can't be told.
		i.known.lo, i.known.hi = min(i.known.lo, new.lo), max(i.known.hi, new.hi)
		i.known.hits = nil
	case i.several, !alike && i.until > new.lo:
		// Of two that differ either may be answered from, for as long as it lasts.
		i.mixed = max(i.mixed, i.until, until)
		i.known = *new
	default:
		i.known = *new
	}
	i.several = true
	i.valid = true
	i.until = max(until, i.mixed)
}

// look returns the item that a query is answered from and its version, or nil if
// that is not known.
func (it *items) look(key uint64) (*item, uint64) {
	s := &it.shards[key%uint64(len(it.shards))]
	s.Lock()
	defer s.Unlock()
	i := s.m[key]
	if i == nil || i.storing > 0 || !i.valid {
		return nil, 0
	}
	return i, i.version.Load()
}

// confirm returns what an answer of this shape was made from, given that it was made
// between began and now and has this TTL, and how many such there have been. It is
// false if that can't be told.
func (it *items) confirm(key uint64, i *item, version uint64, sh shape, ttl uint32, keep bool, began, now int64) (s stored, hits int, ok bool) {
	h := &it.shards[key%uint64(len(it.shards))]
	h.Lock()
	defer h.Unlock()
	s = i.known
	if i.version.Load() != version || i.storing > 0 || began < i.mixed {
		return s, 0, false
	}
	if s.rcode != sh.rcode || s.answer != sh.answer || s.ns != sh.ns || s.extras != sh.extras {
		return s, 0, false
	}
	if !s.answering && !(s.soa && (s.rcode == dns.RcodeSuccess || s.rcode == dns.RcodeNameError)) {
		return s, 0, false // neither an answer nor a proper denial
	}
	most := int64(s.ttl) - (began-s.hi)/int64(time.Second)
	least := int64(s.ttl) - (now-s.lo)/int64(time.Second)
	if least <= 0 || keep && ttl != s.ttl || !keep && (int64(ttl) > most || int64(ttl) < least) {
		return s, 0, false // a stale answer, or one of another item
	}
	i.hits++
	return s, i.hits, true
}

// A marker stands right behind the cache plugin. What comes here the cache plugin could
// not answer, or wants anew; what goes back through here it may store.
type marker struct {
	next  plugin.Handler
	items *items
}

// Name implements plugin.Handler. The marker goes under the name of what it hides.
func (m marker) Name() string { return m.next.Name() }

// ServeDNS implements plugin.Handler.
func (m marker) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	if q, ok := ctx.Value(queryKey{}).(*query); ok {
		q.missed.Store(true)
	}
	to := cacheWriter(w)
	if to == nil || len(r.Question) != 1 || r.Question[0].Qclass != dns.ClassINET {
		return m.next.ServeDNS(ctx, w, r)
	}
	mw := &markedWriter{ResponseWriter: w, to: to, items: m.items, key: m.items.key(r)}
	code, err := m.next.ServeDNS(ctx, mw, r)
	if !mw.written {
		// The cache plugin may store a failure now.
		m.items.end(mw.key, m.items.begin(mw.key), nil)
	}
	return code, err
}

// cacheWriter returns the writer by which the cache plugin stores, or nil.
func cacheWriter(w dns.ResponseWriter) *cache.ResponseWriter {
	for range 4 { // CoreDNS wraps it, and so may the cache plugin
		if c, ok := w.(*cache.ResponseWriter); ok {
			return c
		}
		v := reflect.ValueOf(w)
		if v.Kind() != reflect.Pointer || v.Elem().Kind() != reflect.Struct {
			return nil
		}
		f := v.Elem().FieldByName("ResponseWriter")
		if !f.IsValid() || !f.CanInterface() {
			return nil
		}
		inner, ok := f.Interface().(dns.ResponseWriter)
		if !ok {
			return nil
		}
		w = inner
	}
	return nil
}

type markedWriter struct {
	dns.ResponseWriter
	to      *cache.ResponseWriter
	items   *items
	key     uint64
	written bool
}

// WriteMsg implements dns.ResponseWriter.
func (w *markedWriter) WriteMsg(m *dns.Msg) error {
	w.written = true
	i := w.items.begin(w.key)
	err := w.ResponseWriter.WriteMsg(m)
	if s, ok := lastItem(w.to); ok {
		w.items.end(w.key, i, &s)
	} else {
		w.items.end(w.key, i, nil)
	}
	return err
}
