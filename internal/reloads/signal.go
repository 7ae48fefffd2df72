package reloads

import (
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/coredns/caddy"
)

// onSignal reloads when SIGUSR1 comes, in caddy's place. That forgets all hooks of events
// before it, which the reload plugin sets but once in a process: after a reload by the signal
// it would never again notice a change of the Corefile.
var onSignal = sync.OnceFunc(func() {
	signal.Reset(syscall.SIGUSR1)
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGUSR1)
	go func() {
		for range c {
			log.Info("SIGUSR1: Reloading")
			if err := reloadNow(); err != nil {
				log.Errorf("SIGUSR1: %v", err)
			}
		}
	}()
})

func reloadNow() error {
	in, err := load()
	if err != nil {
		return err
	}
	all := caddy.Instances()
	if len(all) == 0 {
		return nil // an exit
	}
	caddy.EmitEvent(caddy.InstanceRestartEvent, nil)
	_, err = all[0].Restart(in)
	return err
}
