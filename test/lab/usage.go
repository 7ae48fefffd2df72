package lab

import (
	"fmt"
	"time"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
)

// CPUTime returns the CPU time that all threads of a process have had, to the
// nanosecond. The clock is that of clock_getcpuclockid(3).
func CPUTime(pid int) (time.Duration, error) {
	const sched = 2 // CPUCLOCK_SCHED
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|sched), &t); err != nil {
		return 0, fmt.Errorf("reading a process's CPU time: %w", err)
	}
	return time.Duration(t.Nano()), nil
}

// Switches returns how often the threads of a process have gone to sleep.
func Switches(pid int) (n uint64, err error) {
	fs, err := procfs.NewDefaultFS()
	if err != nil {
		return 0, err
	}
	threads, err := fs.AllThreads(pid)
	if err != nil {
		return 0, fmt.Errorf("counting a process's context switches: %w", err)
	}
	for _, t := range threads {
		if status, err := t.NewStatus(); err == nil { // else it has ended
			n += status.VoluntaryCtxtSwitches
		}
	}
	return n, nil
}
