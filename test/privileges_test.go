package e2e

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
)

// privileged starts the rest of its arguments as root with exactly these capabilities,
// as a container runtime does: they are all that this root can ever have.
func privileged(caps ...string) []string {
	bounding := "-all"
	for _, c := range slices.Sorted(slices.Values(caps)) {
		bounding += ",+" + strings.ToLower(c)
	}
	return []string{"setpriv", "--no-new-privs", "--inh-caps=-all", "--bounding-set=" + bounding}
}

// capabilityBits are those that can be needed (linux/capability.h).
var capabilityBits = map[string]int{"NET_BIND_SERVICE": 10, "NET_ADMIN": 12, "NET_RAW": 13}

// capSets is what a process can do, now and ever, one name after the other.
func capSets(n *node, pid int) string {
	n.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	n.must(err)
	sets := regexp.MustCompile(`Cap(?:Prm|Eff|Bnd):\s+([0-9a-f]+)`).FindAllStringSubmatch(string(status), -1)
	if len(sets) != 3 || sets[0][1] != sets[1][1] || sets[1][1] != sets[2][1] {
		n.Errorf("permitted, effective and possible capabilities differ: %v", sets)
	}
	var bits uint64
	_, err = fmt.Sscanf(sets[0][1], "%x", &bits)
	n.must(err)
	var names []string
	for name, bit := range capabilityBits {
		if bits&(1<<bit) != 0 {
			names = append(names, name)
			bits &^= 1 << bit
		}
	}
	if bits != 0 {
		n.Errorf("has further capabilities: %x", bits)
	}
	slices.Sort(names)
	return strings.Join(names, ",")
}
