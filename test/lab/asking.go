package lab

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// An Asking asks one thing after another at a steady pace, over UDP, whatever becomes of what it
// has asked before, as a node's pods do together.
type Asking struct {
	From  *Namespace
	To    netip.Addr
	Rate  int                          // queries a second
	Query func(i int) *dns.Msg         // the i-th
	Right func(i int, m *dns.Msg) bool // nil: an answer without a failure is right
}

// An Outcome is what became of them. Each query is counted once below Sent.
type Outcome struct {
	Sent     int
	Right    int
	Wrong    int // answered otherwise
	Servfail int
	Refused  int
	Lost     int // without an answer for 5 s
	Late     int // of the right ones, after more than a second
	Worst    time.Duration
}

// Failed is how many have got no right answer.
func (t *Outcome) Failed() int { return t.Sent - t.Right }

func (t *Outcome) String() string {
	return fmt.Sprintf("%d asked, %d right, %d late, %d wrong, %d SERVFAIL, %d REFUSED, %d lost, worst %v",
		t.Sent, t.Right, t.Late, t.Wrong, t.Servfail, t.Refused, t.Lost, t.Worst.Round(time.Millisecond))
}

// Add adds another one.
func (t *Outcome) Add(o *Outcome) {
	t.Sent, t.Right, t.Wrong, t.Servfail = t.Sent+o.Sent, t.Right+o.Right, t.Wrong+o.Wrong, t.Servfail+o.Servfail
	t.Refused, t.Lost, t.Late, t.Worst = t.Refused+o.Refused, t.Lost+o.Lost, t.Late+o.Late, max(t.Worst, o.Worst)
}

// clientPatience is how long a client waits.
const clientPatience = 5 * time.Second

// mouths are how many sockets ask.
const mouths = 32

// Run asks until the context ends, and waits for what is under way.
func (a Asking) Run(ctx context.Context) (*Outcome, error) {
	type pending struct {
		i    int
		sent time.Time
	}
	type mouth struct {
		net.Conn
		mu   sync.Mutex
		open map[uint16]pending
	}
	all := make([]*mouth, mouths)
	err := a.From.Do(func() error {
		for i := range all {
			c, err := net.Dial("udp", netip.AddrPortFrom(a.To, 53).String())
			if err != nil {
				return err
			}
			all[i] = &mouth{Conn: c, open: map[uint16]pending{}}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	t := &Outcome{}
	var mu sync.Mutex // of t
	var readers sync.WaitGroup
	read := func(m *mouth) {
		buf := make([]byte, dns.MaxMsgSize)
		for {
			n, err := m.Read(buf)
			if err != nil {
				if ne, ok := err.(net.Error); ok && ne.Timeout() {
					return
				}
				if _, ok := err.(*net.OpError); ok && ctx.Err() == nil {
					continue // an ICMP error: the query counts as lost
				}
				return
			}
			r := new(dns.Msg)
			if r.Unpack(buf[:n]) != nil {
				continue
			}
			m.mu.Lock()
			p, ok := m.open[r.Id]
			delete(m.open, r.Id)
			m.mu.Unlock()
			took := time.Since(p.sent)
			if !ok || took > clientPatience {
				continue
			}
			right := r.Rcode != dns.RcodeServerFailure && r.Rcode != dns.RcodeRefused
			if a.Right != nil {
				right = a.Right(p.i, r)
			}
			mu.Lock()
			switch {
			case right:
				t.Right++
				if took > time.Second {
					t.Late++
				}
			case r.Rcode == dns.RcodeServerFailure:
				t.Servfail++
			case r.Rcode == dns.RcodeRefused:
				t.Refused++
			default:
				t.Wrong++
			}
			t.Worst = max(t.Worst, took)
			mu.Unlock()
		}
	}
	for _, m := range all {
		readers.Go(func() { read(m) })
	}
	pace := time.NewTicker(time.Second / time.Duration(a.Rate))
	defer pace.Stop()
	for i := 0; ctx.Err() == nil; i++ {
		q := a.Query(i)
		q.Id = uint16(i / mouths) // so that no two on one socket have the same
		wire, err := q.Pack()
		if err != nil {
			return nil, err
		}
		m := all[i%mouths]
		m.mu.Lock()
		m.open[q.Id] = pending{i, time.Now()}
		m.mu.Unlock()
		t.Sent++
		m.Write(wire)
		select {
		case <-pace.C:
		case <-ctx.Done():
		}
	}
	for _, m := range all {
		m.SetReadDeadline(time.Now().Add(clientPatience))
	}
	// What is answered is waited for no longer.
	waiting := func() (n int) {
		for _, m := range all {
			m.mu.Lock()
			for _, p := range m.open {
				if time.Since(p.sent) < clientPatience {
					n++
				}
			}
			m.mu.Unlock()
		}
		return n
	}
	for waiting() > 0 {
		time.Sleep(10 * time.Millisecond)
	}
	for _, m := range all {
		m.SetReadDeadline(time.Now())
	}
	readers.Wait()
	for _, m := range all {
		m.Close()
	}
	t.Lost = t.Sent - t.Right - t.Wrong - t.Servfail - t.Refused
	if t.Lost > 0 {
		t.Worst = clientPatience
	}
	return t, nil
}

// Within is Run for a time.
func (a Asking) Within(d time.Duration) (*Outcome, error) {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	return a.Run(ctx)
}

// NewNames asks for the address of a name that nobody has asked for, under a zone.
func NewNames(zone string) func(int) *dns.Msg {
	tag := fmt.Sprintf("%x", time.Now().UnixNano()&0xffffff)
	return func(i int) *dns.Msg {
		return new(dns.Msg).SetQuestion(fmt.Sprintf("n%d-%s.%s", i, tag, zone), dns.TypeA)
	}
}

// IsAddress tells whether an answer has the one address.
func IsAddress(want string) func(int, *dns.Msg) bool {
	ip := net.ParseIP(want)
	return func(_ int, m *dns.Msg) bool {
		if m.Rcode != dns.RcodeSuccess || len(m.Answer) != 1 {
			return false
		}
		a, ok := m.Answer[0].(*dns.A)
		return ok && a.A.Equal(ip)
	}
}
