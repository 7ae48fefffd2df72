package upstream

import (
	"errors"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// longWait is how long a query has to have waited to make room for others. What can be had at
// all is nearly always there by then.
const longWait = 200 * time.Millisecond

var (
	errCrowded = errors.New("too many queries wait, and it had waited for longest")
	errFull    = errors.New("as many queries as max_concurrent allows wait")
)

// slots are the places of the queries that wait. When there are no more, those that have waited
// for long go, and first those of the domain of which most do: names whose servers are silent
// take no place from the others.
type slots struct {
	limit int // 0: none

	mu          sync.Mutex
	first, last *query // in the order in which they came
	n           int
}

// enter gives a query a place, or returns errFull.
func (s *slots) enter(q *query) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.limit > 0 && s.n >= s.limit && !s.makeRoom(q) {
		return errFull
	}
	q.slotted = true
	if q.before = s.last; s.last != nil {
		s.last.after = q
	} else {
		s.first = q
	}
	s.last = q
	s.n++
	return nil
}

// leave takes back a query's place, if it has one.
func (s *slots) leave(q *query) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(q)
}

// taken is how many places are taken.
func (s *slots) taken() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n
}

func (s *slots) remove(q *query) {
	if !q.slotted {
		return
	}
	q.slotted = false
	if q.before != nil {
		q.before.after = q.after
	} else {
		s.first = q.after
	}
	if q.after != nil {
		q.after.before = q.before
	} else {
		s.last = q.before
	}
	q.before, q.after = nil, nil
	s.n--
}

// makeRoom ends some queries of the domain of which most have waited for long. Where none has,
// all are quick and there are too many of them: then a domain that holds most of the places
// has to stay within them, so that a loop ends.
func (s *slots) makeRoom(newcomer *query) bool {
	counts := map[string]int{}
	for q := s.first; q != nil && time.Since(q.begun) >= longWait; q = q.after {
		counts[q.domain()]++
	}
	long := len(counts) > 0
	if !long {
		for q := s.first; q != nil; q = q.after {
			counts[q.domain()]++
		}
	}
	most := ""
	for d, n := range counts {
		if n > counts[most] {
			most = d
		}
	}
	if !long && (counts[most] < s.limit/2 || most == newcomer.domain()) {
		return false
	}
	why := errCrowded
	if !long {
		why = errFull // no failure of its name
	}
	// Several at a time, so that not every newcomer has to look at them all.
	left := min(s.limit/16+1, counts[most])
	for q := s.first; q != nil && left > 0; {
		next := q.after
		if q.domain() == most {
			s.remove(q)
			q.end(why)
			left--
		}
		q = next
	}
	return true
}

// domain is what a query's name has in common with its neighbours': the last two labels.
func (q *query) domain() string {
	if q.group == "" {
		name := strings.ToLower(q.request.Question[0].Name)
		at := 0
		for more := dns.CountLabel(name) - 2; more > 0; more-- {
			at, _ = dns.NextLabel(name, at)
		}
		q.group = name[at:]
	}
	return q.group
}
