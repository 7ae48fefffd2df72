package shield

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/metrics"
	"github.com/miekg/dns"
)

// A back stands right behind the cache plugin. What comes here the cache plugin could not
// answer, or wants anew.
type back struct {
	next plugin.Handler
	*memory
}

// Name implements plugin.Handler. It is not that of the directive, under which CoreDNS keeps
// the front.
func (back) Name() string { return name + "-back" }

// ServeDNS implements plugin.Handler. A failure is returned and never written: the cache
// plugin would put it in the place of the denial that it has, and then answer with what had
// been there before.
func (b back) ServeDNS(ctx context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
	if !concerns(r) {
		return plugin.NextOrFailure(b.Name(), b.next, ctx, w, r)
	}
	k, began := keyOf(r), time.Now()
	if f, held := b.held(k, began); held {
		say(ctx, f.cause, &dns.EDNS0_EDE{InfoCode: dns.ExtendedErrorCodeCachedError})
		code, err := b.instead(ctx, w, r, k, f.rcode, nil, began)
		if !plugin.ClientWrite(code) {
			answered.WithLabelValues(metrics.WithServer(ctx), reasonFailure).Inc()
		}
		return code, err
	}
	defer b.end(k, began)
	a := &answerWriter{ResponseWriter: w, back: b, key: k}
	code, err := plugin.NextOrFailure(b.Name(), b.next, ctx, a, r)
	now := time.Now()
	switch {
	case a.failed != nil:
		code = a.failed.Rcode
		cause := causeOf(a.failed)
		b.fail(k, code, cause, ofTheName(cause), began, now)
		say(ctx, cause)
	case a.written:
		return code, err
	case code == dns.RcodeServerFailure && ctx.Err() == nil:
		b.fail(k, code, nil, false, began, now)
	case code != dns.RcodeServerFailure && code != dns.RcodeRefused:
		return code, err
	default:
		// The client has gone, or this server itself refuses: nothing is known of the name.
	}
	return b.instead(ctx, w, r, k, code, err, now)
}

// instead answers a question that can't be resolved with the denial that is known, or else
// returns code and err.
func (b back) instead(ctx context.Context, w dns.ResponseWriter, r *dns.Msg, k key, code int, err error, now time.Time) (int, error) {
	d := b.denied(k, now)
	if d == nil {
		return code, err
	}
	answered.WithLabelValues(metrics.WithServer(ctx), reasonDenial).Inc()
	d.Id, d.Question = r.Id, slices.Clone(r.Question)
	d.RecursionDesired, d.CheckingDisabled = r.RecursionDesired, r.CheckingDisabled
	say(ctx, &dns.EDNS0_EDE{InfoCode: dns.ExtendedErrorCodeStaleNXDOMAINAnswer})
	if werr := w.WriteMsg(d); werr != nil {
		return dns.RcodeServerFailure, werr
	}
	return d.Rcode, err
}

// mostText bounds what of an upstream's reason is remembered.
const mostText = 128

// causeOf returns the extended error of an upstream's response, or nil.
func causeOf(m *dns.Msg) *dns.EDNS0_EDE {
	if o := m.IsEdns0(); o != nil {
		for _, option := range o.Option {
			if e, ok := option.(*dns.EDNS0_EDE); ok {
				return &dns.EDNS0_EDE{InfoCode: e.InfoCode, ExtraText: strings.ToValidUTF8(e.ExtraText[:min(len(e.ExtraText), mostText)], "")}
			}
		}
	}
	return nil
}

// ofTheName tells whether a failure with this cause, of which an upstream has told, is one of
// the name, rather than of all that is between here and the servers.
func ofTheName(cause *dns.EDNS0_EDE) bool {
	if cause == nil {
		return true
	}
	switch cause.InfoCode {
	case dns.ExtendedErrorCodeNotReady, dns.ExtendedErrorCodeNoReachableAuthority, dns.ExtendedErrorCodeNetworkError:
		return false
	}
	return true
}

// answerWriter learns from the answer, and keeps a failure to itself.
type answerWriter struct {
	dns.ResponseWriter
	back    back
	key     key
	written bool
	failed  *dns.Msg
}

// WriteMsg implements dns.ResponseWriter.
func (w *answerWriter) WriteMsg(m *dns.Msg) error {
	if m != nil && len(m.Question) > 0 {
		switch m.Rcode {
		case dns.RcodeServerFailure, dns.RcodeRefused, dns.RcodeNotImplemented:
			w.failed = m
			return nil
		case dns.RcodeSuccess, dns.RcodeNameError:
			if !m.Truncated {
				m = inCacheForm(m, w.key.qtype)
			}
			w.back.note(w.key, m, time.Now())
		}
	}
	w.written, w.failed = true, nil
	return w.ResponseWriter.WriteMsg(m)
}

// Write implements dns.ResponseWriter.
func (w *answerWriter) Write(b []byte) (int, error) {
	w.written, w.failed = true, nil
	return w.ResponseWriter.Write(b)
}

// inCacheForm returns a response in the form in which the cache plugin does it justice:
//
// A denial is good for the lesser of the SOA record's TTL and its minimum, RFC 2308 section 5;
// the cache plugin knows the TTL alone.
//
// NXDOMAIN at the end of an alias is not kept with the alias in the answer, nor does it replace
// what was there. It is with the alias in the authority section, from which the front takes it.
func inCacheForm(m *dns.Msg, qtype uint16) *dns.Msg {
	soa := soaOf(m)
	if soa == nil || !denies(m, qtype) {
		return m
	}
	lower := soa.Minttl < soa.Hdr.Ttl
	aliased := m.Rcode == dns.RcodeNameError && len(m.Answer) > 0 &&
		!slices.ContainsFunc(m.Answer, func(rr dns.RR) bool { return !isAlias(rr) })
	if !lower && !aliased {
		return m
	}
	c := *m
	if aliased {
		c.Ns = append(slices.Clone(m.Answer), m.Ns...)
		c.Answer = nil
	} else {
		c.Ns = slices.Clone(m.Ns)
	}
	if lower {
		for i, rr := range c.Ns {
			if rr == dns.RR(soa) {
				s := *soa
				s.Hdr.Ttl = s.Minttl
				c.Ns[i] = &s
			}
		}
	}
	return &c
}
