package peers

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
)

// Nobody scrapes a process that has just ended. So an exit tells the processes that
// stay on the node how it went, and they count it: a datagram to each one's socket in
// the abstract namespace, which belongs to the network namespace as the members' do.
const lastWordsPrefix = "@nodecache/exits/"

var lastWordsSockets = socketKind{unix.SOCK_DGRAM, 1<<unix.BPF_TCP_CLOSE | 1<<unix.BPF_TCP_ESTABLISHED, func(name string) bool { return hasID(name, lastWordsPrefix) }}

// How an exit went.
const (
	drainComplete = "complete"
	drainCutShort = "cut_short" // queries were given up
)

var (
	drains = promauto.NewCounterVec(prometheus.CounterOpts{
		Namespace: plugin.Namespace,
		Subsystem: "nodecache",
		Name:      "drains_total",
		Help:      "Counter of exits on this node, of this process and of those that it has outlived.",
	}, []string{"outcome"})
	drainDuration = promauto.NewHistogram(prometheus.HistogramOpts{
		Namespace: plugin.Namespace,
		Subsystem: "nodecache",
		Name:      "drain_duration_seconds",
		Help:      "Histogram of how long these exits took until what had arrived was answered and what had to go was gone.",
		Buckets:   []float64{.025, .05, .1, .25, .5, 1, 2.5, 5, 10, 20},
	})
	drainGivenUp = promauto.NewCounter(prometheus.CounterOpts{
		Namespace: plugin.Namespace,
		Subsystem: "nodecache",
		Name:      "drain_queries_given_up_total",
		Help:      "Counter of queries that these exits left without an answer.",
	})
)

func init() {
	// Present from the start, so that a rate over them sees the first exit.
	for _, o := range []string{drainComplete, drainCutShort} {
		drains.WithLabelValues(o)
	}
}

// LastWords is how an exit went.
type LastWords struct {
	Seconds float64 `json:"seconds"`
	GivenUp int64   `json:"givenUp"` // queries without an answer
}

func (w LastWords) count() {
	outcome := drainComplete
	if w.GivenUp > 0 {
		outcome = drainCutShort
	}
	drains.WithLabelValues(outcome).Inc()
	drainDuration.Observe(w.Seconds)
	drainGivenUp.Add(float64(w.GivenUp))
}

// HearLastWords counts the exits of others until the socket is closed.
func (m *Member) HearLastWords() (*net.UnixConn, error) {
	id := m.id()
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: lastWordsPrefix + id})
	if err != nil {
		return nil, fmt.Errorf("listening on the unix socket %s%s: %w", lastWordsPrefix, id, err)
	}
	if err := passCredentials(c); err != nil {
		c.Close()
		return nil, fmt.Errorf("asking for the senders of the unix socket %s%s: %w", lastWordsPrefix, id, err)
	}
	go func() {
		b, control := make([]byte, 1024), make([]byte, unix.CmsgSpace(unix.SizeofUcred))
		for {
			n, nc, _, _, err := c.ReadMsgUnix(b, control)
			if err != nil {
				return
			}
			var w LastWords
			if trustSender(control[:nc]) && json.Unmarshal(b[:n], &w) == nil && w.Seconds >= 0 && w.GivenUp >= 0 {
				w.count()
			}
		}
	}()
	return c, nil
}

// passCredentials has the kernel say with each datagram who has sent it.
func passCredentials(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = raw.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1)
	})
	return errors.Join(err, failed)
}

// trustSender tells whether a datagram is of a user that is trusted, as a member's is.
func trustSender(control []byte) bool {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return false
	}
	for _, m := range messages {
		if cred, err := unix.ParseUnixCredentials(&m); err == nil {
			return trusted(cred.Uid)
		}
	}
	return false
}

// SayLastWords counts w, and has the other processes on the node count it. Nothing depends
// on it, so nobody is waited for.
func (m *Member) SayLastWords(w LastWords) {
	w.count()
	list, err := listSockets(lastWordsSockets)
	if err != nil {
		log.Debugf("looking for other processes to tell of this exit: %v", err)
		return
	}
	for _, s := range list.trusted[:min(len(list.trusted), peerLimit)] {
		if s.name != lastWordsPrefix+m.id() {
			w.send(s.name)
		}
	}
}

// send sends w to the socket of a process.
func (w LastWords) send(name string) {
	b, err := json.Marshal(w)
	if err != nil {
		return
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Net: "unixgram", Name: name})
	if err != nil {
		return
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(sockets.Poll))
	c.Write(b)
}
