package main

import (
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/plugin"
	clog "github.com/coredns/coredns/plugin/pkg/log"
	"github.com/coredns/coredns/plugin/pkg/reuseport"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/contentful-labs/coredns-nodecache/internal/nodecachemode"
)

// A nodeCache is CoreDNS in the place of node-cache: its Corefile comes from a template, of which
// it is made anew whenever caddy or the reload plugin asks for the Corefile.
type nodeCache struct {
	nodecachemode.Source

	mu      sync.Mutex
	served  string // the Corefile that was last given to caddy
	said    map[string]bool
	written string
}

// asNodeCache returns nil unless the command line is node-cache's, of which it removes the name.
func asNodeCache() *nodeCache {
	args, yes := nodecachemode.Wanted(os.Args)
	if !yes {
		return nil
	}
	os.Args = append(os.Args[:1:1], args...)
	n := &nodeCache{said: map[string]bool{}}
	n.Register(flag.CommandLine)
	return n
}

// prepare is what comes between the flags and the start. With -print the process ends there.
func (n *nodeCache) prepare() error {
	if err := n.Check(); err != nil {
		return fmt.Errorf("%s: %w", nodecachemode.Name, err)
	}
	// The Corefile comes from here: CoreDNS's own loader would read one too.
	if err := flag.Set("conf", ""); err != nil {
		return err
	}
	if n.Print {
		r, err := n.Read()
		if err != nil {
			return fmt.Errorf("%s: %w", nodecachemode.Name, err)
		}
		for _, note := range n.news(r, nil) {
			fmt.Fprintln(os.Stderr, note)
		}
		fmt.Print(r.Corefile)
		os.Exit(0)
	}
	caddy.RegisterCaddyfileLoader(nodecachemode.Name, caddy.LoaderFunc(n.load))
	return nil
}

// run is what goes on beside CoreDNS once it serves.
func (n *nodeCache) run() {
	for _, name := range n.Ignored() {
		clog.Infof("%s: the flag %s is accepted without effect", nodecachemode.Name, name)
	}
	go serveMetrics(n.MetricsAt)
	go n.removeLeft()
	if n.SignalReload {
		go n.watch()
	}
}

// load implements caddy.Loader.
func (n *nodeCache) load(serverType string) (caddy.Input, error) {
	r, err := n.Read()
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.served == "" && err != nil {
		return nil, err // which ends the start, and says so
	}
	n.warn(r, err)
	if err != nil {
		return nil, err
	}
	n.served = r.Corefile
	if r.Made && n.Corefile != n.Template {
		n.write(r.Corefile)
	}
	return caddy.CaddyfileInput{Contents: []byte(r.Corefile), Filepath: n.Corefile, ServerTypeName: serverType}, nil
}

// news is what has not been said before, and counts what is wrong with the files. What has been
// mended in between is said again.
func (n *nodeCache) news(r nodecachemode.Reading, err error) (news []string) {
	said := map[string]bool{}
	say := func(text string, wrong bool) {
		said[text] = true
		if n.said[text] {
			return
		}
		news = append(news, text)
		if wrong {
			setupErrors().WithLabelValues("configmap").Inc()
		}
	}
	if err != nil {
		say(err.Error(), true)
	}
	if r.Invalid != nil {
		say(r.Invalid.Error()+"; its last right state stays in force", true)
	}
	for _, note := range r.Notes {
		say(note, false)
	}
	n.said = said
	return news
}

func (n *nodeCache) warn(r nodecachemode.Reading, err error) {
	for _, news := range n.news(r, err) {
		clog.Warningf("%s: %s", nodecachemode.Name, news)
	}
}

// write leaves the Corefile where node-cache does, for whoever looks there. Nothing reads it.
func (n *nodeCache) write(corefile string) {
	if n.written == corefile {
		return
	}
	n.written = corefile
	if old, err := os.ReadFile(n.Corefile); err == nil && string(old) == corefile {
		return
	}
	err := os.WriteFile(n.Corefile, []byte(corefile), 0o644)
	if errors.Is(err, syscall.EROFS) || errors.Is(err, fs.ErrPermission) {
		return // as the image's root is meant to be; -print shows it
	}
	if err != nil {
		clog.Warningf("%s: writing the Corefile for whoever looks there: %v", nodecachemode.Name, err)
	}
}

// How often the files are read for -reloadwithsignal, as by node-cache, and how often a port that is taken is tried.
const (
	readEvery = 10 * time.Second
	tryEvery  = 5 * time.Second
)

// removeLeft removes the rules of the node-cache in whose place this is, once it has gone.
func (n *nodeCache) removeLeft() {
	for told := false; ; {
		busy, removed, err := n.RemoveLeft()
		if err != nil && !told {
			clog.Warningf("%s: removing the rules that node-cache has left: %v; it is tried again", nodecachemode.Name, err)
			told = true
		}
		if removed > 0 {
			clog.Infof("%s: removed %d rules that node-cache has left", nodecachemode.Name, removed)
		}
		if !busy && err == nil {
			return
		}
		time.Sleep(readEvery)
	}
}

// watch reloads when the Corefile has become another, for a template without the reload plugin.
func (n *nodeCache) watch() {
	for range time.Tick(readEvery) {
		r, err := n.Read()
		n.mu.Lock()
		changed := err == nil && r.Corefile != n.served
		n.warn(r, err)
		n.mu.Unlock()
		if !changed {
			continue
		}
		if err := syscall.Kill(os.Getpid(), syscall.SIGUSR1); err != nil {
			clog.Errorf("%s: reloading: %v", nodecachemode.Name, err)
		}
	}
}

// serveMetrics serves all metrics on an address of their own, as node-cache does. A second
// process on the node shares the port; with node-cache itself it is free when that has ended.
func serveMetrics(at string) {
	for told := false; ; time.Sleep(tryEvery) {
		listener, err := reuseport.Listen("tcp", at)
		if err == nil {
			mux := http.NewServeMux()
			mux.Handle("/metrics", promhttp.Handler())
			server := http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: time.Minute, IdleTimeout: time.Minute}
			err = server.Serve(listener)
		}
		if !told {
			clog.Warningf("%s: serving metrics on %s (-metrics-listen-address): %v; it is tried again", nodecachemode.Name, at, err)
			told = true
		}
	}
}

// setupErrors is the plugin's counter, which node-cache has too, with one label more.
var setupErrors = sync.OnceValue(func() *prometheus.CounterVec {
	c := prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: plugin.Namespace,
		Subsystem: "nodecache",
		Name:      "setup_errors_total",
		Help:      "Counter of errors while making or checking the interface, its addresses and the firewall rules.",
	}, []string{"errortype"})
	var there prometheus.AlreadyRegisteredError
	if errors.As(prometheus.Register(c), &there) {
		return there.ExistingCollector.(*prometheus.CounterVec)
	}
	return c
})
