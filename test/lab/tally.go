package lab

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"
)

// A Tally is what became of queries.
type Tally struct {
	Sent     int
	Answered int
	Lost     int // no answer in time
	Refused  int // an ICMP error, or a TCP reset to the first packet
	Wrong    int // an answer that is not the one to the question

	FromCluster int           // answers that came straight from the cluster
	Gap         time.Duration // the longest time without an answer
	Errors      []string      // the first few of what went wrong
}

// mostErrors is how many errors of one tally are kept.
const mostErrors = 20

// Bad is how many queries got no right answer.
func (t *Tally) Bad() int { return t.Lost + t.Refused + t.Wrong }

// Add adds another's numbers.
func (t *Tally) Add(o *Tally) {
	t.Sent += o.Sent
	t.Answered += o.Answered
	t.Lost += o.Lost
	t.Refused += o.Refused
	t.Wrong += o.Wrong
	t.FromCluster += o.FromCluster
	t.Gap = max(t.Gap, o.Gap)
	t.Errors = append(t.Errors, o.Errors...)
	t.Errors = t.Errors[:min(len(t.Errors), mostErrors)]
}

// answered counts a right answer: the cluster's own TTL is longer than any cache's.
func (t *Tally) answered(ttl uint32) {
	t.Answered++
	if ttl > 3600 {
		t.FromCluster++
	}
}

// failed counts a query that got no right answer, by what err wraps.
func (t *Tally) failed(err error) {
	switch {
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EDESTADDRREQ):
		t.Refused++
	case errors.Is(err, errWrong):
		t.Wrong++
	default:
		t.Lost++
	}
	if len(t.Errors) < mostErrors {
		t.Errors = append(t.Errors, err.Error())
	}
}
