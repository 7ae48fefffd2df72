// Package nodecache makes a node's DNS cache out of CoreDNS.
package nodecache
