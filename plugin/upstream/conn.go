package upstream

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// A way is how a query is sent.
type way string

const (
	overUDP way = "udp"
	overTCP way = "tcp"
	overTLS way = "tls"
)

const (
	headerLen  = 12
	frameLen   = 2   // before a message over a stream
	usualQuery = 192 // longer ones take a larger buffer
	mostLen    = 1<<16 - 1
	leastLen   = 512  // what a datagram may always have
	usualLen   = 2048 // longer answers over a stream take a larger buffer
	bitQR      = 0x80 // of the third byte
	bitTC      = 0x02 // of the third byte
	rcodeMask  = 0x0f // of the fourth byte
	countsFrom = 4
)

const (
	// udpMaxAge is how old a socket for datagrams gets: who forges an answer has to guess its port.
	udpMaxAge = 10 * time.Second
	// mostWrong is how many datagrams a query lets pass that are no answer to it.
	mostWrong = 32
)

var (
	errNotOurs = errors.New("what came is not the answer to what was asked")
	errClosed  = errors.New("the connection was closed without an answer")
)

// A conn is a connected socket. One query is under way on it at a time: servers, CoreDNS
// among them, answer what comes over one connection one after another.
type conn struct {
	net.Conn
	stream bool
	born   time.Time
	idle   time.Time // since when
}

// exchange sends a query and waits for its answer. The deadlines are the caller's.
func (c *conn) exchange(framed []byte, size int) ([]byte, error) {
	if err := c.send(framed); err != nil {
		return nil, err
	}
	return c.receive(framed[frameLen:], make([]byte, size), 0)
}

func (c *conn) send(framed []byte) error {
	if !c.stream {
		framed = framed[frameLen:]
	}
	_, err := c.Write(framed)
	return err
}

// framed packs a message behind its length, as it goes over a stream.
func framed(m *dns.Msg) ([]byte, error) {
	b := make([]byte, usualQuery)
	wire, err := m.PackBuffer(b[frameLen:])
	if err != nil {
		return nil, err
	}
	if len(wire) > len(b)-frameLen || &wire[0] != &b[frameLen] { // it was too long
		b = append(b[:frameLen], wire...)
	}
	binary.BigEndian.PutUint16(b, uint16(len(wire))) // #nosec G115 -- a packed message is not longer
	return b[:frameLen+len(wire)], nil
}

// A partial is what has come of an answer when the deadline passed: the rest can still come.
type partial struct {
	buf []byte
	n   int
	err error
}

func (p *partial) Error() string { return p.err.Error() }
func (p *partial) Unwrap() error { return p.err }

// receive waits for the answer to wire. buf has the first n bytes of what has come.
func (c *conn) receive(wire, buf []byte, n int) ([]byte, error) {
	if c.stream {
		return c.receiveStream(wire, buf, n)
	}
	for range mostWrong {
		n, err := c.Read(buf)
		if err != nil {
			return nil, &partial{buf, 0, err}
		}
		if answers(buf[:n], wire) {
			return buf[:n], nil
		}
		// Late answers to what was asked here before, and forged ones.
	}
	return nil, errNotOurs
}

func (c *conn) receiveStream(wire, buf []byte, n int) ([]byte, error) {
	for {
		if n >= 2 {
			want := 2 + int(binary.BigEndian.Uint16(buf))
			if n > want || n == want && !answers(buf[2:n], wire) {
				return nil, errNotOurs
			}
			if n == want {
				return buf[2:n], nil
			}
			if want > len(buf) {
				buf = append(buf[:n], make([]byte, want-n)...)
			}
		}
		got, err := c.Read(buf[n:])
		if n += got; err != nil {
			if errors.Is(err, io.EOF) {
				err = errClosed
			}
			return nil, &partial{buf, n, err}
		}
	}
}

// answers tells whether a message is the answer to a query: of the same id and question. A
// server that did not understand the query may leave the question out.
func answers(msg, query []byte) bool {
	if len(msg) < headerLen || !bytes.Equal(msg[:2], query[:2]) || msg[2]&bitQR == 0 {
		return false
	}
	if binary.BigEndian.Uint16(msg[countsFrom:]) == 0 {
		return msg[3]&rcodeMask != 0
	}
	end := questionEnd(query)
	name := max(headerLen, end-4) // type and class follow
	return len(msg) >= end && equalFold(msg[headerLen:name], query[headerLen:name]) && bytes.Equal(msg[name:end], query[name:end])
}

// questionEnd is where the first question of a query of ours ends; its name is not compressed.
func questionEnd(query []byte) int {
	at := headerLen
	for at < len(query) && query[at] != 0 {
		at += 1 + int(query[at])
	}
	return min(at+5, len(query))
}

func equalFold(a, b []byte) bool {
	for i := range a {
		if lower(a[i]) != lower(b[i]) {
			return false
		}
	}
	return true
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c + 'a' - 'A'
	}
	return c
}

// setID gives a framed query an id that nobody can foresee.
func setID(framed []byte) {
	binary.BigEndian.PutUint16(framed[frameLen:], uint16(rand.Uint32())) // #nosec G115 G404 -- math/rand/v2's own source is ChaCha8, seeded by the kernel
}

// A pool has the open connections of one server that nobody uses.
type pool struct {
	at     netip.AddrPort
	tls    *tls.Config
	expire time.Duration // how long one may be idle
	maxAge time.Duration // how old one may be; 0: however old
	most   int           // how many of each way are kept; 0: all

	mu     sync.Mutex
	idle   map[way][]*conn // the one that has been idle for longest first
	closed bool
}

// take returns an idle connection, or nil. The oldest comes first, so that the ports that are
// asked from change.
func (p *pool) take(w way) *conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	idle := p.idle[w]
	for len(idle) > 0 {
		c := idle[0]
		// Moved rather than cut off in front, where nothing could be put again.
		idle = slices.Delete(idle, 0, 1)
		if time.Since(c.idle) <= p.expire && p.young(c) {
			p.idle[w] = idle
			return c
		}
		c.Close()
	}
	if p.idle != nil {
		p.idle[w] = idle
	}
	return nil
}

func (p *pool) young(c *conn) bool {
	age := time.Since(c.born)
	return (p.maxAge == 0 || age < p.maxAge) && (c.stream || age < udpMaxAge)
}

// put gives a connection back on which nothing is under way.
func (p *pool) put(w way, c *conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || !p.young(c) || p.most > 0 && len(p.idle[w]) >= p.most {
		c.Close()
		return
	}
	c.idle = time.Now()
	if p.idle == nil {
		p.idle = map[way][]*conn{}
	}
	p.idle[w] = append(p.idle[w], c)
}

// sweep closes what has been idle for too long.
func (p *pool) sweep() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for w, idle := range p.idle {
		n := 0
		for n < len(idle) && time.Since(idle[n].idle) > p.expire {
			idle[n].Close()
			n++
		}
		p.idle[w] = slices.Delete(idle, 0, n)
	}
}

// close closes what is idle now, and what is given back later.
func (p *pool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, idle := range p.idle {
		for _, c := range idle {
			c.Close()
		}
	}
	p.idle = nil
}

// dial opens a connection.
func (p *pool) dial(ctx context.Context, w way) (*conn, error) {
	network := string(w)
	if w == overTLS {
		network = "tcp"
	}
	d := net.Dialer{Control: reportUnreachable}
	inner, err := d.DialContext(ctx, network, p.at.String())
	if err != nil {
		return nil, err
	}
	inner = quick(inner, w != overUDP)
	c := &conn{Conn: inner, stream: w != overUDP, born: time.Now()}
	if w == overTLS {
		t := tls.Client(inner, p.tls)
		if err := t.HandshakeContext(ctx); err != nil {
			inner.Close()
			return nil, fmt.Errorf("TLS with %s: %w", p.at, err)
		}
		c.Conn = t
	}
	return c, nil
}
