package ownquery

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coredns/coredns/plugin"
	clog "github.com/coredns/coredns/plugin/pkg/log"
	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
)

var log = clog.NewWithPlugin("nodecache")

var arrives = promauto.NewGaugeVec(prometheus.GaugeOpts{
	Namespace: plugin.Namespace,
	Subsystem: "nodecache",
	Name:      "own_query_arrives",
	Help:      "Gauge that is 1 while queries that nodecache itself sends to the address come to a cache on this node, out of connection tracking, and else 0.",
}, []string{"address"})

const (
	// tries is how often a round asks an endpoint that does not answer, each for patience.
	tries    = 3
	patience = 500 * time.Millisecond
	// roundsLost is after how many rounds in a row it is told.
	roundsLost = 2
	// mostAsked is how many endpoints a round asks. Where there are more it goes on from there.
	mostAsked = 64
	together  = 8 // at once
)

// An Asker asks the endpoints of this process, in rounds.
type Asker struct {
	next int                      // where the next round begins
	bad  map[desired.Endpoint]int // rounds in a row
	why  map[desired.Endpoint]outcome

	shown map[netip.Addr]float64 // by the gauge
}

// Site is what an Asker has to know.
type Site struct {
	// Zones are a zone of each endpoint that answers plain DNS and has rules.
	Zones map[desired.Endpoint]string
	// Others asks the other caches on the node what they serve; a release that does not
	// know our query answers it as any other.
	Others func() (serves map[desired.Endpoint]bool, known bool)
}

// outcome is what has become of a query.
type outcome int

const (
	unknown outcome = iota
	arrived
	silent
	elsewhere
	tracked
	ipvs
)

// Round asks, at most until ctx ends, and returns a sentence for each thing that is wrong
// since some rounds. Of a round that is cut short nothing counts.
func (a *Asker) Round(ctx context.Context, s Site) (found []string) {
	all := slices.SortedFunc(maps.Keys(s.Zones), desired.Compare)
	asked := all
	if len(all) > mostAsked {
		a.next %= len(all)
		asked = slices.Concat(all[a.next:], all[:a.next])[:mostAsked]
		a.next += mostAsked
	}
	outcomes := make([]outcome, len(asked))
	var wait sync.WaitGroup
	room := make(chan struct{}, together)
	for i, e := range asked {
		wait.Add(1)
		room <- struct{}{}
		go func() {
			defer func() { <-room; wait.Done() }()
			for range tries {
				if outcomes[i] = ask(ctx, e, s.Zones[e]); outcomes[i] <= arrived || ctx.Err() != nil {
					return
				}
			}
		}()
	}
	wait.Wait()
	if ctx.Err() != nil {
		return nil
	}
	if slices.Contains(outcomes, elsewhere) && s.Others != nil {
		serves, known := s.Others()
		for i, e := range asked {
			if outcomes[i] == elsewhere && (serves[e] || !known) {
				outcomes[i] = unknown
			}
		}
	}
	if slices.Contains(outcomes, silent) || slices.Contains(outcomes, elsewhere) {
		carriers, _ := nodelinks.Carriers() // without it the sentences are those of any other cause
		for i, e := range asked {
			if (outcomes[i] == silent || outcomes[i] == elsewhere) && slices.Contains(carriers[e.Addr], nodelinks.IPVS) {
				outcomes[i] = ipvs
			}
		}
	}
	bad, why := map[desired.Endpoint]int{}, map[desired.Endpoint]outcome{}
	for _, e := range all {
		if n := a.bad[e]; n > 0 {
			bad[e], why[e] = n, a.why[e]
		}
	}
	for i, e := range asked {
		switch outcomes[i] {
		case unknown:
		case arrived:
			delete(bad, e)
		default:
			bad[e]++
			why[e] = outcomes[i]
		}
	}
	a.bad, a.why = bad, why
	lost := map[outcome][]desired.Endpoint{}
	values := map[netip.Addr]float64{}
	for _, e := range all {
		if _, ok := values[e.Addr]; !ok {
			values[e.Addr] = 1
		}
		if bad[e] >= roundsLost {
			values[e.Addr] = 0
			lost[why[e]] = append(lost[why[e]], e)
		}
	}
	for addr := range a.shown {
		if _, ok := values[addr]; !ok {
			arrives.DeleteLabelValues(addr.String())
		}
	}
	for addr, v := range values {
		arrives.WithLabelValues(addr.String()).Set(v)
	}
	a.shown = values
	for _, o := range slices.Sorted(maps.Keys(lost)) {
		found = append(found, fmt.Sprintf(said[o], some(lost[o])))
	}
	return found
}

var said = map[outcome]string{
	silent:    "queries that this cache itself sends to %s get no answer, although all is in place: look for a rule of a firewall that drops them (nft list ruleset, iptables-save), for a route that leads elsewhere (ip route get), and whether this process gets CPU time",
	elsewhere: "queries that this cache itself sends to %s are answered by another server, although all is in place: something directs them elsewhere before they come here, such as eBPF in place of kube-proxy (have it direct them to this cache, or bind a local address), or a DNAT in the table nat of queries that are tracked",
	tracked:   "queries that this cache itself sends to %s come here, but are tracked: a rule of somebody else's has them tracked or ends their way before nodecache's rules (nft list ruleset, iptables-save -t raw); a full connection tracking table loses them",
	ipvs:      "queries that this cache itself sends to %s are taken by IPVS before any listener sees them, as the link " + nodelinks.IPVS + " carries the address by now: with kube-proxy in IPVS mode bind only a link-local address, such as 169.254.20.10",
}

// some lists endpoints, of which there may be many.
func some(es []desired.Endpoint) string {
	const most = 8
	var named []string
	for _, e := range es[:min(len(es), most)] {
		named = append(named, e.String())
	}
	if len(es) > most {
		named = append(named, fmt.Sprintf("%d more", len(es)-most))
	}
	return strings.Join(named, ", ")
}

// ask sends one query, as any program on the node would. It comes from the address itself, as the
// routes have it, but for those that a cache which died in its exit has left.
func ask(ctx context.Context, e desired.Endpoint, zone string) outcome {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	at := netip.AddrPortFrom(e.Addr, e.Port)
	self := net.Dialer{LocalAddr: &net.UDPAddr{IP: e.Addr.AsSlice()}}
	if e.Proto == "tcp" {
		self.LocalAddr = &net.TCPAddr{IP: e.Addr.AsSlice()}
	}
	conn, err := self.DialContext(ctx, e.Proto, at.String())
	if err != nil {
		log.Debugf("asking %s: %v", e, err)
		for _, own := range []error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM} {
			if errors.Is(err, own) {
				return unknown
			}
		}
		return silent
	}
	defer conn.Close()
	if t, ok := conn.(*net.TCPConn); ok {
		t.SetLinger(0) // no port is to wait for stray segments
	}
	m := new(dns.Msg)
	m.SetQuestion(dns.Fqdn(label+"."+strings.TrimPrefix(zone, ".")), dns.TypeTXT)
	client := dns.Client{Net: e.Proto, Timeout: patience}
	r, _, err := client.ExchangeWithConnContext(ctx, m, &dns.Conn{Conn: conn})
	from, parsed := netip.ParseAddrPort(conn.LocalAddr().String())
	switch {
	case err != nil:
		log.Debugf("asking %s: %v", e, err)
		return silent
	case r.Rcode == dns.RcodeRefused:
		return unknown // a view that is not for us, or another server: nobody can tell
	case !isOurs(r):
		return elsewhere
	case parsed == nil && isTracked(e.Proto, from, at):
		return tracked
	}
	return arrived
}

// isOurs tells whether an answer is one of Answer's, on this node.
func isOurs(r *dns.Msg) bool {
	return slices.ContainsFunc(r.Answer, func(rr dns.RR) bool {
		t, ok := rr.(*dns.TXT)
		return ok && slices.Equal(t.Txt, []string{id()})
	})
}
