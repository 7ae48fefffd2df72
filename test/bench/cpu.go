package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// A layout is which CPU does what.
type layout struct {
	count int
	load  int   // the CPU of the load
	free  []int // the others, the best for a server first
	spare bool  // there are enough for a server on two
}

// layOut pins this process, and with it the load, to one CPU.
func layOut() (l layout, err error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return l, fmt.Errorf("asking for the CPUs: %w", err)
	}
	var cpus []int
	for i := range len(set) * 64 {
		if set.IsSet(i) {
			cpus = append(cpus, i)
		}
	}
	if len(cpus) < 2 {
		return l, errors.New("one CPU for the server and one for the load are needed, and this process has only one")
	}
	l.count = len(cpus)
	// The first one has interrupts to serve more often than others.
	l.load = cpus[0]
	for i := len(cpus) - 1; i > 0; i-- {
		l.free = append(l.free, cpus[i])
	}
	l.spare = len(l.free) >= 2
	// Threads that are started later inherit it.
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return l, err
	}
	for _, t := range tasks {
		tid, err := strconv.Atoi(t.Name())
		if err != nil {
			return l, err
		}
		if err := pin(tid, []int{l.load}); err != nil && !errors.Is(err, unix.ESRCH) {
			return l, err
		}
	}
	return l, nil
}

// server returns the CPUs of a server that has so many.
func (l layout) server(n int) []int {
	if n > len(l.free) {
		return append([]int{l.load}, l.free...)
	}
	return l.free[:n]
}

// pin keeps a thread, 0 for this one, and what it starts on these CPUs.
func pin(tid int, cpus []int) error {
	var set unix.CPUSet
	for _, c := range cpus {
		set.Set(c)
	}
	if err := unix.SchedSetaffinity(tid, &set); err != nil {
		return fmt.Errorf("pinning a thread to the CPUs %v: %w", cpus, err)
	}
	return nil
}

// busyTime returns for how long all CPUs of the machine have not been idle.
func busyTime() (time.Duration, error) {
	fs, err := procfs.NewDefaultFS()
	if err != nil {
		return 0, err
	}
	stat, err := fs.Stat()
	if err != nil {
		return 0, fmt.Errorf("reading the machine's CPU time: %w", err)
	}
	// The kernel measures how long a CPU idles, and samples what else it does.
	idle := stat.CPUTotal.Idle + stat.CPUTotal.Iowait
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return 0, err
	}
	return time.Duration(now.Nano())*time.Duration(len(stat.CPU)) - time.Duration(idle*float64(time.Second)), nil
}

// used is what has been used since some time in the past.
type used struct {
	cpu, machine time.Duration // by the server, and by all but this process
	switches     uint64        // of the server
}

func usedBy(pid int) (u used, err error) {
	if u.cpu, err = lab.CPUTime(pid); err != nil {
		return u, err
	}
	own, err := lab.CPUTime(os.Getpid())
	if err != nil {
		return u, err
	}
	if u.machine, err = busyTime(); err != nil {
		return u, err
	}
	u.machine -= own
	u.switches, err = lab.Switches(pid)
	return u, err
}
