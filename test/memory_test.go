package e2e

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"testing"
)

// What only the start has needed of the program is not resident any more once the cache is
// in place.
func TestIdleProcessIsSmall(t *testing.T) {
	n := newNode(t, nftables)
	p := n.serve(n.corefile())
	var resident int
	if !eventually(func() bool {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Pid))
		n.must(err)
		resident, err = strconv.Atoi(string(regexp.MustCompile(`VmRSS:\s+(\d+)`).FindSubmatch(status)[1]))
		n.must(err)
		return resident < 25<<10
	}) {
		t.Errorf("an idle process has %d KiB resident, want less than 25 MiB", resident)
	}
}
