package nodecache

import (
	"fmt"
	stdlog "log"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"

	"github.com/contentful-labs/coredns-nodecache/internal/life"
	"github.com/contentful-labs/coredns-nodecache/internal/peers"
)

// NetworkManager's files are as those of 1.42: of a link that it has noted, of one to
// which it applies a profile, and of one that it does not manage.
func TestNetworkManager(t *testing.T) {
	needRoot(t)
	cleanLinks(t)
	i := &netif{name: testLink}
	l, err := i.ensureLink()
	must(t, err)
	t.Cleanup(func() { must(t, i.prune(nil)) })

	const managed = "[device]\nmanaged=true\nconnection-uuid=7b51333c-56a3-44c2-8b1f-3a73088a785b\nnm-owned=false\n"
	const external = "[connection]\nid=nodelocaldns\nuuid=7b51333c-56a3-44c2-8b1f-3a73088a785b\ntype=dummy\n\n[.nmmeta]\nnm-generated=true\nvolatile=true\nexternal=true\n"
	for name, tt := range map[string]struct {
		device, profile string
		want            bool
	}{
		"no NetworkManager":   {"", "", false},
		"unmanaged":           {"[device]\nnm-owned=false\n", "", false},
		"noted":               {managed, external, false},
		"by a profile":        {managed, "", true},
		"another one's noted": {managed, strings.Replace(external, "7b51", "0000", 1), true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			defer func(d string) { networkManagerState = d }(networkManagerState)
			networkManagerState = dir
			for file, text := range map[string]string{
				fmt.Sprintf("devices/%d", l.Attrs().Index): tt.device, "system-connections/nodelocaldns.nmconnection": tt.profile,
			} {
				if text != "" {
					must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, file)), 0o755))
					must(t, os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644))
				}
			}
			found := networkManager(site{links: map[string]bool{testLink: true}})
			if len(found) > 0 != tt.want {
				t.Errorf("found %q, want one: %v", found, tt.want)
			}
		})
	}
}

// Other caches are no sockets.Strangers, and are asked once, however many addresses there are.
func TestSharedPort(t *testing.T) {
	newTestLink(t, "169.254.20.10", "10.96.0.10")
	for _, a := range []string{"169.254.20.10", "10.96.0.10"} {
		c, err := reuseport.ListenPacket(t.Context(), "udp", a+":53")
		must(t, err)
		f, err := c.(*net.UDPConn).File()
		must(t, err)
		c.Close()
		handOver(t, "dnsmasq", f)
	}
	asked := 0
	o := peers.Others{Serves: map[desired.Endpoint]bool{{Addr: addr("10.96.0.10"), Proto: "udp", Port: 53}: true}}
	s := site{listeners: dnsOn("169.254.20.10", "10.96.0.10"), ask: func() (peers.Others, error) { asked++; return o, nil }}
	if found := sharedPort(s); len(found) != 1 || !strings.HasPrefix(found[0], `169.254.20.10:53/udp is served by "dnsmasq" (process `) || asked != 1 {
		t.Errorf("asked %d times, found %q", asked, found)
	}
	o.Unknown = true
	if found := sharedPort(s); len(found) > 0 {
		t.Errorf("beside one that does not say what it serves: %q", found)
	}
}

// systemd-networkd's files are as those of 257: of a link that it configures, and of those
// that it leaves alone.
func TestNetworkd(t *testing.T) {
	needRoot(t)
	cleanLinks(t)
	i := &netif{name: testLink}
	l, err := i.ensureLink()
	must(t, err)
	t.Cleanup(func() { must(t, i.prune(nil)) })

	const managed = "# This is private data. Do not parse.\nADMIN_STATE=configured\nOPER_STATE=off\nNETWORK_FILE=/usr/lib/systemd/network/zz-default.network\n"
	for name, tt := range map[string]struct {
		state string
		want  bool
	}{
		"no networkd":        {"", false},
		"unmanaged":          {"ADMIN_STATE=unmanaged\nOPER_STATE=off\n", false},
		"unmanaged by file":  {strings.Replace(managed, "=configured", "=unmanaged", 1), false},
		"managed":            {managed, true},
		"about to be":        {strings.Replace(managed, "=configured", "=configuring", 1), true},
		"not yet looked at":  {"ADMIN_STATE=pending\n", false},
		"not of this format": {"\x00=\n==\nNETWORK_FILE", false},
	} {
		t.Run(name, func(t *testing.T) {
			defer func(d string) { networkdState = d }(networkdState)
			networkdState = t.TempDir()
			if tt.state != "" {
				must(t, os.WriteFile(filepath.Join(networkdState, fmt.Sprint(l.Attrs().Index)), []byte(tt.state), 0o644))
			}
			found := networkd(site{links: map[string]bool{testLink: true}})
			if len(found) > 0 != tt.want {
				t.Errorf("found %q, want one: %v", found, tt.want)
			}
		})
	}
}

// withFaults has only these looked for.
func withFaults(t *testing.T, only ...fault) (logged *syncBuffer) {
	was, patience := faults, examinePatience
	logged = &syncBuffer{}
	faults = only
	examination.found = nil
	stdlog.SetOutput(logged)
	t.Cleanup(func() {
		faults, examinePatience = was, patience
		stdlog.SetOutput(os.Stdout)
	})
	return logged
}

// syncBuffer is a log that is read while it is written.
type syncBuffer struct {
	sync.Mutex
	strings.Builder
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.Lock()
	defer b.Unlock()
	return b.Builder.Write(p)
}

func (b *syncBuffer) String() string {
	b.Lock()
	defer b.Unlock()
	return b.Builder.String()
}

// A look that panics, and one that does not come back, end neither the process nor the
// looks for other faults.
func TestExaminationSurvives(t *testing.T) {
	back := make(chan struct{})
	var looks atomic.Int32
	logged := withFaults(t,
		fault{"panics", func(site) []string { panic("index out of range") }},
		fault{"hangs", func(site) []string { looks.Add(1); <-back; return nil }},
		fault{"other", func(site) []string { return []string{"a fault"} }})
	examinePatience = 50 * time.Millisecond
	n := newNode()
	n.examine(site{}, false)
	for _, says := range []string{"looking for the fault panics: a fault of this program: index out of range", "looking for the fault hangs: no result within", "a fault", "1 found"} {
		if !strings.Contains(logged.String(), says) {
			t.Errorf("no %q in %s", says, logged)
		}
	}
	n.examine(site{}, true)
	if k := looks.Load(); k != 1 {
		t.Errorf("%d looks that hang, want one", k)
	}
	close(back)
	eventually(t, "the look that hung is over", func() bool {
		examination.Lock()
		defer examination.Unlock()
		return len(examination.busy) == 0
	})
	n.examine(site{}, true)
	if k := looks.Load(); k != 2 {
		t.Errorf("%d looks, want another one", k)
	}
}

// The node is looked at every so often, however rarely it is checked.
func TestExaminesWhateverSync(t *testing.T) {
	defer func(d time.Duration) { examineEvery = d }(examineEvery)
	examineEvery = 5 * time.Millisecond
	looks := make(chan struct{}, 100)
	withFaults(t, fault{"counted", func(site) []string {
		select {
		case looks <- struct{}{}:
		default:
		}
		return nil
	}})
	n := newNode()
	must(t, n.do(func() error {
		n.life = life.Phase[config]{Kind: life.Serving, InForce: newConfig()}
		n.tick(maxSync)
		n.examineFirst(n.life.InForce)
		return nil
	}))
	for i := range 3 {
		select {
		case <-looks:
		case <-time.After(30 * time.Second):
			t.Fatalf("%d looks", i)
		}
	}
	must(t, n.do(func() error { n.on(life.Exits, nil); n.examineTick.Stop(); return nil }))
	examination.Lock() // what is under way comes to its end
	defer examination.Unlock()
	examination.found = nil
}

func TestExaminesAgain(t *testing.T) {
	was := faults
	defer func() { faults = was }()
	var full []string
	faults = []fault{{"full", func(site) []string { return full }}, {"other", func(site) []string { return []string{"always"} }}}
	var text strings.Builder
	stdlog.SetOutput(&text)
	defer stdlog.SetOutput(os.Stdout)
	n := newNode()
	for i, step := range []struct {
		again bool
		full  []string
		says  []string
	}{
		{false, nil, []string{"always", "1 found"}},
		{true, nil, nil},
		{true, []string{"90 of 100"}, []string{"90 of 100", "2 found"}},
		{true, []string{"91 of 100"}, nil},
		{true, nil, []string{"1 found"}},
		{true, []string{"92 of 100"}, []string{"92 of 100", "2 found"}},
		{false, []string{"92 of 100"}, []string{"92 of 100", "always", "2 found"}},
	} {
		text.Reset()
		full = step.full
		n.examine(site{}, step.again)
		lines := strings.Split(strings.TrimSpace(text.String()), "\n")
		if text.Len() == 0 {
			lines = nil
		}
		if !slices.EqualFunc(lines, step.says, strings.HasSuffix) {
			t.Errorf("look %d says %q, want %q", i, lines, step.says)
		}
	}
}
