package main

import (
	"slices"

	"github.com/coredns/coredns/core/dnsserver"
	_ "github.com/coredns/coredns/core/plugin"
	"github.com/coredns/coredns/coremain"

	_ "github.com/contentful-labs/coredns-nodecache"
)

func main() {
	i := slices.Index(dnsserver.Directives, "bind")
	dnsserver.Directives = slices.Insert(dnsserver.Directives, i+1, "nodecache")
	coremain.Run()
}
