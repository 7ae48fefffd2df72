// Command coredns is CoreDNS with the nodecache plugin.
package main

import (
	_ "github.com/coredns/coredns/core/plugin"
	"github.com/coredns/coredns/coremain"

	_ "github.com/contentful-labs/coredns-nodecache"
	_ "github.com/coreos/go-iptables/iptables"
	_ "github.com/google/nftables"
	_ "github.com/miekg/dns"
	_ "github.com/prometheus/client_golang/prometheus"
	_ "github.com/prometheus/procfs"
	_ "github.com/vishvananda/netlink"
	_ "github.com/vishvananda/netns"
)

func main() { coremain.Run() }
