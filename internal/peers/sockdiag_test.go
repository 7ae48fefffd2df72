package peers

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// withoutSockDiag runs do on a thread of its own that a filter of system calls holds back: it
// can't open a socket of netlink's sock_diag, as where a container's runtime or SELinux
// denies it.
func withoutSockDiag(t *testing.T, do func()) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // to the end, which is the thread's too
		err := errors.New("the thread has ended early")
		defer func() { done <- err }()
		load := func(offset uint32) unix.SockFilter {
			return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
		}
		unless := func(value uint32, skip uint8) unix.SockFilter {
			return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: skip, K: value}
		}
		result := func(value uint32) unix.SockFilter {
			return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: value}
		}
		// struct seccomp_data: the number of the call at 0, its arguments from 16 on.
		filter := []unix.SockFilter{
			load(0), unless(unix.SYS_SOCKET, 5),
			load(16), unless(unix.AF_NETLINK, 3),
			load(32), unless(unix.NETLINK_SOCK_DIAG, 1),
			result(unix.SECCOMP_RET_ERRNO | uint32(unix.EACCES)),
			result(unix.SECCOMP_RET_ALLOW),
		}
		program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
		if err = unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return
		}
		if err = unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0); err != nil {
			return
		}
		if fd, e := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_SOCK_DIAG); !errors.Is(e, unix.EACCES) {
			unix.Close(fd)
			err = fmt.Errorf("the filter does not work: %v", e)
			return
		}
		do()
		err = nil
	}()
	must(t, <-done)
}

// eitherWay runs a test with the kernel's list of sockets and with the text.
func eitherWay(t *testing.T, test func(t *testing.T)) {
	needRoot(t)
	t.Run("sock_diag", test)
	t.Run("text", func(t *testing.T) { withoutSockDiag(t, func() { test(t) }) })
}

// bindAs binds a unix socket as a user, and listens where backlog is not negative.
func bindAs(t *testing.T, user, typ int, name string, backlog int) (fd int) {
	t.Helper()
	as(t, user, func() {
		var err error
		fd, err = unix.Socket(unix.AF_UNIX, typ|unix.SOCK_CLOEXEC, 0)
		must(t, err)
		must(t, unix.Bind(fd, &unix.SockaddrUnix{Name: name}))
		if backlog >= 0 {
			must(t, unix.Listen(fd, backlog))
		}
	})
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func TestLookFindsWhoCounts(t *testing.T) {
	eitherWay(t, func(t *testing.T) {
		id := func(i int) string { return fmt.Sprintf("%s%016x", memberPrefix, i) }
		for _, user := range []int{0, 65534} {
			first := 16 + user
			bindAs(t, user, unix.SOCK_STREAM, id(user), 1)
			bindAs(t, user, unix.SOCK_STREAM, id(first+1), -1)
			bindAs(t, user, unix.SOCK_SEQPACKET, id(first+2), 1)
			bindAs(t, user, unix.SOCK_DGRAM, id(first+3), -1)
			bindAs(t, user, unix.SOCK_STREAM, id(first+4)+"0", 1)
			bindAs(t, user, unix.SOCK_STREAM, id(first+5)+"\n", 1)
			bindAs(t, user, unix.SOCK_STREAM, fmt.Sprintf("@x\n00000000: 00000002 00000000 00010000 0001 01 1 %s\n\n", id(first+6)), -1)
		}
		// A connection that nobody has accepted has the stranger's name, and root's number.
		c, err := net.Dial("unix", id(65534))
		must(t, err)
		defer c.Close()
		l, err := listSockets(memberSockets)
		must(t, err)
		if len(l.trusted) != 1 || l.trusted[0].name != id(0) || l.more {
			t.Errorf("found are %v", l.trusted)
		}
		if want := fmt.Sprintf("%q of the user 65534", id(65534)); l.strangers != 1 || !slices.Equal(l.examples, []string{want}) {
			t.Errorf("strangers are %d, such as %q", l.strangers, l.examples)
		}
	})
}

func TestLookBoundsStrangers(t *testing.T) {
	eitherWay(t, func(t *testing.T) {
		for i := range 100 {
			bindAs(t, 65534, unix.SOCK_STREAM, fmt.Sprintf("%s%016x", memberPrefix, i), 1)
		}
		l, err := listSockets(memberSockets)
		must(t, err)
		if len(l.trusted) > 0 || l.strangers != 100 || len(l.examples) != 3 {
			t.Errorf("found are %v, strangers %d, such as %q", l.trusted, l.strangers, l.examples)
		}
	})
}

func FuzzUnixSockets(f *testing.F) {
	const head = "Num       RefCount Protocol Flags    Type St Inode Path\n"
	const line = "0000000000000000: 00000002 00000000 00010000 0001 01 12345 @nodecache/lock\n"
	for _, seed := range []string{
		"", "\n", head, head + line, line + line, line + "\n\n" + line, "x" + line, line[:len(line)-1], strings.ReplaceAll(line, " ", "\n"),
		strings.Replace(line, "@", "", 1), strings.Replace(line, "0001 01", "1 1", 1), line[:60] + strings.Repeat("x", 5000) + "\n" + line, "\xff\x00\n",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		n := 0
		err := parseUnixSockets(strings.NewReader(text), func(s unixSocket) {
			n++
			if len(s.name) < 2 || s.name[0] != '@' || strings.ContainsAny(s.name, " \n\t") || s.whose {
				t.Errorf("found %+v", s)
			}
			memberSockets.has(s)
			lockSockets.has(s)
			lastWordsSockets.has(s)
		})
		if err != nil {
			t.Error(err)
		}
		if n > strings.Count(text, "\n") {
			t.Errorf("%d sockets in %d lines", n, strings.Count(text, "\n"))
		}
	})
}

// The kernel's messages are no text, but they too are read by their lengths.
func FuzzUnixDiag(f *testing.F) {
	message := make([]byte, unixDiagSize)
	message[1], message[2] = unix.SOCK_STREAM, unix.BPF_TCP_LISTEN
	attr := func(typ uint16, value string) {
		length := 4 + len(value)
		message = binary.NativeEndian.AppendUint16(message, uint16(length))
		message = binary.NativeEndian.AppendUint16(message, typ)
		message = append(append(message, value...), make([]byte, (4-length%4)%4)...)
	}
	f.Add(slices.Clone(message))
	attr(0, "\x00nodecache/lock")
	f.Add(slices.Clone(message))
	f.Add(slices.Clone(message[:len(message)-1]))
	attr(7, "\x00\x00\x00\x00")
	f.Add(message)
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, ok := parseUnixDiag(b); ok && (len(s.name) < 2 || s.name[0] != '@') {
			t.Errorf("found %+v", s)
		}
	})
}

// The kernel's own text is understood.
func TestUnixSocketsOfThisKernel(t *testing.T) {
	needRoot(t)
	bindAs(t, 0, unix.SOCK_STREAM, "@nodecache/lock", 0)
	file, err := os.Open("/proc/thread-self/net/unix")
	must(t, err)
	defer file.Close()
	text, err := io.ReadAll(file)
	must(t, err)
	found := false
	must(t, parseUnixSockets(strings.NewReader(string(text)), func(s unixSocket) { found = found || lockSockets.has(s) }))
	if !found {
		t.Errorf("not found in\n%s", text)
	}
}
