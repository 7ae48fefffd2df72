package fastpath

import (
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// batch is how many packets are received and sent with one system call at most.
	batch = 32
	// sendFor bounds how long answers wait for room in their socket's buffer. What a slow
	// client's queue holds takes room there, and it is everyone's.
	sendFor = 20 * time.Millisecond
)

// mmsghdr is the kernel's struct mmsghdr, recvmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
}

// packets are buffers for what is received and sent at a time.
type packets struct {
	recv, send [batch]mmsghdr
	rvec, svec [batch]unix.Iovec
	from       [batch]unix.RawSockaddrInet6
	in         [batch][queryBuffer]byte
	out        [batch][maxWire]byte
	pending    int // of send
}

// buffers are those that nobody uses just now. A socket has some only while it answers.
var buffers = sync.Pool{New: func() any { return newPackets() }}

func newPackets() *packets {
	p := new(packets)
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

// receive returns how many packets there were; with none the error is EAGAIN.
func (p *packets) receive(fd uintptr) (int, unix.Errno) {
	n, _, e := unix.RawSyscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&p.recv[0])), batch, unix.MSG_DONTWAIT, 0, 0)
	if e != 0 {
		return 0, e
	}
	return int(n), 0
}

// packet returns the i-th received packet.
func (p *packets) packet(i int) []byte { return p.in[i][:p.recv[i].len] }

// cut tells whether the i-th packet was longer than there was room for.
func (p *packets) cut(i int) bool { return p.recv[i].hdr.Flags&unix.MSG_TRUNC != 0 }

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

// flush sends the responses, and returns how many could not be, for want of room. One that
// fails otherwise is left out, as the DNS library does.
func (p *packets) flush(fd uintptr, patience time.Duration) (left int) {
	sent := 0
	for sent < p.pending {
		n, _, e := unix.RawSyscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&p.send[sent])), uintptr(p.pending-sent), unix.MSG_DONTWAIT, 0, 0)
		switch {
		case e == 0:
			sent += int(n)
		case e == unix.EINTR:
		case e == unix.EAGAIN && patience > 0:
			began := time.Now()
			unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, int(max(patience/time.Millisecond, 1)))
			patience -= time.Since(began)
		case e == unix.EAGAIN:
			left, sent = p.pending-sent, p.pending
		default:
			sent++
		}
	}
	p.pending = 0
	return left
}

// again makes the buffers ready for the next receive, after n packets.
func (p *packets) again(n int) {
	for i := range n {
		p.recv[i].hdr.Namelen = unix.SizeofSockaddrInet6
		p.recv[i].hdr.Flags = 0
	}
}
