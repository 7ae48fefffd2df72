package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// A bench is where servers are measured.
type bench struct {
	ns       *lab.Namespace
	dir      string
	cpus     layout
	zone     *zone
	upstream string // what it is, in words
}

// A server is a running process; the zero value is none.
type server struct {
	pid    int
	begun  time.Time
	exited chan struct{}
	log    lockedLog
}

type lockedLog struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lockedLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

// tail returns the end of the log.
func (l *lockedLog) tail() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	text := l.text.String()
	return text[max(0, len(text)-2000):]
}

// start starts a command on these CPUs. It ends with this program.
func (b *bench) start(cmd *exec.Cmd, cpus []int) (*server, error) {
	s := &server{exited: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &s.log, &s.log
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	// It dies with the thread that starts it, which waits for it.
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	started := make(chan error, 1)
	go func() {
		err := b.ns.Do(func() error {
			if err := pin(0, cpus); err != nil {
				return err
			}
			s.begun = time.Now()
			if err := cmd.Start(); err != nil {
				return err
			}
			s.pid = cmd.Process.Pid
			started <- nil
			if err := cmd.Wait(); err != nil {
				fmt.Fprintln(&s.log, err)
			}
			close(s.exited)
			return nil
		})
		started <- err
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", strings.Join(cmd.Args, " "), err)
	}
	return s, nil
}

// alive returns an error with the end of its log if the server has ended.
func (s *server) alive() error {
	select {
	case <-s.exited:
		return fmt.Errorf("the server has ended: %s", s.log.tail())
	default:
		return nil
	}
}

func (s *server) stop() error {
	if s.pid == 0 {
		return nil
	}
	if s.alive() == nil {
		if err := unix.Kill(s.pid, unix.SIGKILL); err != nil {
			return fmt.Errorf("ending the server: %w", err)
		}
	}
	<-s.exited
	return nil
}

// rss returns the server's resident memory in bytes.
func (s *server) rss() (float64, error) {
	p, err := procfs.NewProc(s.pid)
	if err != nil {
		return 0, fmt.Errorf("reading the server's memory: %w", err)
	}
	status, err := p.NewStatus()
	if err != nil {
		return 0, fmt.Errorf("reading the server's memory: %w", err)
	}
	return float64(status.VmRSS), nil
}

// await waits for the first right answer, and returns how long it took since the start.
func (b *bench) await(s *server, at netip.AddrPort) (time.Duration, error) {
	var conn net.Conn
	err := b.ns.Do(func() (err error) {
		conn, err = net.Dial("udp", at.String())
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("waiting for the server: %w", err)
	}
	defer conn.Close()
	buf := make([]byte, 4096)
	var last error
	for late := time.Now().Add(lab.Patience); time.Now().Before(late); {
		if err := s.alive(); err != nil {
			return 0, err
		}
		_, err := conn.Write(b.zone.queries[0])
		if err == nil {
			conn.SetReadDeadline(time.Now().Add(5 * time.Millisecond))
			var n int
			if n, err = conn.Read(buf); err == nil {
				if last = b.zone.check(0, buf[:n]); last == nil {
					return time.Since(s.begun), nil
				}
			}
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			time.Sleep(200 * time.Microsecond) // nobody listens yet
		}
	}
	return 0, fmt.Errorf("no right answer within %v (%w): %s", lab.Patience, last, s.log.tail())
}

// A result is what one round has measured of a server.
type result struct {
	points            []point       // one a rate
	start             time.Duration // until the first answer
	idle, loaded, exe float64       // bytes
}

func (r *result) String() string {
	var s strings.Builder
	for i, p := range r.points {
		fmt.Fprintf(&s, "\n  %s: %v", rateName(rates[i]), p)
	}
	fmt.Fprintf(&s, "\n  start %v, rss %.1f and %.1f MiB", r.start, r.idle/(1<<20), r.loaded/(1<<20))
	return s.String()
}

// measure starts a server, fills its cache, and measures it.
func (b *bench) measure(sub *subject) (_ *result, err error) {
	dir, err := os.MkdirTemp(b.dir, sub.name)
	if err != nil {
		return nil, err
	}
	// With room to spare: caches that are divided into parts fill them unevenly.
	room := max(4*len(b.zone.queries), 10000)
	env := sub.env
	if sub.manifest {
		if env, err = shipped(dir, room, sub.fastpath); err != nil {
			return nil, err
		}
	} else if err := os.WriteFile(filepath.Join(dir, sub.file), []byte(sub.config(room)), 0o644); err != nil {
		return nil, err
	}
	cmd := exec.Command(sub.path, sub.args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	s, err := b.start(cmd, b.cpus.server(sub.cpus))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.stop()) }()

	r := &result{exe: size(sub.path), points: make([]point, len(rates))}
	if r.start, err = b.await(s, serverAddr); err != nil {
		return nil, err
	}
	time.Sleep(time.Second) // what it still has to do, and to give back
	if r.idle, err = s.rss(); err != nil {
		return nil, err
	}
	err = b.ns.Do(func() error {
		l, err := newLoad(b.zone, serverAddr, !(sub.cpus > 1 && !b.cpus.spare))
		if err != nil {
			return err
		}
		defer l.close()
		if err := l.fill(); err != nil {
			return fmt.Errorf("filling the cache: %w", err)
		}
		for i, rate := range rates {
			// Another process, or another guest of the host, may have had the CPU.
			for try := 0; try == 0 || try < tries && (r.points[i].idle() || r.points[i].slow()); try++ {
				if r.points[i], err = l.run(rate, length(rate), s.pid); err != nil {
					return fmt.Errorf("at %s: %w", rateName(rate), err)
				}
				r.points[i].cpus = sub.cpus
				if err := s.alive(); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("%w\n%s", err, s.log.tail())
	}
	r.loaded, err = s.rss()
	return r, err
}

func rateName(rate int) string {
	if rate == 0 {
		return "saturation"
	}
	return thousands(rate) + " q/s"
}

func thousands(n int) string {
	if n < 1000 {
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%d,%03d", n/1000, n%1000)
}

// size returns the bytes of a program and of its shared libraries.
func size(path string) (total float64) {
	files := []string{path}
	if text, err := exec.Command("ldd", path).Output(); err == nil {
		for _, m := range regexp.MustCompile(`(/\S+) \(0x`).FindAllStringSubmatch(string(text), -1) {
			files = append(files, m[1])
		}
	}
	for _, f := range files {
		if info, err := os.Stat(f); err == nil {
			total += float64(info.Size())
		}
	}
	return total
}
