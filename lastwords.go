package nodecache

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strings"
	"time"
)

// Nobody scrapes a process that has just ended. So an exit tells the processes that
// stay on the node how it went, and they count it: a datagram to each one's socket in
// the abstract namespace, which belongs to the network namespace as the members' do.
const lastWordsPrefix = "@nodecache/exits/"

// lastWords is how an exit went.
type lastWords struct {
	Seconds float64 `json:"seconds"`
	GivenUp int64   `json:"givenUp"` // queries without an answer
}

func (w lastWords) count() {
	outcome := drainComplete
	if w.GivenUp > 0 {
		outcome = drainCutShort
	}
	drains.WithLabelValues(outcome).Inc()
	drainDuration.Observe(w.Seconds)
	drainGivenUp.Add(float64(w.GivenUp))
}

// hearLastWords counts the exits of others until the socket is closed.
func hearLastWords(id string) (*net.UnixConn, error) {
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: lastWordsPrefix + id})
	if err != nil {
		return nil, fmt.Errorf("listening on the unix socket %s%s: %w", lastWordsPrefix, id, err)
	}
	go func() {
		b := make([]byte, 1024)
		for {
			n, err := c.Read(b)
			if err != nil {
				return
			}
			var w lastWords
			if json.Unmarshal(b[:n], &w) == nil && w.Seconds >= 0 && w.GivenUp >= 0 {
				w.count()
			}
		}
	}()
	return c, nil
}

// tell counts w, and has the other processes on the node count it. Nothing depends
// on it, so nobody is waited for.
func (w lastWords) tell(id string) {
	w.count()
	list, err := os.ReadFile("/proc/thread-self/net/unix")
	if err != nil {
		return
	}
	b, err := json.Marshal(w)
	if err != nil {
		return
	}
	for line := range strings.Lines(string(list)) {
		f := strings.Fields(line)
		name := f[len(f)-1]
		if !strings.HasPrefix(name, lastWordsPrefix) || name == lastWordsPrefix+id {
			continue
		}
		c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Net: "unixgram", Name: name})
		if err != nil {
			continue
		}
		c.SetDeadline(time.Now().Add(drainPoll))
		c.Write(b)
		c.Close()
	}
}
