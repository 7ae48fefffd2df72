package fastpath

import (
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/ownquery"
	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
)

// A worker answers on a socket.
type worker struct {
	socket    *socket
	listener  *listener
	answering *sockets.Counter
	stuck     bool // the last answers found no room in the socket's buffer in time
}

// yieldEvery is how often a worker that always finds more to do lets others have its P, and
// the runtime see to the network.
const yieldEvery = time.Millisecond

// run answers until the listener closes, which then has ended the wait for packets.
func (w *worker) run() {
	for {
		err := w.socket.raw.Read(func(fd uintptr) bool {
			w.empty(fd)
			return false // wait for more
		})
		if w.listener.closing.Load() {
			break
		}
		// Not seen yet, and no reason to leave what comes unread.
		log.Debugf("fastpath: waiting for queries on %s: %v", w.listener.at, err)
		time.Sleep(yieldEvery)
	}
	w.socket.raw.Control(w.empty)
}

// empty answers what the socket holds. The poller tells when there is more.
func (w *worker) empty(fd uintptr) {
	p := buffers.Get().(*packets)
	defer buffers.Put(p)
	began := sinceEpoch()
	for more := true; more; {
		// Counted before it is received: who sees the socket empty, and then waits for
		// what is being answered, waits for these too.
		open := w.answering.Begin()
		n, e := p.receive(fd)
		now := sinceEpoch()
		if n > 0 {
			w.serve(w.listener.enter(), p, n, now, open, fd)
			p.again(n)
		}
		open.Add(-1)
		if more = n == batch || e == unix.EINTR; more && now-began > int64(yieldEvery) {
			// The runtime's monitor, which polls the network while all are busy, may be
			// asleep: a system call that the scheduler hears of wakes it.
			unix.Syscall(unix.SYS_GETPID, 0, 0, 0)
			runtime.Gosched()
			began = now
		}
	}
}

// enter returns the serving in force, counted as used.
func (l *listener) enter() *serving {
	for {
		v := l.serving.Load()
		v.using.Add(1)
		if v == l.serving.Load() {
			return v
		}
		v.using.Add(-1)
	}
}

// serve answers n packets that have come in, and then hands on the others. They count in
// open, those that are handed on each.
func (w *worker) serve(v *serving, p *packets, n int, now int64, open *atomic.Int64, fd uintptr) {
	var misses [batch]int
	missed, own := 0, 0 // own are misses that are nobody else's
	for i := range n {
		q := p.packet(i)
		if len(q) >= headerLen && !p.cut(i) {
			if a := v.table.get(q); a != nil {
				if ttl, ok := a.ttl(now); ok && !a.pass(now) {
					p.done(i, a.put(p.reply(), q, ttl))
					a.counts.add(uint16(len(q)), a.responseSize)
					continue
				}
			}
		}
		misses[missed] = i
		missed++
		if ownquery.Is(q) {
			own++
		}
	}
	patience := sendFor
	if w.stuck {
		patience = 0
	}
	w.stuck = p.flush(fd, patience) > 0
	if n > missed {
		hitsTotal.Add(float64(n - missed))
		ownquery.Somebody()
	}
	if missed > own {
		missesTotal.Add(float64(missed - own))
	}
	for _, i := range misses[:missed] {
		q := p.packet(i)
		f := &query{raw: append([]byte(nil), q...), socket: w.socket, from: sockaddr{p.from[i], p.recv[i].hdr.Namelen}}
		open.Add(1)
		f.open = open
		f.plain = !p.cut(i) && plainQuery(q)
		v.misses.queries <- f
	}
	v.using.Add(-1)
}
