package peers

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// A unixSocket is one with a name in the abstract namespace. The name is written as Go
// does it, with an @ for the first byte, which is NUL.
type unixSocket struct {
	name  string
	typ   uint8 // unix.SOCK_STREAM …
	state uint8 // unix.BPF_TCP_LISTEN …
	user  uint32
	// whose is true where the kernel has told the user.
	whose bool
}

// A socketKind is sockets to look for. Of the same name there may also be others: the
// connections that a listener has accepted have its name, and as long as it has not yet
// accepted them they pass for root's.
type socketKind struct {
	typ    uint8
	states uint32 // 1 << unix.BPF_TCP_LISTEN …
	is     func(name string) bool
}

func (k socketKind) has(s unixSocket) bool {
	return s.typ == k.typ && k.states&(1<<s.state) != 0 && k.is(s.name)
}

// listLimit bounds how many sockets of users that count are looked at.
const listLimit = 1024

// sockets are those of one kind in this network namespace.
type socketList struct {
	trusted []unixSocket
	more    bool // trusted are not all
	// Of users that do not count there are only the number and a few examples: anybody
	// can have any number of sockets.
	strangers int
	examples  []string
}

func (l *socketList) note(s unixSocket) {
	switch {
	case s.whose && !trusted(s.user):
		l.stranger(s.name, s.user)
	case len(l.trusted) == listLimit:
		l.more = true
	default:
		l.trusted = append(l.trusted, s)
	}
}

func (l *socketList) stranger(name string, user uint32) {
	l.strangers++
	if len(l.examples) < 3 {
		l.examples = append(l.examples, fmt.Sprintf("%q of the user %d", name, user))
	}
}

// listSockets lists the sockets of kind k. The kernel tells their users where it has unix_diag
// and is 5.3 or newer. Else who is connected to tells it, and a listener that can't be
// connected to now passes for one that counts.
func listSockets(k socketKind) (socketList, error) {
	l, unsure := socketList{}, []unixSocket(nil)
	note := func(s unixSocket) {
		switch {
		case !k.has(s):
		case s.whose || k.typ != unix.SOCK_STREAM:
			l.note(s)
		case len(unsure) < listLimit:
			unsure = append(unsure, s)
		default:
			l.more = true
		}
	}
	if err := diagSockets(k.states, note); err != nil {
		log.Debugf("asking the kernel for unix sockets: %v; reading /proc/net/unix", err)
		l, unsure = socketList{}, nil
		// While others close theirs a socket may be passed over: those of listeners, which
		// turns depend on, are read twice.
		for i := 0; i == 0 || i == 1 && k.typ == unix.SOCK_STREAM; i++ {
			if e := procSockets(note); e != nil {
				return l, errors.Join(err, e)
			}
		}
	}
	seen := map[string]bool{} // /proc/net/unix can be made to show a name again and again
	for _, s := range unsure {
		if seen[s.name] {
			continue
		}
		seen[s.name] = true
		user, err := userOf(s.name)
		if errors.Is(err, unix.ECONNREFUSED) {
			continue // gone since, or never there
		}
		s.user, s.whose = user, err == nil
		l.note(s)
	}
	return l, nil
}

// userOf returns the user that listens on the unix socket.
func userOf(name string) (uint32, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: name}); err != nil {
		return 0, err
	}
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return 0, err
	}
	return cred.Uid, nil
}

// What sock_diag calls things, in linux/unix_diag.h.
const (
	udiagShowName = 1 << netlink.UNIX_DIAG_NAME
	udiagShowUID  = 0x40
	unixDiagSize  = 16 // struct unix_diag_msg
)

// unixDiagRequest is struct unix_diag_req.
type unixDiagRequest struct{ states, show uint32 }

func (unixDiagRequest) Len() int { return 24 }

func (r unixDiagRequest) Serialize() []byte {
	b := make([]byte, r.Len())
	b[0] = unix.AF_UNIX
	binary.NativeEndian.PutUint32(b[4:], r.states)
	binary.NativeEndian.PutUint32(b[12:], r.show)
	return b
}

// diagSockets calls f for the unix sockets in any of the states.
func diagSockets(states uint32, f func(unixSocket)) error {
	req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
	req.AddData(unixDiagRequest{states: states, show: udiagShowName | udiagShowUID})
	return req.ExecuteIter(unix.NETLINK_SOCK_DIAG, nl.SOCK_DIAG_BY_FAMILY, func(msg []byte) bool {
		if s, ok := parseUnixDiag(msg); ok {
			f(s)
		}
		return true
	})
}

// parseUnixDiag reads a struct unix_diag_msg and its attributes. It is not ok for a socket
// without a name in the abstract namespace.
func parseUnixDiag(msg []byte) (s unixSocket, ok bool) {
	if len(msg) < unixDiagSize || len(msg)%4 != 0 { // the library relies on the padding
		return s, false
	}
	s = unixSocket{typ: msg[1], state: msg[2]}
	attrs, err := nl.ParseRouteAttr(msg[unixDiagSize:])
	if err != nil {
		return s, false
	}
	for _, a := range attrs {
		switch {
		case a.Attr.Type == netlink.UNIX_DIAG_NAME && len(a.Value) > 1 && a.Value[0] == 0:
			s.name = "@" + string(a.Value[1:])
		case a.Attr.Type == netlink.UNIX_DIAG_UID && len(a.Value) == 4:
			s.user, s.whose = binary.NativeEndian.Uint32(a.Value), true
		}
	}
	return s, s.name != ""
}

// procSockets calls f for the unix sockets in /proc/net/unix.
func procSockets(f func(unixSocket)) error {
	file, err := os.Open("/proc/thread-self/net/unix")
	if err != nil {
		return err
	}
	defer file.Close()
	return parseUnixSockets(file, f)
}

// parseUnixSockets reads the text of /proc/net/unix, in which names stand as they are:
// one with a line feed makes further lines, of whatever form somebody likes. So a line
// only tells where there may be a socket, and every other line is passed over.
//
//	Num       RefCount Protocol Flags    Type St Inode Path
//	00000000: 00000002 00000000 00010000 0001 01 12345 @nodecache/lock
func parseUnixSockets(r io.Reader, f func(unixSocket)) error {
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadSlice('\n')
		// A line that does not fit the buffer comes in parts, none of which is of use:
		// the kernel's own have less than 200 bytes.
		if s, ok := parseUnixLine(string(line)); ok && err == nil {
			f(s)
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
	}
}

func parseUnixLine(line string) (s unixSocket, ok bool) {
	fields := strings.Fields(line)
	if len(fields) != 8 || !strings.HasSuffix(fields[0], ":") || len(fields[7]) < 2 || fields[7][0] != '@' {
		return s, false
	}
	flags, err := strconv.ParseUint(fields[3], 16, 32)
	typ, err2 := strconv.ParseUint(fields[4], 16, 8)
	state, err3 := strconv.ParseUint(fields[5], 16, 8)
	if errors.Join(err, err2, err3) != nil {
		return s, false
	}
	const (
		acceptCon   = 1 << 16 // __SO_ACCEPTCON, include/uapi/linux/net.h
		unconnected = 1       // SS_UNCONNECTED
	)
	s = unixSocket{name: fields[7], typ: uint8(typ), state: unix.BPF_TCP_ESTABLISHED}
	switch {
	case flags&acceptCon != 0:
		s.state = unix.BPF_TCP_LISTEN
	case state == unconnected:
		s.state = unix.BPF_TCP_CLOSE
	}
	return s, true
}
