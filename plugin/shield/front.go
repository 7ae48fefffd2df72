package shield

import (
	"context"
	"slices"
	"strings"
	"sync"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/cache"
	"github.com/coredns/coredns/plugin/metrics"
	"github.com/miekg/dns"
)

// A Front stands right before the cache plugin.
type Front struct {
	Next plugin.Handler // what fastpath of nodecache looks for
	*memory
}

// Name implements plugin.Handler.
func (*Front) Name() string { return name }

// ServeDNS implements plugin.Handler.
func (f *Front) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	if !concerns(r) {
		return plugin.NextOrFailure(f.Name(), f.Next, ctx, w, r)
	}
	if o := r.IsEdns0(); o != nil {
		o.Hdr.Ttl &= doBit // CoreDNS makes the answer's OPT record of it, in which there must be no other flag
	}
	asked := common(r, f.keep)
	c := &clientWriter{ResponseWriter: w, r: r}
	if r.IsEdns0() != nil {
		c.notes = new(notes)
		ctx = context.WithValue(ctx, notesKey{}, c.notes)
	}
	next := f.Next
	if f.past(keyOf(asked)) {
		if cache, ok := next.(*cache.Cache); ok {
			next = cache.Next
			bypassed.WithLabelValues(metrics.WithServer(ctx)).Inc()
		}
	}
	code, err := plugin.NextOrFailure(f.Name(), next, ctx, c, asked)
	if c.written || c.notes == nil || !c.notes.any() || plugin.ClientWrite(code) {
		return code, err
	}
	m := new(dns.Msg)
	m.SetRcode(r, code)
	if werr := c.WriteMsg(m); werr != nil {
		return code, werr
	}
	return dns.RcodeSuccess, err
}

// common returns a query in the form in which all queries for the same thing are alike: what
// is answered to one client is answered to the others too. It is the query itself if it has
// that form. keep are the EDNS options that it may have.
func common(r *dns.Msg, keep []uint16) *dns.Msg {
	o := r.IsEdns0()
	records := len(r.Answer) + len(r.Ns) + len(r.Extra)
	if o != nil {
		records--
	}
	h := r.MsgHdr
	if h.RecursionDesired && !h.Authoritative && !h.Truncated && !h.RecursionAvailable && !h.Zero && h.Rcode == dns.RcodeSuccess &&
		records == 0 && isLower(r.Question[0].Name) && (o == nil || plainOPT(o, keep)) {
		return r
	}
	c := &dns.Msg{Question: slices.Clone(r.Question)}
	c.Id, c.RecursionDesired, c.AuthenticatedData, c.CheckingDisabled = r.Id, true, r.AuthenticatedData, r.CheckingDisabled
	c.Question[0].Name = strings.ToLower(c.Question[0].Name)
	if o != nil {
		c.SetEdns0(o.UDPSize(), o.Do())
		p := c.IsEdns0()
		for _, option := range o.Option {
			if slices.Contains(keep, option.Option()) {
				p.Option = append(p.Option, option)
			}
		}
	}
	return c
}

// doBit is DO in what is a TTL in other records than OPT.
const doBit = 1 << 15

// plainOPT tells whether an OPT record has nothing but the size and DO, and what may be kept.
func plainOPT(o *dns.OPT, keep []uint16) bool {
	return o.Hdr.Ttl&^doBit == 0 && !slices.ContainsFunc(o.Option, func(e dns.EDNS0) bool { return !slices.Contains(keep, e.Option()) })
}

func isLower(s string) bool {
	for i := range len(s) {
		if 'A' <= s[i] && s[i] <= 'Z' {
			return false
		}
	}
	return true
}

// clientWriter gives an answer the form in which its client has asked.
type clientWriter struct {
	dns.ResponseWriter
	r       *dns.Msg
	notes   *notes // nil: the client can't be told them
	written bool
}

// WriteMsg implements dns.ResponseWriter. The records of m may be those that the cache plugin
// has stored, so they are not changed.
func (w *clientWriter) WriteMsg(m *dns.Msg) error {
	w.written = true
	if m == nil {
		return w.ResponseWriter.WriteMsg(m)
	}
	m.RecursionDesired = w.r.RecursionDesired
	if m.Rcode == dns.RcodeNameError && len(m.Answer) == 0 {
		n := 0
		for n < len(m.Ns) && isAlias(m.Ns[n]) {
			n++
		}
		m.Answer, m.Ns = m.Ns[:n:n], m.Ns[n:]
	}
	q := w.r.Question[0].Name
	if !isLower(q) {
		m.Question = slices.Clone(w.r.Question)
	}
	m.Answer, m.Ns, m.Extra = spelled(m.Answer, q), spelled(m.Ns, q), spelled(m.Extra, q)
	if w.notes != nil {
		w.notes.addTo(m)
	}
	return w.ResponseWriter.WriteMsg(m)
}

// Write implements dns.ResponseWriter.
func (w *clientWriter) Write(b []byte) (int, error) {
	w.written = true
	return w.ResponseWriter.Write(b)
}

// spelled returns records with the owner name as it was asked for.
func spelled(rrs []dns.RR, asked string) []dns.RR {
	var out []dns.RR
	for i, rr := range rrs {
		owner := rr.Header().Name
		if len(owner) != len(asked) || owner == asked || !strings.EqualFold(owner, asked) {
			continue
		}
		if out == nil {
			out = slices.Clone(rrs)
		}
		out[i] = dns.Copy(rr)
		out[i].Header().Name = asked
	}
	if out == nil {
		return rrs
	}
	return out
}

type notesKey struct{}

// notes are the extended errors (RFC 8914) that go with a failure, or with an answer that is
// given in place of one. A prefetch at the same time may add to them.
type notes struct {
	mu  sync.Mutex
	all []*dns.EDNS0_EDE // nobody changes them
}

// say has the client told why it gets what it gets, if it can be told. A cause may be nil.
func say(ctx context.Context, causes ...*dns.EDNS0_EDE) {
	n, ok := ctx.Value(notesKey{}).(*notes)
	if !ok {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range causes {
		if c != nil && !slices.ContainsFunc(n.all, func(e *dns.EDNS0_EDE) bool { return e.InfoCode == c.InfoCode }) {
			n.all = append(n.all, c)
		}
	}
}

func (n *notes) any() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.all) > 0
}

// addTo adds those notes that fit a response: to a failure all but that of a denial, and to a
// denial that alone.
func (n *notes) addTo(m *dns.Msg) {
	failure := !plugin.ClientWrite(m.Rcode)
	denial := m.Rcode == dns.RcodeNameError || m.Rcode == dns.RcodeSuccess && soaOf(m) != nil
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, e := range n.all {
		if stale := e.InfoCode == dns.ExtendedErrorCodeStaleNXDOMAINAnswer; stale && !denial || !stale && !failure {
			continue
		}
		if m.IsEdns0() == nil {
			m.SetEdns0(dns.DefaultMsgSize, false) // which CoreDNS adapts to the client's
		}
		o := m.IsEdns0()
		o.Option = append(o.Option, e)
	}
}
