package shield

import (
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/cache"
)

func init() { plugin.Register(name, setup) }

// settings are what a server block has asked for.
type settings struct {
	shortest, longest time.Duration // of a pause after a failure
	keepDenials       time.Duration // 0: not
	entries           int
	keep              []uint16 // EDNS options that go on to upstreams
}

// The bounds of RFC 9520 section 3.2.
const (
	leastPause = time.Second
	mostPause  = 5 * time.Minute
)

const (
	mostDenials = 7 * 24 * time.Hour // RFC 8767 section 5: days at most
	mostEntries = 1 << 20
)

func setup(c *caddy.Controller) error {
	s, err := parse(c)
	if err != nil {
		return plugin.Error(name, err)
	}
	config := dnsserver.GetConfig(c)
	// The directive stands right after cache, so the last plugin so far is cache.
	n := len(config.Plugin)
	if n == 0 {
		return plugin.Error(name, noCache(c))
	}
	if _, ok := config.Plugin[n-1](nil).(*cache.Cache); !ok {
		return plugin.Error(name, noCache(c))
	}
	m := newMemory(s)
	config.Plugin = slices.Insert(config.Plugin, n-1, plugin.Plugin(func(next plugin.Handler) plugin.Handler { return &Front{next, m} }))
	config.AddPlugin(func(next plugin.Handler) plugin.Handler { return back{next, m} })
	return nil
}

func noCache(c *caddy.Controller) error {
	return c.Err("needs the plugin cache in the same server block, and in the build's plugin.cfg the place right after it")
}

func parse(c *caddy.Controller) (settings, error) {
	s := settings{shortest: time.Second, longest: 30 * time.Second, keepDenials: time.Hour, entries: 5000}
	for first := true; c.Next(); first = false {
		if !first {
			return s, plugin.ErrOnce
		}
		if len(c.RemainingArgs()) > 0 {
			return s, c.ArgErr()
		}
		seen := map[string]bool{}
		for c.NextBlock() {
			property := c.Val()
			if seen[property] {
				return s, c.Errf("%s is there twice", property)
			}
			seen[property] = true
			args := c.RemainingArgs()
			if len(args) == 0 {
				return s, c.ArgErr()
			}
			if err := s.read(property, args); err != nil {
				return s, c.Errf("%s: %v", property, err)
			}
		}
	}
	return s, nil
}

// read takes over one property.
func (s *settings) read(property string, args []string) (err error) {
	most := map[string]int{"failures": 2, "denials": 1, "entries": 1, "options": 64}[property]
	switch {
	case most == 0:
		return fmt.Errorf("no such property; there are failures, denials, entries and options")
	case len(args) > most:
		return fmt.Errorf("too many arguments: %q", args)
	}
	switch property {
	case "failures":
		if s.shortest, err = readDuration(args[0], leastPause, mostPause); err != nil {
			return err
		}
		s.longest = max(s.shortest, s.longest)
		if len(args) > 1 {
			s.longest, err = readDuration(args[1], s.shortest, mostPause)
		}
	case "denials":
		s.keepDenials, err = readDuration(args[0], 0, mostDenials)
	case "entries":
		if s.entries, err = strconv.Atoi(args[0]); err != nil || s.entries < 1 || s.entries > mostEntries {
			return fmt.Errorf("%q is no number from 1 to %d", args[0], mostEntries)
		}
	case "options":
		for _, a := range args {
			code, err := strconv.ParseUint(a, 0, 16)
			if err != nil {
				return fmt.Errorf("%q is no code of an EDNS option, 0 to 65535", a)
			}
			s.keep = append(s.keep, uint16(code))
		}
	}
	return err
}

func readDuration(text string, least, most time.Duration) (time.Duration, error) {
	d, err := time.ParseDuration(text)
	if err != nil || d < least || d > most {
		return 0, fmt.Errorf("%q is no duration from %v to %v", text, least, most)
	}
	return d, nil
}
