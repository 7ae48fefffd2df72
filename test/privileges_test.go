package e2e

import (
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
