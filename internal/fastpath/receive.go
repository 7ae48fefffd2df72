package fastpath

import (
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
)

// batch is how many packets are received and sent with one system call at most.
const batch = 32

// sockaddr is an address of either family as the kernel has it.
type sockaddr struct {
	raw unix.RawSockaddrInet6
	len uint32
}

// addr returns a as the net package has it.
func (a *sockaddr) addr() *net.UDPAddr {
	port := (*[2]byte)(unsafe.Pointer(&a.raw.Port))
	p := int(port[0])<<8 | int(port[1])
	if a.raw.Family == unix.AF_INET {
		four := (*unix.RawSockaddrInet4)(unsafe.Pointer(&a.raw))
		return &net.UDPAddr{IP: net.IP(four.Addr[:]).To16(), Port: p}
	}
	u := &net.UDPAddr{IP: append(net.IP(nil), a.raw.Addr[:]...), Port: p}
	if a.raw.Scope_id != 0 {
		if i, err := net.InterfaceByIndex(int(a.raw.Scope_id)); err == nil {
			u.Zone = i.Name
		}
	}
	return u
}

// A socket is one UDP socket. The goroutine that serves it blocks its thread, which
// takes two system calls a batch where Go's poller takes four.
type socket struct {
	fd int
}

// openSocket opens a socket on at, beside those that others have there.
func openSocket(at netip.AddrPort) (*socket, error) {
	domain, sa := unix.AF_INET, unix.Sockaddr(nil)
	if at.Addr().Is4() {
		sa = &unix.SockaddrInet4{Addr: at.Addr().As4(), Port: int(at.Port())}
	} else {
		domain, sa = unix.AF_INET6, &unix.SockaddrInet6{Addr: at.Addr().As16(), Port: int(at.Port())}
	}
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if domain == unix.AF_INET6 {
		// As Go's sockets have it: the kernel shares queries out among those that agree.
		err = unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, 0)
	}
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	}
	if err == nil {
		err = sockets.Deepen(fd)
	}
	if err == nil {
		err = unix.Bind(fd, sa)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &socket{fd: fd}, nil
}

func (s *socket) close() { unix.Close(s.fd) }

// wake has a blocked receive return.
func (s *socket) wake() { unix.Shutdown(s.fd, unix.SHUT_RD) }

// send sends one packet.
func (s *socket) send(b []byte, to *sockaddr) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	for {
		_, _, e := unix.Syscall6(unix.SYS_SENDTO, uintptr(s.fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), 0,
			uintptr(unsafe.Pointer(&to.raw)), uintptr(to.len))
		switch e {
		case 0:
			return len(b), nil
		case unix.EINTR:
		default:
			return 0, fmt.Errorf("sending to %s: %w", to.addr(), e)
		}
	}
}

// mmsghdr is the kernel's struct mmsghdr, recvmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
}

// packets are the buffers of one worker.
type packets struct {
	recv, send [batch]mmsghdr
	rvec, svec [batch]unix.Iovec
	from       [batch]unix.RawSockaddrInet6
	in         [batch][queryBuffer]byte
	out        [batch][maxWire]byte
	pending    int // of send
	fd         int
}

func newPackets(fd int) *packets {
	p := &packets{fd: fd}
	for i := range batch {
		p.rvec[i].Base = &p.in[i][0]
		p.rvec[i].SetLen(queryBuffer)
		p.recv[i].hdr.Iov = &p.rvec[i]
		p.recv[i].hdr.SetIovlen(1)
		p.recv[i].hdr.Name = (*byte)(unsafe.Pointer(&p.from[i]))
		p.recv[i].hdr.Namelen = unix.SizeofSockaddrInet6
		p.svec[i].Base = &p.out[i][0]
		p.send[i].hdr.Iov = &p.svec[i]
		p.send[i].hdr.SetIovlen(1)
	}
	return p
}

// receive waits for packets and returns how many there are.
func (p *packets) receive() (int, unix.Errno) {
	n, _, e := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(p.fd), uintptr(unsafe.Pointer(&p.recv[0])), batch, unix.MSG_WAITFORONE, 0, 0)
	if e != 0 {
		return 0, e
	}
	return int(n), 0
}

// poll returns how many packets there are; with none the error is EAGAIN.
func (p *packets) poll() (int, unix.Errno) {
	n, _, e := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(p.fd), uintptr(unsafe.Pointer(&p.recv[0])), batch, unix.MSG_DONTWAIT, 0, 0)
	if e != 0 {
		return 0, e
	}
	return int(n), 0
}

// packet returns the i-th received packet.
func (p *packets) packet(i int) []byte { return p.in[i][:p.recv[i].len] }

// reply returns where to put the response to the i-th packet; done sends it with
// the next flush.
func (p *packets) reply() []byte { return p.out[p.pending][:] }

func (p *packets) done(i, n int) {
	o := p.pending
	p.svec[o].SetLen(n)
	p.send[o].hdr.Name = p.recv[i].hdr.Name
	p.send[o].hdr.Namelen = p.recv[i].hdr.Namelen
	p.pending++
}

// flush sends the responses. One that can't be sent is left out, as the DNS library
// does.
func (p *packets) flush() {
	for sent := 0; sent < p.pending; {
		n, _, e := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(p.fd), uintptr(unsafe.Pointer(&p.send[sent])), uintptr(p.pending-sent), unix.MSG_DONTWAIT, 0, 0)
		switch {
		case e == 0:
			sent += int(n)
		case e == unix.EINTR:
		case e == unix.EAGAIN:
			unix.Poll([]unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLOUT}}, -1)
		default:
			sent++
		}
	}
	p.pending = 0
}

// again makes the buffers ready for the next receive, after n packets.
func (p *packets) again(n int) {
	for i := range n {
		p.recv[i].hdr.Namelen = unix.SizeofSockaddrInet6
		p.recv[i].hdr.Flags = 0
	}
}

// run answers on s until the listener closes.
func (s *socket) run(l *listener, answering *sockets.Counter) {
	p := newPackets(s.fd)
	pace := pace{gap: int64(time.Second)}
	var yielded int64
	for {
		var n int
		var e unix.Errno
		switch {
		case pace.full:
			n, e = p.poll()
		case pace.gathers():
			nap := unix.NsecToTimespec(pace.nap())
			unix.Nanosleep(&nap, nil)
			n, e = p.poll()
		default:
			n, e = p.receive()
		}
		now := sinceEpoch()
		pace.note(n, now)
		if now-yielded > int64(yieldEvery) {
			runtime.Gosched()
			yielded = now
		}
		switch {
		case n == 1 && p.recv[0].hdr.Namelen == 0 || e != 0 && e != unix.EAGAIN && e != unix.EINTR:
			// Shut down, or out of memory.
			if l.closing.Load() {
				return
			}
			time.Sleep(time.Millisecond)
		case n > 0:
			open := answering.Begin()
			s.serve(l.enter(), p, n, now, open)
			open.Add(-1)
		}
		p.again(n)
	}
}

// A worker lets gatherUpTo packets gather, but no longer than gatherFor: it is the most
// that a hit can be late for it.
const (
	gatherUpTo = 3
	gatherFor  = 550 * time.Microsecond
)

// yieldEvery is how often a worker lets Go's scheduler see that it is alive. A
// goroutine that has not been scheduled for 10 ms loses its P in its next system call
// (retake in Go 1.26's runtime/proc.go), and to take and to get it back costs more
// than to answer. To yield wakes another thread each time, so it is done no more often
// than it has to be.
const yieldEvery = 8 * time.Millisecond

// A pace says how to wait for packets. To be woken costs a thread several times what
// a hit does, so that at moderate rates it is all that counts: where packets come so
// fast that several gather in a short time, a worker sleeps for it and takes them
// together.
type pace struct {
	gap  int64 // between packets, smoothed, in ns
	last int64 // when the last came
	full bool  // more are waiting
}

// gathers tells whether to sleep before the next look.
func (p *pace) gathers() bool { return p.gap < int64(gatherFor) }

// nap returns how long to sleep, in ns.
func (p *pace) nap() int64 { return min(gatherUpTo*p.gap, int64(gatherFor)) }

// note learns from n packets that were received at now.
func (p *pace) note(n int, now int64) {
	gap := min((now-p.last)/int64(max(n, 1)), int64(10*gatherFor))
	p.last = now
	p.gap += (gap - p.gap) / 8
	p.full = n == batch
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

// serve answers n packets that have come in, or hands them on. They count in open,
// those that are handed on each.
func (s *socket) serve(v *serving, p *packets, n int, now int64, open *atomic.Int64) {
	hits, misses := 0, 0
	for i := range n {
		q := p.packet(i)
		if len(q) >= headerLen && p.recv[i].hdr.Flags&unix.MSG_TRUNC == 0 {
			if a := v.table.get(q); a != nil {
				if ttl, ok := a.ttl(now); ok && !a.pass(now) {
					p.done(i, a.put(p.reply(), q, ttl))
					a.counts.add(a.querySize, a.responseSize)
					hits++
					continue
				}
			}
		}
		misses++
		f := &query{raw: append([]byte(nil), q...), socket: s, from: sockaddr{p.from[i], p.recv[i].hdr.Namelen}}
		open.Add(1)
		f.open = open
		f.plain = p.recv[i].hdr.Flags&unix.MSG_TRUNC == 0 && plainQuery(q)
		v.misses.queries <- f
	}
	p.flush()
	v.using.Add(-1)
	if hits > 0 {
		hitsTotal.Add(float64(hits))
	}
	if misses > 0 {
		missesTotal.Add(float64(misses))
	}
}
