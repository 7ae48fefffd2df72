package main

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// theCost prints what a new name costs with upstream and with forward: CPU and time, in turns, of
// which the best of three counts.
func theCost(program string) error {
	fmt.Printf("\nA new name, of 1,000 a second:\n\n| | | CPU | switches | median | 99 %% within |\n|-|-|----:|---------:|-------:|------------:|\n")
	for _, option := range []string{"force_tcp", "prefer_udp"} {
		plugins := []string{"forward", "upstream"}
		best := make([]cost, len(plugins))
		for range 3 {
			for i, p := range plugins {
				c, err := costOf(program, fmt.Sprintf(".:53 {\nbind %s\ncache\n%s . %s {\n%s\n}\n}\n", lab.LinkLocal, p, lab.DNSAddr, option))
				if err != nil {
					return fmt.Errorf("%s with %s: %w", p, option, err)
				}
				if best[i].cpu == 0 || c.cpu < best[i].cpu {
					best[i] = c
				}
			}
		}
		for i, p := range plugins {
			fmt.Printf("| `%s` | *%s* | %d µs | %.1f | %d µs | %d µs |\n", option, p, best[i].cpu.Microseconds(), best[i].switches, best[i].median.Microseconds(), best[i].most.Microseconds())
		}
	}
	return nil
}

type cost struct {
	cpu, median, most time.Duration
	switches          float64 // of threads, to sleep
}

func costOf(program, corefile string) (c cost, err error) {
	s, err := newSite(program, nodeCache)
	if err != nil {
		return c, err
	}
	defer s.close()
	if err := s.Node.Do(func() error { return lab.AddAddrs("lo", lab.LinkLocal.String()+"/32") }); err != nil {
		return c, err
	}
	p, err := s.Start(program, corefile, lab.Options{})
	if err != nil {
		return c, err
	}
	if err := p.WaitServing(); err != nil {
		return c, err
	}
	load := lab.Load{From: s.Pod, Proto: "udp", To: []netip.AddrPort{netip.AddrPortFrom(lab.LinkLocal, 53)}, Names: lab.Misses, Tag: "w", Count: 500, Rate: 1000, Workers: 16, Keep: true}
	if _, err := load.Run(); err != nil { // so that connections are open
		return c, err
	}
	load.Tag, load.Count = "c", 5000
	before, err := lab.CPUTime(p.Pid)
	if err != nil {
		return c, err
	}
	slept, err := lab.Switches(p.Pid)
	if err != nil {
		return c, err
	}
	r, err := load.Run()
	if err != nil {
		return c, err
	}
	after, err := lab.CPUTime(p.Pid)
	if err != nil {
		return c, err
	}
	awake, err := lab.Switches(p.Pid)
	if err == nil && r.Answered != load.Count {
		err = fmt.Errorf("%v", r)
	}
	return cost{(after - before) / time.Duration(load.Count), r.Latency(.5), r.Latency(.99), float64(awake-slept) / float64(load.Count)}, err
}
