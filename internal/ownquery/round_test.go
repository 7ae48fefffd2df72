package ownquery

import (
	"context"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
)

// A server answers on both protocols as it is told.
type server struct{ how atomic.Value } // of func(dns.ResponseWriter, *dns.Msg)

func (s *server) ServeDNS(w dns.ResponseWriter, r *dns.Msg) {
	s.how.Load().(func(dns.ResponseWriter, *dns.Msg))(w, r)
}

func serve(t *testing.T) (s *server, zones map[desired.Endpoint]string) {
	t.Helper()
	testkit.NeedRoot(t)
	s = &server{}
	zones = map[desired.Endpoint]string{}
	for _, sock := range testkit.ServeOn(t, testkit.DNSOn("127.0.0.1")...) {
		d := &dns.Server{Handler: s, Listener: sock.TCP}
		if sock.UDP != nil {
			d = &dns.Server{Handler: s, PacketConn: sock.UDP}
		}
		go d.ActivateAndServe()
		t.Cleanup(func() { d.Shutdown() })
		zones[sock.E] = "cluster.local"
	}
	return s, zones
}

func answersItself(w dns.ResponseWriter, r *dns.Msg) {
	if !Answer(w, r) {
		dns.HandleFailed(w, r)
	}
}

func answersOthers(w dns.ResponseWriter, r *dns.Msg) {
	m := new(dns.Msg)
	w.WriteMsg(m.SetRcode(r, dns.RcodeNameError))
}

func refuses(w dns.ResponseWriter, r *dns.Msg) {
	m := new(dns.Msg)
	w.WriteMsg(m.SetRcode(r, dns.RcodeRefused))
}

func isSilent(dns.ResponseWriter, *dns.Msg) {}

// arrival is the value of the gauge, or -1.
func arrival(t *testing.T) float64 {
	t.Helper()
	families, err := prometheus.DefaultGatherer.Gather()
	testkit.Must(t, err)
	for _, f := range families {
		if f.GetName() == "coredns_nodecache_own_query_arrives" {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	return -1
}

// What is wrong is told at the second round, with what it is, and is over with the first
// that finds nothing.
func TestRounds(t *testing.T) {
	s, zones := serve(t)
	twin := func() (map[desired.Endpoint]bool, bool) {
		return map[desired.Endpoint]bool{{Addr: testkit.DNSOn("127.0.0.1")[0].Addr, Proto: "udp", Port: 53}: true}, true
	}
	mute := func() (map[desired.Endpoint]bool, bool) { return nil, false }
	alone := func() (map[desired.Endpoint]bool, bool) { return nil, true }
	for _, c := range []struct {
		name   string
		how    func(dns.ResponseWriter, *dns.Msg)
		others func() (map[desired.Endpoint]bool, bool)
		says   string // "" for nothing
	}{
		{"all is well", answersItself, alone, ""},
		{"silence", isSilent, alone, "127.0.0.1:53/udp, 127.0.0.1:53/tcp get no answer"},
		{"another server", answersOthers, alone, "127.0.0.1:53/udp, 127.0.0.1:53/tcp are answered by another server"},
		{"a twin that does not know the query", answersOthers, twin, "127.0.0.1:53/tcp are answered by another server"},
		{"a twin that says nothing", answersOthers, mute, ""},
		{"a view", refuses, alone, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var a Asker
			site := Site{Zones: zones, Others: c.others}
			s.how.Store(c.how)
			if found := a.Round(t.Context(), site); len(found) > 0 {
				t.Errorf("the first round says %q", found)
			}
			found := a.Round(t.Context(), site)
			if len(found) > 1 || len(found) == 1 != (c.says != "") || c.says != "" && !strings.Contains(found[0], " "+c.says) {
				t.Errorf("the second round says %q, want %q", found, c.says)
			}
			if got, want := arrival(t), map[bool]float64{true: 1}[c.says == ""]; got != want {
				t.Errorf("the gauge is %v, want %v", got, want)
			}
			s.how.Store(answersItself)
			if found := a.Round(t.Context(), site); len(found) > 0 || arrival(t) != 1 {
				t.Errorf("once all is well it says %q, the gauge is %v", found, arrival(t))
			}
		})
	}
}

// IPVS that comes after the start is named as the one who takes the queries to its addresses.
func TestRoundsBesideIPVS(t *testing.T) {
	s, zones := serve(t)
	testkit.Link(t, nodelinks.IPVS, "127.0.0.1")
	for name, how := range map[string]func(dns.ResponseWriter, *dns.Msg){"silence": isSilent, "another server": answersOthers, "all is well": answersItself} {
		s.how.Store(how)
		var a Asker
		var found []string
		for range roundsLost {
			found = a.Round(t.Context(), Site{Zones: zones})
		}
		if name == "all is well" {
			if len(found) > 0 {
				t.Errorf("%s: it says %q", name, found)
			}
		} else if len(found) != 1 || !strings.Contains(found[0], " 127.0.0.1:53/udp, 127.0.0.1:53/tcp are taken by IPVS") {
			t.Errorf("%s: it says %q, want IPVS named", name, found)
		}
	}
}

// A round that an exit cuts short says nothing and changes nothing.
func TestRoundThatIsCutShort(t *testing.T) {
	s, zones := serve(t)
	s.how.Store(isSilent)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var a Asker
	for range roundsLost + 1 {
		if found := a.Round(ctx, Site{Zones: zones}); len(found) > 0 {
			t.Errorf("it says %q", found)
		}
	}
}

// However many endpoints there are, a round asks some of them, and each has its turn.
func TestRoundOfMany(t *testing.T) {
	s, _ := serve(t)
	zones := map[desired.Endpoint]string{}
	for i := range 3 * mostAsked / 2 {
		zones[desired.Endpoint{Addr: testkit.DNSOn("127.0.0.1")[0].Addr, Proto: "tcp", Port: uint16(1000 + i)}] = "."
	}
	s.how.Store(answersItself)
	var a Asker
	for range 2 * roundsLost {
		a.Round(t.Context(), Site{Zones: zones})
	}
	if len(a.bad) != len(zones) {
		t.Errorf("%d of %d have been asked", len(a.bad), len(zones))
	}
}

// A query of its name from another host, and any other, is somebody's.
func TestAnswersOnlyItself(t *testing.T) {
	local := &net.UDPAddr{IP: net.IPv4(10, 96, 0, 10), Port: 53}
	for _, c := range []struct {
		name string
		from net.Addr
		own  bool
	}{
		{label + ".cluster.local.", &net.UDPAddr{IP: net.IPv4(10, 96, 0, 10), Port: 4000}, true},
		{label + ".", &net.TCPAddr{IP: net.IPv4(10, 96, 0, 10), Port: 4000}, true},
		{label + ".cluster.local.", &net.UDPAddr{IP: net.IPv4(10, 0, 1, 2), Port: 4000}, false},
		{label + "x.cluster.local.", &net.UDPAddr{IP: net.IPv4(10, 96, 0, 10), Port: 4000}, false},
		{"example.org.", &net.UDPAddr{IP: net.IPv4(10, 96, 0, 10), Port: 4000}, false},
	} {
		somebody.Store(false)
		m := new(dns.Msg)
		m.SetQuestion(c.name, dns.TypeTXT)
		w := &writer{local: local, remote: c.from}
		if own := Answer(w, m); own != c.own || somebody.Load() == c.own || (len(w.said) == 1) != c.own {
			t.Errorf("%s from %s: its own: %v, somebody's: %v, answers: %v", c.name, c.from, own, somebody.Load(), w.said)
		}
		wire, err := m.Pack()
		testkit.Must(t, err)
		if Is(wire) != strings.HasPrefix(c.name, label+".") {
			t.Errorf("%s in the network: %v", c.name, Is(wire))
		}
		for n := range wire {
			Is(slices.Clone(wire[:n]))
		}
	}
}

type writer struct {
	dns.ResponseWriter
	local, remote net.Addr
	said          []*dns.Msg
}

func (w *writer) LocalAddr() net.Addr       { return w.local }
func (w *writer) RemoteAddr() net.Addr      { return w.remote }
func (w *writer) WriteMsg(m *dns.Msg) error { w.said = append(w.said, m); return nil }
