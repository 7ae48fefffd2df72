package e2e

import (
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// The rules of testdata/nodes are in the shape that these systems write them in. In
// those of iptables, words between at signs differ between IPv4 and IPv6.
var (
	wordsOf4 = strings.NewReplacer("@PODS@", "10.0.1.0/24", "@SERVICES@", "10.96.0.0/16", "@SERVICE@", "10.96.0.10/32", "@SERVER@", "10.0.2.2/32", "@TO-SERVER@", "10.0.2.2:53",
		"@OTHER@", "172.17.0.2/32", "@TO-OTHER@", "172.17.0.2:80", "@LOCALS@", "169.254.0.0/16", "@LOOPBACK@", "127.0.0.0/8", "@MDNS@", "224.0.0.251/32", "@ICMP@", "icmp",
		"@PODS2@", "10.0.3.0/24", "@6@", "")
	wordsOf6 = strings.NewReplacer("@PODS@", "fd00:1::/64", "@SERVICES@", "fd00:96::/112", "@SERVICE@", "fd00:96::10/128", "@SERVER@", "fd00:2::2/128", "@TO-SERVER@", "[fd00:2::2]:53",
		"@OTHER@", "fd00:17::2/128", "@TO-OTHER@", "[fd00:17::2]:80", "@LOCALS@", "fd00:20::/64", "@LOOPBACK@", "::1/128", "@MDNS@", "ff02::fb/128", "@ICMP@", "ipv6-icmp",
		"@PODS2@", "fd00:3::/64", "@6@", "6")
)

// empty is tables of iptables without rules.
const empty = "*filter\n:INPUT ACCEPT\n:FORWARD ACCEPT\n:OUTPUT ACCEPT\nCOMMIT\n*nat\nCOMMIT\n*mangle\nCOMMIT\n*raw\nCOMMIT\n"

// load has a node filter by a file, instead of all that it had.
func (n *node) load(file string) {
	n.Helper()
	_, err := n.Node.Run("nft", "flush", "ruleset")
	n.must(err)
	if n.backend.iptables == lab.Legacy {
		for _, restore := range []string{"iptables-restore", "ip6tables-restore"} {
			_, err := n.Node.RunInput(empty, restore)
			n.must(err)
		}
	}
	text := read(n.T, filepath.Join("testdata", "nodes", file))
	if strings.HasSuffix(file, ".nft") {
		_, err = n.Node.RunInput(text, "nft", "-f", "-")
		n.must(err)
		return
	}
	if !strings.HasPrefix(file, "ip6-") {
		_, err = n.Node.RunInput(wordsOf4.Replace(text), "iptables-restore")
		n.must(err)
	}
	_, err = n.Node.RunInput(wordsOf6.Replace(text), "ip6tables-restore")
	n.must(err)
}

const only4, only6 = "169.254.20.10 10.96.0.10", "fd00:20::10 fd00:96::10"

// examined starts a cache on a node with those rules and has it examined with IPv4, with
// IPv6 and with both. With addresses that sick has too the only fault is the firewall, in
// these words, and pods get no answer from them; else there is none, and they do.
func (n *node) examined(file, sick, words string) {
	n.sub(file, func(n *node) {
		n.load(file)
		var p *process
		for _, bind := range []string{only4, only6, allAddrs} {
			var warnings string
			if corefile := n.block(".:53", bind); p == nil {
				p, warnings = n.examination(corefile)
			} else {
				warnings = p.again(corefile)
			}
			anySick := false
			for _, family := range []struct {
				bind  string
				addrs []netip.Addr
			}{{only4, addrs[:2]}, {only6, addrs[2:]}} {
				if !strings.Contains(bind, family.bind) {
					continue
				}
				isSick := strings.Contains(sick, family.bind)
				anySick = anySick || isSick
				for _, proto := range protos {
					ask := lab.Load{From: n.Pod, Proto: proto, To: on(family.addrs...), Count: 4, Timeout: 200 * time.Millisecond}
					if !isSick {
						ask.Timeout = 0
						n.run(ask, false)
					} else if r, err := ask.Run(); err != nil || r.Answered > 0 {
						n.Errorf("with bind %s: the node is not sick: %v, %v", bind, r, err)
					}
				}
			}
			if anySick {
				n.has(warnings, words)
			}
			for line := range strings.Lines(warnings) {
				if !anySick || !strings.Contains(line, "the firewall drops every") {
					n.Errorf("with bind %s: %s", bind, line)
				}
			}
		}
		p.Kill()
	})
}

// legacyNFT is a node with the legacy iptables on which the cache uses nftables.
var legacyNFT = backend{lab.Legacy, "nftables"}

// On healthy nodes nothing is found.
func TestHealthyNodes(t *testing.T) {
	for _, b := range append([]backend{legacyNFT}, backends...) {
		t.Run(b.String(), func(t *testing.T) {
			n := newNode(t, b)
			files := []string{"kubeadm.rules", "k3s.rules", "eks.rules", "gke.rules", "docker.rules", "calico.rules", "ufw.rules"}
			if b.iptables == lab.NFT {
				files = append(files, "talos.nft", "by-link.nft", "untracked.nft", "kube-proxy.nft", "firewalld.nft", "answers-last.nft")
			}
			for _, file := range files {
				n.examined(file, "", "")
			}
		})
	}
}

// What drops every query or every answer is found, and where.
func TestSickNodes(t *testing.T) {
	for _, b := range append([]backend{legacyNFT}, backends...) {
		t.Run(b.String(), func(t *testing.T) {
			n := newNode(t, b)
			if b.iptables == lab.NFT {
				n.examined("sick-firewalld.nft", allAddrs, " of the chain filter_INPUT of the nftables table inet firewalld)")
				n.examined("sick-port-elsewhere.nft", allAddrs, "every query (the policy of the chain input of the nftables table inet host)")
				n.examined("sick-answers.nft", allAddrs, "every answer (the policy of the chain output of the nftables table inet host)")
				n.examined("sick-answers-last.nft", allAddrs, "every answer (rule 4 (handle")
				n.examined("sick-one-rule.nft", allAddrs, "every query (rule 2 (handle")
			}
			// The backend iptables has ACCEPT rules of its own in these tables.
			sick, sick6 := allAddrs, only6
			if b.firewall == "iptables" {
				sick, sick6 = "", ""
			}
			in, in6 := "the nftables table ip", "the nftables table ip6 filter"
			if b.iptables == lab.Legacy {
				in, in6 = "the table filter of ip", "the table filter of ip6tables-legacy"
			}
			n.examined("sick-raw.rules", allAddrs, " of the chain PREROUTING of the ")
			n.examined("sick-ufw.rules", sick, "every query (the policy of the chain INPUT of "+in)
			n.examined("ip6-closed.rules", sick6, "every query (the policy of the chain INPUT of "+in6+")")
		})
	}
}
