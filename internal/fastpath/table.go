package fastpath

import (
	"bytes"
	"encoding/binary"
	"hash/maphash"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coredns/coredns/plugin/cache/freq"
)

const (
	ways = 7 // entries of one bucket
	// asked is how many looks for room an entry outlives that has been asked for.
	asked          = 2
	DefaultEntries = 1 << 14
	MinEntries     = 64
	MaxEntries     = 1 << 24
	// maxWire bounds the answers that are kept: larger ones do not fit a packet of
	// IPv6's smallest MTU, and are rare.
	maxWire = 1232
	// meanEntry is how many bytes an entry may take on average, all that belongs to
	// it counted. Those with one address take about 550.
	meanEntry = 640
	// overhead is what an entry takes beside its bytes: the answer itself and what is
	// known of the item.
	overhead = 384
	// urgentPass is how long hits keep to the fast way after one that was to have the
	// cache plugin prefetch: a prefetch takes as long as the upstream does.
	urgentPass = 100 * time.Millisecond
)

// epoch is what the times of entries and items count from. They are monotonic.
var epoch = time.Now()

func sinceEpoch() int64 { return int64(time.Since(epoch)) }

// An answer is a response that can be sent again: the same query gets the same bytes,
// but for the ID and the TTLs. It does not change once it is in the table.
type answer struct {
	key          []byte // the query without its ID
	wire         []byte // the response
	ttls         []uint16
	hash         uint64
	lo, hi       int64  // its TTL is over between the two, in ns since the epoch
	constant     uint32 // a TTL that does not count down (keepttl), or 0
	source       *item  // what the cache plugin has answered from
	version      uint64 // of the source
	counts       *counts
	responseSize uint16 // before it is made to fit the client, as it is counted

	used atomic.Int32 // a hit sets it to asked; each look at its bucket for room takes one off

	// A hit goes the ordinary way now and then, so that the cache plugin sees that the
	// name is asked for, and prefetches it.
	every  int64 // 0: never
	urgent int64 // from when on it is to prefetch, in ns since the epoch
	passed atomic.Int64
	// seen is where the cache plugin counts hits, if that is known. It is made up there for up
	// to wanted hits that it has not seen.
	seen   *freq.Freq
	window time.Duration
	wanted int32
	unseen atomic.Int32

	spelled []uint16 // where the name that was asked for is spelled out, if each client gets its own spelling
	turned  []turn   // what comes in another order each time
}

// size is what an answer takes of the memory that a table may have.
func (a *answer) size() int64 {
	return int64(len(a.key)+len(a.wire)+2*len(a.ttls)+2*len(a.spelled)+turnSize*records(a.turned)) + overhead
}

// over tells whether a can't be sent any more.
func (a *answer) over(now int64) bool {
	return now >= a.lo || a.source.version.Load() != a.version
}

// ttl returns the TTL that CoreDNS would answer with, in seconds. It is false when the
// ordinary way has to be taken: the TTL is over, the cache plugin has a newer item, or
// the moment is so close to the turn of a second that the TTL can't be told.
func (a *answer) ttl(now int64) (uint32, bool) {
	if a.over(now) {
		return 0, false
	}
	if a.constant != 0 {
		return a.constant, true
	}
	s := seconds(a.lo - now)
	return uint32(s), s == seconds(a.hi-now)
}

// seconds rounds up: the cache plugin takes the whole seconds since an item was stored
// from its TTL.
func seconds(ns int64) int64 { return (ns + int64(time.Second) - 1) / int64(time.Second) }

// pass tells whether a hit has to go the ordinary way, to be counted there.
func (a *answer) pass(now int64) bool {
	if a.every == 0 {
		return false
	}
	last, every, since := a.passed.Load(), a.every, int64(0)
	if now >= a.urgent {
		every, since = min(every, int64(urgentPass)), a.urgent
	}
	if (now-last >= every || last < since) && a.passed.CompareAndSwap(last, now) {
		a.makeUp()
		return true
	}
	if a.seen != nil && a.unseen.Load() < a.wanted {
		a.unseen.Add(1)
	}
	return false
}

// makeUp has the cache plugin know of the hits that it has not seen.
func (a *answer) makeUp() {
	if a.seen == nil {
		return
	}
	now := time.Now()
	for range a.unseen.Swap(0) {
		a.seen.Update(a.window, now)
	}
}

// put writes the response to the query q into dst, which is large enough, and returns
// its length.
func (a *answer) put(dst, q []byte, ttl uint32) int {
	n := copy(dst, a.wire)
	dst[0], dst[1] = q[0], q[1]
	for _, off := range a.ttls {
		binary.BigEndian.PutUint32(dst[off:], ttl)
	}
	if a.spelled != nil {
		asked := q[headerLen : headerLen+nameLen(q)]
		for _, off := range a.spelled {
			copy(dst[off:], asked)
		}
	}
	for _, t := range a.turned {
		t.shuffle(dst)
	}
	return n
}

// An answerTable holds answers by their queries. Looking one up takes no lock.
type answerTable struct {
	seed    maphash.Seed
	buckets []bucket
	most    int64 // entries
	room    int64 // bytes
	entries atomic.Int64
	bytes   atomic.Int64
	hand    atomic.Uint64  // the bucket that was looked at last for room
	locks   [64]sync.Mutex // of the buckets, for changes
}

// A bucket is one cache line, so that a hit reads that and the answer that it wants: after a sleep
// the CPU has to fetch both from memory, and with them what else it looks at.
type bucket struct {
	marks   atomic.Uint64 // a byte of each answer's hash
	answers [ways]atomic.Pointer[answer]
}

// mark is the byte of a hash that a bucket has of it. Which bucket it is depends on others.
func mark(hash uint64) byte { return byte(hash) }

// set has the i-th place hold a, which may be nil, and returns what it has held.
func (b *bucket) set(i int, a *answer) *answer {
	if a != nil {
		b.marks.Store(b.marks.Load()&^(0xff<<(8*i)) | uint64(mark(a.hash))<<(8*i))
	}
	return b.answers[i].Swap(a)
}

func newAnswerTable(entries int) *answerTable {
	// Half of the places stay empty, so that hardly a bucket is full before the table is.
	return &answerTable{
		most:    int64(entries),
		seed:    maphash.MakeSeed(),
		buckets: make([]bucket, max(1, (2*entries+ways-1)/ways)),
		room:    int64(entries) * meanEntry,
	}
}

// bucket returns the index of a hash's bucket.
func (t *answerTable) bucket(hash uint64) int {
	i, _ := bits.Mul64(hash, uint64(len(t.buckets)))
	return int(i)
}

// get returns the answer to a packet, or nil.
func (t *answerTable) get(q []byte) *answer {
	if a := t.find(q[2:]); a != nil {
		return a
	}
	var form [queryBuffer]byte
	if n := bare(form[:], q, true); n > 0 {
		if a := t.find(form[2:n]); a != nil && a.spelled != nil {
			return a
		}
	}
	// Without shield the name has to be as it was, which all but a few are.
	if n := bare(form[:], q, false); n > 0 {
		return t.find(form[2:n])
	}
	return nil
}

// find returns the answer to a query without its ID, or nil.
func (t *answerTable) find(key []byte) *answer {
	hash := maphash.Bytes(t.seed, key)
	b := &t.buckets[t.bucket(hash)]
	marks := b.marks.Load()
	for i := range b.answers {
		if byte(marks>>(8*i)) != mark(hash) {
			continue
		}
		a := b.answers[i].Load()
		if a != nil && a.hash == hash && bytes.Equal(a.key, key) {
			if a.used.Load() != asked {
				a.used.Store(asked)
			}
			return a
		}
	}
	return nil
}

// add puts an answer in, in place of one to the same query, of one that is over, or of
// one that nobody has asked for: names that are asked for once or twice do not drive
// out those that are asked for again and again. If there is no room it is dropped, and
// room is made for the next.
func (t *answerTable) add(a *answer, now int64) {
	a.hash = maphash.Bytes(t.seed, a.key)
	if !t.place(a, now) {
		t.age(int(t.hand.Add(1)%uint64(len(t.buckets))), now)
	}
}

// place is add's first try.
func (t *answerTable) place(a *answer, now int64) bool {
	n := t.bucket(a.hash)
	l := &t.locks[n%len(t.locks)]
	l.Lock()
	defer l.Unlock()
	b := &t.buckets[n]
	const (
		over = iota
		free
		unused
		none
	)
	victim, best := -1, none
	for i := range b.answers {
		old := b.answers[i].Load()
		if old != nil && old.hash == a.hash && bytes.Equal(old.key, a.key) {
			victim = i
			break
		}
		rank := none
		switch {
		case old == nil:
			rank = free
		case old.over(now):
			rank = over
		case old.used.Load() == 0:
			rank = unused
		}
		if rank < best && t.fits(a, old) {
			victim, best = i, rank
		}
	}
	if victim < 0 || !t.fits(a, b.answers[victim].Load()) {
		return false
	}
	t.set(b, victim, a)
	return true
}

// fits tells whether there is room for a in the place of old, which may be nil.
func (t *answerTable) fits(a, old *answer) bool {
	grow := a.size()
	if old != nil {
		grow -= old.size()
	} else if t.entries.Load() >= t.most {
		return false
	}
	return grow <= 0 || t.bytes.Load()+grow <= t.room
}

// set has the i-th place of a bucket hold a, which may be nil.
func (t *answerTable) set(b *bucket, i int, a *answer) {
	if old := b.set(i, a); old != nil {
		t.entries.Add(-1)
		t.bytes.Add(-old.size())
	}
	if a != nil {
		t.entries.Add(1)
		t.bytes.Add(a.size())
	}
}

// age takes out of a bucket what is over and what nobody has asked for in the last
// looks.
func (t *answerTable) age(n int, now int64) {
	l := &t.locks[n%len(t.locks)]
	l.Lock()
	defer l.Unlock()
	b := &t.buckets[n]
	for i := range b.answers {
		a := b.answers[i].Load()
		if a == nil {
			continue
		}
		if left := a.used.Load(); left == 0 || a.over(now) {
			t.set(b, i, nil)
		} else {
			a.used.Store(left - 1)
		}
	}
}
