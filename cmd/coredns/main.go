// Command coredns is CoreDNS with the nodecache plugin and the plugins of plugin.cfg.
package main

import (
	"flag"
	"fmt"
	"log"
	"os"
	"runtime"
	"slices"

	nodecache "github.com/contentful-labs/coredns-nodecache"
	"github.com/contentful-labs/coredns-nodecache/internal/variant"
	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"
	clog "github.com/coredns/coredns/plugin/pkg/log"
	"go.uber.org/automaxprocs/maxprocs"
)

//go:generate go run ./generate

func main() {
	// CoreDNS's own list lacks nodecache, and names plugins that are not compiled in.
	if err := dnsserver.SetDirectives(directives); err != nil {
		log.Fatalf("Setting the order of plugins: %v", err)
	}
	// With their full names, such as dns.nodecache. Since caddy 1.1.4 CoreDNS's own
	// -plugins cuts off four characters of each, whatever they are.
	if len(os.Args) == 2 && slices.Contains([]string{"-plugins", "--plugins"}, os.Args[1]) {
		for _, name := range caddy.ListPlugins()["others"] {
			fmt.Println(name)
		}
		return
	}
	cache := asNodeCache()
	flag.Parse()
	if flag.NArg() > 0 || given("version") == "true" || given("plugins") == "true" {
		coremain.Run() // which ends there
		return
	}
	if err := run(cache); err != nil {
		if !caddy.IsUpgrade() {
			clog.SetOutput(os.Stderr)
		}
		if clog.IsJSON() {
			clog.Fatal(err)
		}
		log.Fatal(err)
	}
}

func given(name string) string { return flag.Lookup(name).Value.String() }

// run is what coremain.Run does, but that a start which fails leaves nothing on the node. cache is
// nil unless CoreDNS is in the place of node-cache.
func run(cache *nodeCache) error {
	if cache != nil {
		if err := cache.prepare(); err != nil {
			return err
		}
	}
	caddy.TrapSignals()
	runtime.Gosched() // its goroutines run first, or a signal that comes early could be lost
	if format := given("log-format"); format != "text" {
		if err := clog.Configure(format, os.Stdout); err != nil {
			return err
		}
	}
	clog.SetOutput(os.Stdout)
	if !clog.IsJSON() {
		log.SetFlags(coremain.LogFlags)
	}
	if _, err := maxprocs.Set(maxprocs.Logger(log.Printf)); err != nil {
		clog.Warningf("Failed to set GOMAXPROCS: %v", err)
	}
	// Before anything that runs iptables. Outside of an image there is nothing to choose.
	if choice, err := variant.Use(variant.Dir); err != nil {
		return err
	} else if choice != "" {
		clog.Infof("iptables is %s", choice)
	}
	corefile, err := caddy.LoadCaddyfile("dns")
	if err != nil {
		return err
	}
	instance, err := start(corefile)
	if err != nil {
		return err
	}
	if !dnsserver.Quiet {
		version := fmt.Sprintf("%s-%s\n%s/%s, %s, %s", caddy.AppName, caddy.AppVersion, runtime.GOOS, runtime.GOARCH, runtime.Version(), coremain.GitCommit)
		if clog.IsJSON() {
			clog.Info(version)
		} else {
			fmt.Println(version)
		}
	}
	if cache != nil {
		cache.run()
	}
	instance.Wait()
	return nil
}

// start has nodecache take everything back unless all plugins and servers come up.
func start(corefile caddy.Input) (*caddy.Instance, error) {
	up := false
	defer func() {
		if !up { // for an error or a panic
			nodecache.Abandon()
		}
	}()
	instance, err := caddy.Start(corefile)
	up = err == nil
	return instance, err
}
