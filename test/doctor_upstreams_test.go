package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// asking is a server block that asks these upstreams instead of the cluster's DNS server.
func (n *node) asking(upstreams, properties string) string {
	forward := "forward . " + lab.DNSAddr.String() + " {"
	return strings.Replace(n.block(".:53", only4), forward, "forward . "+upstreams+" {\n        "+properties, 1)
}

// TCP may be dropped on the way, or refused by the server.
func TestWarnsOfFilteredTCP(t *testing.T) {
	n := newNode(t, nftables)
	for _, c := range []struct{ how, force, want string }{
		{"drop", "force_tcp", "answers over UDP and not over TCP (no answer within 1.5s): nothing comes from there"},
		{"reject with tcp reset", "", "answers over UDP and not over TCP (refused): answers that are too long for UDP do not come"},
	} {
		n.sub(c.how, func(n *node) {
			n.faulty(n.asking("10.0.2.2", c.force), c.want, func() func() {
				n.commands(n.DNS, "nft 'table inet f { chain input { type filter hook input priority 0; tcp dport 53 "+c.how+"; }; }'")
				return func() { n.commands(n.DNS, "nft delete table inet f") }
			})
		})
	}
}

// UDP that is dropped is told of where UDP is asked.
func TestWarnsOfFilteredUDP(t *testing.T) {
	n := newNode(t, nftables)
	drop := func() func() {
		n.commands(n.DNS, `nft 'table inet f { chain input { type filter hook input priority 0; udp dport 53 drop; }; }'`)
		return func() { n.commands(n.DNS, "nft delete table inet f") }
	}
	n.faulty(n.asking("10.0.2.2", ""), "answers over TCP and not over UDP (no answer within 1.5s): let UDP", drop)
	undo := drop()
	defer undo()
	if _, warnings := n.examination(n.asking("10.0.2.2", "force_tcp")); warnings != "" {
		t.Errorf("where only TCP is asked: %s", warnings)
	}
}

// A server that is dead, or that the node's own firewall lets nobody reach.
func TestWarnsOfSilentUpstream(t *testing.T) {
	n := newNode(t, nftables)
	corefile := n.asking("10.0.2.2 10.0.2.2:5353", "")
	_, warnings := n.examination(corefile)
	n.has(warnings, "no DNS server answers at the upstream 10.0.2.2:5353 (forward at /", "Corefile:5), over UDP (refused) or TCP (refused)")
	if strings.Count(warnings, "\n") != 1 {
		t.Errorf("want one warning, got %s", warnings)
	}

	n.faulty(n.asking("10.0.2.2", ""), "since this node's firewall drops it (rule 1 (handle", func() func() {
		n.commands(n.Node, `nft 'table inet host { chain output { type filter hook output priority 0; policy accept; ip daddr 10.0.2.2 th dport 53 drop; }; }'`)
		return func() { n.commands(n.Node, "nft delete table inet host") }
	})
}

// A Service that is made anew has another address. Kubernetes says the old one in the
// environment until the container is started again.
func TestWarnsOfServiceThatIsGone(t *testing.T) {
	forBackends(t, func(n *node) {
		service := func(how string) {
			for _, proto := range protos {
				n.commands(n.Node, "iptables -t nat -"+how+" OUTPUT -d 10.96.0.11 -p "+proto+" --dport 53 -j DNAT --to-destination 10.0.2.2:53")
			}
			n.must(n.FlushConntrack())
		}
		service("A")
		corefile := n.asking("{$KUBE_DNS_UPSTREAM_SERVICE_HOST}", "force_tcp")
		p := n.serveWith(corefile, lab.Options{Env: []string{"KUBE_DNS_UPSTREAM_SERVICE_HOST=10.96.0.11"}})
		n.must(p.WaitLog(0, examined))
		if warnings := p.warnings(0); warnings != "" {
			n.Errorf("with the Service: %s", warnings)
		}
		service("D")
		during := p.again(corefile + "# gone\n")
		n.has(during, "the upstream 10.96.0.11 (forward at ", "was the address of a Service when this process started (KUBE_DNS_UPSTREAM_SERVICE_HOST)")
		if strings.Count(during, "\n") != 1 {
			n.Errorf("want one warning, got %s", during)
		}
		// Its pods being away is another matter.
		service("A")
		n.commands(n.DNS, `nft 'table inet f { chain input { type filter hook input priority 0; th dport 53 drop; }; }'`)
		n.has(p.again(corefile+"# silent\n"), "no DNS server answers at the upstream 10.96.0.11:53")
		n.commands(n.DNS, "nft delete table inet f")
		if warnings := p.again(corefile + "# back\n"); warnings != "" {
			n.Errorf("with the Service again: %s", warnings)
		}
	})
}

// What forward has read of a file it asks until the next reload.
func TestReadsResolversAnew(t *testing.T) {
	n := newNode(t, nftables)
	file := filepath.Join(n.Dir, "resolv.conf")
	write := func(text string) { n.must(os.WriteFile(file, []byte(text), 0o644)) }
	write("search example.test\nnameserver 10.0.2.2\n")
	p, warnings := n.examination(n.asking(file, ""))
	if warnings != "" {
		t.Errorf("before: %s", warnings)
	}
	write("nameserver fd00:2::2\nnameserver 10.0.2.2\n")
	if warnings := p.again(n.asking(file, "") + "# after\n"); warnings != "" {
		t.Errorf("after a reload: %s", warnings)
	}
}
