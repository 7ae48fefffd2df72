package lab

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
)

func open(t *testing.T, variant Iptables) *Lab {
	if os.Geteuid() != 0 {
		t.Skip("network namespaces take root")
	}
	l, err := New(variant)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// The node without a cache: kube-proxy takes every query to the cluster, and every
// query leaves an entry in the connection tracking table.
func TestClusterAnswers(t *testing.T) {
	for _, variant := range []Iptables{NFT, Legacy} {
		t.Run(string(variant), func(t *testing.T) {
			l := open(t, variant)
			before, err := l.Snapshot()
			if err != nil {
				t.Fatal(err)
			}
			for _, from := range []*Namespace{l.Pod, l.Node} {
				for _, proto := range []string{"udp", "tcp"} {
					for _, to := range []netip.Addr{ClusterIP, ClusterIP6} {
						t.Run(fmt.Sprint(from.name, proto, to), func(t *testing.T) {
							if err := l.FlushConntrack(); err != nil {
								t.Fatal(err)
							}
							asked := l.Cluster.Queries()
							r, err := Load{From: from, Proto: proto, To: []netip.AddrPort{netip.AddrPortFrom(to, 53)}, Count: 100}.Run()
							if err != nil {
								t.Fatal(err)
							}
							if !r.AllAnswered(true) || r.Sent != 100 {
								t.Error(r)
							}
							if n := l.Cluster.Queries() - asked; n != 100 {
								t.Errorf("%d queries reached the cluster, want 100", n)
							}
							// Two sockets can have had the same port, and so the same entry.
							if n, err := l.Conntrack(to); n < 95 || n > 100 || err != nil {
								t.Errorf("%d connection tracking entries, %v; want 100", n, err)
							}
							if n, err := l.Conntrack(LinkLocal); n != 0 || err != nil {
								t.Errorf("%d connection tracking entries of another address, %v", n, err)
							}
						})
					}
				}
			}
			after, err := l.Snapshot()
			if err != nil {
				t.Fatal(err)
			}
			if before != after {
				t.Errorf("queries changed the node:\n%s\n%s", before, after)
			}
		})
	}
}

func TestLoadCounts(t *testing.T) {
	l := open(t, NFT)
	nobody := netip.AddrPortFrom(DNSAddr, 54)
	for _, proto := range []string{"udp", "tcp"} {
		r, err := Load{From: l.Pod, Proto: proto, To: []netip.AddrPort{nobody}, Count: 1}.Run()
		if err != nil || r.Sent != 1 || r.Refused != 1 {
			t.Errorf("nobody listens, over %s: %v, %v", proto, r, err)
		}
	}
	if _, err := l.DNS.Run("nft", "add table ip x; add chain ip x y { type filter hook input priority 0; policy drop; }"); err != nil {
		t.Fatal(err)
	}
	for _, proto := range []string{"udp", "tcp"} {
		r, err := Load{From: l.Pod, Proto: proto, To: []netip.AddrPort{nobody}, Count: 2, Timeout: 1e8}.Run()
		if err != nil || r.Sent != 2 || r.Lost != 2 {
			t.Errorf("dropped, over %s: %v, %v", proto, r, err)
		}
	}
	slow := []netip.AddrPort{netip.AddrPortFrom(DNSAddr6, 53)}
	for _, proto := range []string{"udp", "tcp"} {
		r, err := Load{From: l.Pod, Proto: proto, To: slow, Names: Slow, Keep: true, Count: 8, Workers: 4}.Run()
		if err != nil || !r.AllAnswered(true) || r.Latency(0) < SlowFor {
			t.Errorf("slow, over %s: %v, %v", proto, r, err)
		}
	}
}

func TestSnapshotSeesChanges(t *testing.T) {
	for _, variant := range []Iptables{NFT, Legacy} {
		t.Run(string(variant), func(t *testing.T) {
			l := open(t, variant)
			snapshot := func() string {
				s, err := l.Snapshot()
				if err != nil {
					t.Fatal(err)
				}
				return s
			}
			before := snapshot()
			for _, change := range [][2]string{
				{"iptables -t raw -A PREROUTING -j NOTRACK", "iptables -t raw -F"},
				{"ip6tables -t filter -N X", "ip6tables -t filter -X"},
				{"iptables -P INPUT DROP", "iptables -P INPUT ACCEPT"},
				{"ip addr add 169.254.20.10/32 dev lo", "ip addr del 169.254.20.10/32 dev lo"},
				{"ip route add 10.3.0.0/16 via 10.0.1.2", "ip route del 10.3.0.0/16"},
				{"nft add table inet x", "nft delete table inet x"},
				{"iptables -A INPUT -m recent --name x --rcheck -j ACCEPT", "iptables -F INPUT"},
			} {
				for i, want := range []bool{true, false} {
					words := strings.Fields(change[i])
					if _, err := l.Node.Run(words[0], words[1:]...); err != nil {
						t.Fatal(err)
					}
					if got := snapshot(); (got != before) != want {
						t.Errorf("%s: changed is %v, want %v:\n%s\n%s", change[i], !want, want, before, got)
					}
				}
			}
		})
	}
}
