package nodecache

import (
	"context"
	"time"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/life"
)

// Abandon takes back what a start of CoreDNS has put on the node. It is for a main
// program whose caddy.Start has failed: CoreDNS calls no plugin then, and the process
// is about to end. When nothing has been started, or an exit has been under way, there
// is nothing left for it to do.
func Abandon() {
	if err := theNode.takeBack(); err != nil {
		log.Errorf("taking back what a start that failed has put on the node: %v", count(err))
	}
}

func (n *node) takeBack() error {
	return n.do(func() error {
		if n.life.Kind == life.Absent || !n.on(life.Exits, nil) {
			return nil
		}
		began := time.Now()
		n.ready.Store(false)
		ctx, cancel := context.WithTimeout(context.Background(), exitLeast)
		defer cancel()
		n.giveUp(ctx, n.want)
		if n.life.InForce != nil { // all that is ours has been listened on, and asked
			n.drain(n.life.InForce.listeners(), false, began.Add(drainLimit))
		}
		return n.inTurn(func() error {
			n.member.Hide()
			n.leaving, n.want = desired.State{}, desired.State{}
			// Another process may have come meanwhile.
			return n.takeOff(desired.State{}, n.heed(desired.State{}))
		})
	})
}
