package peers

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// lockNames are the sockets that give a process its turn. Release 0.1.0 knows the first
// one only. The others are for when a process of another user has that one.
var lockNames = []string{
	"@nodecache/lock", "@nodecache/lock/1", "@nodecache/lock/2", "@nodecache/lock/3",
	"@nodecache/lock/4", "@nodecache/lock/5", "@nodecache/lock/6", "@nodecache/lock/7",
}

const (
	// TurnLimit is how long to wait for the others to finish a change.
	TurnLimit = 10 * time.Second
	turnPoll  = 2 * time.Millisecond
	// turnPollMost is what turnPoll grows to: each look lists the sockets of the node.
	turnPollMost = 20 * time.Millisecond
)

var lockSockets = socketKind{unix.SOCK_STREAM, 1 << unix.BPF_TCP_LISTEN, func(name string) bool { return slices.Contains(lockNames, name) }}

// Turn waits, within a time, until no other process is changing the node's link or rules,
// and returns what ends this process's turn. The kernel ends that of one that dies.
//
// Who listens on any of the names has the turn, or is about to look whether it has: it has
// if it then sees no other that counts. So never do two: whoever of them came to listen
// later sees the other. Of those who see each other the one with a name further down gives
// back and waits, and the one with the first name keeps it and waits only for who had a
// turn before: so there is always one whose turn comes. As long as somebody is seen, nobody
// else begins to listen. What strangers hold is passed over, and not even connected to.
func Turn(ctx context.Context, within time.Duration) (end func(), err error) {
	deadline := time.Now().Add(within)
	mine := -1 // the name that l listens on
	var l net.Listener
	end = func() {
		if l != nil {
			l.Close()
		}
	}
	for wait := turnPoll; ; wait = min(2*wait, turnPollMost) {
		held, err := heldLocks(mine)
		if err == nil && len(held) == 0 && mine < 0 {
			// Looked at again, now that the others see it.
			if mine, l, err = takeLock(); err == nil {
				held, err = heldLocks(mine)
			}
		}
		switch {
		case err != nil:
			end()
			return nil, fmt.Errorf("waiting for other processes that change the node: %w", err)
		case len(held) == 0:
			if mine < 0 {
				log.Warningf("other programs hold all unix sockets from %s to %s; going on without waiting for other nodecache processes", lockNames[0], lockNames[len(lockNames)-1])
			}
			return end, nil
		case mine >= 0 && held[0] < mine:
			end()
			mine, l = -1, nil
		}
		if time.Now().After(deadline) {
			// Better to go on than to leave the node without its cache.
			if within > 0 { // else an exit that has waited, and said so, before
				log.Warningf("another nodecache process has been changing the node for %s; going on without waiting for it", within.Round(time.Millisecond))
			}
			return end, nil
		}
		select {
		case <-ctx.Done():
			end()
			return nil, fmt.Errorf("waiting for other processes that change the node: %w", ctx.Err())
		case <-time.After(wait):
		}
	}
}

// heldLocks returns, in order, which of the lock's names other processes that count listen on.
func heldLocks(mine int) (held []int, err error) {
	list, err := listSockets(lockSockets)
	if err != nil {
		return nil, err
	}
	for _, s := range list.trusted {
		// Where connecting has to tell whose it is, a stranger's queue is soon full: ours
		// is not in so short a time.
		if i := slices.Index(lockNames, s.name); i != mine && s.whose {
			held = append(held, i)
		}
	}
	slices.Sort(held)
	return held, nil
}

// takeLock listens on the first name that is free, or returns -1.
func takeLock() (int, net.Listener, error) {
	for i, name := range lockNames {
		l, err := net.Listen("unix", name)
		if err == nil {
			return i, l, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return -1, nil, fmt.Errorf("listening on the unix socket %s: %w", name, err)
		}
	}
	return -1, nil, nil
}
