package main

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// An event is something that happens to a cache while it is asked.
type event struct {
	name    string
	twins   int           // how many processes serve besides the one
	leaves  bool          // nobody serves afterwards, for a while or for good
	removes bool          // somebody else removes something
	after   time.Duration // how long it takes at least to see what comes of it
	skips   func(subject) bool
	happen  func(*site) error
}

var events = []event{
	{name: "reload", happen: func(s *site) error { return s.serving[0].Reload(s.corefile()) }},
	{name: "reload that fails: bad Corefile", happen: func(s *site) error { return s.refuses("{\n") }},
	{name: "reload that fails: port taken", happen: func(s *site) error {
		if err := s.hold(5300); err != nil {
			return err
		}
		return s.refuses(s.corefile() + strings.Replace(s.corefile(), ".:53 ", "other.lab:5300 ", 1))
	}},
	{name: "SIGTERM of one of two", twins: 1, happen: func(s *site) error { return s.end(syscall.SIGTERM) }},
	{name: "SIGKILL of one of two", twins: 1, happen: func(s *site) error { return s.end(syscall.SIGKILL) }},
	{name: "replacement, the new one first", happen: func(s *site) error {
		return errors.Join(s.start(), s.end(syscall.SIGTERM))
	}},
	{name: "replacement, the old one first", leaves: true, happen: func(s *site) error {
		return errors.Join(s.end(syscall.SIGTERM), s.start())
	}},
	{name: "SIGTERM of the only one", leaves: true, after: 4 * time.Second, happen: func(s *site) error { return s.end(syscall.SIGTERM) }},
	{name: "SIGKILL of the only one", leaves: true, after: 4 * time.Second, happen: func(s *site) error { return s.end(syscall.SIGKILL) }},
	{name: "link deleted", removes: true, happen: func(s *site) error { return s.runs("ip link del " + linkName) }},
	{name: "address deleted", removes: true, happen: func(s *site) error {
		return s.runs("ip addr del "+lab.ClusterIP.String()+"/32 dev "+linkName, "ip addr del "+lab.LinkLocal.String()+"/32 dev "+linkName)
	}},
	{name: "link renamed", removes: true, happen: func(s *site) error {
		// Linux before 6.2 renames only what is down, and the repair may be faster.
		for try := 1; ; try++ {
			err := s.runs("ip link set "+linkName+" down", "ip link set "+linkName+" name stolen")
			if err == nil || try == 10 || !strings.Contains(err.Error(), "busy") {
				return err
			}
		}
	}},
	{name: "rules flushed", removes: true, after: 3 * time.Second, happen: func(s *site) error {
		if s.firewall == "nftables" {
			return s.flushTable()
		}
		return s.runs("iptables -t raw -F", "ip6tables -t raw -F")
	}},
	{name: "chain flushed", removes: true, after: 3 * time.Second, happen: func(s *site) error {
		switch s.firewall {
		case "nftables":
			return s.flushTable(" prerouting")
		case "iptables":
			return s.runs("iptables -t raw -F NODECACHE-PREROUTING")
		}
		return s.runs("iptables -t raw -F PREROUTING")
	}},
	{name: "`nft flush ruleset`", removes: true, skips: func(s subject) bool { return s.iptables == lab.Legacy }, happen: func(s *site) error {
		return s.runs("nft flush ruleset")
	}},
}

func (s *site) refuses(corefile string) error {
	if err := s.serving[0].Reload(corefile); err == nil {
		return errors.New("reloading: that should have failed")
	}
	return nil
}

// flushTable tries to flush nodecache's own nftables table, or a chain of it. The
// kernel lets nobody but the owner do so.
func (s *site) flushTable(chain ...string) error {
	out, err := s.Node.Run("nft", "list", "tables")
	if err != nil {
		return err
	}
	for line := range strings.Lines(out) {
		table, ours := strings.CutPrefix(strings.TrimSpace(line), "table inet nodecache-")
		if !ours {
			continue
		}
		what := "table"
		if len(chain) > 0 {
			what = "chain"
		}
		if err := s.runs("nft flush " + what + " inet nodecache-" + table + strings.Join(chain, "")); err == nil {
			return fmt.Errorf("flushing the %s of another process: that should have failed", what)
		}
		return nil
	}
	return errors.New("looking for nodecache's table: there is none")
}
