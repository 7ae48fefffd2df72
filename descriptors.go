package nodecache

import (
	"math"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

const (
	// mostUnderWay is what is under way at most where descriptors and memory are plenty.
	mostUnderWay = 10_000
	// leastUnderWay is what may be under way wherever this runs.
	leastUnderWay = 64
	// bytesUnderWay is what a query that waits for an upstream takes (docs/sizing.md).
	bytesUnderWay = 21 << 10
)

// descriptorLimit returns how many file descriptors this process may have. Go's runtime
// has raised the soft limit to the hard one before main (since Go 1.19, in package
// syscall's init), so there is nothing left to raise; programs that we start get
// back the limit that there was.
func descriptorLimit() int {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil || r.Cur > math.MaxInt32 {
		return math.MaxInt32
	}
	return int(r.Cur)
}

// underWayLimit returns how many queries may wait for upstreams at a time. Each may hold
// a descriptor, and takes memory, of which they get half of what GOMEMLIMIT grants.
func underWayLimit() int {
	return underWayWithin(descriptorLimit(), debug.SetMemoryLimit(-1))
}

func underWayWithin(descriptors int, memory int64) int {
	return max(leastUnderWay, min(descriptors/4, mostUnderWay, int(min(memory/2/bytesUnderWay, mostUnderWay))))
}
