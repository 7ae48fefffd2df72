package sockets

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

func TestTakenPortIsNamedWithItsHolder(t *testing.T) {
	newTestLink(t, "169.254.20.10", "fd00:20::10")
	comm, err := os.ReadFile("/proc/self/comm")
	must(t, err)
	for _, test := range []struct {
		proto, holder string
		wanted        string
		bound         string // as the error has it, or "" for no conflict
	}{
		{"udp", "169.254.20.10:53", "169.254.20.10", "169.254.20.10:53"},
		{"tcp", "169.254.20.10:53", "169.254.20.10", "169.254.20.10:53"},
		{"udp", "[fd00:20::10]:53", "fd00:20::10", "[fd00:20::10]:53"},
		{"tcp", "[fd00:20::10]:53", "fd00:20::10", "[fd00:20::10]:53"},
		// The wildcard address is the usual way to be in the way: systemd, dnsmasq, BIND.
		{"udp4", "0.0.0.0:53", "169.254.20.10", "0.0.0.0:53"},
		{"tcp4", "0.0.0.0:53", "169.254.20.10", "0.0.0.0:53"},
		{"udp6", "[::]:53", "fd00:20::10", "[::]:53"},
		{"tcp6", "[::]:53", "fd00:20::10", "[::]:53"},
		// A socket on :: has IPv4 as well, unless told otherwise.
		{"udp", "[::]:53", "169.254.20.10", "[::]:53"},
		{"tcp", "[::]:53", "169.254.20.10", "[::]:53"},

		{"udp", "169.254.20.10:54", "169.254.20.10", ""},
		{"tcp", "127.0.0.1:53", "169.254.20.10", ""},
		{"udp", "169.254.20.10:53", "10.96.0.10", ""}, // not on the node yet
	} {
		t.Run(test.proto+" "+test.holder+" "+test.wanted, func(t *testing.T) {
			e := desired.Endpoint{Addr: addr(test.wanted), Proto: test.proto[:3], Port: 53}
			var close func() error
			if e.Proto == "udp" {
				c, err := net.ListenPacket(test.proto, test.holder)
				must(t, err)
				close = c.Close
			} else {
				l, err := net.Listen(test.proto, test.holder)
				must(t, err)
				close = l.Close
			}
			defer close()
			err := TryPort(e)
			if test.bound == "" {
				wantError(t, err, "")
				return
			}
			wantError(t, err, fmt.Sprintf("%s is taken by %q (process %d, bound to %s): end that program", e, strings.TrimSpace(string(comm)), os.Getpid(), test.bound))
			close()
			wantError(t, TryPort(e), "")
		})
	}
}

func TestHolderThatCannotBeSeen(t *testing.T) {
	if got := Holder(local(t, "127.0.0.1", "udp")); got != "" {
		t.Errorf("nobody is %q", got)
	}
}

func TestReuseportTwinIsNoConflict(t *testing.T) {
	newTestLink(t, "169.254.20.10", "fd00:20::10")
	for _, e := range dnsOn("169.254.20.10", "fd00:20::10") {
		serveOn(t, e)
		wantError(t, TryPort(e), "")
	}
}

func TestUDPPortOnLoopbackIsNotTried(t *testing.T) {
	e := local(t, "127.0.0.1", "udp")
	c, err := net.ListenPacket("udp", netip.AddrPortFrom(e.Addr, e.Port).String())
	must(t, err)
	defer c.Close()
	wantError(t, TryPort(e), "") // it would take a twin's queries
}

// A socket that is bound takes its share of the queries at once. Of those that
// go to a twin none may be lost to a trial. These are the queries of the node
// itself: to the kernel they come in through the device that carries the address
// (rt_iif, ip_route_output_key_hash_rcu in net/ipv4/route.c).
func TestTryingPortTakesNoQueryFromTwin(t *testing.T) {
	newTestLink(t, "169.254.20.10", "fd00:20::10")
	for _, e := range dnsOn("169.254.20.10", "fd00:20::10") {
		twin := serveOn(t, e)[0]
		var all sync.WaitGroup
		stop := make(chan struct{})
		all.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := TryPort(e); err != nil {
					t.Error(err)
					return
				}
			}
		})
		at := netip.AddrPortFrom(e.Addr, e.Port).String()
		if e.Proto == "udp" {
			all.Go(func() {
				buf := make([]byte, 10)
				for {
					n, from, err := twin.UDP.ReadFromUDPAddrPort(buf)
					if err != nil {
						return
					}
					twin.UDP.WriteToUDPAddrPort(buf[:n], from)
				}
			})
		} else {
			all.Go(func() {
				for {
					c, err := twin.TCP.Accept()
					if err != nil {
						return
					}
					c.Write([]byte("answer"))
					c.Close()
				}
			})
		}
		for i := range 2000 {
			if err := ask(e.Proto, at); err != nil {
				t.Errorf("%s: query %d of 2000: %v", e, i, err)
				break
			}
		}
		close(stop)
		twin.Close()
		all.Wait()
	}
}

// ask sends one query and waits for the answer. Each is from a port of its own,
// by which the kernel chooses among the sockets of a port.
func ask(proto, at string) error {
	c, err := net.Dial(proto, at)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	if proto == "udp" {
		if _, err := c.Write([]byte("query")); err != nil {
			return err
		}
	}
	_, err = c.Read(make([]byte, 10))
	return err
}
