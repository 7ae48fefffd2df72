package nodecache

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/coredns/coredns/plugin"
	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

// handlerFunc is a plugin of one function.
type handlerFunc func()

func (handlerFunc) Name() string { return "test" }
func (f handlerFunc) ServeDNS(context.Context, dns.ResponseWriter, *dns.Msg) (int, error) {
	f()
	return dns.RcodeRefused, nil
}

func TestHandlerCountsWhatIsBeingAnswered(t *testing.T) {
	n := newNode()
	during := int64(0)
	h := handler{node: n, next: handlerFunc(func() { during = n.answering.Open() })}
	if code, err := h.ServeDNS(t.Context(), nil, new(dns.Msg)); code != dns.RcodeRefused || err != nil {
		t.Errorf("the next plugin's %d came back as %d, error %v", dns.RcodeRefused, code, err)
	}
	if after := n.answering.Open(); during != 1 || after != 0 {
		t.Errorf("%d were open while it was answered and %d after, want 1 and 0", during, after)
	}
	// Another plugin may panic, which CoreDNS recovers from.
	h.next = handlerFunc(func() { panic("a bug") })
	func() {
		defer func() { recover() }()
		h.ServeDNS(t.Context(), nil, new(dns.Msg))
	}()
	if after := n.answering.Open(); after != 0 {
		t.Errorf("%d are open after a panic", after)
	}
	var _ plugin.Handler = h
	if h.Ready() || h.Name() != directiveName {
		t.Errorf("%s is ready before anything", h.Name())
	}
}

func TestEndpointsAreSortedUDPFirst(t *testing.T) {
	es := dnsOn("fd00:20::10", "169.254.20.10", "10.96.0.10")
	var got []string
	for _, e := range es {
		got = append(got, e.String())
	}
	want := "10.96.0.10:53/udp 10.96.0.10:53/tcp 169.254.20.10:53/udp 169.254.20.10:53/tcp [fd00:20::10]:53/udp [fd00:20::10]:53/tcp"
	if strings.Join(got, " ") != want || !slices.IsSortedFunc(es, desired.Compare) {
		t.Errorf("got %v, want %s", got, want)
	}
}
