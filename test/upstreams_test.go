package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// looping are Corefiles by which a query would come back to where it has been, and the
// line of the upstream.
func looping(n *node) []struct {
	name, corefile string
	words          []string // of which the first is the line
} {
	cert, key := n.certificate()
	one := func(key, bind, upstream string, lines ...string) string {
		return strings.Join(append([]string{key + " {", "bind " + bind, "nodecache", upstream}, append(lines, "}\n")...), "\n")
	}
	const v4, v6 = "169.254.20.10", "fd00:20::10"
	type row = struct {
		name, corefile string
		words          []string
	}
	return []row{
		{"address", one(".:53", v4, "forward . 169.254.20.10"), []string{":4", "169.254.20.10"}},
		{"another-address-of-the-block", one(".:53", allAddrs, "forward . 10.96.0.10"), []string{":4", "10.96.0.10"}},
		{"port", one(".:5353", v4, "forward . 169.254.20.10:5353"), []string{":4", "169.254.20.10:5353"}},
		{"scheme", one(".:53", v4, "forward . dns://169.254.20.10"), []string{":4"}},
		{"second-upstream", one(".:53", v4, "forward . 10.0.2.2 169.254.20.10"), []string{":4", "169.254.20.10"}},
		{"second-stanza", one(".:53", v4, "forward lab 10.0.2.2", "forward . 169.254.20.10"), []string{":5", "169.254.20.10"}},
		{"file", one(".:53", v4, "forward . ours.conf"), []string{":4", "ours.conf", "169.254.20.10"}},
		{"second-file", one(".:53", v4, "forward . others.conf ours.conf"), []string{":4", "ours.conf"}},
		{"ipv6", one(".:53", v6, "forward . fd00:20::10"), []string{":4", "fd00:20::10"}},
		{"ipv6-brackets", one(".:53", v6, "forward . [fd00:20::10]:53"), []string{":4", "fd00:20::10"}},
		{"ipv6-long", one(".:53", v6, "forward . FD00:0020:0000::000A FD00:0020::0010"), []string{":4", "fd00:20::10"}},
		{"ipv6-mapped", one(".:53", v4, "forward . ::ffff:169.254.20.10"), []string{":4", "169.254.20.10"}},
		{"ipv6-mapped-hex", one(".:53", v4, "forward . [::ffff:a9fe:140a]:53"), []string{":4", "169.254.20.10"}},
		{"zone", one(".:53", v6, "forward . fd00:20::10%eth0"), []string{":4", "fd00:20::10"}},
		{"tls", one("tls://.:853", v4, "forward . tls://169.254.20.10", "tls "+cert+" "+key), []string{":4", "tls://169.254.20.10"}},
		{"tls-servername", one("tls://.", v4, "forward . tls://169.254.20.10%cache.test:853", "tls "+cert+" "+key), []string{":4"}},
		{"grpc", one("grpc://.:5443", v4, "grpc . 169.254.20.10:5443", "tls "+cert+" "+key), []string{":4", "grpc"}},
		{"https", one("https://.", v4, "forward . https://169.254.20.10", "tls "+cert+" "+key), []string{":4"}},
		{"interface", one(".:53", "eth0", "forward . 10.0.3.2"), []string{":4", "10.0.3.2"}},
		{"interface6", one(".:53", "eth0", "forward . fd00:3::2"), []string{":4", "fd00:3::2"}},
		{"custom-block", n.block(".:53", v4) + one("corp.test:53", v4, "forward . 169.254.20.10"), []string{":15", "corp.test"}},
		{"wildcard", n.block(".:53", v4) + ".:5300 {\nforward . 127.0.0.1:5300\n}\n", []string{":13", "127.0.0.1:5300"}},
		{"wildcard-127", n.block(".:53", v4) + ".:5300 {\nforward . 127.0.0.53:5300\n}\n", []string{":13", "127.0.0.53:5300"}},
		{"wildcard-address", n.block(".:53", v4) + ".:5300 {\nforward . 10.0.2.1:5300\n}\n", []string{":13", "10.0.2.1:5300"}},
		{"wildcard-ours", n.block(".:53", v4) + ".:5300 {\nforward . 169.254.20.10:5300\n}\n", []string{":13", "169.254.20.10:5300"}},
		{"wildcard6", n.block(".:53", v4) + ".:5300 {\nforward . [::1]:5300\n}\n", []string{":13", "::1"}},
		{"unspecified", n.block(".:53", v4) + ".:5300 {\nbind 127.0.0.1\nforward . 0.0.0.0:5300\n}\n", []string{":14", "0.0.0.0:5300"}},
		{"two-blocks", one(".:53", v4, "forward . 127.0.0.1:5301") + ".:5301 {\nbind 127.0.0.1\nforward . 169.254.20.10\n}\n",
			[]string{":4", "127.0.0.1:5301", "169.254.20.10", "Corefile:8"}},
		{"three-blocks", one(".:53", v4, "forward . 127.0.0.1:5301") +
			".:5301 {\nbind 127.0.0.1\nforward . 127.0.0.1:5302\n}\n" +
			"lab.:5302 {\nbind 127.0.0.1\nforward . 169.254.20.10\n}\n", []string{":4", "127.0.0.1:5302", "Corefile:8", "Corefile:12"}},
		{"reverse-zones", "10.0.0.0/22:53 {\nbind 127.0.0.1\nforward . 10.0.2.2\n}\n" + one("10.0.4.0/22:53 x.test:53", v4, "forward . 169.254.20.10"), []string{":8", "169.254.20.10"}},
		{"from", one(".:53", v4, "forward lab 169.254.20.10", "forward . 10.0.2.2"), []string{":4"}},
		{"except", one(".:53", v4, "forward . 169.254.20.10 {", "except lab", "}"), []string{":4"}},
		{"answered-but-for-what-falls-through", one(".:53", v4, "forward . 169.254.20.10", "hosts {", "fallthrough", "}"), []string{":4", "169.254.20.10"}},
		{"answered-in-another-zone", one(".:53", v4, "forward . 169.254.20.10", "template ANY ANY corp.test {", "rcode NXDOMAIN", "}"), []string{":4", "169.254.20.10"}},
		{"answered-for-another-type", one(".:53", v4, "forward . 169.254.20.10", "template IN AAAA {", "rcode NOERROR", "}"), []string{":4", "169.254.20.10"}},
		{"fallthrough", one(".:53", v4, "forward . 10.0.2.2 {", "next NXDOMAIN", "}", "forward . 169.254.20.10"), []string{":7"}},
	}
}

// A Corefile by which a query would feed itself is refused with its file, its line and the
// upstream, and the node is left alone.
func TestUpstreamIsOurselves(t *testing.T) {
	n := newNode(t, backend{lab.NFT, "nftables"})
	n.eth0()
	before := n.snapshot()
	for _, c := range looping(n) {
		n.sub(c.name, func(n *node) {
			said := n.refuse(c.corefile, lab.Options{Files: map[string]string{
				"ours.conf":   "search corp.test\nnameserver 10.0.2.2\nnameserver 169.254.20.10\n",
				"others.conf": "nameserver 10.0.2.2\n",
			}})
			n.has(said, append([]string{"Corefile" + c.words[0] + " - "}, c.words[1:]...)...)
			n.has(said, "without end")
			n.same("after a start that was refused", before, n.snapshot())
		})
	}
}

// What asks this very process and comes to an end is no loop.
func TestUpstreamIsAnotherBlock(t *testing.T) {
	const v4 = "169.254.20.10"
	one := func(key, bind, upstream string, lines ...string) string {
		return strings.Join(append([]string{key + " {", "bind " + bind, "nodecache {", "firewall nftables", "}", upstream}, append(lines, "}\n")...), "\n")
	}
	other := func(key, bind, upstream string, lines ...string) string {
		return strings.Join(append([]string{key + " {", "bind " + bind, upstream}, append(lines, "}\n")...), "\n")
	}
	n := newNode(t, backend{lab.NFT, "nftables"})
	for _, c := range []struct{ name, corefile string }{
		{"another-port", one(".:53", v4, "forward . 127.0.0.1:5301") + other(".:5301", "127.0.0.1", "forward . 10.0.2.2")},
		{"same-port-on-another-address", one(".:53", v4, "forward . 127.0.0.1") + other(".:53", "127.0.0.1", "forward . 10.0.2.2")},
		{"wildcard-beside-an-exact-address", one(".:53", v4, "forward . 127.0.0.1:5301") + other(".:5301", "127.0.0.1", "forward . 10.0.2.2")},
		{"three-blocks", one(".:53", v4, "forward . 127.0.0.1:5301") + other(".:5301", "127.0.0.1", "forward . 127.0.0.2:5301") + other(".:5301", "127.0.0.2", "forward . 10.0.2.2")},
		{"another-zone-of-the-same-address", one(".:53", v4, "forward lab 127.0.0.1:5301", "forward . 10.0.2.2") +
			other("lab.:5301", "127.0.0.1", "forward . 169.254.20.10 {", "except x.lab lab", "}", "forward . 10.0.2.2")},
		{"more-specific-zone", one(".:53", v4, "forward . 10.0.2.2") +
			one("lab.:53", v4, "forward . 127.0.0.1:5301") +
			other(".:5301", "127.0.0.1", "forward lab 10.0.2.2", "forward . 169.254.20.10")},
		{"excepted", one(".:53", v4, "forward . 169.254.20.10 {", "except .", "}", "forward . 10.0.2.2")},
		{"first-stanza-takes-all", one(".:53", v4, "forward . 10.0.2.2", "forward . 169.254.20.10")},
		{"renamed", one("corp.test.:53", v4, "forward . 169.254.20.10", "rewrite name suffix .corp.test. .lab.") + one("lab.:53", v4, "forward . 10.0.2.2")},
		{"renamed-in-a-block", one("corp.test.:53", v4, "forward . 169.254.20.10", "rewrite stop {", "name suffix .corp.test. .lab.", "answer auto", "}") + one("lab.:53", v4, "forward . 10.0.2.2")},
		{"another-transport", one(".:53", v4, "forward . 10.0.2.2 tls://169.254.20.10:53 {", "policy sequential", "}")},
		{"answered", one("lab.:53", v4, "forward . 127.0.0.1:5301") + one(".:53", v4, "forward . 10.0.2.2") +
			other(".:5301", "127.0.0.1", "template ANY ANY lab {", "answer \"{{ .Name }} 60 IN A 192.0.2.7\"", "fallthrough x.lab", "}", "forward . 169.254.20.10")},
		{"viewed", one(".:53", v4, "forward . 169.254.20.10", "view pods {", "expr incidr(client_ip(), '10.0.1.0/24')", "}") + one(".:53", v4, "forward . 10.0.2.2")},
	} {
		n.sub(c.name, func(n *node) {
			p := n.serve(c.corefile)
			for i := range 3 {
				name := fmt.Sprintf("a%d.lab.", i)
				if strings.HasPrefix(c.name, "renamed") {
					name = fmt.Sprintf("a%d.corp.test.", i)
				}
				n.resolves(name)
			}
			// Many at a time for the same names.
			if !strings.HasPrefix(c.name, "renamed") && c.name != "answered" {
				n.run(lab.Load{From: n.Pod, Proto: "udp", To: on(lab.LinkLocal), Count: 200, Workers: 40}, true) // nobody caches
			}
			if strings.Contains(p.Log(), "[ERROR] plugin/nodecache") {
				n.Error(p.Log())
			}
			p.Kill()
		})
	}
}

// resolves asks for a name from a pod, which has to get an address.
func (n *node) resolves(name string) {
	n.Helper()
	r, err := n.ask(client{"pod", n.Pod}, lab.LinkLocal, name)
	if err != nil || r.Rcode != dns.RcodeSuccess || len(r.Answer) != 1 {
		n.Errorf("asking for %s: %v, %v", name, r, err)
	}
}

// A reload that would make a loop is refused, in an imported file as well, and the old
// configuration goes on; however often it is tried.
func TestReloadIntoALoop(t *testing.T) {
	n := newNode(t, backend{lab.NFT, "nftables"})
	corefile := "(node) {\nbind " + allAddrs + "\nerrors\nloop\nreload 2s 0s\nnodecache {\nfirewall nftables\n}\n}\n" +
		".:53 {\nimport node\ncache\nforward . 10.0.2.2\n}\nimport custom/*.server\n"
	p := n.serveWith(corefile, lab.Options{Files: map[string]string{"custom/none.server": "# nothing\n"}})
	n.answersEverybody(false, addrs...)
	custom := filepath.Join(filepath.Dir(p.Corefile), "custom", "corp.server")
	n.must(os.WriteFile(custom, []byte("corp.test:53 {\n    import node\n    forward . 169.254.20.10\n}\n"), 0o644))
	for range 10 {
		err := p.Reload(corefile)
		if err == nil {
			n.Fatal("a reload into a loop went well")
		}
		if errors.Is(err, lab.ErrExited) {
			n.Fatal(err)
		}
		n.has(err.Error(), "corp.server:3 - ", "169.254.20.10")
	}
	n.answersEverybody(false, addrs...)
	n.must(os.WriteFile(custom, []byte("corp.test:53 {\n    import node\n    forward . 10.0.2.2\n}\n"), 0o644))
	p.reload(corefile)
	n.resolves("x.corp.test.")
	n.answersEverybody(false, addrs...)
}

// exchange asks from a namespace, and returns the code of the answer, or -1.
func exchange(ns *lab.Namespace, proto, at, name string, patience time.Duration) int {
	code := -1
	ns.Do(func() error {
		c := dns.Client{Net: proto, Timeout: patience}
		r, _, err := c.Exchange(new(dns.Msg).SetQuestion(name, dns.TypeA), at)
		if err == nil {
			code = r.Rcode
		}
		return err
	})
	return code
}

// linkLocal53 is where the tests of loops ask.
var linkLocal53 = netip.AddrPortFrom(lab.LinkLocal, 53).String()
