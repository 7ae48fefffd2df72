package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

var (
	clusterIPs  = []netip.Addr{lab.ClusterIP, lab.ClusterIP6}
	nodesOwn    = []netip.Addr{lab.LinkLocal, lab.Local6}
	all         = append(append([]netip.Addr{}, clusterIPs...), nodesOwn...)
	putBackMark = "put back what another program had removed"
)

const linkName = "nodelocaldns"

// A site is a node with a cache of a subject.
type site struct {
	*lab.Lab
	subject
	serving []*lab.CoreDNS
	every   []*lab.CoreDNS
	held    []int // sockets that take ports
	// outranked is what a cache is started by so as not to go before what computes.
	outranked []string
}

func (s *site) corefile(directive ...string) string {
	var bind []string
	for _, a := range all {
		bind = append(bind, a.String())
	}
	lines := append([]string{"bind " + strings.Join(bind, " "), "errors", "cache 30", "forward . " + lab.DNSAddr.String()}, directive...)
	if s.firewall != "" && len(directive) == 0 {
		lines = append(lines, "nodecache {\n        firewall "+s.firewall+s.option()+"\n    }")
	}
	return ".:53 {\n    " + strings.Join(lines, "\n    ") + "\n}\n"
}

// option is the line of the option fastpath, where the subject has it.
func (s subject) option() string {
	if s.fastpath {
		return "\n        fastpath"
	}
	return ""
}

// start starts one more process, and waits until it serves. directive may be given in
// place of the subject's own.
func (s *site) start(directive ...string) error {
	p, err := s.Start(*binary, s.corefile(directive...), lab.Options{Via: s.outranked})
	if err != nil {
		return err
	}
	s.every = append(s.every, p)
	if err := p.WaitServing(); err != nil {
		return fmt.Errorf("%w; its log:\n%s", err, p.Log())
	}
	if s.firewall != "" {
		if err := p.WaitLog(0, "plugin/nodecache: in place"); err != nil {
			return err
		}
	}
	s.serving = append(s.serving, p)
	return nil
}

// end ends the process that has served longest.
func (s *site) end(with syscall.Signal) error {
	p := s.serving[0]
	s.serving = s.serving[1:]
	_, err := p.Stop(with)
	return err
}

// runs runs commands on the node.
func (s *site) runs(commands ...string) error {
	for _, c := range commands {
		words := strings.Fields(c)
		if _, err := s.Node.Run(words[0], words[1:]...); err != nil {
			return err
		}
	}
	return nil
}

// static makes what plain CoreDNS needs, as the published designs with two DaemonSets
// have it made once on each node.
func (s *site) static() error {
	if s.firewall != "" {
		return nil
	}
	if s.runs("ip link add "+linkName+" type dummy") != nil {
		if err := s.runs("ip tuntap add " + linkName + " mode tun"); err != nil {
			return err
		}
	}
	if err := s.runs("ip link set " + linkName + " up"); err != nil {
		return err
	}
	for _, a := range all {
		ipt, bits, flags := "iptables", "/32", ""
		if a.Is6() {
			ipt, bits, flags = "ip6tables", "/128", " nodad"
		}
		if err := s.runs("ip addr add " + a.String() + bits + " dev " + linkName + flags); err != nil {
			return err
		}
		for _, proto := range []string{"udp", "tcp"} {
			for _, rule := range []string{
				"-t raw -A PREROUTING -d %s -p %s --dport 53 -j NOTRACK",
				"-t raw -A OUTPUT -d %s -p %s --dport 53 -j NOTRACK",
				"-t raw -A OUTPUT -s %s -p %s --sport 53 -j NOTRACK",
				"-A INPUT -d %s -p %s --dport 53 -j ACCEPT",
				"-A OUTPUT -s %s -p %s --sport 53 -j ACCEPT",
			} {
				if err := s.runs(ipt + " " + fmt.Sprintf(rule, a, proto)); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// warm waits until the cluster answers everybody. In a node that is a second old
// neighbours on the way may not have found each other yet.
func (s *site) warm() error {
	var to []netip.AddrPort
	for _, a := range clusterIPs {
		to = append(to, netip.AddrPortFrom(a, 53))
	}
	for _, from := range []*lab.Namespace{s.Pod, s.Node} {
		for late := time.Now().Add(lab.Patience); ; {
			r, err := lab.Load{From: from, Proto: "udp", To: to, Count: 4, Timeout: 200 * time.Millisecond}.Run()
			if err != nil {
				return err
			}
			if r.AllAnswered(true) {
				break
			}
			if time.Now().After(late) {
				return fmt.Errorf("waiting for the cluster's answers: not within %v", lab.Patience)
			}
		}
	}
	return s.FlushConntrack()
}

// hold takes a port on all of the node's addresses.
func (s *site) hold(port int) error {
	return s.Node.Do(func() error {
		fd, err := syscall.Socket(syscall.AF_INET6, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		s.held = append(s.held, fd)
		return syscall.Bind(fd, &syscall.SockaddrInet6{Port: port})
	})
}

func (s *site) close() error {
	for _, fd := range s.held {
		syscall.Close(fd)
	}
	return s.Lab.Close()
}

// A tally is what became of the queries to one kind of address.
type tally struct{ lab.FlowResult }

// rank is by how much this process goes before what computes, and before the cache, so
// that it keeps up with asking and answering.
const rank = 10

// compute has two programs a CPU compute until stop is called.
func (s *site) compute() (stop func() error, err error) {
	var programs []*exec.Cmd
	stop = func() error {
		for _, p := range programs {
			p.Process.Kill()
			p.Wait()
		}
		return prefer(0)
	}
	for range 2 * runtime.NumCPU() {
		p := exec.Command("sh", "-c", "while :; do :; done")
		if err := p.Start(); err != nil {
			return nil, errors.Join(fmt.Errorf("keeping the CPUs busy: %w", err), stop())
		}
		programs = append(programs, p)
	}
	if err := prefer(rank); err != nil {
		return nil, errors.Join(err, stop())
	}
	s.outranked = []string{"nice", "-n", strconv.Itoa(rank)}
	return stop, nil
}

// prefer has all threads of this process go before others, by so many steps of nice(1).
func prefer(by int) error {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	for _, t := range threads { // those that they start inherit it
		tid, err := strconv.Atoi(t.Name())
		if err != nil {
			return err
		}
		if err := unix.Setpriority(unix.PRIO_PROCESS, tid, -by); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("going before what computes: %w", err)
		}
	}
	return nil
}

// measure has the event happen to the subject and returns a row of the table.
func measure(e event, of subject) (row string, err error) {
	l, err := lab.New(of.iptables)
	if err != nil {
		return "", err
	}
	s := &site{Lab: l, subject: of}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.warm(); err != nil {
		return "", err
	}
	if err := s.static(); err != nil {
		return "", err
	}
	for range 1 + e.twins {
		if err := s.start(); err != nil {
			return "", err
		}
	}
	was, err := s.Snapshot()
	if err != nil {
		return "", err
	}
	if of.busy {
		stop, err := s.compute()
		if err != nil {
			return "", err
		}
		defer func() { err = errors.Join(err, stop()) }()
	}
	t, err := s.ask()
	if err != nil {
		return "", err
	}
	// As many slow queries have to be out as there are all the time.
	time.Sleep(lab.SlowFor + 200*time.Millisecond)
	marks := map[*lab.CoreDNS]int{}
	for _, p := range s.every {
		marks[p] = p.Mark()
	}
	full, err := s.Overflows()
	if err != nil {
		return "", err
	}
	begun := time.Now()
	if err := e.happen(s); err != nil {
		return "", err
	}
	repaired := time.Duration(-1)
	if e.removes && of.firewall != "" {
		repaired = s.putBack(marks, begun)
	}
	window := max(*after, e.after)
	if d := time.Until(begun.Add(window)); d > *after/2 {
		time.Sleep(d)
	} else {
		time.Sleep(*after / 2)
	}
	entries, err := s.Conntrack(all...)
	if err != nil {
		return "", err
	}
	ended := time.Now()
	sent, err := t.stop()
	if err != nil {
		return "", err
	}
	fuller, err := s.Overflows()
	if err != nil {
		return "", err
	}
	is := was
	if e.removes {
		if is, err = s.Snapshot(); err != nil {
			return "", err
		}
	}
	extra, note := "", ""
	if e.leaves {
		extra, note = fmt.Sprintf(" +%d²", t.kept.Bad()), "¹"
	} else {
		t.host.Add(&t.kept.FlowResult)
	}
	row = fmt.Sprintf("| %s | %s | %d", e.name, of.name, sent)
	for _, y := range []*tally{&t.pod, &t.host, &t.own} {
		whole := ""
		switch bad := y.Bad(); {
		case bad > 0 && ended.Sub(y.LastBad) < 200*time.Millisecond, e.removes && plainLabels(is) != plainLabels(was):
			whole = "> " + short(ended.Sub(begun).Round(time.Second))
		case repaired >= 0:
			whole = short(max(repaired, y.LastBad.Sub(begun)))
		case bad == 0:
			whole = "at once"
		case y.LastBad.IsZero():
			whole = "TCP only"
		default:
			whole = short(max(0, y.LastBad.Sub(begun)))
		}
		mark, more := "", ""
		switch y {
		case &t.own:
			mark = note
		case &t.host:
			more = extra
		}
		row += fmt.Sprintf(" | %d / %d%s%s | %s%s | %s%s", y.Lost+y.Wrong, y.Refused, more, mark, short(y.Gap), mark, whole, mark)
	}
	row += fmt.Sprintf(" | %d | %d |", entries, fuller-full)
	if *verbose {
		for _, why := range slices.Concat(t.pod.Errors, t.host.Errors, t.kept.Errors, t.own.Errors) {
			fmt.Fprintf(os.Stderr, "%s, %s: %s\n", e.name, of.name, why)
		}
		for _, p := range s.every {
			fmt.Fprintf(os.Stderr, "%s, %s: process %d said:\n%s\n", e.name, of.name, p.Pid, p.Log())
		}
	}
	return row, nil
}

// plainLabels leaves out what the kernel adds to an address's label when its link is
// renamed.
func plainLabels(snapshot string) string {
	for i := range 10 {
		snapshot = strings.ReplaceAll(snapshot, fmt.Sprintf(" %s:%d ", linkName, i), " "+linkName+" ")
	}
	return snapshot
}

func short(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

// putBack waits until a process says that it has repaired something, and returns how
// long after the event that was; 0 if there was nothing to repair.
func (s *site) putBack(marks map[*lab.CoreDNS]int, begun time.Time) time.Duration {
	for time.Since(begun) < *after {
		for _, p := range s.serving {
			if strings.Contains(p.Log()[marks[p]:], putBackMark) {
				return time.Since(begun)
			}
		}
		time.Sleep(2 * time.Millisecond)
	}
	return 0
}

// questions is all that is being asked.
type questions struct {
	udp            map[*lab.Flowing]*tally
	tcp            map[*lab.Running]*tally
	pod, host, own tally
	kept           tally // of host, over kept sockets
}

// ask begins to ask.
func (s *site) ask() (*questions, error) {
	q := &questions{udp: map[*lab.Flowing]*tally{}, tcp: map[*lab.Running]*tally{}}
	// 5 % over TCP; the rest in eight kinds.
	const tcp = 20
	for i, from := range []*lab.Namespace{s.Pod, s.Node} {
		for j, to := range [][]netip.Addr{clusterIPs, nodesOwn} {
			for _, sockets := range []int{0, 32} {
				y := &q.own
				switch {
				case j == 0 && i == 0:
					y = &q.pod
				case j == 0:
					y = &q.host
				}
				tag := fmt.Sprintf("-%d-%d-%d", i, j, sockets)
				f, err := lab.Flow{From: from, To: to, Rate: max(1, *rate*(tcp-1)/tcp/8), Sockets: sockets, Misses: 48, Slow: 2, Tag: tag}.Start()
				if err != nil {
					return nil, err
				}
				q.udp[f] = y
				if y == &q.host && sockets > 0 {
					q.udp[f] = &q.kept
				}
				var ports []netip.AddrPort
				for _, a := range to {
					ports = append(ports, netip.AddrPortFrom(a, 53))
				}
				r, err := lab.Load{From: from, Proto: "tcp", To: ports, Tag: tag, Rate: max(1, *rate/tcp/8), Workers: 4, Keep: sockets > 0, Count: 1 << 30}.Start()
				if err != nil {
					return nil, err
				}
				q.tcp[r] = y
			}
		}
	}
	return q, nil
}

// stop stops asking, waits for the answers, and returns how many queries were sent.
func (q *questions) stop() (sent int, err error) {
	stopped := make(chan error)
	for r := range q.tcp {
		go func() {
			_, err := r.Stop()
			stopped <- err
		}()
	}
	for f := range q.udp {
		go func() {
			_, err := f.Stop()
			stopped <- err
		}()
	}
	for range len(q.tcp) + len(q.udp) {
		err = errors.Join(err, <-stopped)
	}
	if err != nil {
		return 0, err
	}
	for f, y := range q.udp {
		byAddr, _ := f.Stop()
		for _, r := range byAddr {
			y.Add(r)
		}
	}
	for r, y := range q.tcp {
		result, _ := r.Stop()
		y.Sent += result.Sent
		y.Lost += result.Lost
		y.Wrong += result.Wrong
		y.Refused += result.Refused
	}
	return q.pod.Sent + q.host.Sent + q.kept.Sent + q.own.Sent, nil
}
