// Command generate writes those files of charts/ and k8s/ that are made of others: the Corefile, the
// alerts and the dashboard of the chart, its README, and the PrometheusRule. It is run at the root of the
// repository, by make manifests.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/contentful-labs/coredns-nodecache/test/manifest"
)

const chartDir = "charts/nodecache"

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "generate:", err)
		os.Exit(1)
	}
}

func run() error {
	files, err := Generate(".")
	if err != nil {
		return err
	}
	for name, text := range files {
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// Generate returns what the files have to be, by their paths from root on.
func Generate(root string) (map[string]string, error) {
	base, err := manifest.Build(filepath.Join(root, "k8s/base/single"))
	if err != nil {
		return nil, err
	}
	cluster, err := os.ReadFile(filepath.Join(root, "k8s/components/cluster-upstream/configmap.yaml"))
	if err != nil {
		return nil, err
	}
	var patch struct{ Data map[string]string }
	if err := yaml.Unmarshal(cluster, &patch); err != nil {
		return nil, err
	}
	rules, err := os.ReadFile(filepath.Join(root, "k8s/monitoring/rules.yaml"))
	if err != nil {
		return nil, err
	}
	dashboard, err := os.ReadFile(filepath.Join(root, "k8s/monitoring/dashboard.json"))
	if err != nil {
		return nil, err
	}
	readme, err := readme(filepath.Join(root, chartDir, "values.yaml"))
	if err != nil {
		return nil, err
	}
	data := base.ConfigMaps[0].Data
	_, groups, ok := strings.Cut(string(rules), "\ngroups:\n")
	if !ok {
		return nil, fmt.Errorf("k8s/monitoring/rules.yaml has no groups")
	}
	groups = "groups:\n" + groups
	return map[string]string{
		chartDir + "/README.md":                                  readme,
		chartDir + "/files/Corefile":                             data["Corefile"],
		chartDir + "/files/upstream.conf":                        data["upstream.conf"],
		chartDir + "/files/cluster-upstream.conf":                patch.Data["upstream.conf"],
		chartDir + "/files/rules.yaml":                           groups,
		chartDir + "/files/dashboard.json":                       string(dashboard),
		"k8s/components/prometheus-operator/prometheusrule.yaml": prometheusRule(groups),
	}, nil
}

// prometheusRule is groups of rules as an object of the Prometheus Operator.
func prometheusRule(groups string) string {
	var b strings.Builder
	b.WriteString(`# k8s/monitoring/rules.yaml for the Prometheus Operator; make manifests writes this file.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: nodecache
  namespace: kube-system
  labels:
    app.kubernetes.io/name: nodecache
spec:
`)
	for line := range strings.Lines(groups) {
		if strings.TrimSpace(line) != "" {
			b.WriteString("  ")
		}
		b.WriteString(line)
	}
	return b.String()
}

// readme is the chart's, with a table of its values.
func readme(values string) (string, error) {
	text, err := os.ReadFile(values)
	if err != nil {
		return "", err
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(text, &doc); err != nil {
		return "", fmt.Errorf("%s: %w", values, err)
	}
	var b strings.Builder
	b.WriteString(head)
	if err := rows(&b, "", doc.Content[0], ""); err != nil {
		return "", fmt.Errorf("%s: %w", values, err)
	}
	return b.String(), nil
}

// rows writes a row for each value below a mapping. said is what stands above the mapping.
func rows(b *strings.Builder, prefix string, m *yaml.Node, said string) error {
	for i := 0; i+1 < len(m.Content); i += 2 {
		key, value := m.Content[i], m.Content[i+1]
		path, what := prefix+key.Value, said
		if c, ok := strings.CutPrefix(key.HeadComment, "# -- "); ok {
			what = strings.ReplaceAll(c, "\n# ", " ")
		}
		if value.Kind == yaml.MappingNode && len(value.Content) > 0 && !free[path] {
			if err := rows(b, path+".", value, ""); err != nil {
				return err
			}
			continue
		}
		var v any
		if err := value.Decode(&v); err != nil {
			return err
		}
		fmt.Fprintf(b, "| `%s` | `%s` | %s |\n", path, compact(v), what)
	}
	return nil
}

// free are mappings that are one value: a user's own replaces or extends them.
var free = map[string]bool{
	"config.upstreamServiceSelector": true, "resources": true, "nodeSelector": true, "updateStrategy": true,
}

// compact is a value on one line, in YAML's flow style.
func compact(v any) string {
	n := new(yaml.Node)
	if err := n.Encode(v); err != nil {
		return fmt.Sprint(v)
	}
	flow(n)
	out, err := yaml.Marshal(n)
	if err != nil {
		return fmt.Sprint(v)
	}
	return strings.TrimSpace(string(out))
}

func flow(n *yaml.Node) {
	if n.Kind == yaml.MappingNode || n.Kind == yaml.SequenceNode {
		n.Style = yaml.FlowStyle
	}
	for _, c := range n.Content {
		flow(c)
	}
}

const head = `<!-- make manifests writes this file, of values.yaml and test/chart/generate. -->
# The chart nodecache

A DNS cache on every node, in front of the cluster's DNS. It loses no query when it is updated, stopped or
reloaded, and where it does not run the cluster's DNS answers.

~~~ sh
helm install nodecache charts/nodecache --namespace kube-system
helm test nodecache --namespace kube-system
~~~

It belongs into the namespace of the cluster's DNS, mostly kube-system, whose Services give it their addresses.
What it makes with its defaults is what k8s/node-local.yaml has.

| Cluster | Values |
|---------|--------|
| kube-proxy in iptables or nftables mode, DNS behind the Service kube-dns | none |
| the same, nodes without iptables, or an image without a shell | ` + "`config.firewall=nftables`" + ` |
| kube-proxy in IPVS mode | ` + "`config.bindServiceIp=false`" + `, and 169.254.20.10 as kubelet's clusterDNS |
| Cilium in place of kube-proxy | ` + "`cilium.enabled=true`" + ` |
| IPv6 alone | ` + "`config.localDns=fd00:20::10`" + ` |
| IPv4 and IPv6 | ` + "`config.dualStack=true`, `config.localDns={169.254.20.10,fd00:20::10}`" + ` |
| kubespray | ` + "`config.dnsServiceName=coredns`" + ` |
| RKE2 | ` + "`config.dnsServiceName=rke2-coredns-rke2-coredns`" + ` |
| node-cache is there, and stays for now | ` + "`config.upstreamService.create=false`" + ` |

A wrong key or a value of a wrong type is refused: values.schema.json has them all. In a ConfigMap
nodecache-custom keys NAME.override and NAME.server are read too, and changes of it without a new release.

To go, have the DaemonSet end before the Service by which it asks:

~~~ sh
kubectl -n kube-system delete daemonset -l app.kubernetes.io/name=nodecache --wait
kubectl -n kube-system wait --for=delete pod -l app.kubernetes.io/name=nodecache
helm uninstall nodecache --namespace kube-system
~~~

## Values

| Key | Default | What it is |
|-----|---------|------------|
`
