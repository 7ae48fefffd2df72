// Package footprint gives back memory that only the start has needed.
package footprint

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Trim unmaps the pages of this program's file that have been mapped so far: most of them
// hold what has run once, in a start or a reload, and those around it. The pages stay in the
// kernel's cache, and what is used again is mapped again, 16 pages at a time.
func Trim() error {
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("looking for the program's file: %w", err)
	}
	text, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		return fmt.Errorf("reading the program's mappings: %w", err)
	}
	for _, m := range unchanged(string(text), program) {
		if _, _, e := unix.Syscall(unix.SYS_MADVISE, m.start, m.end-m.start, unix.MADV_DONTNEED); e != 0 {
			return fmt.Errorf("giving back pages of %s: %w", program, e)
		}
	}
	return nil
}

type mapping struct{ start, end uintptr }

// unchanged returns the mappings of a file, as smaps has them (proc(5)), that can't be
// written and hold what the file holds: what a program's start has changed, as in one that
// can be loaded anywhere, would be lost.
func unchanged(smaps, file string) (all []mapping) {
	var m mapping
	ours := false
	for line := range strings.Lines(smaps) {
		fields := strings.Fields(line)
		var kind string
		var start, end uintptr
		if n, _ := fmt.Sscanf(line, "%x-%x %s", &start, &end, &kind); n == 3 {
			m = mapping{start, end}
			ours = len(fields) == 6 && fields[5] == file && kind[1] == '-' && kind[3] == 'p'
		} else if ours && len(fields) == 3 && fields[0] == "Anonymous:" && fields[1] == "0" {
			all = append(all, m)
		}
	}
	return all
}
