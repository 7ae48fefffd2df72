package lab

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
)

// Overflows says how many datagrams the node's sockets have had no room for.
func (l *Lab) Overflows() (int, error) {
	total := 0
	err := l.Node.Do(func() error {
		// Not /proc/net: that is the main thread's namespace.
		v4, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err != nil {
			return err
		}
		v6, err := os.ReadFile("/proc/thread-self/net/snmp6")
		if err != nil {
			return err
		}
		var column int
		for line := range strings.Lines(string(v4)) {
			words := strings.Fields(line)
			if words[0] != "Udp:" {
				continue
			}
			if i := slices.Index(words, "RcvbufErrors"); i > 0 {
				column = i
			} else if n, err := strconv.Atoi(words[column]); err == nil {
				total += n
			}
		}
		for line := range strings.Lines(string(v6)) {
			if words := strings.Fields(line); words[0] == "Udp6RcvbufErrors" {
				n, _ := strconv.Atoi(words[1])
				total += n
			}
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("reading the node's counters: %w", err)
	}
	return total, nil
}
