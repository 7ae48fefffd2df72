package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"os"
	"runtime/debug"
	"slices"
	"time"
	"unsafe"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
)

const (
	ports   = 32   // sockets, as of so many clients
	window  = 4    // queries out on each at saturation: 128 in all, which fit any socket's buffer
	slots   = 256  // queries out on each at most
	batch   = 64   // packets of one system call
	fewest  = 100  // answers of a measurement
	atLeast = 0.97 // of the wanted rate
	busy    = 0.9  // of its CPUs, for a server to count as saturated
	tries   = 4    // of a measurement that something else disturbs

	giveUp   = time.Second      // on a query
	patience = 10 * time.Second // beyond a measurement's end, while there are fewer answers
)

// A point is what has been measured at one rate.
type point struct {
	answers   int           // while measured
	wall, cpu time.Duration // while measured
	machine   time.Duration // the CPU time of everything but the load
	switches  uint64        // of the server's threads, to sleep
	latencies []time.Duration
	sent      int // in all
	lost      int // no answer within a second
	missed    int // asked of the authoritative server
	rate      int // wanted
	cpus      int // that the server may use
}

// each is what an answer takes of the CPU, in microseconds.
func (p point) each(of time.Duration) float64 {
	return float64(of.Nanoseconds()) / 1e3 / float64(p.answers)
}

// sleeps is how often threads of the server went to sleep for an answer.
func (p point) sleeps() float64 { return float64(p.switches) / float64(p.answers) }

func (p point) kqps() float64 { return float64(p.answers) / p.wall.Seconds() / 1e3 }

// share is the share of its CPUs that the server had.
func (p point) share() float64 { return p.cpu.Seconds() / p.wall.Seconds() / float64(p.cpus) }

// idle tells whether a server that was to be saturated was not.
func (p point) idle() bool { return p.rate == 0 && p.share() < busy }

// slow tells whether the load or the server did not keep up with the rate.
func (p point) slow() bool { return p.kqps()*1e3 < atLeast*float64(p.rate) }

// latency is the time in which a share of the answers came, in microseconds.
func (p point) latency(share float64) float64 {
	if len(p.latencies) == 0 {
		return 0
	}
	return float64(p.latencies[int(share*float64(len(p.latencies)-1))].Nanoseconds()) / 1e3
}

func (p point) String() string {
	return fmt.Sprintf("CPU %.2f us, of the machine %.1f us, %.2f switches, %.1f kq/s, CPUs %.0f %%, p50 %.0f p99 %.0f p99.9 %.0f us, %d sent, %d lost, %d missed",
		p.each(p.cpu), p.each(p.machine), p.sleeps(), p.kqps(), 100*p.share(), p.latency(.5), p.latency(.99), p.latency(.999), p.sent, p.lost, p.missed)
}

// A load sends queries and checks answers, on one thread. As it never sleeps, no server
// has to wake it, and latency is the server's.
type load struct {
	zone    *zone
	sockets []*socket
	epoll   int
	spin    bool // rather than sleep until there are answers
	epoch   time.Time
	due     time.Duration // when the next query is, since then
	out     int           // queries without an answer yet
	lost    int
	sent    int
	got     int
	late    int
	events  [ports]unix.EpollEvent
	send    packets
	recv    packets
}

// A socket is a client's port. A query's ID is its slot and, above, how often the slot
// has been used, so that a late answer is none to a later query.
type socket struct {
	fd    int
	next  uint16 // the next ID's
	slots [slots]slot
}

type slot struct {
	query int
	id    uint16
	out   bool
	at    time.Duration // since the load's epoch
}

// packets are the arguments of sendmmsg(2) and recvmmsg(2).
type packets struct {
	headers [batch]mmsghdr
	iovecs  [batch]unix.Iovec
	buffers [batch][1500]byte
}

type mmsghdr struct {
	unix.Msghdr
	n uint32 // bytes received
}

func (p *packets) init() {
	for i := range p.headers {
		p.iovecs[i].Base = &p.buffers[i][0]
		p.iovecs[i].SetLen(len(p.buffers[i]))
		p.headers[i].Iov = &p.iovecs[i]
		p.headers[i].SetIovlen(1)
	}
}

func (p *packets) call(trap uintptr, fd, n int) (int, error) {
	for {
		done, _, errno := unix.RawSyscall6(trap, uintptr(fd), uintptr(unsafe.Pointer(&p.headers[0])), uintptr(n), unix.MSG_DONTWAIT, 0, 0)
		switch errno {
		case 0:
			return int(done), nil
		case unix.EAGAIN:
			return 0, nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// newLoad opens sockets in the namespace of this thread.
func newLoad(z *zone, to netip.AddrPort, spin bool) (_ *load, err error) {
	l := &load{zone: z, spin: spin, epoch: time.Now()}
	l.send.init()
	l.recv.init()
	if l.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("making an epoll: %w", err)
	}
	for i := range ports {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("opening a socket: %w", err), l.close())
		}
		l.sockets = append(l.sockets, &socket{fd: fd})
		err = unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()})
		if err == nil {
			err = unix.EpollCtl(l.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(i)})
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("connecting a socket: %w", err), l.close())
		}
	}
	return l, nil
}

func (l *load) close() error {
	for _, s := range l.sockets {
		unix.Close(s.fd)
	}
	return unix.Close(l.epoll)
}

func (l *load) now() time.Duration { return time.Since(l.epoch) }

// ask sends queries on a socket, all with one system call.
func (l *load) ask(s *socket, now time.Duration, queries ...int) error {
	for i, n := range queries {
		place := &s.slots[s.next%slots]
		if place.out {
			l.lost++ // so many queries later
			l.out--
		}
		*place = slot{query: n, id: s.next, out: true, at: now}
		l.out++
		q := l.zone.queries[n]
		copy(l.send.buffers[i][:], q)
		binary.BigEndian.PutUint16(l.send.buffers[i][:], s.next)
		l.send.iovecs[i].SetLen(len(q))
		s.next++
	}
	n, err := l.send.call(unix.SYS_SENDMMSG, s.fd, len(queries))
	if err != nil {
		return fmt.Errorf("sending: %w", err)
	}
	if n < len(queries) {
		return fmt.Errorf("sending: the kernel took %d of %d packets", n, len(queries))
	}
	l.sent += len(queries)
	return nil
}

// answers takes what has arrived, calls each for every right answer, and returns an
// error for a wrong one.
func (l *load) answers(each func(s *socket, latency time.Duration) error, finish func(s *socket) error) error {
	ready, err := l.wait()
	if err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("waiting for answers: %w", err)
	}
	for _, e := range l.events[:max(ready, 0)] {
		s := l.sockets[e.Fd]
		n, err := l.recv.call(unix.SYS_RECVMMSG, s.fd, batch)
		if err != nil {
			return fmt.Errorf("receiving: %w", err)
		}
		now := l.now()
		for i := range n {
			a := l.recv.buffers[i][:l.recv.headers[i].n]
			if len(a) < 12 {
				return fmt.Errorf("%w: %d bytes", errWrong, len(a))
			}
			id := binary.BigEndian.Uint16(a)
			slot := &s.slots[id%slots]
			if slot.id != id {
				l.late++ // counted as lost
				continue
			}
			if !slot.out {
				return fmt.Errorf("%w: a second one to the same query", errWrong)
			}
			if err := l.zone.check(slot.query, a); err != nil {
				return err
			}
			slot.out = false
			l.out--
			l.got++
			if err := each(s, now-slot.at); err != nil {
				return err
			}
		}
		if finish != nil {
			if err := finish(s); err != nil {
				return err
			}
		}
	}
	return nil
}

// wait returns how many sockets have something to receive. Without spin it sleeps until
// there are some, the next query is due, or a millisecond has gone by.
func (l *load) wait() (int, error) {
	events := uintptr(unsafe.Pointer(&l.events[0]))
	if !l.spin {
		// Linux 5.11
		t := unix.NsecToTimespec(int64(max(0, min(l.due-l.now(), time.Millisecond))))
		n, _, errno := unix.Syscall6(unix.SYS_EPOLL_PWAIT2, uintptr(l.epoll), events, ports, uintptr(unsafe.Pointer(&t)), 0, 0)
		if errno != 0 {
			return 0, errno
		}
		return int(n), nil
	}
	// Go's scheduler need not hear of a call that never blocks.
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(l.epoll), events, ports, 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// expire gives up on queries that have waited for a second and returns how many.
func (l *load) expire(s *socket, now time.Duration) (n int) {
	for i := range s.slots {
		if slot := &s.slots[i]; slot.out && now-slot.at > giveUp {
			slot.out = false
			slot.id ^= slots // its answer is late from now on
			l.out--
			l.lost++
			n++
		}
	}
	return n
}

// drain waits for the last answers.
func (l *load) drain(each func(s *socket, latency time.Duration) error) error {
	looked := l.now()
	for l.out > 0 {
		if err := l.answers(each, nil); err != nil {
			return err
		}
		if now := l.now(); now-looked > giveUp/10 {
			looked = now
			for _, s := range l.sockets {
				l.expire(s, now)
			}
		}
	}
	return nil
}

// fill asks for every name until all are answered, and then twice more, so that a cache
// that takes notice of a name at the second time has it too.
func (l *load) fill() error {
	// The authoritative server has the same CPU.
	defer func(spin bool) { l.spin = spin }(l.spin)
	l.spin = false
	todo := make([]int, len(l.zone.queries))
	l.due = math.MaxInt64
	for pass, tries := 0, 0; pass < 3; tries++ {
		if tries == 10 {
			return fmt.Errorf("%d queries without an answer in the last try", l.lost)
		}
		for i := range todo {
			todo[i] = i
		}
		rand.Shuffle(len(todo), func(i, j int) { todo[i], todo[j] = todo[j], todo[i] })
		l.lost = 0
		ask := func(s *socket, _ time.Duration) error {
			if len(todo) == 0 {
				return nil
			}
			n := todo[0]
			todo = todo[1:]
			return l.ask(s, l.now(), n)
		}
		all := todo
		for _, s := range l.sockets {
			if err := ask(s, 0); err != nil {
				return err
			}
		}
		if err := l.drain(ask); err != nil {
			return err
		}
		todo = all
		if l.lost == 0 {
			pass++
		}
	}
	return nil
}

// run measures a process at a rate, 0 for as fast as it answers.
func (l *load) run(rate int, length time.Duration, pid int) (p point, err error) {
	// Its pauses would be taken for the server's.
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	l.lost, l.sent, l.got, l.late = 0, 0, 0, 0
	p.rate = rate
	p.latencies = make([]time.Duration, 0, 2*rate*int(length/time.Second+1))
	datagrams, err := datagramsSent()
	if err != nil {
		return p, err
	}

	measuring := false
	pick := func() int { return rand.IntN(len(l.zone.queries)) }
	again := 0 // answers of one socket
	queries := make([]int, batch)
	each := func(_ *socket, latency time.Duration) error {
		again++
		if measuring {
			p.answers++
			if rate > 0 {
				p.latencies = append(p.latencies, latency)
			}
		}
		return nil
	}
	// At saturation a socket asks anew for what has been answered.
	refill := func(s *socket) error {
		n := again
		again = 0
		if rate > 0 || n == 0 {
			return nil
		}
		for i := range n {
			queries[i] = pick()
		}
		return l.ask(s, l.now(), queries[:n]...)
	}

	begin := l.now()
	from, to := begin+length/10, begin+length/10+length
	turn, looked := 0, begin
	if l.due = begin; rate == 0 {
		l.due = to
	}
	if rate == 0 {
		for _, s := range l.sockets {
			again = window
			if err := refill(s); err != nil {
				return p, err
			}
		}
	}
	var before used
	for {
		now := l.now()
		if !measuring && now >= from {
			measuring = true
			from = now
			if before, err = usedBy(pid); err != nil {
				return p, err
			}
		}
		// However little of a CPU the server gets, a figure takes some answers.
		if now >= to && (p.answers >= fewest || now >= to+patience) {
			p.wall = now - from
			var after used
			after, err = usedBy(pid)
			p.cpu, p.machine, p.switches = after.cpu-before.cpu, after.machine-before.machine, after.switches-before.switches
			measuring = false
			break
		}
		if rate > 0 && now >= l.due {
			// One at a time, at random intervals, and none is made up for: packets
			// that come all at once are cheap to answer.
			if err := l.ask(l.sockets[turn%ports], now, pick()); err != nil {
				return p, err
			}
			turn++
			mean := float64(time.Second) / float64(rate)
			l.due = max(l.due, now-time.Duration(mean)) + time.Duration(rand.ExpFloat64()*mean)
		}
		if rate == 0 && now-looked > giveUp/10 {
			looked = now
			for _, s := range l.sockets {
				again = l.expire(s, now)
				if err := refill(s); err != nil {
					return p, err
				}
			}
		}
		if err := l.answers(each, refill); err != nil {
			return p, err
		}
	}
	if err != nil {
		return p, err
	}
	if err := l.drain(each); err != nil {
		return p, err
	}
	if p.answers == 0 {
		return p, fmt.Errorf("no answers within %v", length+patience)
	}
	p.sent, p.lost = l.sent, l.lost
	after, err := datagramsSent()
	if err != nil {
		return p, err
	}
	// A query that goes further is two datagrams more.
	p.missed = max(0, (int(after-datagrams)-l.sent-l.got-l.late)/2)
	slices.Sort(p.latencies)
	return p, nil
}

// datagramsSent returns how many UDP datagrams have been sent in the namespace of this
// thread.
func datagramsSent() (float64, error) {
	fs, err := procfs.NewDefaultFS()
	if err != nil {
		return 0, err
	}
	thread, err := fs.Thread(os.Getpid(), unix.Gettid())
	if err != nil {
		return 0, fmt.Errorf("counting datagrams: %w", err)
	}
	snmp, err := thread.Snmp()
	if err != nil {
		return 0, fmt.Errorf("counting datagrams: %w", err)
	}
	if snmp.Udp.OutDatagrams == nil {
		return 0, errors.New("counting datagrams: the kernel does not say how many")
	}
	return *snmp.Udp.OutDatagrams, nil
}
