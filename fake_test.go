package nodecache

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

// fakeFirewall notes what it is told and what the link carried then.
type fakeFirewall struct {
	t  testing.TB
	mu sync.Mutex
	// calls are such as "apply 10.96.0.10:53/udp,10.96.0.10:53/tcp on 10.96.0.10".
	calls  []string
	rules  []desired.Endpoint // as ensured
	served []desired.Endpoint
	lost   int // how many the next apply finds missing
	heeded standing
	fault  func(call string) error
	during func(call string)
}

func (f *fakeFirewall) call(what string, es []desired.Endpoint) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, fmt.Sprintf("%s %s on %s", what, list(es), list(carried(f.t, testLink))))
	if f.during != nil {
		f.during(what)
	}
	if f.fault != nil {
		return f.fault(what)
	}
	return nil
}

func (f *fakeFirewall) apply(_ context.Context, own []desired.Endpoint, o standing) (int, error) {
	if err := f.call("apply", own); err != nil {
		return 0, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.lost
	es := slices.Clone(own)
	if o.Unknown {
		es = desired.State{Rules: map[string][]desired.Endpoint{"": append(es, f.rules...)}}.Sorted().Rules[""]
	}
	f.rules, f.lost, f.heeded = es, 0, o
	return n, nil
}

func (f *fakeFirewall) enforce(es []desired.Endpoint) {
	f.call("enforce", es)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.served = slices.Clone(es)
}

func (f *fakeFirewall) withdraw(_ context.Context, gone []desired.Endpoint) error {
	return f.call("withdraw", gone)
}

func (f *fakeFirewall) String() string { return "fake" }

// stand returns what is ensured and what is served.
func (f *fakeFirewall) stand() (rules, served []desired.Endpoint) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.rules), slices.Clone(f.served)
}

// keeps returns what the last apply was told that others want.
func (f *fakeFirewall) keeps() []desired.Endpoint {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.heeded.Others
}

// heard returns and forgets the calls.
func (f *fakeFirewall) heard() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls := f.calls
	f.calls = nil
	return calls
}

// say sets what happens at the next calls.
func (f *fakeFirewall) say(set func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	set()
}

func wantCalls(t *testing.T, fw *fakeFirewall, want ...string) {
	t.Helper()
	if got := fw.heard(); !slices.Equal(got, want) {
		t.Errorf("the firewall heard\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}
