package e2e

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// A Corefile that can't work is refused with its file, its line and the reason, and
// the node is left alone.
func TestBadInput(t *testing.T) {
	// The directive of every Corefile below stands in line 3 if there is a bind.
	one := func(bind, directive string) string {
		return ".:53 {\n" + bind + directive + "\n forward . 10.0.2.2\n}\n"
	}
	const bind = " bind 169.254.20.10\n"
	property := func(lines ...string) string {
		return one(bind, " nodecache {\n"+strings.Join(lines, "\n")+"\n }")
	}
	two := func(first, second string) string {
		return "a.:53 {\n" + bind + " nodecache {\n" + first + "\n }\n}\n" +
			"b.:53 {\n" + bind + " nodecache {\n" + second + "\n }\n}\n"
	}
	fast := func(line string) string {
		return one(bind, " nodecache {\nfastpath\n }\n cache\n "+line)
	}
	for _, c := range []struct {
		name, corefile string
		words          []string // of which the first is the line
		options        func(n *node) lab.Options
		prepare        func(n *node)
	}{
		{
			name: "no-service", corefile: one(" bind 169.254.20.10 {$KUBE_DNS_SERVICE_HOST}\n", " nodecache"),
			words: []string{":2", "plugin/bind", "the variable KUBE_DNS_SERVICE_HOST is empty", "the Service kube-dns,", "$(COREDNS_SERVICE_HOST) for coredns"},
		},
		{
			name: "no-service-of-another-name", corefile: one(" bind {$KUBE_DNS_SERVICE_HOST}\n", " nodecache"),
			words: []string{":2", "the variable MY_DNS_SERVICE_HOST is empty", "the Service my-dns,"},
			options: func(*node) lab.Options {
				return lab.Options{Env: []string{"KUBE_DNS_SERVICE_HOST=$(MY_DNS_SERVICE_HOST)"}}
			},
		},
		{
			name: "no-upstream", corefile: one(bind, " nodecache\n forward . {$KUBE_DNS_UPSTREAM_SERVICE_HOST}:53 {\n prefer_udp\n }"),
			words: []string{":4", "plugin/forward", "the variable KUBE_DNS_UPSTREAM_SERVICE_HOST is empty", "the Service kube-dns-upstream,"},
		},
		{
			name: "no-value-of-a-variable", corefile: one(bind, " nodecache\n forward . {%RESOLVER%}"),
			words: []string{":4", "plugin/forward", "the variable RESOLVER is empty: set it"},
		},
		{name: "no-bind", corefile: one("", " nodecache"), words: []string{":2", "bind"}},
		{name: "bind-wildcard", corefile: one(" bind 0.0.0.0\n", " nodecache"), words: []string{":3", "0.0.0.0"}},
		{name: "bind-wildcard6", corefile: one(" bind ::\n", " nodecache"), words: []string{":3", "::"}},
		{name: "bind-mapped", corefile: one(" bind ::ffff:169.254.20.10\n", " nodecache"), words: []string{":3", "169.254.20.10"}},
		{name: "bind-multicast", corefile: one(" bind 224.0.0.1\n", " nodecache"), words: []string{":3", "224.0.0.1", "multicast"}},
		{name: "bind-broadcast", corefile: one(" bind 255.255.255.255\n", " nodecache"), words: []string{":3", "255.255.255.255"}},
		{name: "bind-link-local6", corefile: one(" bind fe80::1\n", " nodecache"), words: []string{":3", "fe80::1"}},
		{name: "unknown-property", corefile: property("nonsense 1"), words: []string{":4", "nonsense"}},
		{name: "unknown-argument", corefile: one(bind, " nodecache nonsense"), words: []string{":3", "nonsense"}},
		{name: "repeated-property", corefile: property("sync 5s", "sync 5s"), words: []string{":5", "sync"}},
		{name: "repeated-directive", corefile: one(bind, " nodecache\n nodecache"), words: []string{":4", "nodecache"}},
		{name: "no-value", corefile: property("interface"), words: []string{":4", "interface"}},
		{name: "two-values", corefile: property("interface a b"), words: []string{":4", "interface"}},
		{name: "interface-long", corefile: property("interface abcdefghijklmnop"), words: []string{":4", "abcdefghijklmnop"}},
		{name: "interface-slash", corefile: property("interface a/b"), words: []string{":4", "a/b"}},
		{name: "firewall-unknown", corefile: property("firewall pf"), words: []string{":4", "pf"}},
		{name: "firewall-disagrees", corefile: two("firewall none", "firewall iptables"), words: []string{":10", "firewall", "Corefile:4"}},
		{name: "sync-disagrees", corefile: two("sync 5s", "sync 6s"), words: []string{":10", "sync", "Corefile:4"}},
		{name: "sync-negative", corefile: property("sync -5s"), words: []string{":4", "-5s"}},
		{name: "sync-zero", corefile: property("sync 0s"), words: []string{":4", "0s"}},
		{name: "sync-tiny", corefile: property("sync 1ns"), words: []string{":4", "1ns"}},
		{name: "sync-huge", corefile: property("sync 9999h"), words: []string{":4", "9999h"}},
		{name: "sync-word", corefile: property("sync abc"), words: []string{":4", "abc"}},
		{name: "untracked-zero", corefile: property("untracked 0"), words: []string{":4", "untracked", "0"}},
		{name: "untracked-large", corefile: property("untracked 65536"), words: []string{":4", "65536"}},
		{name: "untracked-word", corefile: property("untracked x"), words: []string{":4", "x"}},
		{name: "fastpath-word", corefile: property("fastpath many"), words: []string{":4", "fastpath", "many"}},
		{name: "fastpath-small", corefile: property("fastpath 1"), words: []string{":4", "fastpath 1", "64"}},
		{name: "fastpath-large", corefile: property("fastpath 99999999"), words: []string{":4", "99999999"}},
		{name: "fastpath-two-values", corefile: property("fastpath 1000 2000"), words: []string{":4", "fastpath"}},
		{name: "fastpath-twice", corefile: property("fastpath", "fastpath"), words: []string{":5", "fastpath"}},
		{name: "fastpath-without-cache", corefile: property("fastpath"), words: []string{":4", "fastpath", "cache"}},
		{name: "fastpath-with-log", corefile: fast("log"), words: []string{":4", "fastpath", "log"}},
		{name: "fastpath-with-acl", corefile: fast("acl {\n allow net 0.0.0.0/0\n }"), words: []string{":4", "fastpath", "acl"}},
		{name: "fastpath-with-loadbalance", corefile: fast("loadbalance {\n prefer 10.0.0.0/8\n }"), words: []string{":4", "fastpath", "loadbalance"}},
		{name: "fastpath-with-rewrite", corefile: fast("rewrite edns0 local set 0xffee abcd"), words: []string{":4", "fastpath", "rewrite"}},
		{name: "fastpath-with-trace", corefile: fast("trace"), words: []string{":4", "fastpath", "trace"}},
		{name: "fastpath-with-multisocket", corefile: fast("multisocket 2"), words: []string{":4", "fastpath", "multisocket"}},
		{name: "fastpath-with-shed", corefile: fast("shed"), words: []string{":4", "fastpath", "shed"}},
		{
			name:     "fastpath-with-view-in-another-block",
			corefile: fast("errors") + "v.:53 {\n" + bind + " view here {\n expr true\n }\n forward . 10.0.2.2\n}\n",
			words:    []string{":4", "fastpath", "view"},
		},
		{
			name: "link-of-another-type", corefile: one(bind, " nodecache"), words: []string{":3", "nodelocaldns", "veth"},
			prepare: func(n *node) {
				_, err := n.Node.Run("ip", "link", "add", "nodelocaldns", "type", "veth", "peer", "name", "peer")
				n.must(err)
			},
		},
		{
			name: "address-of-ipvs", corefile: one(" bind 169.254.20.10 10.96.0.10\n", " nodecache"), words: []string{":3", "10.96.0.10", "kube-ipvs0"},
			prepare: func(n *node) {
				n.must(n.Node.Do(func() error {
					attrs := netlink.NewLinkAttrs()
					attrs.Name = "kube-ipvs0"
					if err := netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TUN}); err != nil {
						return err
					}
					return lab.AddAddrs("kube-ipvs0", "10.96.0.10/32")
				}))
			},
		},
		{
			name: "interface-none-without-the-address", corefile: property("interface none"), words: []string{":3", "169.254.20.10", "none"},
		},
		{
			name: "no-iptables", corefile: property("firewall iptables"), words: []string{":4", "iptables"},
			options: func(n *node) lab.Options { return lab.Options{Env: []string{"PATH=" + n.Dir}} },
		},
		{
			name: "no-net-admin", corefile: one(bind, " nodecache"), words: []string{":3", "NET_ADMIN"},
			options: func(*node) lab.Options {
				return lab.Options{Via: []string{"capsh", "--drop=cap_net_admin", "--", "-c", `exec "$0" "$@"`}}
			},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t, backend{lab.NFT, ""})
			if c.prepare != nil {
				c.prepare(n)
			}
			var o lab.Options
			if c.options != nil {
				o = c.options(n)
			}
			before := n.snapshot()
			said := n.refuse(c.corefile, o)
			n.has(said, append([]string{"Corefile" + c.words[0]}, c.words[1:]...)...)
			n.same("after a start that was refused", before, n.snapshot())
		})
	}
}

// lock takes the lock of the lab's iptables, as a long iptables-restore of another
// program does, and returns how to let it go.
func (n *node) lock() (release func()) {
	n.Helper()
	f, err := os.OpenFile(n.XtablesLock(), os.O_RDWR|os.O_CREATE, 0o600)
	n.must(err)
	n.Cleanup(func() { f.Close() })
	n.must(syscall.Flock(int(f.Fd()), syscall.LOCK_EX))
	return func() { f.Close() }
}

// A held lock is waited for, and said to be.
func TestHeldXtablesLock(t *testing.T) {
	n := newNode(t, iptablesLegacy)
	before := n.snapshot()
	release := n.lock()
	p := n.launch(n.corefile(), lab.Options{})
	n.must(p.WaitLog(0, "lock"))
	if strings.Contains(p.Log(), inPlace) {
		n.Error("in place although the lock was held")
	}
	release()
	n.must(p.WaitServing())
	n.must(p.WaitLog(0, inPlace))
	n.answersEverybody(false, addrs...)

	release = n.lock()
	mark := p.Mark()
	n.must(p.Signal(syscall.SIGTERM))
	n.must(p.WaitLog(mark, "lock"))
	release()
	_, err := p.Wait()
	n.must(err)
	n.same("after the exit", before, n.snapshot())
}

// But not for ever: the start fails with the reason, and no rule is in force.
func TestXtablesLockHeldForGood(t *testing.T) {
	n := newNode(t, iptablesLegacy)
	before := n.snapshot()
	release := n.lock()
	said := n.refuse(n.corefile(), lab.Options{})
	n.has(said, "xtables", "lock")
	release()
	n.same("after the start that failed", before, n.snapshot())
	p := n.serve(n.corefile())
	p.exit(syscall.SIGTERM)
	n.same("after the next exit", before, n.snapshot())
}

// However many addresses there are, it takes the same few processes.
func TestProcessesForked(t *testing.T) {
	for _, v := range []lab.Iptables{lab.NFT, lab.Legacy} {
		for _, count := range []int{1, 50} {
			t.Run(fmt.Sprintf("%s-%d", v, count), func(t *testing.T) {
				n := newNode(t, backend{v, "iptables"})
				before := n.snapshot()
				calls := filepath.Join(n.Dir, "calls")
				wrapped := filepath.Join(n.Dir, "wrapped")
				n.must(os.Mkdir(wrapped, 0o755))
				for _, family := range []string{"iptables", "ip6tables"} {
					for _, what := range []string{"", "-save", "-restore"} {
						script := fmt.Sprintf("#!/bin/sh\necho \"%[1]s $*\" >>%[2]s\nexec %[3]s/bin/%[1]s \"$@\"\n", family+what, calls, n.Dir)
						n.must(os.WriteFile(filepath.Join(wrapped, family+what), []byte(script), 0o755))
					}
				}
				path := wrapped + ":" + os.Getenv("PATH") + ":/usr/sbin:/sbin"
				var bound []string
				for i := range count {
					bound = append(bound, fmt.Sprintf("10.96.2.%d fd00:96::2:%d", i+1, i+1))
				}
				count := func(what string, most int, took time.Duration) {
					n.Helper()
					text, err := os.ReadFile(calls)
					n.must(err)
					n.must(os.Remove(calls))
					for _, family := range []string{"iptables", "ip6tables"} {
						k := bytes.Count(append([]byte("\n"), text...), []byte("\n"+family))
						n.Logf("%s: %d processes of %s; %v", what, k, family, took.Round(time.Millisecond))
						if k > most || k == 0 {
							n.Errorf("%s: %d processes of %s, want 1 to %d:\n%s", what, k, family, most, text)
						}
					}
				}
				begun := time.Now()
				p := n.serveWith(n.block(".:53", strings.Join(bound, " ")), lab.Options{Env: []string{"PATH=" + path}})
				count("start", 4, time.Since(begun))
				begun = time.Now()
				p.exit(syscall.SIGTERM)
				// Before it leaves it looks what of others stands in the same chains.
				count("exit", 5, time.Since(begun))
				n.same("after the exit", before, n.snapshot())
			})
		}
	}
}
