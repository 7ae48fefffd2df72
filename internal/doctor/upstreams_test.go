package doctor

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestResolversChanged(t *testing.T) {
	file := filepath.Join(t.TempDir(), "resolv.conf")
	was := "nameserver 192.0.2.1\nnameserver 2001:db8::1\n"
	for name, tt := range map[string]struct {
		now     string
		gone    bool
		follows bool
		want    string
	}{
		"as it was":             {now: was},
		"other words":           {now: "# anew\nsearch example.test\n" + was + "options ndots:2\n"},
		"another server":        {now: "nameserver 192.0.2.2\n", want: "names 192.0.2.2:53 by now, and forward at Corefile:7 still asks 192.0.2.1:53, [2001:db8::1]:53"},
		"another order":         {now: "nameserver 2001:db8::1\nnameserver 192.0.2.1\n", want: "by now"},
		"none":                  {now: "search example.test\n", want: "names no server any more"},
		"no file":               {gone: true, want: "names no server any more"},
		"the plugin follows it": {now: "nameserver 192.0.2.2\n", follows: true},
	} {
		t.Run(name, func(t *testing.T) {
			must(t, os.WriteFile(file, []byte(was), 0o644))
			u := Upstream{At: "Corefile:7", Plugin: "forward", Text: file, Zone: ".", Follows: tt.follows, Servers: Servers(file)}
			must(t, os.WriteFile(file, []byte(tt.now), 0o644))
			if tt.gone {
				must(t, os.Remove(file))
			}
			found := resolversChanged(Site{Upstreams: []Upstream{u, {Text: "192.0.2.1", Servers: Servers("192.0.2.1")}}})
			if got := strings.Join(found, "\n"); (got == "") != (tt.want == "") || !strings.Contains(got, tt.want) {
				t.Errorf("found %q, want %q", got, tt.want)
			}
		})
	}
}

func TestServers(t *testing.T) {
	for text, want := range map[string]string{
		"192.0.2.1":            "192.0.2.1:53",
		"dns://192.0.2.1:5353": "192.0.2.1:5353",
		"2001:db8::1":          "[2001:db8::1]:53",
		"tls://192.0.2.1":      "",
		"unix:///run/dns.sock": "",
		"/no/such/file":        "",
	} {
		got := Servers(text)
		if want == "" && len(got) > 0 || want != "" && (len(got) != 1 || got[0] != netip.MustParseAddrPort(want)) {
			t.Errorf("%s: %v, want %s", text, got, want)
		}
	}
}

// A Service that is followed is a fault for as long as its old address is asked all the same.
func TestUpstreamServiceIsLeft(t *testing.T) {
	at := netip.MustParseAddrPort("192.0.2.1:53")
	s := Site{Services: &Services{}, Upstreams: []Upstream{{At: "Corefile:7", Plugin: "upstream", Zone: ".", Servers: []netip.AddrPort{at}}}}
	silent := answers{udp: os.ErrDeadlineExceeded, tcp: os.ErrDeadlineExceeded}
	gone := func(a answers) string {
		s.askOnce = func() map[netip.AddrPort]answers { return map[netip.AddrPort]answers{at: a} }
		return strings.Join(upstreamServiceGone(s), "\n")
	}
	if got := gone(silent); got != "" || len(s.OfServices()) != 0 {
		t.Errorf("of what has never been a Service: %q", got)
	}
	s.Services.leave(at.Addr(), netip.MustParseAddr("192.0.2.2"), "kube-system/kube-dns-upstream")
	if got := gone(silent); !strings.Contains(got, "Service kube-system/kube-dns-upstream when this process started") || len(s.OfServices()) != 1 {
		t.Errorf("after it has left: %q", got)
	}
	if got := gone(answers{}); got != "" {
		t.Errorf("while it answers: %q", got)
	}
	// A reload has come in force, and a later one asks the same address again.
	all := s.Upstreams
	s.Upstreams = nil
	gone(silent)
	s.Upstreams = all
	if got := gone(silent); got != "" {
		t.Errorf("after it was asked no more: %q", got)
	}
}
