// Command coredns is CoreDNS with the nodecache plugin and the plugins of plugin.cfg.
package main

import (
	"log"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"
)

//go:generate go run ./generate

func main() {
	// CoreDNS's own list lacks nodecache, and names plugins that are not compiled in.
	if err := dnsserver.SetDirectives(directives); err != nil {
		log.Fatalf("Setting the order of plugins: %v", err)
	}
	coremain.Run()
}
