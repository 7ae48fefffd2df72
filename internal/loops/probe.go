package loops

import (
	"context"
	"crypto/rand"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/miekg/dns"
)

const (
	// suspicious is how often one address has to ask the same question at the same time. A
	// client asks again only when it has given up on the first.
	suspicious = 4
	// probeEvery is how often a block sends a probe at most.
	probeEvery = 5 * time.Second
	// probeFor is how long a probe waits for its answer.
	probeFor = 5 * time.Second
	// knownFor is how long an address is known to send back what it is asked. It is a little
	// longer than a further probe takes to come back.
	knownFor = 2 * probeEvery
	// mostKnown is how many such addresses are known.
	mostKnown = 64

	probePrefix = "nodecache-probe-"
)

// A prober finds out whether what a server block sends comes back, and from where: from
// another server, or past an address that is translated, so that nothing shows whose query it
// is. It sends a query for a name that nobody else can ask for. The guard's lock protects it.
type prober struct {
	label string // the first one of the last probe's name
	sent  time.Time
	back  map[netip.Addr]time.Time // where probes came back from, and when last
}

// known tells whether an address sends back what it is asked.
func (p *prober) known(a netip.Addr) bool {
	at, ok := p.back[a]
	return ok && time.Since(at) < knownFor
}

// probe sends a probe on the way of a suspicious query, if it is time for one.
func (g *guard) probe(ctx context.Context, next plugin.Handler, w dns.ResponseWriter, q nameType) {
	g.mu.Lock()
	if time.Since(g.probing.sent) < probeEvery {
		g.mu.Unlock()
		return
	}
	label := strings.ToLower(probePrefix + rand.Text())
	g.probing.label, g.probing.sent = label, time.Now()
	g.mu.Unlock()

	m := new(dns.Msg)
	m.SetQuestion(under(label, q.name), q.qtype)
	pw := &probeWriter{local: w.LocalAddr(), remote: w.RemoteAddr()}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), probeFor)
	go func() {
		defer cancel()
		defer func() {
			if p := recover(); p != nil {
				log.Errorf("%s: looking for a loop: %v", g.at, p)
			}
		}()
		next.ServeDNS(ctx, pw, m)
	}()
}

// under puts a label before a name, which loses what does not fit. So the probe goes where the
// queries for the name go.
func under(label, name string) string {
	const most = 253
	for len(label)+1+len(name) > most {
		i, end := dns.NextLabel(name, 0)
		if end {
			name = "."
			break
		}
		name = name[i:]
	}
	return label + "." + strings.TrimPrefix(name, ".")
}

// cameBack tells whether q is this block's own probe, and notes where it has come from.
func (g *guard) cameBack(q nameType, from source) bool {
	label, _, _ := strings.Cut(q.name, ".")
	if !strings.HasPrefix(label, probePrefix) {
		return false
	}
	g.mu.Lock()
	p := &g.probing
	if label != p.label {
		g.mu.Unlock()
		return false // another block's
	}
	for a, at := range p.back {
		if time.Since(at) >= knownFor {
			delete(p.back, a)
		}
	}
	if p.back == nil {
		p.back = map[netip.Addr]time.Time{}
	}
	if len(p.back) < mostKnown {
		p.back[from.at.Addr()] = time.Now()
	}
	g.mu.Unlock()
	g.refuse(refusedLoop, q, from)
	return true
}

// A probeWriter takes the answer to a probe, which nobody wants.
type probeWriter struct{ local, remote net.Addr }

// LocalAddr implements dns.ResponseWriter.
func (w *probeWriter) LocalAddr() net.Addr { return w.local }

// RemoteAddr implements dns.ResponseWriter.
func (w *probeWriter) RemoteAddr() net.Addr { return w.remote }

// WriteMsg implements dns.ResponseWriter.
func (w *probeWriter) WriteMsg(*dns.Msg) error { return nil }

// Write implements dns.ResponseWriter.
func (w *probeWriter) Write(b []byte) (int, error) { return len(b), nil }

// Close implements dns.ResponseWriter.
func (w *probeWriter) Close() error { return nil }

// TsigStatus implements dns.ResponseWriter.
func (w *probeWriter) TsigStatus() error { return nil }

// TsigTimersOnly implements dns.ResponseWriter.
func (w *probeWriter) TsigTimersOnly(bool) {}

// Hijack implements dns.ResponseWriter.
func (w *probeWriter) Hijack() {}
