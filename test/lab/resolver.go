package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

// A Resolver is a further DNS server in the cluster's namespace, of which everything can be
// changed while it runs.
type Resolver struct {
	Addr     netip.Addr
	UDP, TCP atomic.Int64 // queries that have reached it

	lab    *Lab
	answer atomic.Pointer[Answer]

	mu      sync.Mutex
	servers []*dns.Server
	conns   map[net.Conn]bool
}

// An Answer makes a server's answer; nil is none.
type Answer func(r *dns.Msg, tcp bool) *dns.Msg

// Says answers with an address, of a TTL.
func Says(a string, ttl uint32) Answer {
	ip := net.ParseIP(a)
	return func(r *dns.Msg, _ bool) *dns.Msg {
		m := new(dns.Msg).SetReply(r)
		m.RecursionAvailable = true
		if q := r.Question[0]; q.Qtype == dns.TypeA {
			m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: ttl}, A: ip}}
		}
		return m
	}
}

// Fails answers with a code.
func Fails(rcode int) Answer {
	return func(r *dns.Msg, _ bool) *dns.Msg { return new(dns.Msg).SetRcode(r, rcode) }
}

// Silent does not answer.
func Silent(*dns.Msg, bool) *dns.Msg { return nil }

// After answers later.
func After(d time.Duration, a Answer) Answer {
	return func(r *dns.Msg, tcp bool) *dns.Msg {
		time.Sleep(d)
		return a(r, tcp)
	}
}

// ForNames answers names that end in a suffix in another way.
func ForNames(suffix string, a, others Answer) Answer {
	return func(r *dns.Msg, tcp bool) *dns.Msg {
		if strings.HasSuffix(strings.ToLower(r.Question[0].Name), suffix) {
			return a(r, tcp)
		}
		return others(r, tcp)
	}
}

// Resolver starts a server on an address of 10.0.2.0/24.
func (l *Lab) Resolver(addr netip.Addr, a Answer) (*Resolver, error) {
	r := &Resolver{Addr: addr, lab: l, conns: map[net.Conn]bool{}}
	r.Answers(a)
	if err := l.DNS.Do(func() error { return AddAddrs("eth0", addr.String()+"/24") }); err != nil {
		return nil, err
	}
	l.resolvers = append(l.resolvers, r)
	return r, r.Start()
}

// Answers changes how it answers.
func (r *Resolver) Answers(a Answer) { r.answer.Store(&a) }

// Start begins to listen, as it does at first or after Die.
func (r *Resolver) Start() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.lab.DNS.Do(func() error {
		at := netip.AddrPortFrom(r.Addr, 53).String()
		packets, err := net.ListenPacket("udp", at)
		if err != nil {
			return err
		}
		listener, err := net.Listen("tcp", at)
		if err != nil {
			return errors.Join(err, packets.Close())
		}
		r.servers = []*dns.Server{
			{PacketConn: packets, Handler: r},
			{Listener: recorder{listener, r}, Handler: r, MaxTCPQueries: -1},
		}
		for _, s := range r.servers {
			go s.ActivateAndServe()
		}
		return nil
	})
}

// Die is its death: what is sent to it from now on is refused, and connections are reset.
func (r *Resolver) Die() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.servers {
		if s.PacketConn != nil {
			s.PacketConn.Close()
		}
		if s.Listener != nil {
			s.Listener.Close()
		}
	}
	r.servers = nil
	r.reset()
}

// Reset resets its connections, and goes on.
func (r *Resolver) Reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reset()
}

func (r *Resolver) reset() {
	for c := range r.conns {
		if t, ok := c.(*net.TCPConn); ok {
			t.SetLinger(0)
		}
		c.Close()
	}
	clear(r.conns)
}

// Block has the network on its way lose ("drop") or refuse ("reject") what is sent to it over
// "udp", "tcp" or, with "", both. Unblock ends that.
func (r *Resolver) Block(proto, verdict string) error {
	rules := fmt.Sprintf("add table ip %[1]s\nadd chain ip %[1]s in { type filter hook input priority 0; }\n", r.table())
	for _, p := range []string{"udp", "tcp"} {
		if proto != "" && proto != p {
			continue
		}
		v := verdict
		if v == "reject" && p == "tcp" {
			v = "reject with tcp reset"
		}
		rules += fmt.Sprintf("add rule ip %s in ip daddr %s %s dport 53 %s\n", r.table(), r.Addr, p, v)
	}
	_, err := r.lab.DNS.RunInput(rules, "nft", "-f", "-")
	return err
}

// Unblock ends what Block has begun.
func (r *Resolver) Unblock() error {
	_, err := r.lab.DNS.RunInput(fmt.Sprintf("add table ip %[1]s\ndelete table ip %[1]s\n", r.table()), "nft", "-f", "-")
	return err
}

func (r *Resolver) table() string { return "r" + strings.ReplaceAll(r.Addr.String(), ".", "_") }

// ServeDNS implements dns.Handler.
func (r *Resolver) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	_, tcp := w.RemoteAddr().(*net.TCPAddr)
	if tcp {
		r.TCP.Add(1)
	} else {
		r.UDP.Add(1)
	}
	if len(q.Question) != 1 {
		return
	}
	if m := (*r.answer.Load())(q, tcp); m != nil {
		if !tcp {
			size := dns.MinMsgSize
			if o := q.IsEdns0(); o != nil {
				size = int(o.UDPSize())
			}
			m.Truncate(size)
		}
		w.WriteMsg(m)
	}
}

// recorder notes the connections that it accepts.
type recorder struct {
	net.Listener
	r *Resolver
}

func (l recorder) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		l.r.mu.Lock()
		l.r.conns[c] = true
		l.r.mu.Unlock()
	}
	return c, err
}

// Balance has the node send what is for an address on to one of several, as kube-proxy does for
// a Service with as many pods. With none it is a Service without pods, and refused; Unbalance
// is its deletion.
func (l *Lab) Balance(service netip.Addr, pods ...netip.Addr) error {
	if err := l.Unbalance(service); err != nil {
		return err
	}
	var rules strings.Builder
	name := "s" + strings.ReplaceAll(service.String(), ".", "_")
	if len(pods) == 0 {
		fmt.Fprintf(&rules, "table ip %s {\n chain out { type filter hook output priority 0; ip daddr %s reject; }\n chain forward { type filter hook forward priority 0; ip daddr %[2]s reject; }\n}\n", name, service)
	} else {
		var to []string
		for i, p := range pods {
			to = append(to, fmt.Sprintf("%d : %s", i, p))
		}
		fmt.Fprintf(&rules, "table ip %s {\n", name)
		for _, hook := range []string{"prerouting", "output"} {
			fmt.Fprintf(&rules, " chain %s { type nat hook %[1]s priority -100; ip daddr %s dnat to numgen random mod %d map { %s }; }\n", hook, service, len(pods), strings.Join(to, ", "))
		}
		fmt.Fprintln(&rules, "}")
	}
	_, err := l.Node.RunInput(rules.String(), "nft", "-f", "-")
	return err
}

// Unbalance takes back what Balance has done.
func (l *Lab) Unbalance(service netip.Addr) error {
	name := "s" + strings.ReplaceAll(service.String(), ".", "_")
	_, err := l.Node.RunInput(fmt.Sprintf("add table ip %[1]s\ndelete table ip %[1]s\n", name), "nft", "-f", "-")
	return err
}
