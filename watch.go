package nodecache

import (
	"errors"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// watch begins, once, to have the kernel tell of changes that may concern us:
// of links and addresses, and of what iptables-nft and nft do.
func (n *node) watch() {
	if n.watching {
		return
	}
	n.watching = true
	subscribe("links and addresses", n.reported, unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR)
	subscribe("nftables", n.ruleset, unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES)
}

// subscribe pokes c at each of the kernel's reports. What a report says does not
// matter: a look costs less than to keep track.
func subscribe(what string, c chan struct{}, protocol int, groups ...uint) {
	s, err := nl.Subscribe(protocol, groups...)
	if err != nil {
		log.Warningf("subscribing to the kernel's reports of %s: %v; what somebody removes comes back with the next sync", what, err)
		return
	}
	go func() {
		for {
			_, _, err := s.Receive()
			// ENOBUFS says that reports were lost, which calls for a look too.
			if err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
				log.Warningf("reading the kernel's reports of %s: %v; what somebody removes comes back with the next sync", what, err)
				return
			}
			poke(c)
		}
	}()
}

// stands tells, without running a program, whether the chains and jumps of
// iptables-nft are as long as they were written. It does not know of the legacy
// variant, whose changes nobody reports.
func (t *iptables) stands() bool {
	for f, x := range t.families {
		if !x.written || !x.nft() {
			continue
		}
		conn, err := nftables.New()
		if err != nil {
			return true // no nf_tables to ask; the next sync looks
		}
		fam := nftables.TableFamilyIPv4
		if f == ipv6 {
			fam = nftables.TableFamilyIPv6
		}
		for _, h := range hooks {
			table := &nftables.Table{Name: h.table, Family: fam}
			own, err := conn.GetRules(table, &nftables.Chain{Name: h.chain})
			if errors.Is(err, unix.ENOENT) || err == nil && len(own) != x.length[h] {
				return false
			}
			from, err := conn.GetRules(table, &nftables.Chain{Name: h.builtin})
			if errors.Is(err, unix.ENOENT) || err == nil && !jumpsTo(from, h.chain) {
				return false
			}
		}
	}
	return true
}

func jumpsTo(rules []*nftables.Rule, chain string) bool {
	for _, r := range rules {
		for _, e := range r.Exprs {
			if v, ok := e.(*expr.Verdict); ok && v.Kind == expr.VerdictJump && v.Chain == chain {
				return true
			}
		}
	}
	return false
}
