package nodecache

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/outlive"
)

// watched is what the kernel tells of already.
type watched struct{ links, rules bool }

// watch begins, once, to have the kernel tell of changes that may concern us: of links
// and addresses, and where iptables-nft has our rules, of what it and nft do.
func (n *node) watch() {
	if !n.watching.links {
		n.watching.links = true
		go subscription{"links and addresses", n.reported, unix.NETLINK_ROUTE, []uint{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR}}.follow()
	}
	if t, ok := n.firewalls[backendIPT].(*iptables); ok && t.inNFTables() && !n.watching.rules {
		n.watching.rules = true
		go subscription{"nftables", n.ruleset, unix.NETLINK_NETFILTER, []uint{unix.NFNLGRP_NFTABLES}}.follow()
	}
}

// subscription pokes c at the kernel's reports of what. What a report says does not
// matter: a look costs less than to keep track.
type subscription struct {
	what     string
	c        chan struct{}
	protocol int
	groups   []uint
}

// A subscription that fails is tried again after these pauses.
const (
	resubscribeFirst = time.Second
	resubscribeMost  = time.Minute
)

// follow subscribes, again and again.
func (s subscription) follow() {
	pause := resubscribeFirst
	for {
		heard, err := s.hear()
		if heard {
			pause = resubscribeFirst
		}
		log.Warningf("%v; trying again in %s, and what somebody removes meanwhile comes back with the next sync", err, pause)
		time.Sleep(pause)
		pause = min(2*pause, resubscribeMost)
	}
}

// hear returns when the kernel can't be heard any more, and whether it could be.
func (s subscription) hear() (heard bool, err error) {
	sock, err := nl.Subscribe(s.protocol, s.groups...)
	if err != nil {
		return false, fmt.Errorf("subscribing to the kernel's reports of %s: %w", s.what, err)
	}
	defer sock.Close()
	poke(s.c) // nobody has listened until now
	// Of a burst all is gathered here, and the goroutine that looks is not held up.
	var gathering atomic.Bool
	for {
		_, _, err := sock.Receive()
		// ENOBUFS says that reports were lost, which calls for a look too.
		if err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
			return heard, fmt.Errorf("reading the kernel's reports of %s: %w", s.what, err)
		}
		heard = true
		if gathering.CompareAndSwap(false, true) {
			time.AfterFunc(burst, func() {
				gathering.Store(false)
				poke(s.c)
			})
		}
	}
}

// inNFTables tells whether rules of ours stand in iptables-nft's tables.
func (t *iptables) inNFTables() bool {
	for _, x := range t.families {
		if x.written && x.nft() {
			return true
		}
	}
	return false
}

// stands tells, without running a program, whether the chains and jumps of
// iptables-nft are as long as they were written, and the jumps where they were. It does not know of the legacy
// variant, whose changes nobody reports. Where nf_tables can't be asked, the next sync
// looks.
func (t *iptables) stands() (yes bool) {
	yes = true
	defer outlive.Panic("looking at the rules of iptables-nft")
	for f, x := range t.families {
		if !x.written || !x.nft() {
			continue
		}
		fam := nftables.TableFamilyIPv4
		if f == ipv6 {
			fam = nftables.TableFamilyIPv6
		}
		for _, h := range hooks {
			table := &nftables.Table{Name: h.table, Family: fam}
			own, err := nfLook.GetRules(table, &nftables.Chain{Name: h.chain})
			if errors.Is(err, unix.ENOENT) || err == nil && len(own) != x.length[h] {
				return false
			}
			from, err := nfLook.GetRules(table, &nftables.Chain{Name: h.builtin})
			if errors.Is(err, unix.ENOENT) || err == nil && jumpTo(from, h.chain) != x.before(h).at {
				return false
			}
		}
	}
	return true
}

// jumpTo returns which of the rules is the first that jumps to a chain; -1 is none.
func jumpTo(rules []*nftables.Rule, chain string) int {
	return slices.IndexFunc(rules, func(r *nftables.Rule) bool {
		return slices.ContainsFunc(r.Exprs, func(e expr.Any) bool {
			v, ok := e.(*expr.Verdict)
			return ok && v.Kind == expr.VerdictJump && v.Chain == chain
		})
	})
}
