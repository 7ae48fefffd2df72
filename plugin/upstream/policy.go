package upstream

import "math/rand/v2"

// Policies, by which the servers that do equally well are chosen from.
const (
	random     = "random"
	roundRobin = "round_robin"
	sequential = "sequential"
)

// first is the index of the server that begins, of n.
func (u *Upstream) first(turn, n int) int {
	switch u.opts.policy {
	case sequential:
		return 0
	case roundRobin:
		return turn % n
	}
	return rand.IntN(n) // #nosec G404 -- no secret
}
