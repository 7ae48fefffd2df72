// Command coredns is CoreDNS with the nodecache plugin and the plugins of plugin.cfg.
package main

import (
	"log"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"

	// Libraries of the nodecache plugin.
	_ "github.com/coreos/go-iptables/iptables"
	_ "github.com/google/nftables"
	_ "github.com/miekg/dns"
	_ "github.com/prometheus/client_golang/prometheus"
	_ "github.com/prometheus/procfs"
	_ "github.com/vishvananda/netlink"
	_ "github.com/vishvananda/netns"
)

//go:generate go run ./generate

func main() {
	// CoreDNS's own list neither knows nodecache nor misses the plugins that are left out.
	if err := dnsserver.SetDirectives(directives); err != nil {
		log.Fatalf("Setting the order of plugins: %v", err)
	}
	coremain.Run()
}
