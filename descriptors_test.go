package nodecache

import (
	"errors"
	"os"
	"runtime"
	"testing"

	"github.com/google/nftables"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/doctor"
)

// exported returns the value of a metric of ours without labels.
func exported(t *testing.T, name string) float64 {
	t.Helper()
	families, err := prometheus.DefaultGatherer.Gather()
	must(t, err)
	for _, f := range families {
		if f.GetName() == "coredns_nodecache_"+name {
			return f.GetMetric()[0].GetCounter().GetValue() + f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	t.Fatalf("there is no metric %s", name)
	return 0
}

// openMany opens descriptors until the next one has a number of n or more.
func openMany(t *testing.T, n int) {
	t.Helper()
	for {
		f, err := os.Open("/dev/null")
		must(t, err)
		t.Cleanup(func() { f.Close() })
		if int(f.Fd()) >= n {
			return
		}
	}
}

func TestNFTWithManyDescriptorsOpen(t *testing.T) {
	fw := newTestNFT(t)
	nfLook.mu.Lock()
	if nfLook.conn != nil {
		nfLook.conn.CloseLasting()
		nfLook.conn = nil
	}
	nfLook.mu.Unlock()
	openMany(t, selectLimit+100)
	before := exported(t, "look_panics_total")
	_, err := nfLook.ListChains()
	must(t, err)
	es := dnsOn("169.254.20.10", "fd00:20::10")
	for range 2 * lowDescriptors.size { // each makes a connection anew
		_, err = fw.apply(t.Context(), es, standing{})
		must(t, err)
		fw.enforce(es)
		wantElements(t, list(es), list(es), list(es))
		remove(t, fw)
	}
	must(t, removeFromNFT(ipv4))
	<-doctor.New(doctor.Common).Examine(doctor.Site{Untracked: es}, false)
	if after := exported(t, "look_panics_total"); after != before {
		t.Errorf("%v looks panicked", after-before)
	}
}

// A look that panics costs its answer, and is asked again over another connection.
func TestPanicOfALookIsOutlived(t *testing.T) {
	needRoot(t)
	before := exported(t, "look_panics_total")
	err := nfLook.ask(func(*nftables.Conn) error { panic("of a library") })
	wantError(t, err, "nf_tables could not be asked")
	if _, err := nfLook.ListChains(); err != nil {
		t.Errorf("the next look: %v", err)
	}
	if n := exported(t, "look_panics_total") - before; n != 1 {
		t.Errorf("%v panics were counted", n)
	}
}

// What a write that failed has not written is written by the next check.
func TestNFTWritesWhatFailedBefore(t *testing.T) {
	fw := newTestNFT(t)
	es := dnsOn("169.254.20.10", "fd00:20::10")
	_, err := fw.apply(t.Context(), es, standing{})
	must(t, err)
	withoutNetAdmin(t, func() { fw.enforce(es) })
	wantElements(t, "", list(es), "")
	missing, err := fw.apply(t.Context(), es, standing{})
	must(t, err)
	if missing != 0 {
		t.Errorf("%d were missing, but nobody has removed any", missing)
	}
	fw.enforce(es)
	wantElements(t, list(es), list(es), list(es))
}

// What stands is what the kernel has, whatever was written.
func TestNFTPutsElementsBack(t *testing.T) {
	fw := newTestNFT(t)
	es := dnsOn("169.254.20.10", "fd00:20::10")
	_, err := fw.apply(t.Context(), es, standing{})
	must(t, err)
	fw.enforce(es)
	for _, s := range fw.sets {
		fw.conn.FlushSet(s)
	}
	must(t, fw.conn.Flush())
	missing, err := fw.apply(t.Context(), es, standing{})
	must(t, err)
	if missing != len(es) {
		t.Errorf("%d were missing, want %d", missing, len(es))
	}
	fw.enforce(es)
	wantElements(t, list(es), list(es), list(es))
}

// withoutNetAdmin runs f on a thread that lacks NET_ADMIN in effect.
func withoutNetAdmin(t *testing.T, f func()) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var had [2]unix.CapUserData
	must(t, unix.Capget(&head, &had[0]))
	less := had
	less[0].Effective &^= 1 << unix.CAP_NET_ADMIN
	must(t, unix.Capset(&head, &less[0]))
	defer func() { must(t, unix.Capset(&head, &had[0])) }()
	f()
}

func TestElementsAreReadAsWritten(t *testing.T) {
	for _, e := range dnsOn("169.254.20.10", "fd00:20::10") {
		if got, ok := endpointOfKey(elementKey(e)); !ok || got != e {
			t.Errorf("%s is read as %s", e, got)
		}
	}
}

func FuzzElementKey(f *testing.F) {
	for _, e := range dnsOn("169.254.20.10", "fd00:20::10") {
		f.Add(elementKey(e))
	}
	f.Fuzz(func(t *testing.T, key []byte) {
		if e, ok := endpointOfKey(key); ok && (!e.Addr.IsValid() || e.Proto == "") {
			t.Errorf("%q is read as %v", key, e)
		}
	})
}

// Of the reserve one is lent each time, also when no other descriptor is to be had.
func TestReserveIsThereWithoutDescriptors(t *testing.T) {
	needRoot(t)
	var had unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &had))
	openMany(t, 200)
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 100, Max: had.Max}))
	defer unix.Setrlimit(unix.RLIMIT_NOFILE, &had)
	if _, err := os.Open("/dev/null"); !errors.Is(err, unix.EMFILE) {
		t.Fatalf("opening another: %v, want EMFILE", err)
	}
	conn, err := dialNFT()
	must(t, err)
	must(t, conn.CloseLasting())
}
