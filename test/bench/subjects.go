package main

import (
	"fmt"
	"net/netip"
)

// Where the servers and the authoritative server behind them listen.
var (
	serverAddr   = netip.MustParseAddrPort("127.0.0.1:53")
	upstreamAddr = netip.MustParseAddrPort("127.0.0.2:53")
)

// A subject is a server to measure: a cache that forwards everything, on one CPU, with
// room for all names, without DNSSEC validation and without logs of queries.
type subject struct {
	name    string // for -subjects
	label   string // in tables
	program string // "" for *coredns
	pkg     string // of Debian
	version string // the option that prints it
	c       bool   // counts among the C caches, to which others are compared
	cpus    int
	file    string // the name of its configuration
	config  func(room int) string
	args    []string
	env     []string

	manifest bool // as k8s/node-local.yaml has it but for fastpath, in place of config and env
	fastpath bool // and with fastpath

	path string // of the program, once found
}

func names(all []*subject) (n []string) {
	for _, s := range all {
		n = append(n, s.name)
	}
	return n
}

var subjects = []*subject{
	{name: "fastpath", label: "nodecache with fastpath", cpus: 1, file: "Corefile", args: []string{"-conf", "Corefile"},
		env: []string{"GOMAXPROCS=1"}, config: corefile("nodecache {\n interface none\n firewall none\n fastpath %[3]d\n }")},
	{name: "nodecache", label: "nodecache", cpus: 1, file: "Corefile", args: []string{"-conf", "Corefile"},
		env: []string{"GOMAXPROCS=1"}, config: corefile("nodecache {\n interface none\n firewall none\n }")},
	{name: "manifest", label: "nodecache as in the manifest, without fastpath", cpus: 1, args: []string{"-conf", "Corefile"}, manifest: true},
	{name: "manifest-fastpath", label: "nodecache as in the manifest, with fastpath", cpus: 1, args: []string{"-conf", "Corefile"}, manifest: true, fastpath: true},
	{name: "coredns", label: "CoreDNS", version: "-version", cpus: 1, file: "Corefile", args: []string{"-conf", "Corefile"},
		env: []string{"GOMAXPROCS=1"}, config: corefile("")},
	{name: "unbound", label: "unbound", program: "unbound", pkg: "unbound", version: "-V", c: true, cpus: 1,
		file: "unbound.conf", args: []string{"-d", "-p", "-c", "unbound.conf"}, config: unbound},
	{name: "dnsdist", label: "dnsdist", program: "dnsdist", pkg: "dnsdist", version: "--version", c: true, cpus: 1,
		file: "dnsdist.conf", args: []string{"--supervised", "--disable-syslog", "-C", "dnsdist.conf"}, config: dnsdist},
	{name: "dnsmasq", label: "dnsmasq", program: "dnsmasq", pkg: "dnsmasq-base", version: "--version", c: true, cpus: 1,
		file: "dnsmasq.conf", args: []string{"--keep-in-foreground", "-C", "dnsmasq.conf"}, config: dnsmasq},
	{name: "knot-resolver", label: "Knot Resolver", program: "kresd", pkg: "knot-resolver", version: "--version", c: true, cpus: 1,
		file: "kresd.conf", args: []string{"-n", "-c", "kresd.conf", "."}, config: kresd},
	{name: "fastpath-2cpu", label: "nodecache with fastpath, two CPUs", cpus: 2, file: "Corefile", args: []string{"-conf", "Corefile"},
		env: []string{"GOMAXPROCS=2"}, config: corefile("nodecache {\n interface none\n firewall none\n fastpath %[3]d\n }")},
}

// corefile is what a node's cache has, but for the rules of a firewall and an interface
// of its own, which the others do not have either.
func corefile(nodecache string) func(room int) string {
	return func(room int) string {
		return fmt.Sprintf(`.:53 {
 bind %[1]v
 `+nodecache+`
 prometheus 127.0.0.1:9253
 errors
 cache {
  success %[3]d
 }
 forward . %[2]v
}
`, serverAddr.Addr(), upstreamAddr, room)
	}
}

func unbound(room int) string {
	return fmt.Sprintf(`server:
 directory: ""
 chroot: ""
 username: ""
 pidfile: ""
 do-daemonize: no
 use-syslog: no
 verbosity: 0
 interface: %[1]v
 access-control: 127.0.0.0/8 allow
 num-threads: 1
 # Without the validator.
 module-config: "iterator"
 msg-cache-size: %[4]d
 rrset-cache-size: %[5]d
 rrset-roundrobin: no
 do-not-query-localhost: no
remote-control:
 control-enable: no
forward-zone:
 name: "."
 forward-addr: %[2]v@%[3]d
`, serverAddr.Addr(), upstreamAddr.Addr(), upstreamAddr.Port(), room*1024, room*1024)
}

func dnsdist(room int) string {
	return fmt.Sprintf(`setLocal("%v")
setACL({"127.0.0.0/8"})
newServer({address="%v", checkName="%s"})
getPool(""):setCache(newPacketCache(%d))
-- Several queries with one system call.
setUDPMultipleMessagesVectorSize(64)
setVerboseHealthChecks(false)
setSecurityPollSuffix("")
`, serverAddr, upstreamAddr, zoneName, room)
}

func dnsmasq(room int) string {
	return fmt.Sprintf(`listen-address=%v
bind-interfaces
user=root
group=root
pid-file
no-resolv
no-hosts
server=%v#%d
cache-size=%d
dns-forward-max=1000
log-facility=-
`, serverAddr.Addr(), upstreamAddr.Addr(), upstreamAddr.Port(), room)
}

func kresd(room int) string {
	return fmt.Sprintf(`net.listen('%v', %d, {kind = 'dns'})
log_level('crit')
-- Without the validator, and without what phones out.
trust_anchors.remove('.')
modules.unload('ta_update')
modules.unload('ta_signal_query')
modules.unload('priming')
modules.unload('detect_time_jump')
modules.unload('detect_time_skew')
cache.size = %d
policy.add(policy.all(policy.FORWARD({'%v@%d'})))
`, serverAddr.Addr(), serverAddr.Port(), max(room*1024, 32<<20), upstreamAddr.Addr(), upstreamAddr.Port())
}
