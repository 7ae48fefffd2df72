package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
	"golang.org/x/sys/unix"
)

const nobody = 65534

// as does something on the node as a user without any capability. What it opens stays.
func (n *node) as(user int, do func() error) {
	n.Helper()
	n.must(n.Node.Do(func() error {
		// This thread alone, which ends with this.
		runtime.LockOSThread()
		var none [2]unix.CapUserData
		if user == 0 {
			if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]); err != nil {
				return err
			}
		}
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(user), uintptr(user), uintptr(user)); errno != 0 {
			return errno
		}
		return do()
	}))
}

// bound binds a unix socket of a type as a user, and listens where backlog is not negative.
func (n *node) bound(user, typ int, name string, backlog int) (fd int) {
	n.Helper()
	n.as(user, func() (err error) {
		if fd, err = unix.Socket(unix.AF_UNIX, typ|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err = unix.Bind(fd, &unix.SockaddrUnix{Name: name}); err == nil && backlog >= 0 {
			err = unix.Listen(fd, backlog)
		}
		return err
	})
	n.Cleanup(func() { unix.Close(fd) })
	return fd
}

// answering listens as a user, and answers who connects by writing to it.
func (n *node) answering(user int, name string, write func(net.Conn)) (end func()) {
	n.Helper()
	var l net.Listener
	n.as(user, func() (err error) {
		l, err = net.Listen("unix", name)
		return err
	})
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				write(c)
				c.Close()
			}()
		}
	}()
	n.Cleanup(func() { l.Close() })
	return func() { l.Close() }
}

const (
	memberSocket = "@nodecache/member/"
	lockSocket   = "@nodecache/lock"
)

// usual is a day of a cache, in which nothing has to be said about its neighbours but that
// they are ignored.
func (n *node) usual(before string) (log string) {
	n.Helper()
	p := n.serve(n.corefile())
	n.answersEverybody(false, addrs...)
	p.reload(n.block(".:53", "169.254.20.10 10.96.0.10 fd00:96::10"))
	p.reload(n.corefile())
	n.answersEverybody(false, addrs...)
	p.exit(syscall.SIGTERM)
	n.same("after the exit", before, n.snapshot())
	for _, words := range []string{"panic", "nothing is taken away", "has been changing the node", "going on without"} {
		if strings.Contains(p.Log(), words) {
			n.Errorf("%q in the log", words)
		}
	}
	return p.Log()
}

// Whatever anybody calls his sockets, the caches go on.
func TestNeighboursSocketsOfAnyName(t *testing.T) {
	for _, typ := range []int{unix.SOCK_STREAM, unix.SOCK_DGRAM, unix.SOCK_SEQPACKET} {
		for _, name := range []string{
			"@x\n", "@x\n\ny", "@\n", "@x\n00000000: 00000002 00000000 00010000 0001 01 1 @nodecache/member/00000000000000aa",
			memberSocket + "\n", lockSocket + "\n", "@" + strings.Repeat("\n", 100), "@\xff\x00\n",
		} {
			t.Run(fmt.Sprintf("%d-%q", typ, name), func(t *testing.T) {
				n := newNode(t, iptablesNFT)
				before := n.snapshot()
				n.bound(nobody, typ, name, -1)
				n.usual(before)
			})
		}
	}
	t.Run("file", func(t *testing.T) {
		n := newNode(t, iptablesNFT)
		before := n.snapshot()
		n.must(os.Chmod(n.Dir, 0o777))
		n.bound(nobody, unix.SOCK_DGRAM, filepath.Join(n.Dir, "x\n\ny"), -1)
		n.usual(before)
	})
}

// A process of another user has the names of our sockets, and keeps nobody from anything.
func TestNeighboursWithOurNames(t *testing.T) {
	const id = "00000000000000aa"
	for _, c := range []struct {
		name   string
		listed bool // as one that is ignored
		hold   func(n *node)
	}{
		{"member that says what it wants", true, func(n *node) {
			n.answering(nobody, memberSocket+id, func(c net.Conn) {
				io.WriteString(c, `{"links":{"nodelocaldns":["10.9.9.9"]},"rules":[{"addr":"10.9.9.9","proto":"tcp","port":22}]}`)
			})
		}},
		{"member that does not answer", true, func(n *node) { n.bound(nobody, unix.SOCK_STREAM, memberSocket+id, 5) }},
		{"member with a full queue", true, func(n *node) {
			n.bound(nobody, unix.SOCK_STREAM, memberSocket+id, 0)
			n.fill(memberSocket + id)
		}},
		{"members without number", true, func(n *node) {
			for i := range 300 {
				n.bound(nobody, unix.SOCK_STREAM, fmt.Sprintf("%s%016x", memberSocket, i), 0)
			}
		}},
		{"member of another type", false, func(n *node) { n.bound(nobody, unix.SOCK_SEQPACKET, memberSocket+id, 0) }},
		{"names like a member's", false, func(n *node) {
			for _, name := range []string{"", "x", id + "0", strings.ToUpper(id), id + "\x00", "0123456789abcde\n"} {
				n.bound(nobody, unix.SOCK_STREAM, memberSocket+name, 0)
				n.bound(0, unix.SOCK_STREAM, memberSocket+name+"/", 0)
			}
		}},
		{"lock that does not listen", false, func(n *node) { n.bound(nobody, unix.SOCK_STREAM, lockSocket, -1) }},
		{"lock that listens", false, func(n *node) { n.bound(nobody, unix.SOCK_STREAM, lockSocket, 0) }},
		{"lock with a full queue", false, func(n *node) {
			n.bound(nobody, unix.SOCK_STREAM, lockSocket, 0)
			n.fill(lockSocket)
		}},
		{"most locks", false, func(n *node) {
			n.bound(nobody, unix.SOCK_STREAM, lockSocket, -1)
			for i := 1; i < 7; i++ {
				n.bound(nobody, unix.SOCK_STREAM, fmt.Sprintf("%s/%d", lockSocket, i), i%2-1)
			}
		}},
		{"exits", false, func(n *node) {
			for i := range 300 {
				n.bound(nobody, unix.SOCK_DGRAM, fmt.Sprintf("@nodecache/exits/%016x", i), -1)
			}
		}},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			n := newNode(t, iptablesNFT)
			before := n.snapshot()
			c.hold(n)
			log := n.usual(before)
			if got := strings.Contains(log, "want here is ignored"); got != c.listed {
				n.Errorf("says that it ignores somebody: %v, want %v", got, c.listed)
			}
			if c.listed && !strings.Contains(log, `of the user 65534`) {
				n.Error("does not say whom")
			}
		})
	}
}

// fill connects to a listener until its queue is full.
func (n *node) fill(name string) {
	n.Helper()
	n.must(n.Node.Do(func() error {
		for {
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
			if err != nil {
				return err
			}
			n.Cleanup(func() { unix.Close(fd) })
			if err := unix.Connect(fd, &unix.SockaddrUnix{Name: name}); err == unix.EAGAIN {
				return nil
			} else if err != nil {
				return err
			}
		}
	}))
}

// A process of root that has no capability can have nothing written that is no rule of a
// cache's, nor keep a cache from starting.
func TestHostileMember(t *testing.T) {
	evil := func(addr, proto string, port any) string {
		b, err := json.Marshal(map[string]any{"rules": []any{map[string]any{"addr": addr, "proto": proto, "port": port}}})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	text := func(s string) func(net.Conn) { return func(c net.Conn) { io.WriteString(c, s) } }
	const redirect = "\nCOMMIT\n*nat\n-A PREROUTING -p tcp --dport 443 -j REDIRECT --to-ports 4444\nCOMMIT\n*raw\n"
	for name, write := range map[string]func(net.Conn){
		"protocol":     text(evil("10.0.0.9", "udp"+redirect, 53)),
		"no protocol":  text(evil("10.0.0.9", "sctp", 53)),
		"zone":         text(evil("fe80::1%x"+redirect, "udp", 53)),
		"no address":   text(evil("", "udp", 53)),
		"wildcard":     text(evil("0.0.0.0", "udp", 53)),
		"mapped":       text(evil("::ffff:10.0.0.9", "udp", 53)),
		"no port":      text(evil("10.0.0.9", "udp", 0)),
		"port 70000":   text(evil("10.0.0.9", "udp", 70000)),
		"link's name":  text(`{"links":{"a/../b":["10.0.0.9"]}}`),
		"link's zone":  text(`{"links":{"nodelocaldns":["fe80::1%x"]}}`),
		"leaving":      text(`{"leaving_rules":[{"addr":"10.0.0.9","proto":"x","port":53}]}`),
		"not JSON":     text("\x00\xff{"),
		"number":       text("1"),
		"two":          text("{}{}"),
		"version":      text(`{"version":-1}`),
		"deep":         text(strings.Repeat(`{"links":`, 100000)),
		"long address": text(evil(strings.Repeat("\x1b[31m", 100000), "udp", 53)),
		"without end": func(c net.Conn) {
			for {
				if _, err := c.Write([]byte(strings.Repeat(" ", 1<<16))); err != nil {
					return
				}
			}
		},
		"many rules": text(`{"rules":[` + strings.Repeat(`{"addr":"10.0.0.9","proto":"udp","port":53},`, 20000) + `{"addr":"10.0.0.9","proto":"udp","port":53}]}`),
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			n := newNode(t, iptablesNFT)
			before := n.snapshot()
			end := n.answering(0, memberSocket+"00000000000000aa", write)
			p := n.serve(n.corefile())
			n.has(p.Log(), "what it answers can't be understood", "nothing is taken away until it answers or ends")
			n.answersEverybody(false, addrs...)
			p.reload(n.corefile())
			out, err := n.Node.Run("iptables-save")
			n.must(err)
			for _, words := range []string{"REDIRECT", "10.0.0.9", "4444"} {
				if strings.Contains(out, words) {
					n.Errorf("%q in\n%s", words, out)
				}
			}
			if i := strings.IndexFunc(p.Log(), func(r rune) bool { return r < ' ' && r != '\n' }); i >= 0 {
				n.Errorf("a control character in the log at %d", i)
			}
			for line := range strings.Lines(p.Log()) {
				if len(line) > 2000 {
					n.Errorf("a line of %d bytes in the log", len(line))
				}
			}
			end()
			p.exit(syscall.SIGTERM)
			n.same("after the exit", before, n.snapshot())
		})
	}
}

// What a stopped process said last is still known: nobody has to leave for its sake what
// it never wanted.
func TestStoppedTwin(t *testing.T) {
	forBackends(t, func(n *node) {
		before := n.snapshot()
		stops := n.serve(n.block(".:53", "10.96.0.10 fd00:96::10"))
		alone := n.snapshot()
		leaves := n.serve(n.corefile())
		n.must(stops.Signal(syscall.SIGSTOP))
		n.Cleanup(func() { stops.Signal(syscall.SIGCONT) })
		leaves.exit(syscall.SIGTERM)
		n.has(leaves.Log(), "what it said last counts until it answers or ends")
		n.same("after the other one has left", alone, n.snapshot())
		n.must(stops.Signal(syscall.SIGCONT))
		// With iptables the rules for the node's own programs have gone out of force meanwhile.
		for _, at := range on(clusterIPs...) {
			ask := lab.Load{From: n.Node, Proto: "udp", To: []netip.AddrPort{at}, Count: 1}
			eventually(func() bool { r, err := ask.Run(); return err == nil && r.AllAnswered(false) })
		}
		n.answersEverybody(false, clusterIPs...)
		stops.exit(syscall.SIGTERM)
		n.same("after both have left", before, n.snapshot())
	})
}

// A Corefile has the others asked once, however many server blocks it has.
func TestOthersAreAskedOnceForACorefile(t *testing.T) {
	n := newNode(t, iptablesNFT)
	var asked atomic.Int32
	n.answering(0, memberSocket+"00000000000000aa", func(c net.Conn) {
		asked.Add(1)
		io.WriteString(c, "{}")
	})
	corefile := ""
	for i := range 5 {
		corefile += n.block(fmt.Sprintf("zone%d.lab:53", i), "169.254.20.10")
	}
	n.refuse(corefile+n.block("last.lab:53", "0.0.0.0"), lab.Options{})
	if got := asked.Load(); got != 1 {
		t.Errorf("asked %d times, want once", got)
	}
}

// A process that had no file descriptor left answers again when it has one.
func TestAnswersAgainAfterTooManyOpenFiles(t *testing.T) {
	n := newNode(t, iptablesNFT)
	before := n.snapshot()
	p := n.serve(n.corefile())
	list, err := n.Node.Run("cat", "/proc/net/unix")
	n.must(err)
	name := regexp.MustCompile(`@nodecache/member/[0-9a-f]{16}`).FindString(list)
	ask := func() (text []byte, err error) {
		err = n.Node.Do(func() error {
			c, err := net.Dial("unix", name)
			if err != nil {
				return err
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(lab.Patience))
			text, err = io.ReadAll(c)
			return err
		})
		return text, err
	}
	if _, err := ask(); err != nil {
		t.Fatalf("asking %q: %v", name, err)
	}
	var was unix.Rlimit
	n.must(unix.Prlimit(p.Pid, unix.RLIMIT_NOFILE, nil, &was))
	n.must(unix.Prlimit(p.Pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1, Max: was.Max}, nil))
	mark := p.Mark()
	answered := make(chan error, 1)
	go func() { _, err := ask(); answered <- err }()
	n.must(p.WaitLog(mark, "answering other nodecache processes"))
	n.must(unix.Prlimit(p.Pid, unix.RLIMIT_NOFILE, &was, nil))
	n.must(<-answered)
	text, err := ask()
	if err != nil || !strings.Contains(string(text), `"169.254.20.10"`) {
		t.Errorf("answers %q, error %v", text, err)
	}
	p.exit(syscall.SIGTERM)
	n.same("after the exit", before, n.snapshot())
}
