package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netns"
)

// Patience is how long to wait for what must come. It is not a measure of how fast it
// has to come: an emulated machine is 30 times slower.
const Patience = 60 * time.Second

// ErrExited says that a process ended before it did what was waited for.
var ErrExited = errors.New("the process has exited")

// A CoreDNS is a CoreDNS process on the node.
type CoreDNS struct {
	Corefile string // the path of its configuration
	Pid      int

	node   *Namespace
	log    log
	exited chan struct{}
	state  *os.ProcessState // when exited
}

// Options are what can differ between processes.
type Options struct {
	Env   []string          // further environment variables; the last one wins
	Via   []string          // a command that starts the rest of its arguments, such as setpriv
	Files map[string]string // what stands beside the Corefile, by the path from there
}

// Start starts a binary with a configuration, and does not wait for it to serve.
func (l *Lab) Start(binary, corefile string, o Options) (*CoreDNS, error) {
	dir, err := os.MkdirTemp(l.Dir, "coredns")
	if err != nil {
		return nil, err
	}
	p := l.process()
	p.Corefile = filepath.Join(dir, "Corefile")
	if err := p.Configure(corefile); err != nil {
		return nil, err
	}
	for name, text := range o.Files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, err
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	words := append(append([]string{}, o.Via...), binary, "-conf", p.Corefile)
	if err := l.start(p, dir, o.Env, words...); err != nil {
		return nil, err
	}
	return p, nil
}

// StartProgram starts another program on the node, which ends with the lab.
func (l *Lab) StartProgram(words ...string) (*CoreDNS, error) {
	p := l.process()
	if err := l.start(p, l.Dir, nil, words...); err != nil {
		return nil, err
	}
	return p, nil
}

func (l *Lab) process() *CoreDNS {
	p := &CoreDNS{exited: make(chan struct{}), node: l.Node}
	p.log.changed = make(chan struct{})
	return p
}

func (l *Lab) start(p *CoreDNS, dir string, env []string, words ...string) error {
	cmd := l.Node.command(words[0], words[1:]...)
	cmd.Dir = dir
	cmd.Env = append(append([]string{}, l.Env...), env...)
	cmd.Stdout, cmd.Stderr = &p.log, &p.log

	started := make(chan error, 1)
	go func() {
		// The process dies with this thread, and so with this program.
		runtime.LockOSThread()
		if err := netns.Set(l.Node.handle); err != nil {
			started <- err
			return
		}
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		started <- nil
		var exit *exec.ExitError
		if err := cmd.Wait(); err != nil && !errors.As(err, &exit) {
			fmt.Fprintf(&p.log, "waiting for the process: %v\n", err)
		}
		p.state = cmd.ProcessState
		close(p.exited)
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("starting %s: %w", strings.Join(words, " "), err)
	}
	p.Pid = cmd.Process.Pid
	l.processes = append(l.processes, p)
	return nil
}

// Configure writes the configuration that the next reload reads.
func (p *CoreDNS) Configure(corefile string) error {
	// At once, or the reload plugin could read half of it.
	draft := p.Corefile + ".new"
	if err := os.WriteFile(draft, []byte(corefile), 0o644); err != nil {
		return err
	}
	return os.Rename(draft, p.Corefile)
}

// WaitServing waits until the process serves all its addresses.
func (p *CoreDNS) WaitServing() error {
	// The last thing that it prints when it starts, when its sockets are open.
	return p.WaitLog(0, "\nCoreDNS-")
}

// Reload has the process read a new configuration and waits until it has taken or
// refused it, which is an error.
func (p *CoreDNS) Reload(corefile string) error {
	if err := p.Configure(corefile); err != nil {
		return err
	}
	mark := p.Mark()
	if err := p.Signal(syscall.SIGUSR1); err != nil {
		return err
	}
	return p.WaitReload(mark)
}

// WaitReload waits for the first reload after a mark.
func (p *CoreDNS) WaitReload(mark int) error {
	const refused = "[ERROR] Restart failed: "
	err := p.wait(mark, func(log string) bool {
		return strings.Contains(log, "[INFO] Reloading complete") ||
			strings.Contains(log, refused) && strings.HasSuffix(log, "\n")
	})
	if err != nil {
		return fmt.Errorf("reloading: %w", err)
	}
	if _, why, ok := strings.Cut(p.Log()[mark:], refused); ok {
		why, _, _ = strings.Cut(why, "\n")
		return fmt.Errorf("reloading: %s", why)
	}
	return nil
}

// Signal sends a signal.
func (p *CoreDNS) Signal(s syscall.Signal) error {
	if !p.Running() {
		return fmt.Errorf("sending %v: %w", s, ErrExited)
	}
	return syscall.Kill(p.Pid, s)
}

// Stop sends a signal and waits for the process's end.
func (p *CoreDNS) Stop(s syscall.Signal) (*os.ProcessState, error) {
	if err := p.Signal(s); err != nil {
		return nil, err
	}
	return p.Wait()
}

// Kill ends the process as kill -9 does, and waits until the kernel has closed its
// sockets: a program that it was just starting has them open until its exec.
func (p *CoreDNS) Kill() {
	if !p.Running() {
		return
	}
	had := sockets(p.Pid)
	syscall.Kill(p.Pid, syscall.SIGKILL)
	<-p.exited
	for late := time.Now().Add(Patience); p.open(had) && time.Now().Before(late); {
		time.Sleep(time.Millisecond)
	}
}

// sockets returns the inodes of a process's sockets.
func sockets(pid int) map[string]bool {
	inodes := map[string]bool{}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, _ := os.ReadDir(dir)
	for _, fd := range fds {
		to, err := os.Readlink(filepath.Join(dir, fd.Name()))
		if inode, ok := strings.CutPrefix(to, "socket:["); ok && err == nil {
			inodes[strings.TrimSuffix(inode, "]")] = true
		}
	}
	return inodes
}

// open tells whether a UDP socket of these is still there on the node.
func (p *CoreDNS) open(inodes map[string]bool) (yes bool) {
	p.node.Do(func() error {
		for _, table := range []string{"udp", "udp6"} {
			text, _ := os.ReadFile("/proc/thread-self/net/" + table)
			for line := range strings.Lines(string(text)) {
				if f := strings.Fields(line); len(f) > 9 && inodes[f[9]] {
					yes = true
				}
			}
		}
		return nil
	})
	return yes
}

// Running says whether the process has not ended yet.
func (p *CoreDNS) Running() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// Wait waits for the process's end.
func (p *CoreDNS) Wait() (*os.ProcessState, error) {
	select {
	case <-p.exited:
		return p.state, nil
	case <-time.After(Patience):
		return nil, fmt.Errorf("waiting for the process's end: not within %v", Patience)
	}
}

// Log is all that the process has written.
func (p *CoreDNS) Log() string {
	text, _ := p.log.read()
	return text
}

// Mark is a place in the log: here and now.
func (p *CoreDNS) Mark() int { return len(p.Log()) }

// WaitLog waits until the process has written a text, after a mark.
func (p *CoreDNS) WaitLog(mark int, text string) error {
	err := p.wait(mark, func(log string) bool { return strings.Contains("\n"+log, text) })
	if err != nil {
		return fmt.Errorf("waiting for %q: %w", text, err)
	}
	return nil
}

// LoggedAt returns when the process last wrote a text, after a mark, and the mark after
// that.
func (p *CoreDNS) LoggedAt(mark int, text string) (at time.Time, end int) {
	p.log.mu.Lock()
	defer p.log.mu.Unlock()
	last := mark + strings.LastIndex(p.log.text.String()[mark:], text)
	for _, w := range p.log.writes {
		if w.end > last {
			return w.at, w.end
		}
	}
	return time.Time{}, mark
}

func (p *CoreDNS) wait(mark int, ok func(log string) bool) error {
	late := time.After(Patience)
	for {
		running := p.Running() // before the log: an ended process has written all
		text, changed := p.log.read()
		if ok(text[mark:]) {
			return nil
		}
		if !running {
			return fmt.Errorf("%w (%v)", ErrExited, p.state)
		}
		select {
		case <-changed:
		case <-p.exited:
		case <-late:
			return fmt.Errorf("not within %v", Patience)
		}
	}
}

// A log keeps what is written to it.
type log struct {
	mu      sync.Mutex
	text    strings.Builder
	changed chan struct{} // closed at the next write
	writes  []write
}

// A write is when the log had become so long.
type write struct {
	end int
	at  time.Time
}

func (l *log) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.changed)
	l.changed = make(chan struct{})
	l.writes = append(l.writes, write{l.text.Len() + len(b), time.Now()})
	return l.text.Write(b)
}

func (l *log) read() (string, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String(), l.changed
}

// CountPrograms returns what has a process count the iptables programs that it runs, as
// a part of its environment, and how many that were since the last call.
func (l *Lab) CountPrograms() (since func() (int, error), env []string, err error) {
	dir, err := os.MkdirTemp(l.Dir, "counted")
	if err != nil {
		return nil, nil, err
	}
	calls := filepath.Join(dir, "calls")
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, what := range []string{"", "-save", "-restore"} {
			script := fmt.Sprintf("#!/bin/sh\necho \"%[1]s $*\" >>%[2]s\nexec %[3]s/bin/%[1]s \"$@\"\n", family+what, calls, l.Dir)
			if err := os.WriteFile(filepath.Join(dir, family+what), []byte(script), 0o755); err != nil {
				return nil, nil, err
			}
		}
	}
	since = func() (int, error) {
		text, err := os.ReadFile(calls)
		if errors.Is(err, os.ErrNotExist) {
			return 0, nil
		}
		return strings.Count(string(text), "\n"), errors.Join(err, os.Remove(calls))
	}
	return since, []string{"PATH=" + dir + ":" + os.Getenv("PATH") + ":/usr/sbin:/sbin"}, nil
}
