package nodecache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

// lock takes the lock of the legacy variant, as another iptables would.
func lock(t *testing.T) (inode uint64, unlock func()) {
	t.Helper()
	f, err := os.OpenFile(lockFile(), os.O_RDWR|os.O_CREATE, 0o600)
	must(t, err)
	must(t, unix.Flock(int(f.Fd()), unix.LOCK_EX))
	info, err := f.Stat()
	must(t, err)
	t.Cleanup(func() { f.Close() })
	return info.Sys().(*syscall.Stat_t).Ino, func() { f.Close() }
}

func TestLockOfOtherProgramIsWaitedFor(t *testing.T) {
	needRoot(t)
	v := newVariant(t, "legacy")
	inode, unlock := lock(t)
	fw := newIPTables(nil)
	es := dnsOn("169.254.20.10")
	done := make(chan error, 1)
	go func() { _, err := fw.apply(t.Context(), es, standing{}); done <- err }()
	// "1: -> FLOCK  ADVISORY  WRITE 123 fe:00:4711 0 EOF" is one that waits.
	eventually(t, "iptables-restore waits for the lock", func() bool {
		select {
		case err := <-done:
			t.Fatalf("it has not waited for the lock; error %v", err)
		default:
		}
		b, err := os.ReadFile("/proc/locks")
		must(t, err)
		return regexp.MustCompile(fmt.Sprintf(`-> FLOCK .*:%d `, inode)).Match(b)
	})
	unlock()
	must(t, <-done)
	wantRules(t, v, fw.families[ipv4], es)
	remove(t, fw)
}

func TestLockIsNotWaitedForWithoutEnd(t *testing.T) {
	needRoot(t)
	v := newVariant(t, "legacy")
	fw := newIPTables(nil)
	_, err := fw.apply(t.Context(), dnsOn("169.254.20.10"), standing{})
	must(t, err)
	_, unlock := lock(t)
	before := metric(t, "coredns_nodecache_setup_errors_total", errFirewallLock)
	_, err = fw.apply(t.Context(), dnsOn("10.96.0.10"), standing{})
	wantError(t, err, "another program has held the xtables lock ("+lockFile()+") for 3s")
	if !errors.As(count(err), new(lockError)) || isFirewallError(err) {
		t.Errorf("%v is not known for the lock's", err)
	}
	if after := metric(t, "coredns_nodecache_setup_errors_total", errFirewallLock); after != before+1 {
		t.Errorf("the metric went from %v to %v", before, after)
	}
	unlock()
	wantRules(t, v, fw.families[ipv4], dnsOn("169.254.20.10")) // as before
	remove(t, fw)
}

func TestFirstRulesWaitLongerForLock(t *testing.T) {
	// As iptables-restore ends when the time is over.
	needRoot(t)
	v := newVariant(t, "legacy")
	v.script(t, "iptables-restore", `echo "Another app is currently holding the xtables lock; still $3s 0us time ahead to have a chance to grab the lock..." >&2
echo "Another app is currently holding the xtables lock. Stopped waiting after $3s." >&2
exit 4`)
	fw := newIPTables(nil)
	_, err := fw.apply(t.Context(), dnsOn("169.254.20.10"), standing{})
	wantError(t, err, "for 20s")
	wantError(t, err, "Stopped waiting after 20s")
	if !errors.As(err, new(lockError)) {
		t.Errorf("%v is not known for the lock's", err)
	}
	if fw.families[ipv4].noRecent {
		t.Error("a held lock counts as a missing match")
	}
}

func TestLockFile(t *testing.T) {
	t.Setenv("XTABLES_LOCKFILE", "")
	if got := lockFile(); got != "/run/xtables.lock" {
		t.Errorf("got %s", got)
	}
}

// A caller's deadline bounds the wait for the lock, and the program itself.
func TestDeadlineBoundsLockAndProgram(t *testing.T) {
	needRoot(t)
	v := newVariant(t, "legacy")
	fw := newIPTables(nil)
	es := dnsOn("169.254.20.10")
	_, err := fw.apply(t.Context(), es, standing{})
	must(t, err)
	within := func(d time.Duration) context.Context {
		ctx, cancel := context.WithTimeout(t.Context(), d)
		t.Cleanup(cancel)
		return ctx
	}
	x := fw.families[ipv4]
	for left, want := range map[time.Duration]time.Duration{
		-time.Second: time.Second, 100 * time.Millisecond: time.Second, 2900 * time.Millisecond: 2 * time.Second, time.Hour: time.Hour - time.Second,
	} {
		if got := x.wait(within(left)); got != want {
			t.Errorf("with %s left the lock is waited for %s, want %s", left, got, want)
		}
	}
	if got := x.wait(t.Context()); got != lockWaitLater {
		t.Errorf("with no deadline the lock is waited for %s", got)
	}
	_, unlock := lock(t)
	_, err = fw.apply(within(1900*time.Millisecond), nil, standing{})
	wantError(t, err, "another program has held the xtables lock ("+lockFile()+") for 1s")
	if !errors.As(err, new(lockError)) {
		t.Errorf("%v is not known for the lock's", err)
	}
	unlock()
	v.script(t, "iptables-restore", "exec "+lookPath(t, "/usr/bin/sleep")+" 600")
	_, err = fw.apply(within(500*time.Millisecond), nil, standing{})
	wantError(t, err, "there was no more time")
	must(t, os.Remove(filepath.Join(v.dir, "iptables-restore")))
	must(t, os.Symlink(v.real["iptables-restore"], filepath.Join(v.dir, "iptables-restore")))
	remove(t, fw)
}

func TestDeadlineOfStepsBoundsFirewalls(t *testing.T) {
	needRoot(t)
	v := newVariant(t, "legacy")
	n, err := listenStart(t, "169.254.20.10")
	must(t, err)
	_, unlock := lock(t)
	must(t, n.do(func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 1900*time.Millisecond)
		defer cancel()
		wantError(t, n.reduce(ctx, desired.State{}), "another program has held the xtables lock ("+lockFile()+") for 1s")
		return nil
	}))
	unlock()
	n.exit()
	if lines := savedOurs(t, v); len(lines) > 0 {
		t.Errorf("left are\n%s", strings.Join(lines, "\n"))
	}
}
