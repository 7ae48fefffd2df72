package nodecache

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Several processes may serve on one node: a pair for high availability, or the
// old and the new pod of an update. Each shows the others what it wants there
// through a unix socket in the abstract namespace. Such a name belongs to the
// network namespace, as do the link and the rules, and is gone when the process
// is, however it died; so there is no file and no mount that they have to share.
//
// Any process of the network namespace can take such a name. What one shows comes to
// stand in the firewall, so only those of this process's own user and of root count.
const (
	memberPrefix = "@nodecache/member/"
	lockName     = "@nodecache/lock"
	// askLimit is how long another process may take to answer. One that does not
	// answer is stopped or starved, and its wants are not known.
	askLimit = time.Second
	// askLimitAtExit is the same for an exit.
	askLimitAtExit = 300 * time.Millisecond
	// turnLimit is how long to wait for the others to finish a change.
	turnLimit = 10 * time.Second
	turnPoll  = 2 * time.Millisecond
)

// presence is what one process shows the others.
type presence struct {
	Links map[string][]netip.Addr `json:"links"`
	// Rules are those of the backend iptables, whose chains all processes share.
	Rules []shownEndpoint `json:"rules"`
	// Serves is what it listens on, and goes on to.
	Serves []shownEndpoint `json:"serves"`
	// LeavingLinks and LeavingRules are what of Links and Rules it is about to give
	// up: still needed, but not by anything new.
	LeavingLinks map[string][]netip.Addr `json:"leaving_links,omitempty"`
	LeavingRules []shownEndpoint         `json:"leaving_rules,omitempty"`
}

// shownState returns links and rules as a state.
func shownState(links map[string][]netip.Addr, rules []shownEndpoint) state {
	s := state{links: links, rules: map[string][]endpoint{}}
	if len(rules) > 0 {
		s.rules[backendIPT] = shown(rules)
	}
	return s.sorted()
}

type shownEndpoint struct {
	Addr  netip.Addr `json:"addr"`
	Proto string     `json:"proto"`
	Port  uint16     `json:"port"`
	Extra bool       `json:"extra,omitempty"`
}

func show(es []endpoint) (ss []shownEndpoint) {
	for _, e := range es {
		ss = append(ss, shownEndpoint{e.addr, e.proto, e.port, e.extra})
	}
	return ss
}

func shown(ss []shownEndpoint) (es []endpoint) {
	for _, s := range ss {
		es = append(es, endpoint{s.Addr, s.Proto, s.Port, s.Extra})
	}
	return es
}

// others is what all other processes on the node want together.
type others struct {
	wants   state
	stays   state // of wants, what somebody is not about to give up
	leaving state // of wants, what somebody is about to give up
	serves  map[endpoint]bool
	// unknown is true when one of them did not answer: then nothing may be taken away.
	unknown bool
	states  map[string]int // how many do what: see the metric processes
	// variants are those of iptables in which others have rules; "" is of those that do
	// not say.
	variants map[string]bool
}

// member is this process among those on the node.
type member struct {
	name     string
	mu       sync.Mutex
	shown    []byte
	listener net.Listener
}

func newMember() *member {
	id := make([]byte, 8) // a process's number is not unique among containers
	rand.Read(id)
	return &member{name: memberPrefix + hex.EncodeToString(id)}
}

// id is what tells this process from the others on the node.
func (m *member) id() string { return strings.TrimPrefix(m.name, memberPrefix) }

// show has the others see p from now on.
func (m *member) show(p presence) error {
	b, err := json.Marshal(p)
	if err != nil {
		return fmt.Errorf("showing other processes what this one wants: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.shown = b
	if m.listener != nil {
		return nil
	}
	// A program that this process was starting while it hid has the socket open until
	// its exec, and the name with it.
	for deadline := time.Now().Add(askLimit); ; time.Sleep(turnPoll) {
		m.listener, err = net.Listen("unix", m.name)
		if !errors.Is(err, unix.EADDRINUSE) || time.Now().After(deadline) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("listening on the unix socket %s: %w", m.name, err)
	}
	go m.answer(m.listener)
	return nil
}

// hide ends that.
func (m *member) hide() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.listener != nil {
		m.listener.Close()
		m.listener = nil
	}
}

func (m *member) answer(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		m.mu.Lock()
		b := m.shown
		m.mu.Unlock()
		c.SetDeadline(time.Now().Add(askLimit))
		c.Write(b) // whoever asks no longer will ask again
		c.Close()
	}
}

// ask returns what the other processes want.
func (m *member) ask(within time.Duration) (others, error) {
	o := others{wants: state{}, serves: map[endpoint]bool{}, states: map[string]int{}, variants: map[string]bool{}}
	list, err := os.ReadFile("/proc/thread-self/net/unix")
	if err != nil {
		return o, fmt.Errorf("looking for other processes that serve here: %w", err)
	}
	seen := map[string]bool{m.name: true}
	strangers := map[uint32]int{} // by user
	for line := range strings.Lines(string(list)) {
		f := strings.Fields(line)
		name := f[len(f)-1]
		if !strings.HasPrefix(name, memberPrefix) || seen[name] {
			continue
		}
		seen[name] = true // an accepted connection has its listener's name
		p, err := askOne(name)
		if errors.Is(err, unix.ECONNREFUSED) {
			continue // gone since
		}
		var s strangerError
		if errors.As(err, &s) {
			strangers[uint32(s)]++
			continue
		}
		if err != nil {
			log.Warningf("asking another nodecache process what it needs: %v; nothing is taken away until it answers or ends", err)
			o.unknown = true
			o.states[processSilent]++
			continue
		}
		wants, leaving := shownState(p.Links, p.Rules), shownState(p.LeavingLinks, p.LeavingRules)
		o.wants = o.wants.union(wants)
		o.stays = o.stays.union(wants.minus(leaving))
		o.leaving = o.leaving.union(leaving)
		if len(p.Rules) > 0 {
			o.variants[""] = true
		}
		for _, e := range shown(p.Serves) {
			o.serves[e] = true
		}
		if len(p.Serves) > 0 {
			o.states[processServing]++
		} else {
			o.states[processIdle]++
		}
	}
	for user, n := range strangers {
		log.Warningf("what processes of the user %d want here is ignored (%d of them): if they are caches of yours, run them as the user %d", user, n, os.Geteuid())
	}
	return o, nil
}

// strangerError is that another user's process has a socket of ours. Its value is the user.
type strangerError uint32

func (e strangerError) Error() string { return fmt.Sprintf("the user %d holds the socket", uint32(e)) }

// trust returns a strangerError unless the listener that c is connected to is of this
// process's user or of root.
func trust(c net.Conn) error {
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var failed error
	if err := raw.Control(func(fd uintptr) {
		cred, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if failed != nil {
		return fmt.Errorf("asking whose the socket is: %w", failed)
	}
	if !trusted(cred.Uid) {
		return strangerError(cred.Uid)
	}
	return nil
}

// trusted tells whether what a user's processes say counts.
func trusted(user uint32) bool { return user == 0 || int(user) == os.Geteuid() }

func askOne(name string) (p presence, err error) {
	c, err := net.DialTimeout("unix", name, askLimit)
	if err != nil {
		return p, err
	}
	defer c.Close()
	if err := trust(c); err != nil {
		return p, err
	}
	c.SetDeadline(time.Now().Add(askLimit))
	return p, json.NewDecoder(c).Decode(&p)
}

// turn waits until no other process is changing the node's link or rules, and
// returns what ends this process's turn. The kernel ends that of one that dies.
func turn(within time.Duration) (end func(), err error) {
	deadline := time.Now().Add(within)
	looked := false
	for {
		l, err := net.Listen("unix", lockName)
		if err == nil {
			return func() { l.Close() }, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return nil, fmt.Errorf("listening on the unix socket %s: %w", lockName, err)
		}
		if !looked {
			looked = true
			if user, ok := heldByStranger(); ok {
				log.Warningf("a process of the user %d holds the unix socket %s; going on without it", user, lockName)
				return func() {}, nil
			}
		}
		if time.Now().After(deadline) {
			// Better to go on than to leave the node without its cache.
			log.Warningf("another nodecache process has been changing the node for %s; going on without waiting for it", turnLimit)
			return func() {}, nil
		}
		time.Sleep(turnPoll)
	}
}

// heldByStranger tells whether another user's process keeps everybody from their turns.
func heldByStranger() (user uint32, ok bool) {
	c, err := net.DialTimeout("unix", lockName, askLimit)
	if err != nil {
		return 0, false // released since
	}
	defer c.Close()
	var s strangerError
	ok = errors.As(trust(c), &s)
	return uint32(s), ok
}
