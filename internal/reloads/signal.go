package reloads

import (
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/coredns/caddy"
)

// onSignal reloads when SIGUSR1 comes, in caddy's place. That forgets all hooks of events
// before it, which the reload plugin sets but once in a process: after a reload by the signal
// it would never again notice a change of the Corefile.
var onSignal = sync.OnceFunc(func() {
	// Not Reset: in between the signal would end the process.
	signal.Ignore(syscall.SIGUSR1)
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGUSR1)
	go func() {
		for range c {
			// caddy knows an instance before it is up, and would begin a second one beside it.
			for !caddy.Started() {
				time.Sleep(startedEvery)
			}
			log.Info("SIGUSR1: Reloading")
			if err := reloadNow(); err != nil {
				log.Errorf("SIGUSR1: %v", err)
			}
		}
	}()
})

// startedEvery is how often it is looked whether a start is over.
const startedEvery = 20 * time.Millisecond

func reloadNow() error {
	// While another reload is under way, and for a moment after it, there are two.
	all := caddy.Instances()
	for begun := time.Now(); len(all) > 1 && time.Since(begun) < othersFor; all = caddy.Instances() {
		time.Sleep(startedEvery)
	}
	if len(all) == 0 {
		return nil // an exit
	}
	in, err := load()
	if err != nil {
		return err
	}
	caddy.EmitEvent(caddy.InstanceRestartEvent, nil)
	_, err = all[0].Restart(in)
	return err
}
