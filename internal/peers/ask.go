package peers

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

// reply is what came of asking one process.
type reply struct {
	name string
	presence
	err error
}

// Ask returns what the other processes want, each of which has so long to answer. Of one
// that is silent counts what it said last: it can have changed nothing since, unless it
// is only slow.
func (m *Member) Ask(within time.Duration) (Others, error) {
	o := Others{Wants: desired.State{}, Serves: map[desired.Endpoint]bool{}, Variants: map[string]bool{}, States: map[string]int{}}
	list, err := listSockets(memberSockets)
	if err != nil {
		return o, fmt.Errorf("looking for other processes that serve here: %w", err)
	}
	names := m.peers(&list)
	if list.more {
		o.Unknown = true
		m.tell("peers", fmt.Sprintf("there are more than %d other nodecache processes here, and only so many are asked; nothing is taken away", peerLimit))
	} else {
		m.tell("peers", "")
	}
	replies := make([]reply, len(names))
	var all sync.WaitGroup
	for i, name := range names {
		all.Go(func() {
			p, err := m.askOne(name, time.Now().Add(within))
			replies[i] = reply{name, p, err}
		})
	}
	all.Wait()
	for _, r := range replies {
		var s strangerError
		switch {
		case errors.Is(r.err, unix.ECONNREFUSED):
			m.forget(r.name) // gone since
			continue
		case errors.As(r.err, &s):
			list.stranger(r.name, uint32(s))
			continue
		}
		m.add(&o, r)
	}
	m.tellStrangers(list)
	return o, nil
}

// peers returns the names to ask, at most peerLimit, those first who have answered before.
// It forgets who is gone.
func (m *Member) peers(list *socketList) (names []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	there := map[string]bool{}
	for _, s := range list.trusted {
		if s.name != m.name && !there[s.name] {
			there[s.name] = true
			names = append(names, s.name)
		}
	}
	for name := range m.heard {
		// A list that is made while sockets come and go may lack one.
		if there[name] {
			continue
		}
		if user, err := userOf(name); err == nil && trusted(user) {
			there[name] = true
			names = append(names, name)
		}
	}
	gone := func(name string) bool { return hasID(name, memberPrefix) && !there[name] }
	maps.DeleteFunc(m.heard, func(name string, _ presence) bool { return gone(name) })
	maps.DeleteFunc(m.told, func(name, _ string) bool { return gone(name) })
	slices.Sort(names)
	slices.SortStableFunc(names, func(a, b string) int {
		_, known := m.heard[a]
		if _, too := m.heard[b]; known == too {
			return 0
		}
		if known {
			return -1
		}
		return 1
	})
	if len(names) > peerLimit {
		names, list.more = names[:peerLimit], true
	}
	return names
}

func (m *Member) forget(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.heard, name)
	delete(m.told, name)
}

// add adds to o what one process wants.
func (m *Member) add(o *Others, r reply) {
	m.mu.Lock()
	if r.err == nil {
		m.heard[r.name] = r.presence
	}
	p, known := m.heard[r.name]
	ours := m.variant
	m.mu.Unlock()
	switch {
	case r.err == nil:
		m.tell(r.name, "")
	case known:
		m.tell(r.name, fmt.Sprintf("asking another nodecache process what it needs: %v; what it said last counts until it answers or ends", r.err))
	default:
		m.tell(r.name, fmt.Sprintf("asking another nodecache process what it needs: %v; nothing is taken away until it answers or ends", r.err))
		o.Unknown = true
	}
	switch {
	case r.err != nil:
		o.States[Silent]++
	case len(p.Serves) > 0:
		o.States[Serving]++
	default:
		o.States[Idle]++
	}
	if len(p.Rules) > 0 {
		o.Variants[p.Variant] = true
	}
	if p.Variant != "" && ours != "" && p.Variant != ours {
		p.Rules, p.LeavingRules = nil, nil
	}
	wants, leaving := m.state(p.Links, p.Rules), m.state(p.LeavingLinks, p.LeavingRules)
	o.Wants = o.Wants.Union(wants)
	o.Stays = o.Stays.Union(wants.Minus(leaving))
	o.Leaving = o.Leaving.Union(leaving)
	if r.err != nil {
		return // whether it still serves is the one thing that nobody can know
	}
	for _, e := range shown(p.Serves) {
		o.Serves[e] = true
	}
}

// tell logs what there is to say about something once, until there is something else to say.
func (m *Member) tell(about, what string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if what == m.told[about] {
		return
	}
	if what == "" {
		delete(m.told, about)
		return
	}
	m.told[about] = what
	log.Warning(what)
}

func (m *Member) tellStrangers(list socketList) {
	what := ""
	if list.strangers > 0 {
		what = fmt.Sprintf("what %d processes of other users want here is ignored, such as %s: if they are caches of yours, run them as the user %d", list.strangers, list.examples, os.Geteuid())
	}
	m.tell("strangers", what)
}

// askOne asks a process until the deadline. Anybody can fill its queue for a moment, and it
// may end between two steps.
func (m *Member) askOne(name string, deadline time.Time) (p presence, err error) {
	for {
		p, err = m.askOnce(name, deadline)
		again := errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) || errors.Is(err, io.ErrUnexpectedEOF)
		if !again || time.Until(deadline) < turnPoll {
			break
		}
		time.Sleep(turnPoll)
	}
	if errors.Is(err, fs.ErrPermission) {
		err = fmt.Errorf("%w (where SELinux is on, have the pods of all caches run with the same seLinuxOptions.level)", err)
	}
	return p, err
}

func (m *Member) askOnce(name string, deadline time.Time) (p presence, err error) {
	d := net.Dialer{Deadline: deadline}
	c, err := d.Dial("unix", name)
	if err != nil {
		return p, err
	}
	defer c.Close()
	if err := trust(c); err != nil {
		return p, err
	}
	if err := c.SetDeadline(deadline); err != nil {
		return p, err
	}
	p, err = readPresence(c, m.badLink)
	if err != nil {
		return p, fmt.Errorf("unix socket %s: %w", name, err)
	}
	return p, nil
}
