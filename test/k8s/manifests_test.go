// Package k8s tests the manifests: what can be said of them without starting anything.
// manifests_test.go of the folder above starts what they say.
package k8s

import (
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/yaml"

	"github.com/contentful-labs/coredns-nodecache/test/manifest"
)

// TestMain runs the tests in the folder of the manifests.
func TestMain(m *testing.M) {
	if err := os.Chdir(filepath.Join("..", "..", "k8s")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// variant is what one way to apply the manifests has to come to.
type variant struct {
	image    string
	firewall string // "" where the plugin has firewall none
	caps     []corev1.Capability
	lock     bool // the host's xtables lock
	bind     string
	pod      bool   // on a pod's network
	dns      string // KUBE_DNS_SERVICE_HOST, where it is another Service's
	protocol string // to the cluster, "" for force_tcp
	upstream string // of all other names, "" for /etc/resolv.conf
	log      bool   // of queries
	scraped  bool   // has a Service for the metrics
	named    bool   // the ports of the cluster's DNS are found by their names
}

// What all manifests take: the release that the Makefile names, of the CoreDNS that go.mod does.
var (
	release = "v" + first("Makefile", `(?m)^RELEASE := v(.*)$`)
	tag     = release + "-coredns" + first("go.mod", `(?m)^\tgithub.com/coredns/coredns v(.*)$`)
	image   = first("Makefile", `(?m)^IMAGE_NAME \?= (.*)$`) + ":" + tag
)

// first is what a pattern finds in a file of the repository.
func first(file, pattern string) string {
	text, err := os.ReadFile(filepath.Join("..", "..", file))
	if err != nil {
		panic(err)
	}
	m := regexp.MustCompile(pattern).FindSubmatch(text)
	if m == nil {
		panic(file + " has no " + pattern)
	}
	return string(m[1])
}

var (
	usual = variant{
		image: image, firewall: "auto", caps: []corev1.Capability{"NET_ADMIN", "NET_BIND_SERVICE", "NET_RAW"}, lock: true,
		bind: "169.254.20.10 {$KUBE_DNS_SERVICE_HOST}",
	}
	static = variant{
		image: image + "-nftables", firewall: "nftables", caps: []corev1.Capability{"NET_ADMIN", "NET_BIND_SERVICE"}, bind: usual.bind,
	}
)

// components are those of the folder, each of which fits either base.
var components = map[string]variant{
	"iptables":   usual.with(func(v *variant) { v.firewall = "iptables" }),
	"nftables":   static,
	"ipvs":       usual.with(func(v *variant) { v.bind = "169.254.20.10" }),
	"dual-stack": usual.with(func(v *variant) { v.bind += " fd00:20::10 {$KUBE_DNS_IPV6_SERVICE_HOST}" }),
	"ipv6":       usual.with(func(v *variant) { v.bind = "fd00:20::10 {$KUBE_DNS_SERVICE_HOST}" }),
	"cilium":     {image: image + "-nftables", caps: []corev1.Capability{"NET_BIND_SERVICE"}, bind: "eth0", pod: true},
	"fastpath":   usual,
	"kubespray":  usual.with(func(v *variant) { v.dns = "$(COREDNS_SERVICE_HOST)" }),
	"rke2":       usual.with(func(v *variant) { v.dns = "$(RKE2_COREDNS_RKE2_COREDNS_SERVICE_HOST)" }),

	"prometheus-operator": usual.with(func(v *variant) { v.scraped = true }),

	"cluster-upstream": usual.with(func(v *variant) { v.upstream = "{$KUBE_DNS_UPSTREAM_SERVICE_HOST}" }),
	"udp":              usual.with(func(v *variant) { v.protocol = "prefer_udp" }),
	"no-fastpath":      usual,
	"query-log":        usual.with(func(v *variant) { v.log = true }),
	"port-names":       usual.with(func(v *variant) { v.named = true }),
}

func (v variant) with(change func(*variant)) variant { change(&v); return v }

// The files that are applied as they are stand in the folders of the bases again, since
// a kustomization reads nothing from above its own folder.
func TestFilesAreTheBases(t *testing.T) {
	for file, base := range map[string]string{"node-local.yaml": "single", "node-local-ha.yaml": "ha"} {
		a, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join("base", base, file))
		if err != nil {
			t.Fatal(err)
		}
		if string(a) != string(b) {
			t.Errorf("%s is not %s: run make manifests", file, filepath.Join("base", base, file))
		}
	}
	if files, err := filepath.Glob("*.yaml"); err != nil || len(files) != 2 {
		t.Errorf("the manifests are %v (%v), want two", files, err)
	}
}

func TestManifests(t *testing.T) {
	for file, sets := range map[string]int{"node-local.yaml": 1, "node-local-ha.yaml": 2} {
		t.Run(file, func(t *testing.T) {
			m, err := manifest.Read(file)
			if err != nil {
				t.Fatal(err)
			}
			check(t, m, sets, usual)
		})
	}
}

// Every overlay is a component on the single base, and has its name.
func TestOverlays(t *testing.T) {
	names := folders(t, "overlays")
	if len(names) < 9 {
		t.Errorf("the overlays are %v, want nine", names)
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			m, err := manifest.Build(filepath.Join("overlays", name))
			if err != nil {
				t.Fatal(err)
			}
			check(t, m, 1, components[name])
		})
	}
}

// Every component fits the pair too.
func TestComponentsOnThePair(t *testing.T) {
	for _, name := range folders(t, "components") {
		t.Run(name, func(t *testing.T) {
			check(t, combine(t, "ha", name), 2, components[name])
		})
	}
}

// What a user would combine works together.
func TestComponentsTogether(t *testing.T) {
	v := static.with(func(v *variant) { v.bind = components["dual-stack"].bind })
	check(t, combine(t, "ha", "nftables", "dual-stack", "fastpath"), 2, v)
}

// combine builds a kustomization of components.
func combine(t *testing.T, base string, names ...string) *manifest.Manifest {
	t.Helper()
	return build(t, func(up string) string {
		text := "resources:\n- " + filepath.Join(up, "base", base) + "\ncomponents:\n"
		for _, name := range names {
			text += "- " + filepath.Join(up, "components", name) + "\n"
		}
		return text
	})
}

// build builds a kustomization of a user's own. up is the way to this folder.
func build(t *testing.T, text func(up string) string) *manifest.Manifest {
	t.Helper()
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	up, err := filepath.Rel(dir, here)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "kustomization.yaml"), []byte(text(up)), 0o600); err != nil {
		t.Fatal(err)
	}
	m, err := manifest.Build(dir)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func folders(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
		if _, ok := components[e.Name()]; !ok {
			t.Errorf("%s/%s is not known to this test", dir, e.Name())
		}
	}
	return names
}

// The images that the manifests take are those that make image builds of the release, and those
// in the README and in docs have the same tag.
func TestImagesAreThoseOfMake(t *testing.T) {
	cmd := exec.Command("make", "--no-print-directory", "-n", "image", "VERSION="+release)
	cmd.Dir = ".."
	cmd.Env = slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "MAKE") || strings.HasPrefix(v, "IMAGE=") || strings.HasPrefix(v, "MFLAGS=")
	})
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v", cmd, err)
	}
	var got []string
	for _, m := range regexp.MustCompile(`--target (\w+) --tag (\S+)`).FindAllStringSubmatch(string(out), -1) {
		got = append(got, m[1]+" "+m[2])
	}
	if want := []string{"iptables " + usual.image, "nftables " + static.image}; !slices.Equal(got, want) {
		t.Errorf("make image builds %q, want %q:\n%s", got, want, out)
	}
	pages, err := filepath.Glob(filepath.Join("..", "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	tags := 0
	for _, path := range append(pages, filepath.Join("..", "README.md")) {
		page, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`coredns-nodecache:([\w.-]+)`).FindAllStringSubmatch(string(page), -1) {
			tags++
			if m[1] != tag {
				t.Errorf("%s has the image %s, want the tag %s", path, m[0], tag)
			}
		}
	}
	if tags < 2 {
		t.Errorf("%d images with a tag in the pages, want at least 2", tags)
	}
	changes, err := os.ReadFile(filepath.Join("..", "CHANGELOG.md"))
	if err != nil {
		t.Fatal(err)
	}
	if m := regexp.MustCompile(`(?m)^## (\d\S+)`).FindSubmatch(changes); m == nil || "v"+string(m[1]) != release {
		t.Errorf("the newest release of CHANGELOG.md is %q, the manifests have %s", m, release)
	}
}

func check(t *testing.T, m *manifest.Manifest, sets int, v variant) {
	t.Helper()
	if len(m.ConfigMaps) != 1 || len(m.DaemonSets) != sets {
		t.Fatalf("has %d ConfigMaps and %d DaemonSets", len(m.ConfigMaps), len(m.DaemonSets))
	}
	// test/chart has what the Service for the metrics is to be.
	headless := func(s corev1.Service) bool { return s.Spec.ClusterIP == "None" }
	if slices.ContainsFunc(m.Services, headless) != v.scraped {
		t.Errorf("has a headless Service: %v", !v.scraped)
	}
	m.Services = slices.DeleteFunc(m.Services, headless)
	for _, s := range m.Services {
		if s.Namespace != "kube-system" || len(s.Spec.Selector) != 1 || s.Spec.Selector["k8s-app"] != "kube-dns" {
			t.Errorf("the Service %s/%s is of %v, not of the cluster's DNS", s.Namespace, s.Name, s.Spec.Selector)
		}
		for _, p := range s.Spec.Ports {
			target := intstr.FromInt32(53)
			if v.named {
				target = intstr.FromString(p.Name)
			}
			if p.Port != 53 || p.TargetPort != target {
				t.Errorf("the Service %s has the port %v", s.Name, p)
			}
		}
	}
	// Their variables are made of their names, in pods of the same namespace.
	for name, variable := range map[string]string{"kube-dns-upstream": "KUBE_DNS_UPSTREAM", "kube-dns-ipv6": "KUBE_DNS_IPV6"} {
		has := slices.ContainsFunc(m.Services, func(s corev1.Service) bool { return s.Name == name })
		if uses := strings.Contains(fmt.Sprint(m.ConfigMaps[0].Data), "{$"+variable+"_SERVICE_HOST}"); has != uses {
			t.Errorf("has the Service %s: %v, uses its variable: %v", name, has, uses)
		}
	}
	if v.pod != (len(m.Policies) == 1) {
		t.Errorf("on a pod's network: %v, and %d policies", v.pod, len(m.Policies))
	}
	for _, ds := range m.DaemonSets {
		checkDaemonSet(t, m, ds, v)
	}
	if sets == 2 {
		checkTwins(t, m.DaemonSets[0], m.DaemonSets[1])
	}
}

func checkDaemonSet(t *testing.T, m *manifest.Manifest, ds appsv1.DaemonSet, v variant) {
	t.Helper()
	spec, cm := ds.Spec.Template.Spec, m.ConfigMaps[0]
	if ds.Namespace != "kube-system" || cm.Namespace != "kube-system" {
		t.Errorf("not in kube-system, whose Services it needs the variables of")
	}
	if spec.HostNetwork == v.pod || spec.HostPID || spec.HostIPC {
		t.Errorf("hostNetwork is %v, hostPID %v, hostIPC %v", spec.HostNetwork, spec.HostPID, spec.HostIPC)
	}
	if spec.DNSPolicy != corev1.DNSDefault || spec.PriorityClassName != "system-node-critical" {
		t.Errorf("the pod is not one for the node's own DNS: %+v", spec)
	}
	if spec.ServiceAccountName != "" || spec.AutomountServiceAccountToken == nil || *spec.AutomountServiceAccountToken {
		t.Error("the pod has a token of the API server")
	}
	// Without the variables of Services the Corefile is not complete.
	if spec.EnableServiceLinks == nil || !*spec.EnableServiceLinks {
		t.Error("enableServiceLinks is not true")
	}
	if len(spec.Tolerations) != 1 || spec.Tolerations[0] != (corev1.Toleration{Operator: corev1.TolerationOpExists}) {
		t.Errorf("tolerates only %v", spec.Tolerations)
	}
	pods := labels.Set(ds.Spec.Template.Labels)
	// Network policies of Cilium's guides select a node's cache by it. Elsewhere it stays node-cache's.
	if has := pods["k8s-app"] == "node-local-dns"; has != v.pod || pods["k8s-app"] != "" && !has {
		t.Errorf("the pods are labelled %v", pods)
	}
	if !labels.SelectorFromSet(ds.Spec.Selector.MatchLabels).Matches(pods) {
		t.Errorf("selects %v, its own pods are %v", ds.Spec.Selector.MatchLabels, pods)
	}
	// The Services would send the cache's misses back to the cache.
	for _, s := range m.Services {
		if labels.SelectorFromSet(s.Spec.Selector).Matches(pods) {
			t.Errorf("the Service %s leads to the cache", s.Name)
		}
	}
	if u := ds.Spec.UpdateStrategy.RollingUpdate; u == nil || u.MaxSurge.String() != "1" || u.MaxUnavailable.String() != "0" {
		t.Errorf("updates with %v", u)
	}
	if len(spec.Containers) != 1 || len(spec.InitContainers) != 0 {
		t.Fatalf("has %d containers, and %d to start with", len(spec.Containers), len(spec.InitContainers))
	}
	c := spec.Containers[0]
	if c.Image != v.image {
		t.Errorf("the image is %s, want %s", c.Image, v.image)
	}
	// With hostNetwork they would be ports of the host, and two pods could not be on one node.
	if (len(c.Ports) == 0) == v.pod {
		t.Errorf("on a pod's network: %v, and declares the ports %v", v.pod, c.Ports)
	}
	for _, p := range m.Policies {
		checkPolicy(t, p, pods, c.Ports)
	}
	checkSecurity(t, c.SecurityContext, v)
	var volumes []string
	for _, volume := range spec.Volumes {
		volumes = append(volumes, volume.Name)
		if volume.HostPath != nil && (volume.HostPath.Path != "/run/xtables.lock" || *volume.HostPath.Type != corev1.HostPathFileOrCreate) {
			t.Errorf("takes %s of the host", volume.HostPath.Path)
		}
	}
	want := []string{"config", "custom"}
	if v.lock {
		want = append(want, "xtables-lock")
	}
	if slices.Sort(volumes); !slices.Equal(volumes, want) || len(c.VolumeMounts) != len(want) {
		t.Errorf("the volumes are %v, mounted %v, want %v", volumes, c.VolumeMounts, want)
	}

	env, err := manifest.Env(c, nil, map[string]string{"status.hostIP": "10.0.0.1"})
	if err != nil {
		t.Error(err)
	}
	if env["KUBE_DNS_SERVICE_HOST"] != v.dns || env["CLUSTER_PROTOCOL"] != cmp.Or(v.protocol, "force_tcp") {
		t.Errorf("the address of the cluster's DNS is %q, asked with %q", env["KUBE_DNS_SERVICE_HOST"], env["CLUSTER_PROTOCOL"])
	}
	if env["FIREWALL"] != v.firewall {
		t.Errorf("the firewall is %q, want %q", env["FIREWALL"], v.firewall)
	}
	files, err := m.Files(spec, c, "/etc/coredns")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	if want := []string{"Corefile", "bind.conf", "custom/none.override", "custom/none.server", "log.conf", "nodecache.conf", "upstream.conf"}; !slices.Equal(names, want) {
		t.Errorf("the files are %v, want %v", names, want)
	}
	if got := files["bind.conf"]; got != "bind "+v.bind+"\n" {
		t.Errorf("binds with %q, want %q", got, v.bind)
	}
	if want := "upstream . " + cmp.Or(v.upstream, "/etc/resolv.conf") + " {\n"; !strings.HasPrefix(files["upstream.conf"], want) {
		t.Errorf("all other names go to %q, want %q", files["upstream.conf"], want)
	}
	if got := files["log.conf"]; v.log != (got == "log\n") || v.log == strings.HasPrefix(got, "#") {
		t.Errorf("logs with %q, want a log: %v", got, v.log)
	}
	corefile := files["Corefile"] + files["upstream.conf"]
	checkResources(t, c, corefile, files["nodecache.conf"], len(strings.Fields(v.bind)))
	for name, value := range env {
		corefile = strings.ReplaceAll(corefile, "{$"+name+"}", value)
	}
	for directive, probe := range map[string]*corev1.Probe{"health": c.LivenessProbe, "ready": c.ReadinessProbe} {
		get := probe.HTTPGet
		host := get.Host
		if strings.Contains(host, ":") {
			host = "[" + host + "]"
		}
		if want := fmt.Sprintf("\n    %s %s:%s {\n", directive, host, get.Port.String()); !strings.Contains(corefile, want) {
			t.Errorf("a probe asks %s:%s, where %s does not listen", get.Host, get.Port.String(), directive)
		}
	}
	port := ds.Spec.Template.Annotations["prometheus.io/port"]
	metrics := "10.0.0.1:" + port
	switch {
	case v.pod:
		metrics = ":" + port
	case strings.HasPrefix(v.bind, "fd"):
		metrics = "[10.0.0.1]:" + port
	}
	if !strings.Contains(corefile, "\n    prometheus "+metrics+"\n") {
		t.Errorf("the metrics are not on %s:\n%s", metrics, corefile)
	}
}

func checkSecurity(t *testing.T, s *corev1.SecurityContext, v variant) {
	t.Helper()
	switch {
	case s == nil || s.Capabilities == nil || s.SeccompProfile == nil:
		t.Fatalf("the security context is %v", s)
	case s.Privileged == nil || *s.Privileged, s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation:
		t.Error("is privileged, or can become so")
	case s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem:
		t.Error("the root file system can be written")
	case s.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault:
		t.Error("seccomp is not the runtime's default")
	case s.RunAsUser == nil || *s.RunAsUser != 0:
		t.Error("does not run as root, and would have no effective capabilities")
	case !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) || !slices.Equal(s.Capabilities.Add, v.caps):
		t.Errorf("the capabilities are %v, want %v", s.Capabilities, v.caps)
	}
}

// checkResources checks that the resources follow docs/sizing.md: what may be cached and
// what may wait fits into the limit, and what is usual into the request.
func checkResources(t *testing.T, c corev1.Container, corefile, directive string, addresses int) {
	t.Helper()
	request, limit := c.Resources.Requests.Memory(), c.Resources.Limits.Memory()
	if c.Resources.Requests.Cpu().IsZero() || !c.Resources.Limits.Cpu().IsZero() {
		t.Errorf("the CPU is %v, want a request and no limit, which would have answers wait", c.Resources)
	}
	number := func(pattern string) (all []float64) {
		for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(corefile, -1) {
			n, err := strconv.ParseFloat(m[1], 64)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, n)
		}
		return all
	}
	entries, waiting := 0.0, 0.0
	for _, n := range number(`(?m)^\s+(?:success|denial) (\d+)`) {
		entries += n
	}
	for _, n := range number(`max_concurrent (\d+)`) {
		waiting += n
	}
	blocks := float64(strings.Count(corefile, "upstream . "))
	if entries != 4*9984 || waiting != 2000 || blocks != 2 {
		t.Fatalf("%v entries, %v waiting, %v blocks", entries, waiting, blocks)
	}
	s := sizing(t)
	// In MiB. Half of a full cache is usual.
	most := s["the process"] + blocks*s["a server block"] + waiting*s["a query that waits"] + entries*s["an answer, three names, four addresses"]
	if strings.Contains(directive, "\n    fastpath") {
		most += float64(addresses) * 16384 * s["an answer of the fast path"] // its default
	}
	usual := s["the process"] + blocks*s["a server block"] + entries/2*s["an answer, one address"]
	const mib = 1 << 20
	if got := float64(limit.Value()) / mib; got < most || got > 1.5*most {
		t.Errorf("the limit is %.0f MiB, want at least the %.0f that can be needed, and not much more", got, most)
	}
	if got := float64(request.Value()) / mib; got < usual || got > 1.5*usual {
		t.Errorf("the request is %.0f MiB, want at least the %.0f of half a cache, and not much more", got, usual)
	}
	// The collector has to be hurried before the kernel kills. What it does not count, the
	// program's own pages, is less than the process without any answer.
	for _, e := range c.Env {
		if e.Name != "GOMEMLIMIT" {
			continue
		}
		quantity, err := resource.ParseQuantity(strings.TrimSuffix(e.Value, "B"))
		if err != nil {
			t.Fatal(err)
		}
		if rest := float64(limit.Value()-quantity.Value()) / mib; rest < s["the process"] || rest > 2*s["the process"] {
			t.Errorf("GOMEMLIMIT is %.0f MiB below the limit", rest)
		}
		return
	}
	t.Error("GOMEMLIMIT is not set")
}

// sizing reads the numbers of docs/sizing.md, in MiB.
func sizing(t *testing.T) map[string]float64 {
	t.Helper()
	page, err := os.ReadFile(filepath.Join("..", "docs", "sizing.md"))
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]float64{}
	for _, m := range regexp.MustCompile(`(?m)^\| ([^|]+) \| ([0-9.]+) (MiB|KiB) \|$`).FindAllStringSubmatch(string(page), -1) {
		n, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			t.Fatal(err)
		}
		if m[3] == "KiB" {
			n /= 1024
		}
		all[m[1]] = n
	}
	for _, name := range []string{"the process", "a server block", "a query that waits", "an answer, one address", "an answer, three names, four addresses", "an answer of the fast path"} {
		if all[name] == 0 {
			t.Fatalf("docs/sizing.md does not say what memory is for %s", name)
		}
	}
	return all
}

// A policy finds the pods by label, and their ports by name.
func checkPolicy(t *testing.T, p manifest.RedirectPolicy, pods labels.Set, ports []corev1.ContainerPort) {
	t.Helper()
	if s := p.Spec.RedirectFrontend.ServiceMatcher; p.Metadata.Namespace != "kube-system" || s.ServiceName != "kube-dns" || s.Namespace != "kube-system" {
		t.Errorf("the policy in %s is for %v", p.Metadata.Namespace, s)
	}
	if selector := p.Spec.RedirectBackend.LocalEndpointSelector.MatchLabels; len(selector) == 0 || !labels.SelectorFromSet(selector).Matches(pods) {
		t.Errorf("the policy selects %v, the pods are %v", selector, pods)
	}
	if len(p.Spec.RedirectBackend.ToPorts) != len(ports) {
		t.Errorf("the policy has the ports %v, the pod %v", p.Spec.RedirectBackend.ToPorts, ports)
	}
	for _, to := range p.Spec.RedirectBackend.ToPorts {
		if !slices.ContainsFunc(ports, func(c corev1.ContainerPort) bool {
			return c.Name == to.Name && fmt.Sprint(c.ContainerPort) == to.Port && c.Protocol == to.Protocol
		}) {
			t.Errorf("the pod has no port %v, it has %v", to, ports)
		}
	}
}

// Neither of the twins may take the other's pods for its own, and what does not need to
// differ between them does not.
func checkTwins(t *testing.T, a, b appsv1.DaemonSet) {
	t.Helper()
	for _, x := range [][2]appsv1.DaemonSet{{a, b}, {b, a}} {
		if labels.SelectorFromSet(x[0].Spec.Selector.MatchLabels).Matches(labels.Set(x[1].Spec.Template.Labels)) {
			t.Errorf("%s selects the pods of %s", x[0].Name, x[1].Name)
		}
	}
	text := func(ds appsv1.DaemonSet) string {
		out, err := yaml.Marshal(ds)
		if err != nil {
			t.Fatal(err)
		}
		return string(out)
	}
	got := strings.NewReplacer("nodecache-a", "nodecache-b", "instance: a", "instance: b",
		"8653", "8654", "8663", "8664", "9253", "9254").Replace(text(a))
	if want := text(b); got != want {
		w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
		for i := range min(len(w), len(g)) {
			if w[i] != g[i] {
				t.Fatalf("a and b differ in more than name and ports: %q and %q", g[i], w[i])
			}
		}
		t.Error("a and b differ in more than name and ports")
	}
}

// Both can be applied at once, while one takes the other's place.
func TestSingleAndPairSideBySide(t *testing.T) {
	single, err := manifest.Read("node-local.yaml")
	if err != nil {
		t.Fatal(err)
	}
	pair, err := manifest.Read("node-local-ha.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if single.ConfigMap(pair.ConfigMaps[0].Name) != nil {
		t.Error("they have a ConfigMap of one name")
	}
	all := append(slices.Clone(single.DaemonSets), pair.DaemonSets...)
	for i, a := range all {
		for j, b := range all {
			if i != j && labels.SelectorFromSet(a.Spec.Selector.MatchLabels).Matches(labels.Set(b.Spec.Template.Labels)) {
				t.Errorf("%s selects the pods of %s", a.Name, b.Name)
			}
		}
	}
	// Whoever is deleted first must not take what the other needs.
	for key, text := range single.ConfigMaps[0].Data {
		if pair.ConfigMaps[0].Data[key] != text {
			t.Errorf("%s of the single one and of the pair differ", key)
		}
	}
	if s, p := single.Services[0].Spec.String(), pair.Services[0].Spec.String(); s != p {
		t.Errorf("the Services differ: %s and %s", s, p)
	}
}

// The fast path is one line, of which one word makes it a wish, and no-fastpath the base without it.
func TestFastpathIsOneLine(t *testing.T) {
	base, err := manifest.Read("node-local.yaml")
	if err != nil {
		t.Fatal(err)
	}
	fast, err := manifest.Build("overlays/fastpath")
	if err != nil {
		t.Fatal(err)
	}
	without, err := manifest.BuildOn(t.TempDir(), ".", "single", "no-fastpath")
	if err != nil {
		t.Fatal(err)
	}
	const key, line = "nodecache.conf", "    # Repeated questions are answered past the plugins.\n    fastpath auto\n"
	usual := base.ConfigMaps[0].Data[key]
	if got := strings.Replace(fast.ConfigMaps[0].Data[key], "    fastpath\n", "    fastpath auto\n", 1); got != usual {
		t.Errorf("with the word it is\n%s\nwant\n%s", got, usual)
	}
	if got, want := without.ConfigMaps[0].Data[key], strings.Replace(usual, line, "", 1); got != want || want == usual {
		t.Errorf("without fastpath it is\n%s\nwant\n%s", got, want)
	}
}

// The kustomization that docs/on-a-cluster.md shows builds, and does what it says.
func TestReadmeKustomization(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "docs", "on-a-cluster.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, text, ok := strings.Cut(string(page), "\n~~~ yaml\n")
	text, _, ok2 := strings.Cut(text, "~~~\n")
	if !ok || !ok2 {
		t.Fatal("the page has no YAML")
	}
	m := build(t, func(up string) string { return strings.ReplaceAll(text, "- k8s/", "- "+up+"/") })
	if len(m.DaemonSets) != 2 {
		t.Fatalf("has %d DaemonSets", len(m.DaemonSets))
	}
	for _, ds := range m.DaemonSets {
		c := ds.Spec.Template.Spec.Containers[0]
		if want := "registry.example/coredns-nodecache:" + tag + "-nftables"; c.Image != want {
			t.Errorf("the image is %s, want %s", c.Image, want)
		}
		env, err := manifest.Env(c, nil, map[string]string{"status.hostIP": "10.0.0.1"})
		if err != nil || env["CLUSTER_DOMAIN"] != "example.internal" {
			t.Errorf("the environment is %v, %v", env, err)
		}
	}
}
