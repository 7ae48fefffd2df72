package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
)

// pprofAddr is where a profiled server's plugin pprof listens.
const pprofAddr = "127.0.0.1:6053"

// profiled are the configurations that a profile is made of: what a node's cache does
// most. The load of misses is slower, since the authoritative server has its CPU too.
var profiled = []struct {
	name    string
	plugins []string
	rates   []int
}{
	{"hits", []string{nodecache, cache}, rates[:]},
	{"misses", []string{nodecache}, rates[1:]},
	{"fastpath", []string{fastpath, cache}, rates[:]},
}

// writeProfile writes the CPU profile of the profiled servers, for the compiler.
func (b *bench) writeProfile(to string) error {
	words := []string{"tool", "pprof", "-proto", "-output", to}
	for _, p := range profiled {
		s := &subject{name: p.name, path: *coredns, cpus: 1, file: "Corefile", args: []string{"-conf", "Corefile"},
			env: []string{"GOMAXPROCS=1"}, config: corefile(append(p.plugins, "pprof "+pprofAddr)...)}
		text, err := b.profile(s, p.rates)
		if err != nil {
			return fmt.Errorf("profiling %s: %w", p.name, err)
		}
		part := filepath.Join(b.dir, p.name+".pprof")
		if err := os.WriteFile(part, text, 0o644); err != nil {
			return err
		}
		words = append(words, part)
	}
	if text, err := exec.Command("go", words...).CombinedOutput(); err != nil {
		return fmt.Errorf("merging the profiles: %w: %s", err, text)
	}
	return nil
}

// profile returns the CPU profile of one server that is asked at each rate in turn.
func (b *bench) profile(sub *subject, rates []int) (text []byte, err error) {
	s, _, err := b.launch(sub)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	var g errgroup.Group
	g.Go(func() (err error) {
		text, err = b.fetch(fmt.Sprintf("http://%s/debug/pprof/profile?seconds=%.0f", pprofAddr, max(1, duration.Seconds()*float64(len(rates)))))
		return err
	})
	_, err = b.ask(s, sub, rates)
	return text, errors.Join(err, g.Wait())
}

// fetch returns what is at a URL in the namespace.
func (b *bench) fetch(url string) ([]byte, error) {
	r, err := b.ns.Client(time.Minute).Get(url)
	if err != nil {
		return nil, err
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("asking for %s: %s: %s", url, r.Status, text)
	}
	return text, err
}
