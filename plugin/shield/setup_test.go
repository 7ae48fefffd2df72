package shield

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/cache"
)

func TestParse(t *testing.T) {
	usual := settings{time.Second, 30 * time.Second, time.Hour, 5000, nil}
	with := func(change func(s *settings)) settings {
		s := usual
		change(&s)
		return s
	}
	for _, c := range []struct {
		text string
		want settings
		err  string
	}{
		{"shield", usual, ""},
		{"shield {\n}", usual, ""},
		{"shield {\nfailures 2s\n}", with(func(s *settings) { s.shortest = 2 * time.Second }), ""},
		{"shield {\nfailures 1m\n}", with(func(s *settings) { s.shortest, s.longest = time.Minute, time.Minute }), ""},
		{"shield {\nfailures 2s 5m\n}", with(func(s *settings) { s.shortest, s.longest = 2*time.Second, 5*time.Minute }), ""},
		{"shield {\ndenials 0s\nentries 5\n}", with(func(s *settings) { s.keepDenials, s.entries = 0, 5 }), ""},
		{"shield {\noptions 65001 0xfde9 8\n}", with(func(s *settings) { s.keep = []uint16{65001, 65001, 8} }), ""},
		{"shield now", usual, "Testfile:1"},
		{"shield {\nfailures\n}", usual, "Testfile:2"},
		{"shield {\nfailures 500ms\n}", usual, "Testfile:2 - Error during parsing: failures: \"500ms\" is no duration from 1s to 5m0s"},
		{"shield {\nfailures 5s 1s\n}", usual, "from 5s to 5m0s"},
		{"shield {\nfailures 1s 1h\n}", usual, "1h"},
		{"shield {\nfailures 1s 2s 3s\n}", usual, "too many"},
		{"shield {\ndenials -1s\n}", usual, "-1s"},
		{"shield {\nentries 0\n}", usual, "\"0\""},
		{"shield {\nentries 99999999\n}", usual, "99999999"},
		{"shield {\noptions 65536\n}", usual, "65536"},
		{"shield {\noptions x\n}", usual, "\"x\""},
		{"shield {\nsubnet\n}", usual, "Testfile:2"},
		{"shield {\nsubnet off\n}", usual, "subnet: no such property"},
		{"shield {\nentries 5\nentries 6\n}", usual, "Testfile:3"},
		{"shield\nshield", usual, "once"},
	} {
		s, err := parse(caddy.NewTestController("dns", c.text))
		switch {
		case c.err == "" && (err != nil || !reflect.DeepEqual(s, c.want)):
			t.Errorf("%q: %+v, %v, want %+v", c.text, s, err, c.want)
		case c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)):
			t.Errorf("%q: the error is %v, want %q", c.text, err, c.err)
		}
	}
}

// It stands on both sides of cache, and is an error elsewhere.
func TestSetupStandsAroundCache(t *testing.T) {
	c := caddy.NewTestController("dns", "shield")
	if err := setup(c); err == nil {
		t.Error("no error without cache")
	}
	config := dnsserver.GetConfig(c)
	other := func(next plugin.Handler) plugin.Handler { return back{next: next} }
	config.AddPlugin(other)
	c = caddy.NewTestController("dns", "shield")
	dnsserver.GetConfig(c).AddPlugin(other)
	if err := setup(c); err == nil || !strings.Contains(err.Error(), "needs the plugin cache") {
		t.Errorf("with another plugin in the place of cache the error is %v", err)
	}
	c = caddy.NewTestController("dns", "shield")
	config = dnsserver.GetConfig(c)
	config.AddPlugin(func(next plugin.Handler) plugin.Handler { return &cache.Cache{Next: next} })
	if err := setup(c); err != nil {
		t.Fatal(err)
	}
	var h plugin.Handler
	for i := len(config.Plugin) - 1; i >= 0; i-- {
		h = config.Plugin[i](h)
	}
	f, ok := h.(*Front)
	if !ok {
		t.Fatalf("%T is first", h)
	}
	between, ok := f.Next.(*cache.Cache)
	if !ok {
		t.Fatalf("%T is second", f.Next)
	}
	if b, ok := between.Next.(back); !ok || b.memory != f.memory {
		t.Errorf("%T is third", between.Next)
	}
}
