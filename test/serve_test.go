package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

func TestServesPodAndHost(t *testing.T) {
	forBackends(t, func(n *node) {
		n.serve(n.corefile())
		for _, c := range n.clients() {
			for _, proto := range protos {
				for _, to := range on(addrs...) {
					for _, keep := range []bool{false, true} {
						n.sub(fmt.Sprint(c.name, "-", proto, "-", to, "-keep-", keep), func(n *node) {
							n.run(lab.Load{From: c.ns, Proto: proto, To: []netip.AddrPort{to}, Count: 20, Keep: keep}, false)
						})
					}
				}
			}
		}
	})
}

// The default backend serves too.
func TestServesWithDefaults(t *testing.T) {
	for _, v := range []lab.Iptables{lab.NFT, lab.Legacy} {
		t.Run(string(v), func(t *testing.T) {
			n := newNode(t, backend{v, "auto"})
			before := n.snapshot()
			p := n.serve(plainBlock(".:53", allAddrs, "nodecache"))
			n.answersEverybody(false, addrs...)
			n.must(n.FlushConntrack())
			n.answersEverybody(false, addrs...)
			n.untracked()
			p.exit(syscall.SIGTERM)
			n.same("after the exit", before, n.snapshot())
		})
	}
}

// The interface is a dummy wherever the kernel has that driver.
func TestInterfaceIsDummyWhereThereIsOne(t *testing.T) {
	n := newNode(t, iptablesNFT)
	kind := "tun"
	if _, err := n.Pod.Run("ip", "link", "add", "try", "type", "dummy"); err == nil {
		kind = "dummy"
	}
	n.serve(n.corefile())
	out, err := n.Node.Run("ip", "-d", "link", "show", "nodelocaldns")
	n.must(err)
	n.has(out, "    "+kind+" ")
}

// Without IPv6 the link stays down, where node-address detection does not look.
func TestLinkStaysDownWithoutIPv6(t *testing.T) {
	n := newNode(t, iptablesNFT)
	n.serve(n.block(".:53", "169.254.20.10 10.96.0.10"))
	out, err := n.Node.Run("ip", "link", "show", "nodelocaldns")
	n.must(err)
	n.has(out, "state DOWN")
	n.answersEverybody(false, lab.LinkLocal, lab.ClusterIP)
}

// untracked checks that no address of the cache has an entry in the connection
// tracking table.
func (n *node) untracked() {
	n.Helper()
	entries, err := n.ConntrackEntries(addrs...)
	n.must(err)
	if len(entries) > 0 {
		n.Errorf("%d connection tracking entries, want 0; the first: %s", len(entries), entries[0])
	}
}

func TestNoConntrackEntries(t *testing.T) {
	forBackends(t, func(n *node) {
		// What is counted is counted: without rules every query has an entry.
		n.sub("without-rules", func(n *node) {
			without := &node{Lab: n.Lab, T: n.T, backend: backend{firewall: "none"}}
			p := without.serve(without.corefile())
			for _, c := range n.clients() {
				n.run(lab.Load{From: c.ns, Proto: "udp", To: on(lab.Local6), Count: 50}, false)
			}
			// Two sockets can have had the same port, and so the same entry.
			if got, err := n.Conntrack(lab.Local6); err != nil || got < 95 {
				n.Errorf("without rules there are %d entries for 100 queries (%v)", got, err)
			}
			p.exit(syscall.SIGTERM)
		})
		n.must(n.FlushConntrack())

		n.serve(n.corefile())
		sent := 0
		for _, c := range n.clients() {
			for _, proto := range protos {
				l := lab.Load{From: c.ns, Proto: proto, To: on(addrs...), Count: scale(25000)}
				r, err := l.Run()
				n.must(err)
				n.Logf("%s over %s: %v", c.name, proto, r)
				n.answered(r, false)
				sent += r.Sent
			}
		}
		n.untracked()
		total, err := n.Conntrack()
		n.must(err)
		upstream, err := n.Conntrack(lab.DNSAddr, lab.DNSAddr6)
		n.must(err)
		n.Logf("%d queries; %d entries on the node, %d of them CoreDNS's own queries to the cluster", sent, total, upstream)
		if total != upstream {
			n.Errorf("%d entries, of which only %d are those of queries to the cluster", total, upstream)
		}
	})
}

// Misses and slow answers are untracked too: the guards of the rules must hold as
// long as an answer takes.
func TestNoConntrackEntriesForSlowAnswers(t *testing.T) {
	forBackends(t, func(n *node) {
		n.serve(n.corefile())
		for _, c := range n.clients() {
			for _, proto := range protos {
				n.run(lab.Load{From: c.ns, Proto: proto, To: on(addrs...), Names: lab.Slow, Tag: c.name + proto, Count: 16, Workers: 16}, false)
			}
		}
		n.untracked()
	})
}

// A host firewall that accepts only what it tracks must let queries and answers by.
func TestServesBehindHostFirewall(t *testing.T) {
	for _, b := range []backend{iptablesNFT, iptablesLegacy} {
		t.Run(string(b.iptables), func(t *testing.T) {
			n := newNode(t, b)
			for _, ipt := range []string{"iptables", "ip6tables"} {
				for _, chain := range []string{"INPUT", "OUTPUT"} {
					for _, rule := range []string{
						"-A %s -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
						// To the cluster, and neighbour discovery.
						"-A %s -p udp -m multiport --ports 53 -m conntrack --ctstate NEW -o to-dns -j ACCEPT",
						"-A %s -p tcp -m multiport --ports 53 -m conntrack --ctstate NEW -o to-dns -j ACCEPT",
						"-A %s -p icmpv6 -j ACCEPT",
						"-P %s DROP",
					} {
						if chain == "INPUT" && strings.Contains(rule, "-o to-dns") || ipt == "iptables" && strings.Contains(rule, "icmpv6") {
							continue
						}
						_, err := n.Node.Run(ipt, strings.Fields(fmt.Sprintf(rule, chain))...)
						n.must(err)
					}
				}
			}
			before := n.snapshot()
			p := n.serve(n.corefile())
			n.answersEverybody(false, addrs...)
			p.exit(syscall.SIGTERM)
			n.same("after the exit", before, n.snapshot())
		})
	}
}

func TestHealthReadyPrometheusPprofOnNodecacheAddress(t *testing.T) {
	forBackends(t, func(n *node) {
		before := n.snapshot()
		p := n.serve(plainBlock(".:53", allAddrs,
			"health 169.254.20.10:8080", "ready 169.254.20.10:8181", "prometheus 169.254.20.10:9253", "pprof 169.254.20.10:6053",
			"nodecache {\n firewall "+n.backend.firewall+"\n untracked 8080 8181 9253\n}"))
		for _, path := range []string{":8080/health", ":8181/ready", ":9253/metrics", ":6053/debug/pprof/cmdline"} {
			for _, c := range n.clients() {
				n.must(n.FlushConntrack())
				body, err := get(c.ns, "http://169.254.20.10"+path)
				if err != nil {
					n.Errorf("from %s: %v", c.name, err)
				}
				if path == ":9253/metrics" {
					n.has(body, "coredns_nodecache_")
				}
				entries, err := n.Conntrack(lab.LinkLocal)
				n.must(err)
				if want := path[:5] == ":6053"; entries > 0 != want {
					n.Errorf("%s from %s: %d connection tracking entries; tracked is to be %v", path, c.name, entries, want)
				}
			}
		}
		p.exit(syscall.SIGTERM)
		n.same("after the exit", before, n.snapshot())
	})
}

// get fetches a page from inside a namespace.
func get(ns *lab.Namespace, url string) (string, error) {
	r, err := ns.Client(lab.Patience).Get(url)
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("getting %s: %s", url, r.Status)
	}
	return string(body), err
}

// Several server blocks share addresses, and other transports have their own
// protocols.
func TestManyBlocks(t *testing.T) {
	forBackends(t, func(n *node) {
		before := n.snapshot()
		cert, key := n.certificate()
		encrypted := "tls " + cert + " " + key
		p := n.serve(strings.Join([]string{
			n.block("cluster.local:53", allAddrs),
			n.block("in-addr.arpa:53 ip6.arpa:53", "169.254.20.10 10.96.0.10"),
			n.block(".:53", allAddrs),
			n.block(".:5300", "169.254.20.10 fd00:20::10"),
			plainBlock("tls://.:853", "169.254.20.10 fd00:20::10", encrypted, "nodecache {\n firewall "+n.backend.firewall+"\n}"),
			plainBlock("grpc://.:5443", "169.254.20.10", encrypted, "nodecache {\n firewall "+n.backend.firewall+"\n}"),
		}, "\n"))
		n.answersEverybody(false, addrs...)
		for _, c := range n.clients() {
			for _, proto := range protos {
				n.run(lab.Load{From: c.ns, Proto: proto, To: []netip.AddrPort{
					netip.AddrPortFrom(lab.LinkLocal, 5300), netip.AddrPortFrom(lab.Local6, 5300),
				}, Count: 10}, false)
			}
			for _, at := range []string{"169.254.20.10:853", "[fd00:20::10]:853"} {
				err := c.ns.Do(func() error {
					m := new(dns.Msg)
					m.SetQuestion("tls.lab.", dns.TypeA)
					client := dns.Client{Net: "tcp-tls", Timeout: lab.Patience, TLSConfig: &tls.Config{InsecureSkipVerify: true}}
					r, _, err := client.Exchange(m, at)
					if err == nil && len(r.Answer) != 1 {
						err = fmt.Errorf("asking %s: %v", at, r)
					}
					return err
				})
				if err != nil {
					n.Errorf("from %s: %v", c.name, err)
				}
			}
			err := c.ns.Do(func() error {
				conn, err := net.DialTimeout("tcp", "169.254.20.10:5443", lab.Patience)
				if err == nil {
					conn.Close()
				}
				return err
			})
			if err != nil {
				n.Errorf("connecting from %s: %v", c.name, err)
			}
		}
		n.untracked()
		// Nobody listens on UDP where TLS and gRPC are, so no rule is for it.
		for line := range strings.Lines(n.snapshot()) {
			for _, port := range []string{"853", "5443"} {
				if strings.Contains(line, "udp") && regexp.MustCompile(`\b`+port+`\b`).MatchString(line) {
					n.Errorf("a rule for UDP where nobody listens on it: %s", line)
				}
			}
		}
		p.exit(syscall.SIGTERM)
		n.same("after the exit", before, n.snapshot())
	})
}

// certificate makes a certificate of its own for TLS.
func (n *node) certificate() (cert, key string) {
	n.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	n.must(err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &k.PublicKey, k)
	n.must(err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(k)
	n.must(err)
	cert, key = filepath.Join(n.Dir, "cert.pem"), filepath.Join(n.Dir, "key.pem")
	n.must(os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	n.must(os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), 0o600))
	return cert, key
}

// What somebody else removes comes back, and what is his stays.
func TestPutsBackWhatSomebodyRemoves(t *testing.T) {
	for _, b := range backends {
		for _, c := range []struct{ name, command string }{
			{"link", "ip link del nodelocaldns"},
			{"address", "ip addr del 10.96.0.10/32 dev nodelocaldns"},
			{"address6", "ip addr del fd00:96::10/128 dev nodelocaldns"},
			{"rules4", "iptables -t raw -F"},
			{"rules6", "ip6tables -t raw -F"},
			{"filter", "iptables -F"},
			{"ruleset", "nft flush ruleset"},
		} {
			rules := strings.HasPrefix(c.command, "ip6tables") || strings.HasPrefix(c.command, "iptables")
			if b == nftables && rules || b == iptablesLegacy && c.name == "ruleset" {
				continue
			}
			t.Run(string(b.iptables)+"-"+b.firewall+"-"+c.name, func(t *testing.T) {
				n := newNode(t, b)
				if c.name == "ruleset" {
					// kube-proxy's rules would go too, and be missed.
					_, err := n.Node.Run("nft", "flush", "ruleset")
					n.must(err)
				}
				n.serve(n.corefile("sync 1s"))
				was := n.snapshot()
				words := strings.Fields(c.command)
				_, err := n.Node.Run(words[0], words[1:]...)
				n.must(err)
				n.becomes("after "+c.command, was)
				n.answersEverybody(false, addrs...)
			})
		}
	}
}

// What comes while the process gets no CPU waits for it. The kernel's default is room for
// some 200 queries on a socket.
func TestQueriesWaitForTheProcess(t *testing.T) {
	for name, options := range map[string][]string{"CoreDNS": nil, "fastpath": {"fastpath"}} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, nftables)
			p := n.serve(n.corefile(options...))
			f, err := lab.Flow{From: n.Pod, To: clusterIPs, Rate: 2000, Sockets: 32}.Start()
			n.must(err)
			n.Cleanup(func() { f.Stop() })
			for _, s := range []struct {
				signal  syscall.Signal
				queries int
			}{{syscall.SIGCONT, 100}, {syscall.SIGSTOP, 2000}, {syscall.SIGCONT, 100}} {
				n.must(syscall.Kill(p.Pid, s.signal))
				until := f.Sent() + s.queries
				if !eventually(func() bool { return f.Sent() >= until }) {
					n.Fatal("the flow came to a halt")
				}
			}
			r, err := f.Stop()
			n.must(err)
			for a, r := range r {
				if r.Bad() > 0 || r.FromCluster > 0 {
					n.Errorf("%v: of %d queries %d were lost, %d refused, %d answered wrongly, %d by the cluster", a, r.Sent, r.Lost, r.Refused, r.Wrong, r.FromCluster)
				}
			}
		})
	}
}
