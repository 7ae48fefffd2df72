package sockets

import (
	"net"
	"testing"

	"golang.org/x/sys/unix"
)

// A read that has begun while its socket was in blocking mode comes back to Go, which then
// sees that the socket is to be closed, though nothing is sent to it.
func TestReadInTheKernelEnds(t *testing.T) {
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	must(t, err)
	defer c.Close()
	must(t, DeepenAll(nil))
	raw, err := c.SyscallConn()
	must(t, err)
	ended := make(chan error, 1)
	must(t, raw.Control(func(fd uintptr) {
		err = unix.SetNonblock(int(fd), false)
		go func() {
			_, _, err := unix.Recvfrom(int(fd), make([]byte, 1), 0)
			ended <- err
		}()
	}))
	must(t, err)
	eventually(t, "the read ends", func() bool { return len(ended) == 1 })
	if err := <-ended; err != unix.EAGAIN {
		t.Errorf("the read ended with %v, want %v", err, unix.EAGAIN)
	}
}
