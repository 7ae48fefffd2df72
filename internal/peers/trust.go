package peers

import (
	"fmt"
	"net"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// trusted tells whether what a user's processes say counts.
func trusted(user uint32) bool { return user == 0 || int(user) == os.Geteuid() }

// strangerError is that another user's process is on the other side. Its value is the user.
type strangerError uint32

func (e strangerError) Error() string {
	return fmt.Sprintf("the user %d is on the other side", uint32(e))
}

// trust returns a strangerError unless what c is connected to is of this process's user
// or of root.
func trust(c net.Conn) error {
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var failed error
	if err := raw.Control(func(fd uintptr) {
		cred, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if failed != nil {
		return fmt.Errorf("asking whose the socket is: %w", failed)
	}
	if !trusted(cred.Uid) {
		return strangerError(cred.Uid)
	}
	return nil
}

// hasID tells whether name is prefix and a member's id, as newMember makes them.
func hasID(name, prefix string) bool {
	id, ok := strings.CutPrefix(name, prefix)
	return ok && len(id) == 16 && strings.Trim(id, "0123456789abcdef") == ""
}
