package fastpath

import "runtime"

// Each query is answered by a goroutine of its own, which calls through all plugins of
// a server block. Go begins it with a small stack, and copies that to a larger one once
// or twice on the way down: with a few plugins more than a fifth of what a cached
// answer costs. Since 1.19 Go begins stacks at the size that those of all goroutines
// have in use on average, rounded up to a power of two (gcComputeStartingStackSize in
// runtime/stack.go), but the few that idle, with little on their stacks, outnumber
// those that answer. So some more idle here, with as much as answering takes.

const (
	deepStacks = 16
	deepStack  = 12 << 10 // bytes
)

// GrowStacks has new goroutines begin with the stack that they will need, from the next
// garbage collection on. It takes 256 KiB.
func GrowStacks() {
	for range deepStacks {
		go idleDeep()
	}
}

//go:noinline
func idleDeep() {
	var room [deepStack]byte
	var never chan byte
	room[0] = <-never
	runtime.KeepAlive(&room)
}
