package cluster

import (
	"os"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

const chartDir = "charts/nodecache"

// The chart is installed, changed, tested and removed by Helm as anybody does it, while everybody asks.
func TestHelm(t *testing.T) {
	kit := os.Getenv("CLUSTER_KIT")
	if kit == "" {
		t.Skip("make test-cluster runs this: it takes Kubernetes' programs")
	}
	makeImages(t, kit)
	t.Run("iptables", func(t *testing.T) {
		s := newSite(t, kit, "iptables")
		s.installed()
		s.upgraded()
		s.uninstalled()
	})
}

// helm runs Helm on the release nodecache, and shows what it says.
func (s *site) helm(args ...string) {
	s.Helper()
	out, err := s.Helm(append(args, namespace)...)
	s.Logf("$ helm %s\n%s", args[0], out)
	s.must(err)
}

func (s *site) installed() {
	s.step("helm install", kinds[:3], settling, func() {
		s.helm("install", "nodecache", path(chartDir), "--wait", "--timeout=3m",
			"--set", "tests.image=cluster.test/ask:1", "--set", "tests.command={/ask,lookup,kubernetes.default.svc.cluster.local}")
		s.rolled("nodecache")
	})
	s.answers(false)
	s.helm("test", "nodecache", "--timeout=2m", "--logs")
}

func (s *site) upgraded() {
	s.step("helm upgrade, a line of the Corefile", kinds, all, func() {
		s.helm("upgrade", "nodecache", path(chartDir), "--reuse-values", "--wait", "--timeout=3m", "--set", "config.cache.success=12000")
		// Kubelet looks at a pod's volumes when the pod changes, and else once a minute.
		s.kubectl(namespace, "annotate", "pods", ours, "changed=now")
		s.logged("Reloading complete")
	})
	s.answers(false)
	s.step("helm upgrade, the backend nftables", kinds, all, func() {
		s.helm("upgrade", "nodecache", path(chartDir), "--reuse-values", "--wait", "--timeout=3m", "--set", "config.firewall=nftables")
		s.rolled("nodecache")
	})
	s.answers(false)
	// The one cache ends while the pair starts, so the cluster answers meanwhile. Then what is on its way to
	// the node's own programs can be lost, as at the exit of any only process.
	ended := func(from string, k kind, r *lab.Result) string {
		if from == "host-network" && r.Wrong == 0 && r.Lost+r.Refused <= workers {
			return ""
		}
		return all(from, k, r)
	}
	s.step("helm upgrade, to a pair", kinds[:3], ended, func() {
		s.helm("upgrade", "nodecache", path(chartDir), "--reuse-values", "--wait", "--timeout=3m", "--set", "pair.enabled=true")
		s.rolled("nodecache-a", "nodecache-b")
	})
	s.answers(false)
	s.step("pair: a pod deleted", kinds, all, func() {
		s.kubectl(namespace, "delete", "pod", "--selector=app.kubernetes.io/instance=nodecache-a")
		s.rolled("nodecache-a", "nodecache-b")
	})
	s.helm("test", "nodecache", "--timeout=2m", "--logs")
}

func (s *site) uninstalled() {
	// As its README says: the DaemonSets first.
	s.step("delete the DaemonSets of the release", kinds[:3], all, func() {
		s.kubectl(namespace, "delete", "daemonset", ours)
		s.rolled()
	})
	s.helm("uninstall", "nodecache", "--wait", "--timeout=2m")
	s.answers(true)
	// And at once, as most will do it: the Service goes while the caches are on their way out.
	s.helm("install", "nodecache", path(chartDir), "--wait", "--timeout=3m")
	s.answers(false)
	few := func(_ string, _ kind, r *lab.Result) string {
		if r.Answered == 0 || r.Lost+r.Refused > workers {
			return "want no more lost than were on their way"
		}
		return ""
	}
	s.step("helm uninstall", kinds[:3], few, func() {
		s.helm("uninstall", "nodecache", "--wait", "--timeout=2m")
		s.rolled()
	})
	s.answers(true)
	s.leftNothing()
}
