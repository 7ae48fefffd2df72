package sockets

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

const (
	// maxName bounds what is read of the name of a program, which it gives itself. The
	// kernel's own limit is 16 bytes, and 64 for its own threads.
	maxName = 64
	// maxWild bounds how many sockets on the wildcard address count for one port, as
	// each does for all addresses: somebody may open as many as he likes.
	maxWild = 100
)

// Holder says who has a socket on e, as far as /proc tells: ` by "dnsmasq" (process
// 123, bound to 0.0.0.0:53)`, or "".
func Holder(e desired.Endpoint) string { return whose(On([]desired.Endpoint{e}))[e] }

// Strangers says for each of es on which others than this process have a socket who
// does, as holder says it.
func Strangers(es []desired.Endpoint) map[desired.Endpoint]string {
	on := On(es)
	if len(on) == 0 {
		return nil
	}
	own := map[uint64]bool{}
	for inode := range openSockets("self") {
		own[inode] = true
	}
	for e, socks := range on {
		maps.DeleteFunc(socks, func(inode uint64, _ string) bool { return own[inode] })
		if len(socks) == 0 {
			delete(on, e)
		}
	}
	return whose(on)
}

// On returns the sockets that take what is sent to each of es, by their inodes
// and with what they are bound to, which may be the wildcard address. An endpoint with
// the wildcard address has the sockets of all addresses. All of es together cost one
// look at the kernel's tables.
func On(es []desired.Endpoint) map[desired.Endpoint]map[uint64]string {
	type port struct {
		proto string
		port  uint16
	}
	exact, all, wild := map[desired.Endpoint][]desired.Endpoint{}, map[port][]desired.Endpoint{}, map[port][]desired.Endpoint{}
	tables := map[string]bool{}
	for _, e := range es {
		bare, p := desired.Endpoint{Addr: e.Addr, Proto: e.Proto, Port: e.Port}, port{e.Proto, e.Port}
		exact[bare] = append(exact[bare], e)
		all[p] = append(all[p], e)
		if e.Addr.IsUnspecified() {
			wild[p] = append(wild[p], e)
		}
		tables[e.Proto], tables[e.Proto+"6"] = true, true
	}
	on, seen := map[desired.Endpoint]map[uint64]string{}, map[port]int{}
	for table := range tables {
		// By way of the thread: /proc/net is that of the process's first one.
		f, err := os.Open("/proc/thread-self/net/" + table)
		if err != nil {
			continue // a family that is off has no file
		}
		for s := range boundSockets(f, table[:3]) {
			p := port{table[:3], s.at.Port()}
			met := wild[p]
			if !s.at.Addr().IsUnspecified() {
				met = slices.Concat(met, exact[desired.Endpoint{Addr: s.at.Addr(), Proto: p.proto, Port: p.port}])
			} else if seen[p]++; seen[p] <= maxWild {
				met = all[p]
			}
			for _, e := range met {
				if e.Addr.Is6() && !e.Addr.IsUnspecified() && s.at.Addr().Is4() {
					continue // while a socket on :: has IPv4 too
				}
				if on[e] == nil {
					on[e] = map[uint64]string{}
				}
				on[e][s.inode] = s.to
			}
		}
		f.Close()
	}
	return on
}

// boundSocket is one line of the kernel's tables of sockets.
type boundSocket struct {
	at    netip.AddrPort
	to    string // at as text
	inode uint64
}

// boundSockets yields the sockets of one of the kernel's tables, of TCP those that
// listen, which come first in it.
func boundSockets(table io.Reader, proto string) func(yield func(boundSocket) bool) {
	const listen = "0A" // TCP_LISTEN, include/net/tcp_states.h
	return func(yield func(boundSocket) bool) {
		lines := bufio.NewScanner(table)
		lines.Scan() // the head
		for lines.Scan() {
			// sl local_address rem_address st tx_queue:rx_queue tr:tm->when retrnsmt uid timeout inode
			f := strings.Fields(lines.Text())
			if len(f) < 10 {
				continue
			}
			if proto == "tcp" && f[3] != listen {
				return
			}
			at, ok := parseLocal(f[1])
			inode, err := strconv.ParseUint(f[9], 10, 64)
			if ok && err == nil && !yield(boundSocket{at, at.String(), inode}) {
				return
			}
		}
	}
}

// parseLocal reads an address and port such as 0100007F:0035, where each four bytes
// of the address are a number in this machine's order of bytes.
func parseLocal(s string) (netip.AddrPort, bool) {
	digits, port, _ := strings.Cut(s, ":")
	b, err := hex.DecodeString(digits)
	p, errPort := strconv.ParseUint(port, 16, 16)
	if err != nil || errPort != nil || len(b)%4 != 0 {
		return netip.AddrPort{}, false
	}
	for i := 0; i < len(b); i += 4 {
		binary.NativeEndian.PutUint32(b[i:], binary.BigEndian.Uint32(b[i:]))
	}
	a, ok := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(a.Unmap(), uint16(p)), ok
}

// whose says for each endpoint which process has one of its sockets.
func whose(on map[desired.Endpoint]map[uint64]string) map[desired.Endpoint]string {
	if len(on) == 0 {
		return nil
	}
	unknown := map[uint64]bool{}
	for _, socks := range on {
		for inode := range socks {
			unknown[inode] = true
		}
	}
	who := map[uint64]string{}
	for _, pid := range processIDs() {
		if len(unknown) == 0 {
			break
		}
		for inode := range openSockets(pid) {
			if unknown[inode] {
				delete(unknown, inode)
				who[inode] = fmt.Sprintf("%q (process %s", programName(pid), pid)
			}
		}
	}
	said := map[desired.Endpoint]string{}
	for e, socks := range on {
		said[e] = say(socks, who)
	}
	return said
}

// say names the first of an endpoint's sockets whose process is known.
func say(socks map[uint64]string, who map[uint64]string) string {
	inodes := slices.Sorted(maps.Keys(socks))
	for _, inode := range inodes {
		if who[inode] != "" {
			return fmt.Sprintf(" by %s, bound to %s)", who[inode], socks[inode])
		}
	}
	return " by a process that can't be seen from here, bound to " + socks[inodes[0]]
}

// processIDs returns those of all processes that can be seen from here.
func processIDs() (pids []string) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	return slices.DeleteFunc(names, func(n string) bool { return n[0] < '0' || n[0] > '9' })
}

// openSockets yields the inodes of a process's sockets; of one that is not ours to look
// into, none.
func openSockets(pid string) func(yield func(uint64) bool) {
	return func(yield func(uint64) bool) {
		dir, err := os.Open(filepath.Join("/proc", pid, "fd"))
		if err != nil {
			return
		}
		defer dir.Close()
		names, _ := dir.Readdirnames(-1)
		for _, n := range names {
			to, err := os.Readlink(filepath.Join("/proc", pid, "fd", n))
			if err != nil {
				continue
			}
			inode, ok := strings.CutPrefix(to, "socket:[")
			i, err := strconv.ParseUint(strings.TrimSuffix(inode, "]"), 10, 64)
			if ok && err == nil && !yield(i) {
				return
			}
		}
	}
}

// programName returns what a program calls itself.
func programName(pid string) string {
	f, err := os.Open(filepath.Join("/proc", pid, "comm"))
	if err != nil {
		return ""
	}
	defer f.Close()
	name, _ := io.ReadAll(io.LimitReader(f, maxName))
	return strings.TrimSuffix(string(name), "\n")
}
