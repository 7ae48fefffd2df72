package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netns"
)

// A Namespace is a network namespace without a name: nothing but open file
// descriptors and running processes keep it, so that the kernel removes it, and
// every link, rule and address in it, whichever way this process ends.
type Namespace struct {
	name   string
	handle netns.NsHandle
	env    []string
}

// NewNamespace makes a namespace with nothing but its loopback device, which is up.
func NewNamespace(name string) (*Namespace, error) {
	n, err := newNamespace(name, os.Environ())
	if err != nil {
		return nil, err
	}
	if err := n.Do(func() error { return setUp("lo") }); err != nil {
		return nil, errors.Join(err, n.close())
	}
	return n, nil
}

func newNamespace(name string, env []string) (*Namespace, error) {
	n := &Namespace{name: name, env: env}
	err := onThread(func() (err error) {
		n.handle, err = netns.New()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("making the namespace of %s: %w", name, err)
	}
	return n, nil
}

// Do runs fn on a thread in the namespace and returns its error. Sockets that fn
// opens and processes that it starts stay in the namespace. No namespace is the one that
// this process is in.
func (n *Namespace) Do(fn func() error) error {
	if n == nil {
		return fn()
	}
	return onThread(func() error {
		if err := netns.Set(n.handle); err != nil {
			return fmt.Errorf("entering the namespace of %s: %w", n.name, err)
		}
		return fn()
	})
}

// Client returns an HTTP client whose connections begin in the namespace.
func (n *Namespace) Client(timeout time.Duration) *http.Client {
	return &http.Client{Timeout: timeout, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, at string) (c net.Conn, err error) {
			err = n.Do(func() error {
				c, err = new(net.Dialer).DialContext(ctx, network, at)
				return err
			})
			return c, err
		},
	}}
}

// onThread runs fn on a thread that ends with it: a thread that has been in a
// namespace must never run another goroutine.
func onThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		err := errors.New("leaving the thread early")
		defer func() { done <- err }() // also where fn calls runtime.Goexit
		runtime.LockOSThread()
		err = fn()
	}()
	return <-done
}

// Run runs a command in the namespace and returns what it wrote to stdout.
func (n *Namespace) Run(name string, args ...string) (string, error) {
	return n.RunInput("", name, args...)
}

// RunInput is Run with something to read on stdin.
func (n *Namespace) RunInput(stdin, name string, args ...string) (string, error) {
	var stdout, stderr strings.Builder
	err := n.Do(func() error {
		cmd := n.command(name, args...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
		return cmd.Run()
	})
	if err != nil {
		return stdout.String(), fmt.Errorf("running %s %s in %s: %w: %s",
			name, strings.Join(args, " "), n.name, err, stderr.String())
	}
	return stdout.String(), nil
}

// command looks name up in the lab's PATH, not in this process's. The child dies
// with the thread that started it, so start it on one that stays.
func (n *Namespace) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	if path, err := lookPath(name, n.env); err == nil {
		cmd.Path, cmd.Err = path, nil
	}
	cmd.Env = n.env
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

func (n *Namespace) close() error { return n.handle.Close() }
