package e2e

import (
	"errors"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
	"github.com/contentful-labs/coredns-nodecache/test/manifest"
)

// newIPVSNode is a node with kube-proxy in IPVS mode.
func newIPVSNode(t *testing.T, b backend) *node {
	t.Helper()
	n := newNode(t, b)
	n.ipvs()
	return n
}

func (n *node) ipvs() {
	n.Helper()
	err := n.IPVS()
	if errors.Is(err, lab.ErrNoIPVS) {
		n.Skip("this kernel has no IPVS: make test-kernel runs this on one that has")
	}
	n.must(err)
}

// IPVS takes the queries to its addresses before any listener, so binding one is refused, and the
// cluster goes on answering there.
func TestIPVSAddressIsRefused(t *testing.T) {
	n := newIPVSNode(t, iptablesNFT)
	for _, address := range []string{lab.ClusterIP.String(), lab.ClusterIP6.String()} {
		before := n.snapshot()
		said := n.refuse(n.block(".:53", "169.254.20.10 fd00:20::10 "+address), lab.Options{})
		n.has(said, "Corefile:", "bind "+address, "kube-ipvs0", "IPVS takes its queries", "169.254.20.10")
		n.same("after a start that was refused", before, n.snapshot())
	}
	n.answersEverybody(true, lab.ClusterIP, lab.ClusterIP6)
}

// Beside IPVS the local addresses are served without connection tracking, by every backend, while
// the cluster answers at its own; and the rules for them leave the node as it was.
func TestIPVSBesideTheLocalAddresses(t *testing.T) {
	forBackends(t, func(n *node) {
		n.ipvs()
		n.answersEverybody(true, lab.ClusterIP, lab.ClusterIP6)
		before := n.snapshot()
		p := n.serve(n.block(".:53", "169.254.20.10 fd00:20::10"))
		n.must(n.FlushConntrack())
		n.answersEverybody(false, lab.LinkLocal, lab.Local6)
		n.untracked()
		n.answersEverybody(true, lab.ClusterIP, lab.ClusterIP6)
		p.exit(syscall.SIGTERM)
		n.same("after the exit", before, n.snapshot())
	})
}

// The overlay ipvs, and the same of a pair: the cluster's names come through a virtual service.
func TestIPVSOverlay(t *testing.T) {
	m, err := manifest.BuildOn(t.TempDir(), filepath.Join("..", "k8s"), "ha", "ipvs")
	if err != nil {
		t.Fatal(err)
	}
	overlay, err := manifest.Build(filepath.Join("..", "k8s", "overlays", "ipvs"))
	if err != nil {
		t.Fatal(err)
	}
	for name, m := range map[string]*manifest.Manifest{"overlay": overlay, "pair": m} {
		t.Run(name, func(t *testing.T) {
			n := newIPVSNode(t, backend{iptables: lab.NFT})
			before := n.snapshot()
			var pods []*pod
			var running []*process
			for _, ds := range m.DaemonSets {
				p := n.pod(m, ds, custom)
				p.options.Env = append(p.options.Env, "KUBE_DNS_UPSTREAM_SERVICE_HOST="+lab.UpstreamIP.String())
				pods = append(pods, p)
				running = append(running, n.up(p))
			}
			had, err := n.IPVSConnections(lab.UpstreamIP)
			n.must(err)
			n.must(n.FlushConntrack())
			for i := range running {
				if len(pods[i].bound) != 1 || pods[i].bound[0] != lab.LinkLocal {
					n.Errorf("it binds %v, want the local address alone", pods[i].bound)
				}
				n.serves(pods[i])
				n.untracked()
				running[i].exit(syscall.SIGTERM)
				n.quiet(running[i].Log())
			}
			// The kernel adds up what its CPUs have counted every two seconds.
			var now int
			if !eventually(func() bool {
				now, err = n.IPVSConnections(lab.UpstreamIP)
				return err != nil || now > had
			}) || err != nil {
				n.Errorf("the virtual service of the upstream has had %d connections, and %d before (%v)", now, had, err)
			}
			n.same("after the exit", before, n.snapshot())
			n.answersEverybody(true, lab.ClusterIP)
		})
	}
}

// Where kube-proxy is changed to IPVS mode under a cache that has the ClusterIP, the cluster answers pods
// there from then on, which is told; the local address goes on being served. The node's own programs are
// answered at the ClusterIP once the cache has let go of it.
func TestIPVSComesLater(t *testing.T) {
	n := newNode(t, iptablesNFT)
	p := n.serve(n.block(".:53", "169.254.20.10 10.96.0.10", "sync 1s"))
	n.answersEverybody(false, lab.LinkLocal, lab.ClusterIP)
	n.ipvs()
	n.must(p.WaitLog(0, "taken by IPVS"))
	for _, proto := range protos {
		n.run(lab.Load{From: n.Pod, Proto: proto, To: on(lab.ClusterIP), Count: 20}, true)
	}
	n.answersEverybody(false, lab.LinkLocal)
	if err := p.Reload(n.block(".:53", "169.254.20.10 10.96.0.10", "sync 2s")); err == nil {
		n.Error("a reload with the address of IPVS was taken")
	} else {
		n.has(err.Error(), "bind 10.96.0.10", "kube-ipvs0")
	}
	p.reload(n.block(".:53", "169.254.20.10"))
	n.answersEverybody(false, lab.LinkLocal)
	n.answersEverybody(true, lab.ClusterIP)
	p.exit(syscall.SIGTERM)
}
