package main

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// A kind of answers. Two of three questions of a pod with search paths have the answer
// that there is no such name.
type kind int

const (
	address kind = iota
	noName
	chain
)

var kinds = []kind{address, noName, chain}

func (k kind) String() string {
	return [...]string{"one address", "no such name", "three names, four addresses"}[k]
}

// upstreamAt is where the server that knows all names is, in the lab's namespace dns.
var upstreamAt = netip.AddrPortFrom(lab.DNSAddr, 5300)

// upstream answers by the name's first letter, the kind. Names that begin with wait are
// answered when released.
type upstream struct {
	server   *dns.Server
	mu       sync.Mutex
	waiting  int
	released chan struct{}
	once     sync.Once
}

func serve(ns *lab.Namespace) (*upstream, error) {
	u := &upstream{released: make(chan struct{})}
	err := ns.Do(func() error {
		conn, err := net.ListenPacket("udp", upstreamAt.String())
		if err != nil {
			return err
		}
		u.server = &dns.Server{PacketConn: conn, Handler: u}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("starting the upstream server: %w", err)
	}
	go u.server.ActivateAndServe()
	return u, nil
}

func (u *upstream) release() { u.once.Do(func() { close(u.released) }) }

func (u *upstream) close() {
	u.release()
	u.server.PacketConn.Close()
}

// ServeDNS implements dns.Handler.
func (u *upstream) ServeDNS(w dns.ResponseWriter, r *dns.Msg) {
	m := new(dns.Msg)
	m.SetReply(r)
	q := r.Question[0].Name
	if strings.HasPrefix(q, "wait") {
		u.mu.Lock()
		u.waiting++
		u.mu.Unlock()
		<-u.released
	}
	hdr := func(name string, t uint16) dns.RR_Header {
		return dns.RR_Header{Name: name, Rrtype: t, Class: dns.ClassINET, Ttl: lab.ClusterTTL}
	}
	switch {
	case strings.HasPrefix(q, "n"):
		zone := q[strings.IndexByte(q, '.')+1:]
		m.Rcode = dns.RcodeNameError
		m.Ns = append(m.Ns, &dns.SOA{Hdr: hdr(zone, dns.TypeSOA), Ns: "ns.dns." + zone, Mbox: "hostmaster." + zone, Serial: 1, Refresh: 7200, Retry: 1800, Expire: 86400, Minttl: 3600})
	case strings.HasPrefix(q, "c"):
		name := q
		for i := range 2 {
			next := fmt.Sprintf("balancer-%d.%s", i, q)
			m.Answer = append(m.Answer, &dns.CNAME{Hdr: hdr(name, dns.TypeCNAME), Target: next})
			name = next
		}
		for i := range 4 {
			m.Answer = append(m.Answer, &dns.A{Hdr: hdr(name, dns.TypeA), A: net.IPv4(192, 0, 2, byte(i))})
		}
	default:
		m.Answer = append(m.Answer, &dns.A{Hdr: hdr(q, dns.TypeA), A: net.IPv4(192, 0, 2, 1)})
	}
	w.WriteMsg(m)
}

// name is the number i of a kind, in one of the blocks' zones.
func name(r run, i int) string {
	letter := [...]string{"a", "n", "c"}[r.kind]
	return fmt.Sprintf("%s%d.default.svc.cluster.%d.test.", letter, i, i%r.blocks)
}

var cacheAt = netip.AddrPortFrom(lab.LinkLocal, 53).String()

// fill asks once for each of the run's names.
func fill(ns *lab.Namespace, r run) error {
	const workers = 16
	errs := make(chan error, workers)
	for w := range workers {
		go func() {
			var conn *dns.Conn
			err := ns.Do(func() (err error) {
				conn, err = dns.Dial("udp", cacheAt)
				return err
			})
			if err != nil {
				errs <- err
				return
			}
			defer conn.Close()
			for i := w; i < r.entries && err == nil; i += workers {
				err = exchange(conn, name(r, i))
			}
			errs <- err
		}()
	}
	var first error
	for range workers {
		if err := <-errs; err != nil && first == nil {
			first = err
		}
	}
	return first
}

// exchange asks until there is an answer: this is about memory, not about lost packets.
func exchange(conn *dns.Conn, name string) (err error) {
	for range 5 {
		m := new(dns.Msg).SetQuestion(name, dns.TypeA)
		if err = conn.WriteMsg(m); err != nil {
			continue
		}
		conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		var answer *dns.Msg
		if answer, err = conn.ReadMsg(); err == nil && answer.Id == m.Id {
			if answer.Rcode == dns.RcodeServerFailure {
				err = fmt.Errorf("%s: SERVFAIL", name)
				continue
			}
			return nil
		}
	}
	return fmt.Errorf("asking for %s: %w", name, err)
}

// hold sends so many queries that the server does not answer, and waits until they are
// all there.
func (u *upstream) hold(ns *lab.Namespace, count int) error {
	var conn *dns.Conn
	err := ns.Do(func() (err error) {
		conn, err = dns.Dial("udp", cacheAt)
		return err
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	for i := range count {
		if err := conn.WriteMsg(new(dns.Msg).SetQuestion(fmt.Sprintf("wait%d.0.test.", i), dns.TypeA)); err != nil {
			return err
		}
		if i%50 == 49 || i == count-1 {
			// Not all at once, or the sockets on the way would be full.
			if err := u.await(i + 1); err != nil {
				return err
			}
		}
	}
	return nil
}

func (u *upstream) await(count int) error {
	for late := time.Now().Add(lab.Patience); ; time.Sleep(time.Millisecond) {
		u.mu.Lock()
		waiting := u.waiting
		u.mu.Unlock()
		if waiting >= count {
			return nil
		}
		if time.Now().After(late) {
			return fmt.Errorf("only %d of %d queries have reached the upstream server", waiting, count)
		}
	}
}
