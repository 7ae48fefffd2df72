package sockets

import (
	"fmt"
	"math"
	"os"
	"runtime/debug"
	"strconv"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// mostUnderWay is what is under way at most where descriptors and memory are plenty.
	mostUnderWay = 10_000
	// leastUnderWay is what may be under way wherever this runs.
	leastUnderWay = 64
	// bytesUnderWay is what a query that waits for an upstream takes (docs/sizing.md).
	bytesUnderWay = 21 << 10

	// mostClients, leastClients and bytesOfClient are the same for a client's TCP connection.
	mostClients   = 4096
	leastClients  = 64
	bytesOfClient = 12 << 10

	// fewDescriptors is where the log says what could be done about it.
	fewDescriptors = 4096
	// manyDescriptors are more than clients can open in a quarter of a second.
	manyDescriptors = 1 << 14
)

// DescriptorLimit returns how many file descriptors this process may have. Go's runtime
// has raised the soft limit to the hard one before main (since Go 1.19, in package
// syscall's init), so there is nothing left to raise; programs that we start get
// back the limit that there was.
func DescriptorLimit() int {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil || r.Cur > math.MaxInt32 {
		return math.MaxInt32
	}
	return int(r.Cur)
}

// UnderWayLimit returns how many queries may wait for upstreams at a time. Each may hold
// a descriptor, and takes memory, of which they get half of what GOMEMLIMIT grants.
func UnderWayLimit() int {
	return underWayWithin(DescriptorLimit(), debug.SetMemoryLimit(-1))
}

func underWayWithin(descriptors int, memory int64) int {
	return max(leastUnderWay, min(descriptors/4, mostUnderWay, int(min(memory/2/bytesUnderWay, mostUnderWay))))
}

// tcpLimit returns how many TCP connections clients may have open at a time. They get
// a quarter of the memory.
func tcpLimit() int {
	return clientsWithin(DescriptorLimit(), debug.SetMemoryLimit(-1))
}

func clientsWithin(descriptors int, memory int64) int {
	return max(leastClients, min(descriptors/4, mostClients, int(min(memory/4/bytesOfClient, mostClients))))
}

func warnOfFewDescriptors() {
	if n := DescriptorLimit(); n < fewDescriptors {
		log.Warningf("this process may have only %d file descriptors open, so that clients can have %d TCP connections and %d queries can wait for upstreams: raise the hard limit, as with LimitNOFILE= of the container runtime's unit",
			n, tcpLimit(), UnderWayLimit())
	}
}

// fdDir is /proc/self/fd. It stays open, so that it can be read when there are no more
// Descriptors to be had.
var fdDir struct {
	sync.Mutex
	file *os.File
}

// Descriptors returns the numbers of this process's open descriptors.
func Descriptors() ([]int, error) {
	fdDir.Lock()
	defer fdDir.Unlock()
	if fdDir.file == nil {
		var err error
		if fdDir.file, err = os.Open("/proc/self/fd"); err != nil {
			return nil, fmt.Errorf("listing this process's descriptors: %w", err)
		}
	}
	_, err := fdDir.file.Seek(0, 0)
	if err != nil {
		return nil, fmt.Errorf("listing this process's descriptors: %w", err)
	}
	names, err := fdDir.file.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("listing this process's descriptors: %w", err)
	}
	var fds []int
	for _, name := range names {
		if fd, err := strconv.Atoi(name); err == nil {
			fds = append(fds, fd)
		}
	}
	return fds, nil
}

var ownDescriptors = []byte("/proc/self/fd\x00")

// descriptorsOpen returns how many there are, which Linux tells as the directory's size
// since 6.2.
func descriptorsOpen() (int, error) {
	var st unix.Statx_t
	// Go's scheduler does not hear of a raw call, which never blocks here: it would wake the
	// runtime's monitor each time, which then looks around a few dozen times more.
	_, _, e := unix.RawSyscall6(unix.SYS_STATX, ^uintptr(0), uintptr(unsafe.Pointer(&ownDescriptors[0])), 0, unix.STATX_SIZE, uintptr(unsafe.Pointer(&st)), 0)
	if e == 0 && st.Size > 0 {
		return int(st.Size), nil
	}
	fds, err := Descriptors()
	return len(fds), err
}
