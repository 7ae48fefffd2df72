// Package arrival tells what a start has to know before it takes queries over from the
// cluster: whether the cluster answers them, and whether this cache can.
package arrival

import (
	"context"
	"crypto/rand"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/outlive"
	"github.com/contentful-labs/coredns-nodecache/internal/ruleset"
)

// Elsewhere returns those addresses of es to which this node's rules let queries of pods go on to
// another server, as kube-proxy's do for a ClusterIP.
func Elsewhere(es []desired.Endpoint) (addrs []netip.Addr, err error) {
	err = ruleset.Look([]string{"nat"}, func(r *ruleset.Ruleset) {
		addrs = nil
		for _, e := range es {
			query := ruleset.Packet{Proto: unix.IPPROTO_UDP, Dst: e.Addr, DstPort: e.Port, State: ruleset.StateNew}
			if e.Proto == "tcp" {
				query.Proto = unix.IPPROTO_TCP
			}
			if slices.Contains(addrs, e.Addr) {
				continue
			}
			for _, res := range r.Through(query, unix.NF_INET_PRE_ROUTING, "nat") {
				if res.Translated {
					addrs = append(addrs, e.Addr)
					break
				}
			}
		}
	})
	return addrs, err
}

// Block is the plugins of a server block that ask upstreams, and a zone for which they do.
type Block struct {
	Zone string
	Next plugin.Handler
}

const (
	// askFor is how long an answer may take, askEvery how long there is no further query after one
	// that was not answered.
	askFor   = 2 * time.Second
	askEvery = 100 * time.Millisecond
)

// Await returns the zones of the blocks that answer no query until ctx is done, and none as soon as
// all do. SERVFAIL is no answer, nor is REFUSED if it is no upstream's: some answer so to whatever is not theirs.
func Await(ctx context.Context, blocks []Block) (silent []string) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, b := range blocks {
		wg.Go(func() {
			for !b.answers(ctx) {
				select {
				case <-ctx.Done():
					mu.Lock()
					defer mu.Unlock()
					silent = append(silent, b.Zone)
					return
				case <-time.After(askEvery):
				}
			}
		})
	}
	wg.Wait()
	slices.Sort(silent)
	return silent
}

func (b Block) answers(ctx context.Context) bool {
	if b.Next == nil {
		return true // it will never be any better
	}
	ctx, cancel := context.WithTimeout(ctx, askFor)
	m := new(dns.Msg)
	m.SetQuestion(b.name(), dns.TypeA)
	answered := make(chan bool, 1)
	go func() {
		defer cancel()
		good := false
		defer func() { answered <- good }()
		defer outlive.Panic("asking the plugins of " + b.Zone)
		w := &writer{rcode: -1}
		rcode, err := b.Next.ServeDNS(ctx, w, m)
		if w.rcode >= 0 {
			rcode = w.rcode
		}
		good = (err == nil || w.rcode >= 0) && rcode != dns.RcodeServerFailure && (rcode != dns.RcodeRefused || w.rcode >= 0)
	}()
	select {
	case good := <-answered:
		return good
	case <-ctx.Done(): // a plugin may not heed it
		return false
	}
}

// name returns a name that nobody has asked for, so that no plugin knows what became of it. For all
// names it is in a domain of which resolvers know that it has none (RFC 6761).
func (b Block) name() string {
	label := "nodecache-asks-" + strings.ToLower(rand.Text())
	if b.Zone == "." || len(label)+len(b.Zone) > 250 {
		return label + ".invalid."
	}
	return label + "." + b.Zone
}

// writer takes the answer to a query of this process.
type writer struct{ rcode int }

// LocalAddr implements dns.ResponseWriter.
func (*writer) LocalAddr() net.Addr { return &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 53} }

// RemoteAddr implements dns.ResponseWriter.
func (*writer) RemoteAddr() net.Addr { return &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)} }

// WriteMsg implements dns.ResponseWriter.
func (w *writer) WriteMsg(m *dns.Msg) error {
	w.rcode = m.Rcode
	return nil
}

// Write implements dns.ResponseWriter.
func (w *writer) Write(b []byte) (int, error) {
	m := new(dns.Msg)
	if m.Unpack(b) == nil {
		w.rcode = m.Rcode
	}
	return len(b), nil
}

// Close implements dns.ResponseWriter.
func (*writer) Close() error { return nil }

// TsigStatus implements dns.ResponseWriter.
func (*writer) TsigStatus() error { return nil }

// TsigTimersOnly implements dns.ResponseWriter.
func (*writer) TsigTimersOnly(bool) {}

// Hijack implements dns.ResponseWriter.
func (*writer) Hijack() {}
