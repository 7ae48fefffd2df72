// Package fastpath answers repeated questions without CoreDNS. It has UDP sockets of its own
// on the addresses of server blocks that ask for it, and a table of answers that the cache
// plugin has given, each good for as long as that would answer the same. Everything else it
// hands to CoreDNS as it came.
//
// Listeners has the sockets, one listener an address, which stay over reloads. A socket
// receives (receive.go) and looks into the table (table.go, wire.go) of the serving that an
// instance of CoreDNS has there, which takes the ordinary way for what is not in it
// (serving.go). What is known of the cache plugin's items is in items.go, what is counted as
// other plugins would in counts.go, which server blocks can have it in block.go.
package fastpath

import clog "github.com/coredns/coredns/plugin/pkg/log"

var log = clog.NewWithPlugin("nodecache")
