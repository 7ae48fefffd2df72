// Package k8s tests the manifests.
package k8s

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"

	_ "github.com/contentful-labs/coredns-nodecache"
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/forward"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/loop"
	_ "github.com/coredns/coredns/plugin/metrics"
	_ "github.com/coredns/coredns/plugin/ready"
	_ "github.com/coredns/coredns/plugin/reload"
)

type manifest struct {
	services   []corev1.Service
	configMaps []corev1.ConfigMap
	daemonSets []appsv1.DaemonSet
}

// load decodes a file as strictly as the API server validates fields.
func load(t *testing.T, name string) (m manifest) {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for i, doc := range strings.Split(string(text), "\n---\n") {
		var kind struct{ Kind string }
		if err := yaml.Unmarshal([]byte(doc), &kind); err != nil {
			t.Fatalf("%s, document %d: %v", name, i, err)
		}
		switch kind.Kind {
		case "": // the comment at the head
			continue
		case "Service":
			m.services = append(m.services, corev1.Service{})
			err = yaml.UnmarshalStrict([]byte(doc), &m.services[len(m.services)-1])
		case "ConfigMap":
			m.configMaps = append(m.configMaps, corev1.ConfigMap{})
			err = yaml.UnmarshalStrict([]byte(doc), &m.configMaps[len(m.configMaps)-1])
		case "DaemonSet":
			m.daemonSets = append(m.daemonSets, appsv1.DaemonSet{})
			err = yaml.UnmarshalStrict([]byte(doc), &m.daemonSets[len(m.daemonSets)-1])
		default:
			err = fmt.Errorf("unexpected kind %s", kind.Kind)
		}
		if err != nil {
			t.Fatalf("%s, document %d: %v", name, i, err)
		}
	}
	return m
}

// manifests are the files, with the number of DaemonSets in each.
var manifests = map[string]int{"node-local.yaml": 1, "node-local-ha.yaml": 2}

func TestManifests(t *testing.T) {
	files, err := filepath.Glob("*.yaml")
	if err != nil || len(files) != len(manifests) {
		t.Fatalf("the manifests are %v (%v), want those of %v", files, err, manifests)
	}
	for name, sets := range manifests {
		t.Run(name, func(t *testing.T) {
			m := load(t, name)
			if len(m.services) != 1 || len(m.configMaps) != 1 || len(m.daemonSets) != sets {
				t.Fatalf("has %d Services, %d ConfigMaps, %d DaemonSets", len(m.services), len(m.configMaps), len(m.daemonSets))
			}
			// Its variable is KUBE_DNS_UPSTREAM_SERVICE_HOST, in pods of the same namespace.
			if s := m.services[0]; s.Name != "kube-dns-upstream" || s.Namespace != "kube-system" || s.Spec.Selector["k8s-app"] != "kube-dns" {
				t.Errorf("the Service upstream is %s/%s of %v", s.Namespace, s.Name, s.Spec.Selector)
			}
			for _, ds := range m.daemonSets {
				t.Run(ds.Name, func(t *testing.T) { checkDaemonSet(t, ds, m.configMaps[0]) })
			}
		})
	}
}

func checkDaemonSet(t *testing.T, ds appsv1.DaemonSet, cm corev1.ConfigMap) {
	spec := ds.Spec.Template.Spec
	if ds.Namespace != "kube-system" || cm.Namespace != "kube-system" {
		t.Errorf("not in kube-system, whose Services it needs the variables of")
	}
	if !spec.HostNetwork || spec.DNSPolicy != corev1.DNSDefault || spec.PriorityClassName != "system-node-critical" ||
		spec.AutomountServiceAccountToken == nil || *spec.AutomountServiceAccountToken {
		t.Errorf("the pod is not one for the node's own DNS: %+v", spec)
	}
	// Without the variables of Services the Corefile is not complete.
	if spec.EnableServiceLinks != nil && !*spec.EnableServiceLinks {
		t.Error("enableServiceLinks is false")
	}
	if len(spec.Tolerations) != 1 || spec.Tolerations[0] != (corev1.Toleration{Operator: corev1.TolerationOpExists}) {
		t.Errorf("tolerates only %v", spec.Tolerations)
	}
	for k, v := range ds.Spec.Selector.MatchLabels {
		if ds.Spec.Template.Labels[k] != v {
			t.Errorf("its own pods lack the selector's %s: %s", k, v)
		}
	}
	// The Service would send the cache's misses back to the cache.
	if ds.Spec.Template.Labels["k8s-app"] != "" {
		t.Error("the pods have a label k8s-app, as those of the cluster's DNS have")
	}
	if u := ds.Spec.UpdateStrategy.RollingUpdate; u == nil || u.MaxSurge.String() != "1" || u.MaxUnavailable.String() != "0" {
		t.Errorf("updates with %v", u)
	}

	if len(spec.Containers) != 1 {
		t.Fatalf("has %d containers", len(spec.Containers))
	}
	c := spec.Containers[0]
	if len(c.Ports) != 0 {
		t.Errorf("declares ports, so that two pods can't be on one node: %v", c.Ports)
	}
	s := c.SecurityContext
	if s == nil || s.Privileged == nil || *s.Privileged || s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem ||
		s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation ||
		s.SeccompProfile == nil || s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault ||
		!slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) ||
		!slices.Equal(s.Capabilities.Add, []corev1.Capability{"NET_ADMIN", "NET_RAW", "NET_BIND_SERVICE"}) {
		t.Errorf("the security context is %v", s)
	}
	if v := spec.Volumes; len(v) != 2 || v[0].ConfigMap == nil || v[0].ConfigMap.Name != cm.Name ||
		v[1].HostPath == nil || v[1].HostPath.Path != "/run/xtables.lock" || *v[1].HostPath.Type != corev1.HostPathFileOrCreate {
		t.Errorf("the volumes are %v", v)
	}

	corefile := expand(cm.Data["Corefile"], c.Env)
	for directive, probe := range map[string]*corev1.Probe{"health": c.LivenessProbe, "ready": c.ReadinessProbe} {
		get := probe.HTTPGet
		if want := fmt.Sprintf("\n    %s %s:%s\n", directive, get.Host, get.Port.String()); !strings.Contains(corefile, want) {
			t.Errorf("a probe asks %s:%s, where %s does not listen", get.Host, get.Port.String(), directive)
		}
	}
	if want := "\n    prometheus :" + ds.Spec.Template.Annotations["prometheus.io/port"] + "\n"; strings.Count(corefile, want) != 2 {
		t.Errorf("the metrics are not all on the annotated port")
	}
	checkCorefile(t, corefile)
}

// expand replaces the variables that the container and the Services bring.
func expand(corefile string, env []corev1.EnvVar) string {
	pairs := []string{"{$KUBE_DNS_SERVICE_HOST}", "10.96.0.10", "{$KUBE_DNS_UPSTREAM_SERVICE_HOST}", "10.96.7.7"}
	for _, e := range env {
		pairs = append(pairs, "{$"+e.Name+"}", e.Value)
	}
	return strings.NewReplacer(pairs...).Replace(corefile)
}

// checkCorefile has all plugins read a Corefile. None of them starts.
func checkCorefile(t *testing.T, corefile string) {
	if strings.Contains(corefile, "{$") {
		t.Errorf("the Corefile has a variable that nothing sets:\n%s", corefile)
	}
	directives := []string{"reload", "bind", "nodecache", "ready", "health", "prometheus", "errors", "cache", "loop", "forward"}
	if err := dnsserver.SetDirectives(directives); err != nil {
		t.Fatal(err)
	}
	input := caddy.CaddyfileInput{Filepath: "Corefile", Contents: []byte(corefile), ServerTypeName: "dns"}
	err := caddy.ValidateAndExecuteDirectives(input, nil, true)
	if err != nil && strings.Contains(err.Error(), "capability NET_ADMIN") {
		t.Skipf("reading the Corefile needs root: %v", err)
	}
	if err != nil {
		t.Errorf("%v\n%s", err, corefile)
	}
}

// Of two DaemonSets, neither may take the other's pods for its own.
func TestSelectorsAreDistinct(t *testing.T) {
	seen := map[string]string{}
	for name := range manifests {
		for _, ds := range load(t, name).daemonSets {
			selector := fmt.Sprint(ds.Spec.Selector.MatchLabels)
			if other := seen[selector]; other != "" {
				t.Errorf("%s and %s select the same pods", ds.Name, other)
			}
			seen[selector] = ds.Name
		}
	}
}

// What does not need to differ between the twins does not.
func TestTwinsDifferInNameAndPorts(t *testing.T) {
	m := load(t, "node-local-ha.yaml")
	var twins [2][]byte
	for i := range twins {
		out, err := yaml.Marshal(m.daemonSets[i])
		if err != nil {
			t.Fatal(err)
		}
		twins[i] = out
	}
	a := strings.NewReplacer("nodecache-a", "nodecache-b", "instance: a", "instance: b",
		"8080", "8081", "8181", "8182", "9253", "9254").Replace(string(twins[0]))
	if a != string(twins[1]) {
		t.Errorf("a and b differ in more than name and ports:\n%s", diff(t, a, string(twins[1])))
	}
}

func diff(t *testing.T, a, b string) string {
	dir := t.TempDir()
	for name, text := range map[string]string{"a": a, "b": b} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var out bytes.Buffer
	cmd := exec.Command("diff", "-u", filepath.Join(dir, "a"), filepath.Join(dir, "b"))
	cmd.Stdout = &out
	_ = cmd.Run() // it says no when they differ, and that is why we are here
	return out.String()
}
