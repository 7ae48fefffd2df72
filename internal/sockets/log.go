// Package sockets knows who listens on a node: this process's own sockets, which CoreDNS does
// not hand out, how to leave them without loss and to bound what clients hold of them, and
// the sockets of others on its ports.
package sockets

import clog "github.com/coredns/coredns/plugin/pkg/log"

var log = clog.NewWithPlugin("nodecache")
