package nodecache

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

// Several processes may serve on one node: a pair for high availability, or the
// old and the new pod of an update. Each shows the others what it wants there
// through a unix socket in the abstract namespace. Such a name belongs to the
// network namespace, as do the link and the rules, and is gone when the process
// is, however it died; so there is no file and no mount that they have to share.
//
// Any process of the network namespace can take such a name. What one shows decides on
// what stays on the node, so only those of this process's own user and of root count, and
// the others are not even connected to where the kernel tells whose a socket is.
const (
	memberPrefix = "@nodecache/member/"
	// askLimit is how long another process may take to answer. One that does not
	// answer is stopped or starved.
	askLimit = time.Second
	// askLimitAtExit is the same for an exit.
	askLimitAtExit = 300 * time.Millisecond
	// peerLimit is how many others are asked. There are two in an update of a pair.
	peerLimit     = 16
	answersAtOnce = 64
)

var memberSockets = socketKind{unix.SOCK_STREAM, 1 << unix.BPF_TCP_LISTEN, func(name string) bool { return hasID(name, memberPrefix) }}

// others is what all other processes on the node want together.
type others struct {
	// wants has of iptables rules those alone that stand in this process's variant, or may.
	wants   desired.State
	stays   desired.State // of wants, what somebody is not about to give up
	leaving desired.State // of wants, what somebody is about to give up
	serves  map[desired.Endpoint]bool
	// variants are those of iptables in which others have rules; "" is of those that do
	// not say it.
	variants map[string]bool
	// unknown is true when one of them has never answered: then nothing may be taken away.
	unknown bool
	states  map[string]int // how many do what: see the metric processes
}

// member is this process among those on the node.
type member struct {
	name     string
	mu       sync.Mutex
	shown    []byte
	variant  string // of what is shown
	listener net.Listener
	heard    map[string]presence // by name: what the others that are still there said last
	told     map[string]string   // by what it is about: what the log has last been told
}

func newMember() *member {
	id := make([]byte, 8) // a process's number is not unique among containers
	rand.Read(id)
	return &member{name: memberPrefix + hex.EncodeToString(id), heard: map[string]presence{}, told: map[string]string{}}
}

// id is what tells this process from the others on the node.
func (m *member) id() string { return strings.TrimPrefix(m.name, memberPrefix) }

// show has the others see p from now on.
func (m *member) show(p presence) error {
	p.Version = presenceVersion
	err := p.check()
	var b []byte
	if err == nil {
		b, err = json.Marshal(p)
	}
	if err != nil {
		return fmt.Errorf("showing other processes what this one wants: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.shown, m.variant = b, p.Variant
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

// answer tells whoever asks, until l is closed. One that does not read keeps nobody else
// from an answer.
func (m *member) answer(l net.Listener) {
	asking := make(chan struct{}, answersAtOnce)
	pause := time.Duration(0)
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // such as too many open files
			if pause == 0 {
				log.Warningf("answering other nodecache processes: %v; trying again", err)
			}
			pause = min(max(2*pause, turnPoll), askLimit)
			time.Sleep(pause)
			continue
		}
		pause = 0
		if trust(c) != nil {
			c.Close()
			continue
		}
		m.mu.Lock()
		b := m.shown
		m.mu.Unlock()
		asking <- struct{}{}
		go func() {
			defer func() { <-asking }()
			defer c.Close()
			c.SetDeadline(time.Now().Add(askLimit))
			c.Write(b) // whoever asks no longer will ask again
		}()
	}
}
