package peers

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// memberNamed is a name that newMember could have made.
func memberNamed(i int) string { return fmt.Sprintf("%s%016x", memberPrefix, i) }

// saying listens as another process that answers what say is, or nothing where it is "".
func saying(t *testing.T, name string) (say *atomic.Value) {
	t.Helper()
	say = &atomic.Value{}
	say.Store("")
	l, err := net.Listen("unix", name)
	must(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if text := say.Load().(string); text != "" {
				io.WriteString(c, text)
				c.Close()
			} else {
				t.Cleanup(func() { c.Close() })
			}
		}
	}()
	return say
}

// Of one that is silent counts what it said last, but not that it serves.
func TestLastWordsOfASilentMemberCount(t *testing.T) {
	needRoot(t)
	m := newMember()
	say := saying(t, memberNamed(1))
	const short = 50 * time.Millisecond
	ask := func(within time.Duration, unknown bool, want string) {
		t.Helper()
		o, err := m.Ask(within)
		must(t, err)
		if got := fmt.Sprint(o.Wants.Links, len(o.Serves), o.States); got != want || o.Unknown != unknown {
			t.Errorf("got %s, unknown %v; want %s", got, o.Unknown, want)
		}
	}
	ask(short, true, "map[] 0 map[silent:1]")
	said := func(addr string) string {
		return fmt.Sprintf(`{"links":{"a":[%q]},"serves":[{"addr":%q,"proto":"udp","port":53}]}`, addr, addr)
	}
	say.Store(said("10.0.0.9"))
	ask(AskLimit, false, "map[a:[10.0.0.9]] 1 map[serving:1]")
	say.Store("")
	ask(short, false, "map[a:[10.0.0.9]] 0 map[silent:1]")
	say.Store("{]")
	ask(AskLimit, false, "map[a:[10.0.0.9]] 0 map[silent:1]")
	say.Store(said("10.0.0.8"))
	ask(AskLimit, false, "map[a:[10.0.0.8]] 1 map[serving:1]")
	if len(m.heard) != 1 {
		t.Errorf("remembered are %v", m.heard)
	}
}

func TestWhoIsGoneIsForgotten(t *testing.T) {
	needRoot(t)
	m := newMember()
	t.Run("there", func(t *testing.T) {
		saying(t, memberNamed(1)).Store("{}")
		saying(t, memberNamed(2)).Store("{]")
		if o, err := m.Ask(AskLimit); err != nil || !o.Unknown || len(m.heard) != 1 || len(m.told) != 1 {
			t.Errorf("unknown %v, error %v, remembered are %v and %v", o.Unknown, err, m.heard, m.told)
		}
	})
	if o, err := m.Ask(AskLimit); err != nil || o.Unknown || len(m.heard)+len(m.told) > 0 {
		t.Errorf("unknown %v, error %v, remembered are %v and %v", o.Unknown, err, m.heard, m.told)
	}
}

// Nobody is asked after another: here each waits with its answer until all have been asked.
func TestMembersAreAskedAtOnce(t *testing.T) {
	needRoot(t)
	var asked sync.WaitGroup
	asked.Add(peerLimit)
	for i := range peerLimit {
		l, err := net.Listen("unix", memberNamed(i))
		must(t, err)
		defer l.Close()
		go func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			asked.Done()
			asked.Wait()
			io.WriteString(c, "{}")
		}()
	}
	o, err := newMember().Ask(10 * time.Second)
	must(t, err)
	if o.Unknown || o.States[Idle] != peerLimit {
		t.Errorf("found are %v, unknown %v", o.States, o.Unknown)
	}
}

// Of more than can be asked those are who have answered before, and nothing may go.
func TestNumberOfMembersIsBounded(t *testing.T) {
	needRoot(t)
	m := newMember()
	saying(t, memberNamed(100)).Store(`{"links":{"a":["10.0.0.9"]}}`)
	_, err := m.Ask(AskLimit)
	must(t, err)
	for i := range peerLimit {
		saying(t, memberNamed(i)).Store("{}")
	}
	o, err := m.Ask(AskLimit)
	must(t, err)
	if !o.Unknown || o.States[Idle] != peerLimit || len(o.Wants.Links) != 1 {
		t.Errorf("found are %v, %v, unknown %v", o.States, o.Wants, o.Unknown)
	}
}

// The chains of the other variant of iptables are others.
func TestRulesInAnotherVariantAreOthers(t *testing.T) {
	needRoot(t)
	a, b := newMember(), newMember()
	defer a.Hide()
	defer b.Hide()
	for _, c := range []struct {
		own, other string
		counts     bool
	}{
		{"legacy", "legacy", true}, {"nf_tables", "legacy", false}, {"legacy", "nf_tables", false}, {"", "legacy", true}, {"legacy", "", true},
	} {
		must(t, a.publish(presence{Variant: c.own}))
		must(t, b.publish(presence{
			Variant: c.other, Links: map[string][]netip.Addr{testLink: addrs("10.0.0.9")},
			Rules: toShow(dnsOn("10.0.0.9")), LeavingRules: toShow(dnsOn("10.0.0.9")), Serves: toShow(dnsOn("10.0.0.9")),
		}))
		o, err := a.Ask(AskLimit)
		must(t, err)
		if got := len(o.Wants.Rules) > 0 && len(o.Leaving.Rules) > 0; got != c.counts || got != (len(o.Wants.Rules)+len(o.Leaving.Rules) > 0) {
			t.Errorf("own variant %q, the other's %q: rules wanted %v, left %v", c.own, c.other, o.Wants.Rules, o.Leaving.Rules)
		}
		if len(o.Wants.Links) != 1 || len(o.Serves) != 2 || !o.Variants[c.other] || len(o.Variants) != 1 {
			t.Errorf("own variant %q, the other's %q: %+v", c.own, c.other, o)
		}
	}
}

// Who asks and does not read keeps nobody else from an answer.
func TestSlowReadersKeepNobodyWaiting(t *testing.T) {
	needRoot(t)
	m, twin := newMember(), newMember()
	defer m.Hide()
	must(t, m.publish(many(1000)))
	for range answersAtOnce / 2 {
		c, err := net.Dial("unix", m.name)
		must(t, err)
		defer c.Close()
	}
	o, err := twin.Ask(AskLimit)
	must(t, err)
	if o.Unknown || len(o.Wants.Rules[testShared]) != 4000 {
		t.Errorf("unknown %v, %d rules", o.Unknown, len(o.Wants.Rules[testShared]))
	}
}

// Strangers are not answered, and their connections do not stay.
func TestStrangersAreNotAnswered(t *testing.T) {
	needRoot(t)
	m := newMember()
	defer m.Hide()
	must(t, m.publish(many(1000)))
	as(t, 65534, func() {
		c, err := net.Dial("unix", m.name)
		must(t, err)
		defer c.Close()
		c.SetDeadline(time.Now().Add(30 * time.Second))
		if b, err := io.ReadAll(c); len(b) > 0 || errors.Is(err, unix.ETIMEDOUT) {
			t.Errorf("got %d bytes, error %v", len(b), err)
		}
	})
}

// Where the system refuses the connection, as SELinux does between pods of different
// categories, the remedy is said.
func TestRefusedConnectionNamesTheRemedy(t *testing.T) {
	needRoot(t)
	saying(t, memberNamed(1)).Store("{}")
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // to the end, which is the thread's too
		// struct landlock_ruleset_attr: handled_access_fs, handled_access_net, scoped.
		attr := [3]uint64{2: unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET}
		fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr), 0)
		if errno != 0 {
			done <- errno
			return
		}
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			done <- err
			return
		}
		if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0); errno != 0 {
			done <- errno
			return
		}
		unix.Close(int(fd))
		_, err := newMember().askOne(memberNamed(1), time.Now().Add(AskLimit))
		done <- err
	}()
	err := <-done
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.E2BIG) {
		t.Skipf("this kernel's Landlock can't refuse the connection: %v", err)
	}
	wantError(t, err, "the same seLinuxOptions.level")
}
