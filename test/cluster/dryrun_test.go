package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/test/manifest"
)

// values are those of the chart that its README names for a kind of cluster, and what else makes objects.
var values = map[string][]string{
	"defaults":     nil,
	"nftables":     {"config.firewall=nftables"},
	"ipvs":         {"config.bindServiceIp=false"},
	"cilium":       {"cilium.enabled=true"},
	"ipv6":         {"config.localDns=fd00:20::10"},
	"dual-stack":   {"config.dualStack=true", "config.localDns={169.254.20.10,fd00:20::10}"},
	"kubespray":    {"config.dnsServiceName=coredns"},
	"node-cache":   {"config.upstreamService.create=false"},
	"fastpath":     {"config.fastpath.enabled=true"},
	"a pair":       {"pair.enabled=true", "config.firewall=nftables", "config.upstreamServiceTargetPort.udp=dns"},
	"monitored":    {"serviceMonitor.enabled=true", "prometheusRule.enabled=true", "dashboard.enabled=true"},
	"all of a pod": {"podAnnotations.a=b", "priorityClassName=system-cluster-critical", "resources.limits.memory=256Mi"},
}

// All manifests, and what the chart makes of several values, are taken by a real API server, which validates them
// strictly: the objects of others' kinds by the definitions that these publish. Nothing is made.
func TestServerTakesEverything(t *testing.T) {
	kit := os.Getenv("CLUSTER_KIT")
	if kit == "" {
		t.Skip("make test-cluster runs this: it takes Kubernetes' programs")
	}
	makeImages(t, kit) // the node's own are among them
	t.Run("dry-run", func(t *testing.T) {
		c, err := New(kit, "dual-stack") // which has Services of both families
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
		must := func(out string, err error) {
			t.Helper()
			if err != nil {
				t.Fatal(out, err)
			}
		}
		must(c.Kubectl("apply", "--server-side", "-f", filepath.Join(kit, "crds")))
		must(c.Kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=1m"))
		must(c.Kubectl("create", "namespace", "monitoring"))
		// take has the server try, and says what it would make.
		take := func(t *testing.T, args ...string) (string, error) {
			out, err := c.Kubectl(append([]string{"apply", "--dry-run=server", "--validate=strict"}, args...)...)
			t.Log(strings.TrimSpace(out))
			if err == nil && !strings.Contains(out, "(server dry run)") {
				err = fmt.Errorf("nothing of it is an object")
			}
			return out, err
		}
		taken := func(name string, args ...string) {
			t.Run(name, func(t *testing.T) {
				if out, err := take(t, args...); err != nil {
					t.Error(out, err)
				}
			})
		}

		for _, file := range []string{single, pair} {
			taken(file, "-f", path(file))
		}
		for _, pattern := range []string{"k8s/base/*", "k8s/overlays/*", "k8s/monitoring"} {
			dirs, err := filepath.Glob(path(pattern))
			if err != nil || len(dirs) == 0 {
				t.Fatalf("%s: %v, %v", pattern, dirs, err)
			}
			for _, dir := range dirs {
				taken(strings.TrimPrefix(dir, path("")+"/"), "-k", dir)
			}
		}
		components, err := os.ReadDir(path("k8s/components"))
		if err != nil {
			t.Fatal(err)
		}
		for _, component := range components {
			for _, base := range []string{"single", "ha"} {
				dir := t.TempDir()
				if err := manifest.Combine(dir, path("k8s"), base, component.Name()); err != nil {
					t.Fatal(err)
				}
				taken(fmt.Sprintf("k8s/components/%s on %s", component.Name(), base), "-k", dir)
			}
		}
		for name, set := range values {
			args := []string{"template", "nodecache", path(chartDir), namespace}
			for _, s := range set {
				args = append(args, "--set", s)
			}
			text, err := c.Helm(args...)
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(t.TempDir(), "chart.yaml")
			if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			taken("the chart, "+name, namespace, "-f", file)
		}

		// What is taken is looked at: a field that is none is refused, of each kind.
		for file, change := range map[string][2]string{
			"k8s/node-local.yaml":                                    {"hostNetwork:", "hostNet:"},
			"k8s/components/cilium/policy.yaml":                      {"serviceMatcher:", "serviceMatch:"},
			"k8s/components/prometheus-operator/servicemonitor.yaml": {"endpoints:", "endpoint:"},
			"k8s/components/prometheus-operator/prometheusrule.yaml": {"groups:", "group:"},
		} {
			text, err := os.ReadFile(path(file))
			if err != nil {
				t.Fatal(err)
			}
			wrong := filepath.Join(t.TempDir(), "wrong.yaml")
			if err := os.WriteFile(wrong, []byte(strings.Replace(string(text), change[0], change[1], 1)), 0o644); err != nil {
				t.Fatal(err)
			}
			field := strings.TrimSuffix(change[1], ":")
			if out, err := take(t, "-f", wrong); err == nil || !strings.Contains(err.Error(), `unknown field "spec.`) || !strings.Contains(err.Error(), field) {
				t.Errorf("%s with a field %s: %v: %s", file, field, err, out)
			}
		}
	})
}
