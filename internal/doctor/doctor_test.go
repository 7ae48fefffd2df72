package doctor

import (
	"fmt"
	stdlog "log"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
)

// What the tests of all packages share, by short names.
var (
	eventually = testkit.Eventually
	must       = testkit.Must
	dnsOn      = testkit.DNSOn
	handOver   = testkit.HandOver
	reuseport  = testkit.ReusePort
)

const testLink = "nctest0"

func TestMain(m *testing.M) { os.Exit(testkit.Main(m)) }

// newTestLink makes a link with these addresses, and returns its number.
func newTestLink(t *testing.T, on ...string) (index int) {
	t.Helper()
	testkit.Link(t, testLink, on...)
	l, err := netlink.LinkByName(testLink)
	must(t, err)
	return l.Attrs().Index
}

// NetworkManager's files are as those of 1.42: of a link that it has noted, of one to
// which it applies a profile, and of one that it does not manage.
func TestNetworkManager(t *testing.T) {
	index := newTestLink(t)

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
				fmt.Sprintf("devices/%d", index): tt.device, "system-connections/nodelocaldns.nmconnection": tt.profile,
			} {
				if text != "" {
					must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, file)), 0o755))
					must(t, os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644))
				}
			}
			found := networkManager(Site{Links: map[string]bool{testLink: true}})
			if len(found) > 0 != tt.want {
				t.Errorf("found %q, want one: %v", found, tt.want)
			}
		})
	}
}

// Other caches are no strangers, and are asked once, however many addresses there are.
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
	serves := map[desired.Endpoint]bool{{Addr: netip.MustParseAddr("10.96.0.10"), Proto: "udp", Port: 53}: true}
	known := true
	s := Site{Listeners: dnsOn("169.254.20.10", "10.96.0.10"), Others: func() (map[desired.Endpoint]bool, bool) { asked++; return serves, known }}
	if found := sharedPort(s); len(found) != 1 || !strings.HasPrefix(found[0], `169.254.20.10:53/udp is served by "dnsmasq" (process `) || asked != 1 {
		t.Errorf("asked %d times, found %q", asked, found)
	}
	known = false
	if found := sharedPort(s); len(found) > 0 {
		t.Errorf("beside one that does not say what it serves: %q", found)
	}
}

// systemd-networkd's files are as those of 257: of a link that it configures, and of those
// that it leaves alone.
func TestNetworkd(t *testing.T) {
	index := newTestLink(t)

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
				must(t, os.WriteFile(filepath.Join(networkdState, fmt.Sprint(index)), []byte(tt.state), 0o644))
			}
			found := networkd(Site{Links: map[string]bool{testLink: true}})
			if len(found) > 0 != tt.want {
				t.Errorf("found %q, want one: %v", found, tt.want)
			}
		})
	}
}

// withFaults returns a doctor who has only these looked for, and what is logged.
func withFaults(t *testing.T, only ...Fault) (d *Doctor, logged *syncBuffer) {
	logged = &syncBuffer{}
	stdlog.SetOutput(logged)
	t.Cleanup(func() { stdlog.SetOutput(os.Stdout) })
	return New(only), logged
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
	d, logged := withFaults(t,
		Fault{"panics", func(Site) []string { panic("index out of range") }},
		Fault{"hangs", func(Site) []string { looks.Add(1); <-back; return nil }},
		Fault{"other", func(Site) []string { return []string{"a fault"} }})
	d.patience = 50 * time.Millisecond
	<-d.Examine(Site{}, false)
	for _, says := range []string{"looking for the fault panics: a fault of this program: index out of range", "looking for the fault hangs: no result within", "a fault", "1 found"} {
		if !strings.Contains(logged.String(), says) {
			t.Errorf("no %q in %s", says, logged)
		}
	}
	<-d.Examine(Site{}, true)
	if k := looks.Load(); k != 1 {
		t.Errorf("%d looks that hang, want one", k)
	}
	close(back)
	eventually(t, "the look that hung is over", func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return len(d.busy) == 0
	})
	<-d.Examine(Site{}, true)
	if k := looks.Load(); k != 2 {
		t.Errorf("%d looks, want another one", k)
	}
}

func TestExaminesAgain(t *testing.T) {
	var full []string
	d, text := withFaults(t, Fault{"full", func(Site) []string { return full }}, Fault{"other", func(Site) []string { return []string{"always"} }})
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
		<-d.Examine(Site{}, step.again)
		lines := strings.Split(strings.TrimSpace(text.String()), "\n")
		if text.Len() == 0 {
			lines = nil
		}
		if !slices.EqualFunc(lines, step.says, strings.HasSuffix) {
			t.Errorf("look %d says %q, want %q", i, lines, step.says)
		}
	}
}

// Reloads that come faster than a node is looked at leave one look to be made, for the last
// configuration.
func TestExaminesTheLastConfiguration(t *testing.T) {
	looked, goOn := make(chan int), make(chan bool)
	d, _ := withFaults(t, Fault{"counted", func(s Site) []string {
		looked <- len(s.Listeners)
		<-goOn
		return nil
	}})
	site := func(listeners int) Site { return Site{Listeners: make([]desired.Endpoint, listeners)} }
	d.Examine(site(1), false)
	if k := <-looked; k != 1 {
		t.Fatalf("looks for configuration %d", k)
	}
	d.Examine(site(1), true)
	var last <-chan struct{}
	for k := 2; k <= 50; k++ {
		last = d.Examine(site(k), false)
	}
	goOn <- true
	if k := <-looked; k != 50 {
		t.Fatalf("looks for configuration %d, want the last one", k)
	}
	goOn <- true
	<-last
	again := d.Examine(site(51), true)
	if k := <-looked; k != 51 {
		t.Fatalf("looks for %d, which has waited for nothing any more", k)
	}
	goOn <- true
	<-again
}
