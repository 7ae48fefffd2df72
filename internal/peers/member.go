// Package peers is the other processes of this program on the node: it shows them what this
// one wants, asks them what they want, lets one at a time change the node, and tells those
// that stay how an exit went.
//
// Several processes may serve on one node: a pair for high availability, or the
// old and the new pod of an update. Each shows the others what it wants there
// through a unix socket in the abstract namespace. Such a name belongs to the
// network namespace, as do the link and the rules, and is gone when the process
// is, however it died; so there is no file and no mount that they have to share.
//
// Any process of the network namespace can take such a name. What one shows decides on
// what stays on the node, so only those of this process's own user and of root count, and
// the others are not even connected to where the kernel tells whose a socket is.
package peers

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

	clog "github.com/coredns/coredns/plugin/pkg/log"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

var log = clog.NewWithPlugin("nodecache")

const (
	memberPrefix = "@nodecache/member/"
	// AskLimit is how long another process may take to answer. One that does not
	// answer is stopped or starved.
	AskLimit = time.Second
	// AskLimitAtExit is the same for an exit.
	AskLimitAtExit = 300 * time.Millisecond
	// peerLimit is how many others are asked. There are two in an update of a pair.
	peerLimit     = 16
	answersAtOnce = 64
)

var memberSockets = socketKind{unix.SOCK_STREAM, 1 << unix.BPF_TCP_LISTEN, func(name string) bool { return hasID(name, memberPrefix) }}

// Others is what all other processes on the node want together.
type Others struct {
	// Wants has of iptables rules those alone that stand in this process's variant, or may.
	Wants   desired.State
	Stays   desired.State // of Wants, what somebody is not about to give up
	Leaving desired.State // of Wants, what somebody is about to give up
	Serves  map[desired.Endpoint]bool
	// Variants are those of iptables in which others have rules; "" is of those that do
	// not say it.
	Variants map[string]bool
	// Unknown is true when one of them has never answered: then nothing may be taken away.
	Unknown bool
	States  map[string]int // how many do what: see the metric processes
}

// What a process on the node does, as another one sees it.
const (
	Serving = "serving"
	Idle    = "idle"   // on its way in or out
	Silent  = "silent" // it does not answer
)

// Member is this process among those on the node.
type Member struct {
	name    string
	shared  string // of rules, the backend whose chains all processes share
	badLink func(name string) (why string)

	mu       sync.Mutex
	shown    []byte
	variant  string // of what is shown
	listener net.Listener
	heard    map[string]presence // by name: what the others that are still there said last
	told     map[string]string   // by what it is about: what the log has last been told
}

// New returns this process, which shows nothing yet. Of the rules that processes want it
// shows those of the backend shared, whose chains all processes share, and of what the
// others answer it takes only names of interfaces for which badLink returns "".
func New(shared string, badLink func(name string) (why string)) *Member {
	id := make([]byte, 8) // a process's number is not unique among containers
	rand.Read(id)
	return &Member{name: memberPrefix + hex.EncodeToString(id), shared: shared, badLink: badLink, heard: map[string]presence{}, told: map[string]string{}}
}

// id is what tells this process from the others on the node.
func (m *Member) id() string { return strings.TrimPrefix(m.name, memberPrefix) }

// Shown is what a process shows the others.
type Shown struct {
	Wants   desired.State
	Leaving desired.State // of Wants, what it is about to give up
	Serves  []desired.Endpoint
	// Variant is the variant of iptables in which its rules stand, "" where it is not known.
	Variant string
}

// Show has the others see s from now on.
func (m *Member) Show(s Shown) error {
	return m.publish(presence{
		Links: s.Wants.Links, Rules: toShow(s.Wants.Rules[m.shared]), Serves: toShow(s.Serves),
		LeavingLinks: s.Leaving.Links, LeavingRules: toShow(s.Leaving.Rules[m.shared]), Variant: s.Variant,
	})
}

func (m *Member) publish(p presence) error {
	p.Version = presenceVersion
	err := p.check(m.badLink)
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
	for deadline := time.Now().Add(AskLimit); ; time.Sleep(turnPoll) {
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

// Hide ends what Show has begun.
func (m *Member) Hide() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.listener != nil {
		m.listener.Close()
		m.listener = nil
	}
}

// answer tells whoever asks, until l is closed. One that does not read keeps nobody else
// from an answer.
func (m *Member) answer(l net.Listener) {
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
			pause = min(max(2*pause, turnPoll), AskLimit)
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
			c.SetDeadline(time.Now().Add(AskLimit))
			c.Write(b) // whoever asks no longer will ask again
		}()
	}
}
