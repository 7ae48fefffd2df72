package main

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// syncEvery is how often nodecache looks by itself while repairs are measured. What
// the kernel tells nobody (of iptables-legacy) comes back with that.
const syncEvery = time.Second

// repairs has others remove things, each so many times, and prints how long each took
// to be back.
func repairs(tries int, of []subject) error {
	fmt.Printf("| removed | cache | median | worst of %d |\n|---|---|--:|--:|\n", tries)
	var errs []error
	var mu sync.Mutex
	rows := map[string]string{}
	var wait sync.WaitGroup
	for _, s := range of {
		if s.firewall == "" || s.fastpath {
			continue // nobody repairs there, or nothing else
		}
		wait.Go(func() {
			for _, e := range events {
				if !e.removes || !e.chosen() || e.skips != nil && e.skips(s) {
					continue
				}
				row, err := repeatedly(e, s, tries)
				mu.Lock()
				rows[e.name+s.name] = row
				if err != nil {
					errs = append(errs, fmt.Errorf("%s with %s: %w", e.name, s.name, err))
				}
				mu.Unlock()
			}
		})
	}
	wait.Wait()
	for _, e := range events {
		for _, s := range of {
			fmt.Print(rows[e.name+s.name])
		}
	}
	fmt.Printf("\nFrom before the removal until nodecache says that all is back, without load, with `sync %s`.\n0: nothing was gone, since the kernel lets nobody else remove it.\n", syncEvery)
	return errors.Join(errs...)
}

func repeatedly(e event, of subject, tries int) (row string, err error) {
	l, err := lab.New(of.iptables)
	if err != nil {
		return "", err
	}
	s := &site{Lab: l, subject: of}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.start("nodecache {\n        firewall " + of.firewall + of.option() + "\n        sync " + syncEvery.String() + "\n    }"); err != nil {
		return "", err
	}
	kind := "dummy"
	if strings.Contains(s.serving[0].Log(), "TUN") {
		kind = "TUN"
	}
	// Once without a look, since a repair may put things in another order than a start.
	if err := e.happen(s); err != nil {
		return "", err
	}
	time.Sleep(2500 * time.Millisecond)
	was, err := s.Snapshot()
	if err != nil {
		return "", err
	}
	was = plainLabels(was)
	var took []time.Duration
	for range tries {
		mark, begun := s.serving[0].Mark(), time.Now()
		if err := e.happen(s); err != nil {
			return "", err
		}
		var d time.Duration
		said := func() bool { return strings.Contains(s.serving[0].Log()[mark:], putBackMark) }
		for {
			is, err := s.Snapshot()
			if err != nil {
				return "", err
			}
			if plainLabels(is) == was && !said() {
				if d == 0 {
					time.Sleep(50 * time.Millisecond) // what is back has to be said yet
				}
				if !said() {
					break // nothing was gone, or the last that was is back
				}
			}
			// Seen in the log, since to look at the whole node takes longer than a repair.
			if err := s.serving[0].WaitLog(mark, putBackMark); err != nil {
				return "", fmt.Errorf("%w; the node reads\n%s\nand before\n%s", err, is, was)
			}
			var at time.Time
			at, mark = s.serving[0].LoggedAt(mark, putBackMark)
			d = at.Sub(begun)
		}
		took = append(took, d)
		// More than one a second, for long, would be taken for a fight.
		time.Sleep(time.Until(begun.Add(2500 * time.Millisecond)))
	}
	slices.Sort(took)
	return fmt.Sprintf("| %s | %s, %s | %s | %s |\n", e.name, of.name, kind, short(took[len(took)/2]), short(took[len(took)-1])), nil
}

var inPlaceAfter = regexp.MustCompile(`in place after (\S+):`)

// rules starts processes with many addresses and prints how long they take to put them
// in place and to leave, and how many programs they run.
func rules(of []subject) error {
	const rounds = 5
	fmt.Println("| addresses | cache | in place after | programs run | left after | programs run |")
	fmt.Println("|--:|---|--:|--:|--:|--:|")
	for _, count := range []int{1, 50, 500} {
		for _, s := range of {
			if s.firewall == "" || s.fastpath {
				continue // no other rules
			}
			row, err := manyAddresses(count, s, rounds)
			if err != nil {
				return fmt.Errorf("%d addresses with %s: %w", count, s.name, err)
			}
			fmt.Println(row)
		}
	}
	fmt.Printf("\nThe median of %d starts, from before the first address until CoreDNS listens on all and the rules\nstand; the addresses are IPv4 and IPv6 in turn.\n", rounds)
	return nil
}

func manyAddresses(count int, of subject, rounds int) (row string, err error) {
	l, err := lab.New(of.iptables)
	if err != nil {
		return "", err
	}
	s := &site{Lab: l, subject: of}
	defer func() { err = errors.Join(err, s.close()) }()
	var bind []string
	for i := range count {
		if i%2 == 0 {
			bind = append(bind, fmt.Sprintf("10.96.%d.%d", 2+i/250, 1+i%250))
		} else {
			bind = append(bind, fmt.Sprintf("fd00:96::2:%x", i))
		}
	}
	calls, env, err := s.CountPrograms()
	if err != nil {
		return "", err
	}
	corefile := fmt.Sprintf(".:53 {\n    bind %s\n    errors\n    forward . %s\n    nodecache {\n        firewall %s\n    }\n}\n", strings.Join(bind, " "), lab.DNSAddr, of.firewall)
	var up, down []time.Duration
	var begin, end int
	for range rounds {
		p, err := s.Start(*binary, corefile, lab.Options{Env: env})
		if err != nil {
			return "", err
		}
		if err := p.WaitLog(0, "plugin/nodecache: in place"); err != nil {
			return "", fmt.Errorf("%w; its log:\n%s", err, p.Log())
		}
		d, err := time.ParseDuration(inPlaceAfter.FindStringSubmatch(p.Log())[1])
		if err != nil {
			return "", err
		}
		up = append(up, d)
		if begin, err = calls(); err != nil {
			return "", err
		}
		begun := time.Now()
		if _, err := p.Stop(syscall.SIGTERM); err != nil {
			return "", err
		}
		down = append(down, time.Since(begun))
		if end, err = calls(); err != nil {
			return "", err
		}
	}
	slices.Sort(up)
	slices.Sort(down)
	return fmt.Sprintf("| %d | %s | %s | %d | %s | %d |", count, of.name, short(up[rounds/2]), begin, short(down[rounds/2]), end), nil
}
