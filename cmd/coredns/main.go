// Command coredns is CoreDNS with the nodecache plugin and the plugins of plugin.cfg.
package main

import (
	"fmt"
	"log"
	"os"
	"slices"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"
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
	coremain.Run()
}
