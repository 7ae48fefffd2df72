package upstream

import (
	"fmt"
	"sync"
	"time"

	clog "github.com/coredns/coredns/plugin/pkg/log"
)

var log = clog.NewWithPlugin(directive)

const (
	// sayEvery is how often lines of one kind are logged.
	sayEvery = time.Minute
	// mostKinds bounds what is remembered of lines.
	mostKinds = 256
)

// A teller writes log lines: the first of each kind at once, and the last one of those that
// come within a minute of it at that minute's end, with how many there were.
type teller struct {
	where string // in the Corefile

	mu    sync.Mutex
	kinds map[string]*kind
}

// A kind of line has been logged within the last minute.
type kind struct {
	held  int
	write func(string, ...any)
	last  string
}

func newTeller(where string) *teller { return &teller{where: where, kinds: map[string]*kind{}} }

func (t *teller) info(format string, args ...any)  { t.say(log.Infof, format, args) }
func (t *teller) warn(format string, args ...any)  { t.say(log.Warningf, format, args) }
func (t *teller) error(format string, args ...any) { t.say(log.Errorf, format, args) }

// say logs a line, of which the format and the first argument are the kind.
func (t *teller) say(write func(string, ...any), format string, args []any) {
	of, text := format, fmt.Sprintf(format, args...)
	if len(args) > 0 {
		of += fmt.Sprint(args[0])
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if k := t.kinds[of]; k != nil {
		k.held++
		k.write, k.last = write, text
		return
	}
	write("%s: %s", t.where, text)
	if len(t.kinds) < mostKinds {
		t.kinds[of] = &kind{}
		time.AfterFunc(sayEvery, func() { t.settle(of) })
	}
}

// settle logs what has been held back of a kind.
func (t *teller) settle(of string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	k := t.kinds[of]
	if k.held == 0 {
		delete(t.kinds, of)
		return
	}
	k.write("%s: %s (%d like it in the last %v)", t.where, k.last, k.held, sayEvery)
	k.held = 0
	time.AfterFunc(sayEvery, func() { t.settle(of) })
}
