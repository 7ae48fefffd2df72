package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// number is an environment variable, or a default.
func number(variable string, otherwise int) int {
	if v, err := strconv.Atoi(os.Getenv(variable)); err == nil {
		return v
	}
	return otherwise
}

// However up to four processes with either backend come and go, at the end all is in
// place if one of them serves, and nothing is left when the last one has left as told.
// LAB_SCHEDULES says how many schedules there are. A schedule depends on its seed
// alone, except for what the machine's timing adds: LAB_SEED=N LAB_SCHEDULES=1
// repeats that of the subtest N.
func TestRandomSchedules(t *testing.T) {
	seed := number("LAB_SEED", int(time.Now().UnixNano()%1e9))
	for i := range number("LAB_SCHEDULES", scale(15)) {
		t.Run(strconv.Itoa(seed+i), func(t *testing.T) {
			random := rand.New(rand.NewPCG(uint64(seed+i), 0))
			n := newNode(t, backend{[]lab.Iptables{lab.NFT, lab.Legacy}[random.IntN(2)], ""})
			s := &schedule{node: n, random: random, before: n.snapshot()}
			s.run()
			if t.Failed() {
				t.Logf("on iptables-%s, the schedule was:\n%s", n.backend.iptables, strings.Join(s.said, "\n"))
			}
		})
	}
}

type schedule struct {
	*node
	random *rand.Rand
	before string
	slots  [4]*process
	begun  time.Time
	all    []*process
	said   []string
}

func (s *schedule) say(format string, args ...any) {
	s.said = append(s.said, fmt.Sprintf("%6d ms  ", time.Since(s.begun).Milliseconds())+fmt.Sprintf(format, args...))
}

func (s *schedule) run() {
	s.begun = time.Now()
	for range 6 + s.random.IntN(10) {
		i := s.random.IntN(len(s.slots))
		wait := s.random.IntN(2) == 0
		switch p := s.slots[i]; {
		case p == nil:
			fw := []string{"iptables", "nftables"}[s.random.IntN(2)]
			of := &node{Lab: s.Lab, T: s.T, backend: backend{s.backend.iptables, fw}}
			s.say("start %d with %s, wait %v", i, fw, wait)
			p = of.launch(of.corefile(), lab.Options{})
			s.slots[i] = p
			s.all = append(s.all, p)
			if wait {
				s.up(p)
			}
		case s.random.IntN(5) < 3:
			s.say("SIGTERM of %d, wait %v", i, wait)
			s.must(p.Signal(syscall.SIGTERM))
			s.slots[i] = nil
			if wait {
				s.gone(p)
			}
		default:
			s.say("SIGKILL of %d", i)
			p.Kill()
			s.slots[i] = nil
		}
		// A part of the schedule: what follows at once, and what after a while.
		time.Sleep(time.Duration(s.random.IntN(4)*s.random.IntN(100)) * time.Millisecond)
	}
	left := s.settle()
	s.say("the end, %d processes serve", left)
	if left == 0 {
		// Maybe the last was killed, and has left everything. The next one takes it over.
		of := &node{Lab: s.Lab, T: s.T, backend: backend{s.backend.iptables, []string{"iptables", "nftables"}[s.random.IntN(2)]}}
		s.say("start 0 with %s", of.backend.firewall)
		s.slots[0] = of.launch(of.corefile(), lab.Options{})
		s.settle()
	}
	s.inPlace()
	together := s.random.IntN(2) == 0
	for i, p := range s.slots {
		if p != nil {
			s.say("SIGTERM of %d, wait %v", i, !together)
			s.must(p.Signal(syscall.SIGTERM))
			if !together {
				s.gone(p)
			}
		}
	}
	for _, p := range s.slots {
		if p != nil {
			s.gone(p)
		}
	}
	s.same("after the last one has left", s.before, s.snapshot())
}

// up waits until the process serves with all in place.
func (s *schedule) up(p *process) {
	s.Helper()
	s.must(p.WaitServing())
	s.must(p.WaitLog(0, inPlace))
}

func (s *schedule) gone(p *process) {
	s.Helper()
	_, err := p.Wait()
	s.must(err)
}

// settle waits for everything that is under way and returns how many serve.
func (s *schedule) settle() (serving int) {
	s.Helper()
	stays := map[*process]bool{}
	for _, p := range s.slots {
		if p != nil {
			stays[p] = true
			serving++
			s.up(p)
		}
	}
	for _, p := range s.all {
		if !stays[p] {
			s.gone(p)
		}
	}
	return serving
}

func (s *schedule) inPlace() {
	s.Helper()
	out, err := s.Node.Run("ip", "addr", "show", "dev", "nodelocaldns")
	s.must(err)
	for _, a := range addrs {
		if !strings.Contains(out, " "+a.String()+"/") {
			s.Errorf("one process serves, and %v is not there:\n%s", a, out)
		}
	}
	s.answersEverybody(false, addrs...)
	s.must(s.FlushConntrack())
	s.answersEverybody(false, addrs...)
	s.untracked()
}
