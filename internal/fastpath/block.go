package fastpath

import (
	"context"
	"fmt"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/cache"
	"github.com/coredns/coredns/plugin/loadbalance"
	querylog "github.com/coredns/coredns/plugin/log"
	prom "github.com/coredns/coredns/plugin/metrics"
	"github.com/coredns/coredns/plugin/pkg/response"
	"github.com/coredns/coredns/plugin/pkg/transport"
	"github.com/coredns/coredns/plugin/rewrite"
	"github.com/coredns/coredns/request"
	"github.com/miekg/dns"
)

// exact are the plugins that may stand before cache in a block with fastpath: what
// they do to a query that cache answers depends on nothing but its bytes, and none has
// to see each query. (prometheus has to, and is done justice by counts.)
var exact = []string{
	"any", "bufsize", "cancel", "chaos", "errors", "health", "local", "metadata", "nsid", "prometheus", "ready",
	"shield",
}

// A Block is a server block with fastpath. Its exported fields are set before Attach.
type Block struct {
	Entries int
	Auto    bool     // without it where it can't be, rather than an error
	Ports   []string // of its keys
	Config  *dnsserver.Config
	Next    plugin.Handler // behind the plugin that calls Enter

	off      bool // Attach has found it impossible
	alike    bool // shield has everybody ask alike
	turns    bool // loadbalance turns the records of an answer
	logs     []querylog.Rule
	rewrites []rewrite.Rule
	items    *items
	settings cacheSettings
	metrics  *prom.Metrics // nil: the block has no prometheus
}

// Enter is called by the plugin of the name that Attach is given with each query that
// comes to it in the block.
func (b *Block) Enter(ctx context.Context, r *dns.Msg) {
	if b.off {
		return
	}
	if q, ok := ctx.Value(queryKey{}).(*query); ok {
		q.enter(b, r)
	}
}

// Attach gets the block ready, or says what does not go with fastpath: then no answer of the
// block is kept. CoreDNS has made its servers, of the configurations all, and does not listen
// yet. self is the name of the plugin that calls Enter.
func (b *Block) Attach(self string, all []*dnsserver.Config) error {
	err := b.beside(all)
	if err == nil {
		err = b.attach(self)
	}
	b.off = err != nil
	return err
}

// beside checks that the blocks of the same address allow a fast way.
func (b *Block) beside(all []*dnsserver.Config) error {
	ours := reflect.ValueOf(b.Config.UDPDecorateWriterFunc).Pointer()
	for _, c := range all {
		if c.Transport != transport.DNS || !slices.Contains(b.Ports, c.Port) || !slices.ContainsFunc(c.ListenHosts, func(h string) bool { return slices.Contains(b.Config.ListenHosts, h) }) {
			continue
		}
		what := ""
		switch f := c.UDPDecorateWriterFunc; {
		case len(c.FilterFuncs) > 0 || c.ViewName != "":
			what = "view"
		case c.ProxyProtoConnPolicy != nil:
			what = "proxyproto"
		case c.NumSockets > 1:
			what = "multisocket"
		case f != nil && reflect.ValueOf(f).Pointer() != ours:
			what = "shed"
		}
		if what != "" {
			return fmt.Errorf("fastpath can't go with the plugin %s in any server block that listens on the same address: take one of the two out", what)
		}
	}
	return nil
}

// attach checks that a block's plugins allow a fast way, and puts a marker behind its
// cache plugin. The chain of plugins has been compiled.
func (b *Block) attach(self string) error {
	if _, err := layout(); err != nil {
		return fmt.Errorf("fastpath: this build has a plugin cache that nodecache does not know: %w", err)
	}
	refuse := func(name string) error {
		return fmt.Errorf("fastpath can't go with the plugin %s in a server block: its answers are not the same for everybody, or it has to see every query; take one of the two out", name)
	}
	order := func(name string) int { return slices.Index(dnsserver.Directives, name) }
	for _, h := range b.Config.Handlers() {
		if order(h.Name()) < order(self) && !slices.Contains(exact, h.Name()) {
			return refuse(h.Name())
		}
	}
	h := b.Next
	for {
		if lb, ok := h.(loadbalance.LoadBalance); ok {
			if !turnsEvenly(lb) {
				return fmt.Errorf("fastpath can't go with the plugin loadbalance but with its policy round_robin and without prefer: change that, or take one of the two out")
			}
			b.turns = true
			h = lb.Next
			continue
		}
		if l, ok := h.(querylog.Logger); ok {
			if logsAll(l.Rules, b.Config.Zone) {
				return fmt.Errorf("fastpath can't go with the plugin log where that writes a line for each query: give it the class error or denial, or a zone, or take one of the two out")
			}
			b.logs = l.Rules
			h = l.Next
			continue
		}
		if rw, ok := h.(rewrite.Rewrite); ok {
			if !goByQuestion(rw.Rules) {
				return fmt.Errorf("fastpath can't go with the plugin rewrite but with rules of the kinds name (without metadata) and type: change that, or take one of the two out")
			}
			b.rewrites = rw.Rules
			h = rw.Next
			continue
		}
		if h == nil {
			return fmt.Errorf("fastpath needs the plugin cache in the same server block: it sends again what cache has answered")
		}
		if _, ok := h.(*cache.Cache); ok {
			break
		}
		if !slices.Contains(exact, h.Name()) {
			if b.Config.Handler("cache") == nil {
				return fmt.Errorf("fastpath needs the plugin cache in the same server block: it sends again what cache has answered")
			}
			return refuse(h.Name())
		}
		b.alike = h.Name() == "shield"
		h = nextOf(h)
	}
	c := h.(*cache.Cache)
	var err error
	if b.settings, err = readSettings(c); err != nil {
		return fmt.Errorf("fastpath: this build has a plugin cache that nodecache does not know: %w", err)
	}
	if m, ok := b.Config.Handler("prometheus").(*prom.Metrics); ok {
		b.metrics = m
	}
	b.items = newItems(b.Entries, b.settings.staleUpTo)
	if c.Next != nil {
		c.Next = marker{next: c.Next, items: b.items}
	}
	return nil
}

// turnsEvenly tells whether a loadbalance has the policy round_robin and nothing else: then it
// shuffles with the function of this name.
func turnsEvenly(lb loadbalance.LoadBalance) bool {
	f := reflect.ValueOf(lb).FieldByName("shuffle")
	if f.Kind() != reflect.Func {
		return false
	}
	fn := runtime.FuncForPC(f.Pointer())
	return fn != nil && strings.HasSuffix(fn.Name(), "/plugin/loadbalance.randomShuffle")
}

// goByQuestion tells whether each rule goes by the name, whatever its letters' case, or by the type
// of a question alone, as those of these types do.
func goByQuestion(rules []rewrite.Rule) bool {
	kinds := []string{"exactNameRule", "prefixNameRule", "suffixNameRule", "substringNameRule", "regexNameRule", "typeRule"}
	for _, r := range rules {
		if t := reflect.TypeOf(r); t.Kind() != reflect.Pointer || !slices.Contains(kinds, t.Elem().Name()) {
			return false
		}
	}
	return true
}

// isRewritten tells whether the plugin rewrite changes a question, or the answer to it.
func (b *Block) isRewritten(q dns.Question) bool {
	for _, r := range b.rewrites {
		if _, result := r.Rewrite(context.Background(), request.Request{Req: &dns.Msg{Question: []dns.Question{q}}}); result != rewrite.RewriteIgnored {
			return true
		}
	}
	return false
}

// logsAll tells whether all answers to the names of a zone are logged that are no failures.
func logsAll(rules []querylog.Rule, zone string) bool {
	for _, r := range rules {
		_, all := r.Class[response.All]
		_, success := r.Class[response.Success]
		if plugin.Name(r.NameScope).Matches(zone) {
			return all || success
		}
	}
	return false
}

// logged tells whether the plugin log has to see the answer each time.
func (b *Block) logged(m *dns.Msg, now time.Time) bool {
	for _, r := range b.logs {
		if !plugin.Name(r.NameScope).Matches(strings.ToLower(m.Question[0].Name)) {
			continue
		}
		kind, opt := response.Typify(m, now)
		if opt != nil && opt.Do() {
			return true // of another class when a signature expires
		}
		_, all := r.Class[response.All]
		_, one := r.Class[response.Classify(kind)]
		return all || one
	}
	return false
}

// nextOf returns the plugin behind h, or nil.
func nextOf(h plugin.Handler) plugin.Handler {
	v := reflect.Indirect(reflect.ValueOf(h))
	if v.Kind() != reflect.Struct {
		return nil
	}
	f := v.FieldByName("Next")
	if !f.IsValid() || !f.CanInterface() {
		return nil
	}
	next, _ := f.Interface().(plugin.Handler)
	return next
}
