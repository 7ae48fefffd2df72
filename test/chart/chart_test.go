package chart

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"helm.sh/helm/v4/pkg/chart/v2/lint"
	"helm.sh/helm/v4/pkg/chart/v2/lint/support"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/contentful-labs/coredns-nodecache/test/manifest"
)

const (
	root = "../.."
	dir  = root + "/charts/nodecache"
)

func render(t *testing.T, release, values string) (*manifest.Manifest, *Rendered) {
	t.Helper()
	r, err := Render(dir, release, values)
	if err != nil {
		t.Fatal(err)
	}
	m, err := manifest.Decode([]byte(r.Objects))
	if err != nil {
		t.Fatalf("%v:\n%s", err, r.Objects)
	}
	return m, r
}

func TestLint(t *testing.T) {
	for _, values := range []map[string]any{nil, {"pair": map[string]any{"enabled": true}}} {
		for _, m := range lint.RunAll(dir, values, Namespace).Messages {
			// A chart of its own needs no icon.
			if m.Severity > support.InfoSev {
				t.Errorf("helm lint: %v", m)
			}
		}
	}
}

// counterparts are the values that come to what a kustomization comes to.
var counterparts = map[string]string{
	"k8s/base/single":             "",
	"k8s/base/ha":                 "pair: {enabled: true}",
	"k8s/overlays/iptables":       "config: {firewall: iptables}",
	"k8s/overlays/nftables":       "config: {firewall: nftables}",
	"k8s/overlays/ipvs":           "config: {bindServiceIp: false}",
	"k8s/overlays/dual-stack":     `config: {dualStack: true, localDns: [169.254.20.10, "fd00:20::10"]}`,
	"k8s/overlays/ipv6":           `config: {localDns: "fd00:20::10"}`,
	"k8s/overlays/cilium":         "cilium: {enabled: true}",
	"k8s/overlays/fastpath":       "config: {fastpath: {auto: false}}",
	"components/no-fastpath":      "config: {fastpath: {enabled: false}}",
	"k8s/overlays/kubespray":      "config: {dnsServiceName: coredns}",
	"k8s/overlays/rke2":           "config: {dnsServiceName: rke2-coredns-rke2-coredns}",
	"components/cluster-upstream": "config: {forwardToClusterDns: true}",
	"components/udp":              "config: {commProtocol: prefer_udp}",
	"components/query-log":        "config: {enableLogging: true}",
	"components/port-names":       "config: {upstreamServiceTargetPort: {udp: dns, tcp: dns-tcp}}",
}

// build builds an overlay, or a component on the base single.
func build(t *testing.T, name string) (*manifest.Manifest, error) {
	if component, ok := strings.CutPrefix(name, "components/"); ok {
		return manifest.BuildOn(t.TempDir(), filepath.Join(root, "k8s"), "single", component)
	}
	return manifest.Build(filepath.Join(root, name))
}

// The chart and the manifests are one: what the defaults come to is the base, and for each overlay and each
// component there are values.
func TestChartIsTheManifests(t *testing.T) {
	for _, name := range []string{"overlays", "components"} {
		entries, err := os.ReadDir(filepath.Join(root, "k8s", name))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			_, overlay := counterparts["k8s/overlays/"+e.Name()]
			_, component := counterparts["components/"+e.Name()]
			if !overlay && !component && e.Name() != "prometheus-operator" {
				t.Errorf("no values of the chart for %s/%s", name, e.Name())
			}
		}
	}
	for name, values := range counterparts {
		t.Run(name, func(t *testing.T) {
			want, err := build(t, name)
			if err != nil {
				t.Fatal(err)
			}
			got, _ := render(t, "nodecache", values)
			compare(t, comparable(t, got), comparable(t, want))
		})
	}
}

func compare(t *testing.T, got, want map[string]string) {
	t.Helper()
	for name, text := range want {
		if got[name] == text {
			continue
		}
		g, w := strings.Split(got[name], "\n"), strings.Split(text, "\n")
		for i := range min(len(g), len(w)) {
			if g[i] != w[i] {
				t.Errorf("%s: line %d of the chart's is %q, want %q:\n%s\nwant\n%s", name, i, g[i], w[i], got[name], text)
				break
			}
		}
		if got[name] == "" {
			t.Errorf("the chart has no %s", name)
		}
	}
	for name := range got {
		if want[name] == "" {
			t.Errorf("the chart has a %s too", name)
		}
	}
}

// comparable is what matters of the objects, by kind and name: without what differs by purpose. Those are
// Helm's own labels, and names that a release gives.
func comparable(t *testing.T, m *manifest.Manifest) map[string]string {
	t.Helper()
	all := map[string]string{}
	put := func(kind, name string, v any) {
		text, err := yaml.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		all[kind+" "+name] = regexp.MustCompile(`(?m)(instance: )(nodecache-|single$|nodecache$)`).ReplaceAllString(strings.ReplaceAll(string(text), "nodecache-ha", "nodecache"), "${1}")
	}
	for _, s := range m.Services {
		put("Service", s.Name, s.Spec)
	}
	for _, c := range m.ConfigMaps {
		put("ConfigMap", strings.TrimSuffix(c.Name, "-ha"), c.Data)
	}
	for _, p := range m.Policies {
		put("Policy", p.Metadata.Name, p.Spec)
	}
	for _, d := range m.DaemonSets {
		c := &d.Spec.Template.Spec.Containers[0]
		c.ImagePullPolicy = corev1.PullIfNotPresent // the default for a tag
		slices.SortFunc(c.Env, func(a, b corev1.EnvVar) int { return strings.Compare(a.Name, b.Name) })
		put("DaemonSet", d.Name, d.Spec)
	}
	return all
}

// Every object has Helm's labels, and those of the release's pods are found by no other release.
func TestLabels(t *testing.T) {
	m, _ := render(t, "other", "pair: {enabled: true}\nserviceMonitor: {enabled: true}\nprometheusRule: {enabled: true}\ndashboard: {enabled: true}")
	var metas []metav1.ObjectMeta
	for _, o := range m.Services {
		metas = append(metas, o.ObjectMeta)
	}
	for _, o := range m.ConfigMaps {
		metas = append(metas, o.ObjectMeta)
	}
	for _, o := range m.DaemonSets {
		metas = append(metas, o.ObjectMeta)
		if got := o.Spec.Selector.MatchLabels["app.kubernetes.io/instance"]; !strings.HasPrefix(got, "other-") {
			t.Errorf("%s selects the instance %q", o.Name, got)
		}
	}
	metas = append(metas, m.Monitors[0].ObjectMeta, m.Rules[0].ObjectMeta)
	for _, o := range metas {
		if o.Labels["app.kubernetes.io/managed-by"] != "Helm" || o.Labels["app.kubernetes.io/name"] != "nodecache" || o.Namespace != Namespace {
			t.Errorf("%s is in %q and labelled %v", o.Name, o.Namespace, o.Labels)
		}
	}
	if len(metas) != 2+2+2+2 {
		t.Errorf("%d objects", len(metas))
	}
}

// What a user gets to read for values that can't be.
func TestBadValues(t *testing.T) {
	for values, want := range map[string]string{
		"config: {clusterDomain: x}":                `additional properties 'clusterDomain' not allowed`,
		"nodecache: 1":                              `additional properties 'nodecache' not allowed`,
		"config: {healthPort: '8080'}":              `/config/healthPort`,
		"config: {firewall: pf}":                    `/config/firewall`,
		"config: {localDns: nowhere}":               `/config/localDns`,
		"config: {localDns: []}":                    `/config/localDns`,
		"config: {cache: {success: 1}}":             `/config/cache/success`,
		"config: {fastpath: {entries: 1}}":          `/config/fastpath/entries`,
		"config: {fastpath: true}":                  `/config/fastpath`,
		"config: {interfaceName: abcdefghijklmnop}": `/config/interfaceName`,
		"pair: true":                                `/pair`,
		"image: {tag: 1}":                           `/image/tag`,
		"config: {upstreamServers: ['a b']}":        `/config/upstreamServers`,
		"config: {forwardToClusterDns: true, upstreamServers: [192.0.2.53]}": `give one of the two`,
		"config: {enableLogging: true, fastpath: {auto: false}}":             `config.enableLogging can't go with config.fastpath.enabled`,
		"config: {dualStack: true, bindServiceIp: false}":                    `config.dualStack serves the address of a Service`,
		"resources: {limits: {memory: 200M}}":                                `goMemLimit has to be given`,
	} {
		if _, err := Render(dir, "nodecache", values); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", values, err, want)
		} else {
			t.Logf("%s\n%v", values, err)
		}
	}
}

// The schema has each value that there is, and no other.
func TestSchemaHasTheValues(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(dir, "values.schema.json"))
	if err != nil {
		t.Fatal(err)
	}
	type node struct {
		Type                 string
		Properties           map[string]json.RawMessage
		AdditionalProperties any
	}
	var check func(path string, schema json.RawMessage, value any)
	check = func(path string, schema json.RawMessage, value any) {
		var n node
		if err := json.Unmarshal(schema, &n); err != nil {
			t.Fatal(err)
		}
		if n.Properties == nil {
			return
		}
		if n.AdditionalProperties != false {
			t.Errorf("%s takes any key", path)
		}
		values, _ := value.(map[string]any)
		for key, below := range n.Properties {
			if v, ok := values[key]; ok {
				check(path+"."+key, below, v)
			} else if path+"."+key != ".global" && path != ".resources" {
				t.Errorf("the schema has %s.%s, values.yaml has not", path, key)
			}
		}
		for key := range values {
			if _, ok := n.Properties[key]; !ok {
				t.Errorf("values.yaml has %s.%s, the schema has not", path, key)
			}
		}
	}
	values, err := os.ReadFile(filepath.Join(dir, "values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var all map[string]any
	if err := yaml.UnmarshalStrict(values, &all); err != nil {
		t.Fatal(err)
	}
	check("", text, all)
}

// What else values do.
func TestValues(t *testing.T) {
	daemonset := func(t *testing.T, values string) appsv1.DaemonSet {
		m, _ := render(t, "nodecache", values)
		return m.DaemonSets[0]
	}
	data := func(t *testing.T, values, key string) string {
		m, _ := render(t, "nodecache", values)
		return m.ConfigMaps[0].Data[key]
	}
	env := func(t *testing.T, values, name string) string {
		e, err := manifest.Env(daemonset(t, values).Spec.Template.Spec.Containers[0], nil, map[string]string{"status.hostIP": "10.0.0.1"})
		if err != nil {
			t.Fatal(err)
		}
		return e[name]
	}
	image := func(t *testing.T, values string) string {
		return daemonset(t, values).Spec.Template.Spec.Containers[0].Image
	}
	for what, c := range map[string]struct{ got, want string }{
		"servers":            {data(t, "config: {upstreamServers: [192.0.2.53, 'tls://192.0.2.54']}", "upstream.conf"), "upstream . 192.0.2.53 tls://192.0.2.54 {\n"},
		"sizes":              {data(t, "config: {cache: {success: 20000, denial: 3000}}", "Corefile"), "success 20000 30 "},
		"domains":            {data(t, "config: {extraClusterDomains: [corp.local]}", "values.server"), "corp.local:53 {\n    import cluster\n}\n"},
		"overrides":          {data(t, "config: {extraOverrides: 'hosts /etc/hosts'}", "values.override"), "hosts /etc/hosts\n"},
		"addresses":          {data(t, "config: {dnsServer: [10.96.0.10, 10.96.0.9]}", "bind.conf"), "bind 169.254.20.10 10.96.0.10 10.96.0.9\n"},
		"directive":          {data(t, "config: {skipTeardown: true, interfaceName: dns0, fastpath: {enabled: true, entries: 4096}}", "nodecache.conf"), "nodecache skipteardown {\n    interface dns0\n    firewall {$FIREWALL}\n"},
		"entries":            {data(t, "config: {fastpath: {entries: 4096}}", "nodecache.conf"), "    fastpath auto 4096\n}\n"},
		"registry":           {image(t, "image: {repository: registry.example/nodecache, tag: v9}\nconfig: {firewall: nftables}"), "registry.example/nodecache:v9-nftables"},
		"digest":             {image(t, "image: {digest: 'sha256:"+strings.Repeat("0", 64)+"'}"), "@sha256:000"},
		"memory":             {env(t, "resources: {limits: {memory: 1Gi}}", "GOMEMLIMIT"), "976MiB"},
		"memory in MiB":      {env(t, "resources: {limits: {memory: 400Mi}}", "GOMEMLIMIT"), "352MiB"},
		"memory said":        {env(t, "resources: {limits: {memory: 200M}}\ngoMemLimit: 150MiB", "GOMEMLIMIT"), "150MiB"},
		"another Service":    {env(t, "config: {upstreamService: {name: dns-behind, create: false}}", "KUBE_DNS_UPSTREAM_SERVICE_HOST"), "$(DNS_BEHIND_SERVICE_HOST)"},
		"probe over IPv6":    {env(t, "config: {localDns: ['fd00:20::10', 169.254.20.10]}", "PROBE_HOST"), "[fd00:20::10]"},
		"further variables":  {env(t, "extraEnv: [{name: GOGC, value: '75'}]", "GOGC"), "75"},
		"garbage":            {env(t, "goGC: 80", "GOGC"), "80"},
		"the test of a pair": {strings.TrimSpace(testOf(t, "pair: {enabled: true}")), "nslookup kubernetes.default.svc.cluster.local 169.254.20.10"},
	} {
		if !strings.Contains(c.got, c.want) {
			t.Errorf("%s: %q, want %q", what, c.got, c.want)
		}
	}
	if m, _ := render(t, "nodecache", "config: {upstreamService: {create: false}}"); len(m.Services) != 0 {
		t.Errorf("has Services that it is not to make: %v", m.Services)
	}
	if m, _ := render(t, "nodecache", "prometheusScraping: {enabled: false}"); m.DaemonSets[0].Spec.Template.Annotations != nil {
		t.Errorf("has the annotations %v", m.DaemonSets[0].Spec.Template.Annotations)
	}
}

// testOf is the command of the pod that helm test starts.
func testOf(t *testing.T, values string) string {
	t.Helper()
	_, r := render(t, "nodecache", values)
	m, err := manifest.Decode([]byte(r.Tests))
	if err != nil || len(m.Pods) != 1 || m.Pods[0].Annotations["helm.sh/hook"] != "test" {
		t.Fatalf("%v:\n%s", err, r.Tests)
	}
	return strings.Join(m.Pods[0].Spec.Containers[0].Command, " ")
}

// The notes say what to give kubelet.
func TestNotes(t *testing.T) {
	for values, want := range map[string]string{
		"":                               "clusterDNS stays as it is",
		"pair: {enabled: true}":          "daemonset/nodecache-b",
		"config: {bindServiceIp: false}": "169.254.20.10 as their nameserver",
		"cilium: {enabled: true}":        "localRedirectPolicies.enabled=true",
		"config: {dnsDomain: k8s.test}":  "Names outside of k8s.test are asked of the node's own resolvers",
	} {
		if _, r := render(t, "nodecache", values); !strings.Contains(r.Notes, want) || strings.Contains(r.Notes, "WARNING") {
			t.Errorf("with %q the notes are\n%s\nwant %q", values, r.Notes, want)
		}
	}
}

// What is there for the Prometheus Operator takes each pod once, on its own port, and has the alerts.
func TestPrometheusOperator(t *testing.T) {
	rules, err := os.ReadFile(filepath.Join(root, "k8s/monitoring/rules.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	alerts := strings.Count(string(rules), "- alert: ")
	of := func(m *manifest.Manifest, what string) {
		t.Helper()
		if len(m.Monitors) != 1 || len(m.Rules) != 1 {
			t.Fatalf("%s: %d ServiceMonitors, %d PrometheusRules", what, len(m.Monitors), len(m.Rules))
		}
		var service *corev1.Service
		for i, s := range m.Services {
			if s.Spec.ClusterIP == "None" {
				service = &m.Services[i]
			}
		}
		for _, d := range m.DaemonSets {
			pod := d.Spec.Template
			taken := 0
			for _, e := range m.Monitors[0].Spec.Endpoints {
				keep := regexp.MustCompile("^(?:" + e.RelabelConfigs[0].Regex + ")$")
				if !keep.MatchString(pod.Labels["app.kubernetes.io/instance"]) {
					continue
				}
				for _, p := range service.Spec.Ports {
					if p.Name == e.Port && p.TargetPort.String() == pod.Annotations["prometheus.io/port"] {
						taken++
					}
				}
			}
			if taken != 1 {
				t.Errorf("%s: the metrics of %s are taken %d times", what, d.Name, taken)
			}
		}
		if got := len(m.Rules[0].Spec.Groups[0].Rules); got != alerts || alerts == 0 {
			t.Errorf("%s: %d alerts, want %d", what, got, alerts)
		}
	}
	const values = "serviceMonitor: {enabled: true, interval: 15s, labels: {release: prometheus}}\nprometheusRule: {enabled: true}\n"
	for _, pair := range []string{"", "pair: {enabled: true}\n"} {
		m, _ := render(t, "mine", values+pair)
		of(m, "the chart "+pair)
		if got := m.Monitors[0]; got.Labels["release"] != "prometheus" || got.Spec.Endpoints[0].Interval != "15s" {
			t.Errorf("the ServiceMonitor is %v", got)
		}
	}
	for _, base := range []string{"single", "ha"} {
		m, err := manifest.BuildOn(t.TempDir(), filepath.Join(root, "k8s"), base, "prometheus-operator")
		if err != nil {
			t.Fatal(err)
		}
		of(m, base)
	}
}
