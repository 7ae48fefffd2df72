package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// A row is one thing that happens.
type row struct {
	name   string
	before func(s *site) error // before CoreDNS starts
	run    func(s *site) (*lab.Outcome, error)
}

const (
	cluster = "svc.cluster.local."
	outside = "example.test."
)

// new asks for new names under a zone.
func (s *site) new(zone string, rate int) lab.Asking {
	says := resolverSays
	if strings.HasSuffix(zone, "cluster.local.") {
		says = clusterSays
	}
	return lab.Asking{From: s.Pod, To: s.server(zone), Rate: rate, Query: lab.NewNames(zone), Right: lab.IsAddress(says)}
}

// while asks for new names under a zone, has something happen after a second, and goes on.
func while(zone string, d time.Duration, event func(s *site) error) func(s *site) (*lab.Outcome, error) {
	return func(s *site) (*lab.Outcome, error) { return s.asking(s.new(zone, 40), d, event) }
}

// asking asks for as long as the event takes, and then for so long.
func (s *site) asking(a lab.Asking, d time.Duration, event func(s *site) error) (*lab.Outcome, error) {
	ctx, stop := context.WithCancel(context.Background())
	failed := make(chan error, 1)
	go func() {
		time.Sleep(time.Second)
		err := event(s)
		time.Sleep(d)
		stop()
		failed <- err
	}()
	t, err := a.Run(ctx)
	return t, errors.Join(err, <-failed)
}

var rows = []row{
	{name: "nothing (names of the cluster)", run: while(cluster, 2*time.Second, nothing)},
	{name: "nothing (other names)", run: while(outside, 2*time.Second, nothing)},
	{name: "one of two DNS pods dies without a word", run: while(cluster, 5*time.Second, func(s *site) error { return s.pods[0].Block("", "drop") })},
	{name: "one of two DNS pods dies, its connections are reset", run: while(cluster, 5*time.Second, func(s *site) error { s.pods[0].Die(); return nil })},
	{name: "one of two DNS pods takes 3 s for everything", run: while(cluster, 6*time.Second, func(s *site) error {
		s.pods[0].Answers(lab.After(3*time.Second, lab.Says(clusterSays, 30)))
		return nil
	})},
	{name: "one of two DNS pods answers SERVFAIL", run: while(cluster, 4*time.Second, func(s *site) error { s.pods[0].Answers(lab.Fails(dns.RcodeServerFailure)); return nil })},
	{name: "the DNS pods refuse TCP", run: while(cluster, 5*time.Second, func(s *site) error {
		s.reset()
		return errors.Join(s.pods[0].Block("tcp", "reject"), s.pods[1].Block("tcp", "reject"))
	})},
	{name: "TCP to the DNS pods is filtered", run: while(cluster, 6*time.Second, func(s *site) error {
		s.reset()
		return errors.Join(s.pods[0].Block("tcp", "drop"), s.pods[1].Block("tcp", "drop"))
	})},
	{name: "connections to the DNS pods are reset, four times a second", run: while(cluster, time.Second, func(s *site) error {
		for range 16 {
			s.reset()
			time.Sleep(time.Second / 4)
		}
		return nil
	})},
	{name: "a DNS pod flaps, each half second", run: while(cluster, time.Second, func(s *site) error {
		for range 5 {
			s.pods[0].Die()
			time.Sleep(time.Second / 2)
			if err := s.pods[0].Start(); err != nil {
				return err
			}
			time.Sleep(time.Second / 2)
		}
		return nil
	})},
	{name: "the cluster's DNS is gone for 3 s", run: while(cluster, 3*time.Second, func(s *site) error {
		for _, p := range s.pods {
			p.Die()
		}
		time.Sleep(3 * time.Second)
		return errors.Join(s.pods[0].Start(), s.pods[1].Start())
	})},
	{name: "one of two resolvers dies without a word", run: while(outside, 5*time.Second, func(s *site) error { return s.resolvers[0].Block("", "drop") })},
	{name: "one of two resolvers dies and refuses", run: while(outside, 5*time.Second, func(s *site) error { s.resolvers[0].Die(); return nil })},
	{name: "one of two resolvers takes 3 s for everything", run: while(outside, 6*time.Second, func(s *site) error {
		s.resolvers[0].Answers(lab.After(3*time.Second, lab.Says(resolverSays, 30)))
		return nil
	})},
	{name: "one of two resolvers answers REFUSED", run: while(outside, 4*time.Second, func(s *site) error { s.resolvers[0].Answers(lab.Fails(dns.RcodeRefused)); return nil })},
	{name: "the resolvers change, the old ones die", run: while(outside, 6*time.Second, func(s *site) error {
		err := s.names(2)
		return errors.Join(err, s.resolvers[0].Block("", "drop"), s.resolvers[1].Block("", "drop"))
	})},
	{name: "resolv.conf is empty at the start (names of the cluster)", before: func(s *site) error { return s.names() }, run: while(cluster, 3*time.Second, nothing)},
	{name: "resolv.conf is empty at the start, and is written later (other names)", before: func(s *site) error { return s.names() },
		run: while(outside, 4*time.Second, func(s *site) error { return s.names(0, 1) })},
	{name: "resolv.conf is odd: a bad line, and the cache's own address", before: func(s *site) error {
		return os.WriteFile(s.resolv, []byte("nameserver nobody\nnameserver 169.254.20.10\nnameserver "+resolverAddrs[0].String()+"\n"), 0o644)
	}, run: while(outside, 3*time.Second, nothing)},
	{name: "an answer does not fit into a datagram, TCP to the resolvers is filtered", before: func(s *site) error {
		for _, r := range s.resolvers {
			r.Answers(large)
		}
		return errors.Join(s.resolvers[0].Block("tcp", "drop"), s.resolvers[1].Block("tcp", "drop"))
	}, run: largeAnswers},
	{name: "600 dead names a second beside good ones (the good ones)", before: func(s *site) error {
		for _, r := range s.resolvers {
			r.Answers(lab.ForNames("dead.test.", lab.Silent, lab.Says(resolverSays, 30)))
		}
		return nil
	}, run: func(s *site) (*lab.Outcome, error) {
		ctx, stop := context.WithCancel(context.Background())
		defer stop()
		go lab.Asking{From: s.Pod, To: s.server(outside), Rate: 600, Query: lab.NewNames("dead.test.")}.Run(ctx)
		return s.asking(s.new(outside, 20), 8*time.Second, nothing)
	}},
	{name: "a name comes to be, which was asked for before", run: changes("NXDOMAIN", clusterSays, 30, 8*time.Second, cluster)},
	{name: "the address of a record of TTL 0 changes", run: changes("192.0.2.1", "192.0.2.2", 0, 6*time.Second, outside)},
	{name: "the address of a record of TTL 5 changes (from 5 s on)", run: changes("192.0.2.1", "192.0.2.2", 5, 6*time.Second, outside)},
	{name: "a name is deleted, then its servers fail (from 6 s on)", run: deleted},
	{name: "four addresses that their server rotates (wrong: more than 40 % have the same first)", run: rotation},
	{name: "one client asks for a subnet (the others)", run: subnet},
	{name: "a client asks in mixed case (another one, in lower case)", run: letterCase},
	{name: "a name that only the cluster's own DNS has", run: func(s *site) (*lab.Outcome, error) {
		for _, p := range s.pods {
			p.Answers(lab.Says(clusterSays, 30))
		}
		for _, r := range s.resolvers {
			r.Answers(lab.Fails(dns.RcodeNameError))
		}
		if s.subject == without { // there it has it
			for _, r := range s.resolvers {
				r.Answers(lab.Says(clusterSays, 30))
			}
		}
		a := s.new("intranet.test.", 20)
		a.Right = lab.IsAddress(clusterSays)
		return s.asking(a, time.Second, nothing)
	}},
}

func nothing(*site) error { return nil }

func (s *site) reset() {
	for _, p := range s.pods {
		p.Reset()
	}
}

// large is an answer of 1,600 bytes.
func large(r *dns.Msg, _ bool) *dns.Msg {
	m := new(dns.Msg).SetReply(r)
	for i := range 100 {
		m.Answer = append(m.Answer, &dns.A{Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 30}, A: net.IPv4(192, 0, 2, byte(i))})
	}
	return m
}

// largeAnswers asks as a libc does: over UDP, and over TCP what is truncated, for 5 s in all.
func largeAnswers(s *site) (*lab.Outcome, error) {
	t := &lab.Outcome{}
	query := lab.NewNames(outside)
	for i := range 20 {
		began := time.Now()
		var m *dns.Msg
		err := s.Pod.Do(func() (err error) {
			at := netip.AddrPortFrom(s.server(outside), 53).String()
			c := dns.Client{Timeout: 5 * time.Second}
			if m, _, err = c.Exchange(query(i), at); err == nil && m.Truncated {
				c = dns.Client{Net: "tcp", Timeout: 5*time.Second - time.Since(began)}
				m, _, err = c.Exchange(query(i), at)
			}
			return err
		})
		took := time.Since(began)
		t.Sent++
		t.Worst = max(t.Worst, took)
		switch {
		case err != nil:
			t.Lost++
		case m.Rcode == dns.RcodeServerFailure:
			t.Servfail++
		case len(m.Answer) != 100:
			t.Wrong++
		default:
			if t.Right++; took > time.Second {
				t.Late++
			}
		}
		if time.Since(began) > 2*time.Second && i >= 4 {
			break // five are enough to see that
		}
	}
	return t, nil
}

// denied is NXDOMAIN, for 5 s.
func denied(r *dns.Msg, _ bool) *dns.Msg {
	m := new(dns.Msg).SetRcode(r, dns.RcodeNameError)
	soa, _ := dns.NewRR("test. 5 IN SOA ns.test. admin.test. 1 60 60 60 5")
	m.Ns = []dns.RR{soa}
	return m
}

func says(what string, ttl uint32) lab.Answer {
	if what == "NXDOMAIN" {
		return denied
	}
	return lab.Says(what, ttl)
}

// all has all servers of a zone answer so.
func (s *site) all(zone string, a lab.Answer) {
	for _, r := range s.pods {
		if zone == cluster {
			r.Answers(a)
		}
	}
	for _, r := range s.resolvers {
		if zone != cluster {
			r.Answers(a)
		}
	}
}

// changes asks for one name again and again, whose answer changes after 2 s. What is shown longer
// than the old answer's TTL is wrong.
func changes(from, to string, ttl uint32, d time.Duration, zone string) func(s *site) (*lab.Outcome, error) {
	return func(s *site) (*lab.Outcome, error) {
		s.all(zone, says(from, ttl))
		var changed atomic.Int64
		old := time.Duration(ttl) * time.Second
		if from == "NXDOMAIN" {
			old = 5 * time.Second
		}
		a := lab.Asking{From: s.Pod, To: s.server(zone), Rate: 20, Query: one("changes." + zone)}
		was, is := lab.IsAddress(from), lab.IsAddress(to)
		a.Right = func(i int, m *dns.Msg) bool {
			at := changed.Load()
			since := time.Since(time.Unix(0, at))
			if at == 0 || since < old+time.Second { // one, for what is on its way
				return is(i, m) || was(i, m) || from == "NXDOMAIN" && m.Rcode == dns.RcodeNameError
			}
			return is(i, m)
		}
		return s.asking(a, d, func(s *site) error {
			time.Sleep(time.Second)
			s.all(zone, says(to, ttl))
			changed.Store(time.Now().UnixNano())
			return nil
		})
	}
}

func one(name string) func(int) *dns.Msg {
	return func(int) *dns.Msg { return new(dns.Msg).SetQuestion(name, dns.TypeA) }
}

// deleted asks for a name of TTL 2 that is deleted after 2 s, and whose servers fail from 6 s on.
func deleted(s *site) (*lab.Outcome, error) {
	s.all(outside, says("192.0.2.1", 2))
	var gone atomic.Bool
	a := lab.Asking{From: s.Pod, To: s.server(outside), Rate: 20, Query: one("deleted." + outside)}
	a.Right = func(_ int, m *dns.Msg) bool { return !gone.Load() || m.Rcode == dns.RcodeNameError }
	return s.asking(a, 10*time.Second, func(s *site) error {
		time.Sleep(time.Second)
		s.all(outside, denied)
		time.Sleep(4 * time.Second)
		gone.Store(true)
		s.all(outside, lab.Fails(dns.RcodeServerFailure))
		return nil
	})
}

func rotation(s *site) (*lab.Outcome, error) {
	var turn atomic.Int64
	s.all(outside, func(r *dns.Msg, _ bool) *dns.Msg {
		m := new(dns.Msg).SetReply(r)
		first := int(turn.Add(1))
		for i := range 4 {
			m.Answer = append(m.Answer, &dns.A{Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 30}, A: net.IPv4(192, 0, 2, byte((first+i)%4))})
		}
		return m
	})
	counts := [4]int{}
	a := lab.Asking{From: s.Pod, To: s.server(outside), Rate: 100, Query: one("many." + outside)}
	a.Right = func(_ int, m *dns.Msg) bool {
		if len(m.Answer) != 4 {
			return false
		}
		counts[m.Answer[0].(*dns.A).A.To4()[3]]++ // one reader at a time has the lock of the outcome
		return true
	}
	t, err := s.asking(a, 3*time.Second, nothing)
	if err != nil {
		return nil, err
	}
	for _, n := range counts {
		if n*10 > t.Sent*4 {
			t.Wrong, t.Right = n, t.Right-n
		}
	}
	return t, nil
}

func subnet(s *site) (*lab.Outcome, error) {
	s.all(outside, func(r *dns.Msg, tcp bool) *dns.Msg {
		if o := r.IsEdns0(); o != nil {
			for _, e := range o.Option {
				if _, ok := e.(*dns.EDNS0_SUBNET); ok {
					return lab.Says("203.0.113.1", 30)(r, tcp)
				}
			}
		}
		return lab.Says(resolverSays, 30)(r, tcp)
	})
	a := s.new(outside, 20)
	a.Query = func(i int) *dns.Msg {
		q := new(dns.Msg).SetQuestion(fmt.Sprintf("n%d.%s", i/2, outside), dns.TypeA)
		if i%2 == 0 {
			q.SetEdns0(1232, false)
			q.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: net.IPv4(198, 51, 100, 0)}}
		}
		return q
	}
	right := a.Right
	a.Right = func(i int, m *dns.Msg) bool { return i%2 == 0 || right(i, m) }
	return s.asking(a, 2*time.Second, nothing)
}

func letterCase(s *site) (*lab.Outcome, error) {
	a := s.new(outside, 20)
	name := func(i int) string {
		if i%2 == 0 {
			return fmt.Sprintf("WwW%d.ExAmPlE.test.", i/2)
		}
		return fmt.Sprintf("www%d.example.test.", i/2)
	}
	a.Query = func(i int) *dns.Msg { return one(name(i))(i) }
	a.Right = func(i int, m *dns.Msg) bool {
		return len(m.Answer) == 1 && m.Question[0].Name == name(i) && m.Answer[0].Header().Name == name(i)
	}
	return s.asking(a, 2*time.Second, nothing)
}

// anHour is what can happen in an hour of the upstreams' life, and how it ends.
var anHour = []struct {
	name       string
	begin, end func(s *site, i int) error
}{
	{"nothing", func(*site, int) error { return nil }, func(*site, int) error { return nil }},
	{"dies without a word", func(s *site, i int) error {
		return errors.Join(s.pods[i].Block("", "drop"), s.resolvers[i].Block("", "drop"))
	},
		func(s *site, i int) error { return errors.Join(s.pods[i].Unblock(), s.resolvers[i].Unblock()) }},
	{"dies", func(s *site, i int) error { s.pods[i].Die(); s.resolvers[i].Die(); return nil },
		func(s *site, i int) error { return errors.Join(s.pods[i].Start(), s.resolvers[i].Start()) }},
	{"is slow", func(s *site, i int) error {
		return s.both(i, func(a lab.Answer) lab.Answer { return lab.After(2*time.Second, a) })
	}, same},
	{"fails", func(s *site, i int) error {
		return s.both(i, func(lab.Answer) lab.Answer { return lab.Fails(dns.RcodeServerFailure) })
	}, same},
	{"resets connections", func(s *site, i int) error { s.pods[i].Reset(); s.resolvers[i].Reset(); return nil }, func(*site, int) error { return nil }},
	{"has no TCP", func(s *site, i int) error { s.pods[i].Reset(); return s.pods[i].Block("tcp", "drop") }, func(s *site, i int) error { return s.pods[i].Unblock() }},
	{"has another address", func(s *site, i int) error {
		return errors.Join(s.names(2, 1-i), s.resolvers[i].Block("", "drop"))
	}, func(s *site, i int) error { return errors.Join(s.resolvers[i].Unblock(), s.names(0, 1)) }},
}

// both changes how the pod and the resolver of a number answer.
func (s *site) both(i int, change func(lab.Answer) lab.Answer) error {
	s.pods[i].Answers(change(lab.Says(clusterSays, 30)))
	s.resolvers[i].Answers(change(lab.Says(resolverSays, 30)))
	return nil
}

func same(s *site, i int) error { return s.both(i, func(a lab.Answer) lab.Answer { return a }) }

// theDay prints what a pod sees in 24 hours of which each brings something to one of the two DNS pods
// and one of the two resolvers, and then half an hour of peace.
func theDay(program string) error {
	var zone string
	hours := row{run: func(s *site) (*lab.Outcome, error) {
		hour := *day / 24
		return s.asking(s.new(zone, 40), hour, func(s *site) error {
			chance := rand.New(rand.NewPCG(1, 2)) // the same day for all
			for range 24 {
				h, i := anHour[chance.IntN(len(anHour))], chance.IntN(2)
				if err := h.begin(s, i); err != nil {
					return fmt.Errorf("%s: %w", h.name, err)
				}
				time.Sleep(hour / 2)
				if err := h.end(s, i); err != nil {
					return fmt.Errorf("the end of %s: %w", h.name, err)
				}
				time.Sleep(hour / 2)
			}
			return nil
		})
	}}
	fmt.Printf("\n24 hours of the upstreams' life, in %v:\n\n", *day)
	fmt.Println("| | | right | late | SERVFAIL | REFUSED | wrong | lost | worst |")
	fmt.Println("|-|-|------:|-----:|---------:|--------:|------:|-----:|------:|")
	for _, z := range []struct{ zone, name string }{{cluster, "names of the cluster"}, {outside, "other names"}} {
		zone = z.zone
		results, err := measure(program, hours)
		if err != nil {
			return err
		}
		for i, t := range results {
			fmt.Printf("| %s | %s | %s |\n", z.name, subjects[i], cells(t))
		}
	}
	return nil
}
