package cluster

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/test/manifest"
)

// The overlays for other clusters and for fastpath, each on a cluster that it is for, and the same of a pair.
func TestOverlays(t *testing.T) {
	kit := os.Getenv("CLUSTER_KIT")
	if kit == "" {
		t.Skip("make test-cluster runs this: it takes Kubernetes' programs")
	}
	makeImages(t, kit)
	for _, name := range []string{"dual-stack", "ipv6", "fastpath"} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, kit, name)
			overlay := "k8s/overlays/" + name
			s.single = applied{overlay, []string{"-k", path(overlay)}}
			dir := t.TempDir()
			s.must(manifest.Combine(dir, path("k8s"), "ha", name))
			s.pair = applied{"a pair with k8s/components/" + name, []string{"-k", dir}}

			s.applied()
			s.serves("nodecache")
			s.updated()
			s.killed("iptables")
			s.paired()
			s.serves("nodecache-a", "nodecache-b")
			s.halves()
			s.removed()
		})
	}
}

// serves checks what the processes of these DaemonSets say of themselves, and from here on asks the second
// Service of the cluster's DNS too, where there is one.
func (s *site) serves(sets ...string) {
	s.Helper()
	const second = "service/kube-dns-ipv6"
	addrs := []netip.AddrPort{s.services[0]}
	if strings.Contains(s.single.title, "dual-stack") {
		at := s.kubectl(namespace, "get", second, "--output=jsonpath={.spec.clusterIP}")
		addr, err := netip.ParseAddr(at)
		s.must(err)
		addrs = append(addrs, netip.AddrPortFrom(addr, 53))
	}
	s.services = addrs
	s.answers(false)
	s.logged("looked for what commonly goes wrong on a node")
	for i, set := range sets {
		want := map[string]float64{
			"nodecache_ready": 1, `nodecache_processes{state="serving"}`: float64(len(sets)),
			`nodecache_objects_in_place{object="address"}`: float64(len(addrs) + len(s.local)),
		}
		for _, at := range slices.Concat(addrs, s.local) {
			want[fmt.Sprintf("nodecache_own_query_arrives{address=%q}", at.Addr())] = 1
		}
		s.must(poll("the metrics of "+set+" are those of a cache that serves", func() error {
			metrics, err := s.metrics(9253 + i)
			for name, n := range want {
				if got, ok := metrics["coredns_"+name]; !ok || got != n {
					err = errors.Join(err, fmt.Errorf("%s is %v, want %v", name, got, n))
				}
			}
			if metrics["coredns_nodecache_fastpath_hits_total"] == 0 {
				err = errors.Join(err, errors.New("fastpath has answered no query"))
			}
			for name, n := range metrics {
				if strings.HasPrefix(name, "coredns_nodecache_node_faults{") && n != 0 {
					err = errors.Join(err, fmt.Errorf("%s is %v, want none", name, n))
				}
			}
			return err
		}))
	}
}

// metrics are those of ours that a process of the node's has on its port.
func (s *site) metrics(port int) (map[string]float64, error) {
	out, err := s.OnNode("bash", "-c", fmt.Sprintf(`exec 3<>/dev/tcp/%s/%d && printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3 && cat <&3`, s.setup.families[0].Node, port))
	values := map[string]float64{}
	for line := range strings.Lines(out) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if n, err := strconv.ParseFloat(value, 64); err == nil && strings.HasPrefix(name, "coredns_nodecache_") {
			values[name] = n
		}
	}
	return values, err
}
