package cluster

import (
	"fmt"
	"net"
	"strings"
)

// A family is the addresses of a cluster in one of the two address families.
type family struct {
	Node, Outside string // of the link between them
	Bits          int    // of that link
	Default       string // where a default route leads
	PodNet        string
	ServiceNet    string
	API, DNS      string // the Services kubernetes and kube-dns
	Local         string // what the manifests have as the cache's own address
}

var (
	ipv4 = family{
		Node: "10.245.0.2", Outside: "10.245.0.1", Bits: 30, Default: "0.0.0.0/0", PodNet: "10.244.0.0/24",
		ServiceNet: "10.96.0.0/16", API: "10.96.0.1", DNS: ClusterIP, Local: "169.254.20.10",
	}
	ipv6 = family{
		Node: "fd00:245::2", Outside: "fd00:245::1", Bits: 64, Default: "::/0", PodNet: "fd00:244::/64",
		ServiceNet: "fd00:96::/112", API: "fd00:96::1", DNS: "fd00:96::a", Local: "fd00:20::10",
	}
)

// A setup is a kind of cluster.
type setup struct {
	proxy    string   // kube-proxy's mode
	families []family // the first is that of Services which name none
}

// setups are the kinds of clusters by the names that New takes.
var setups = map[string]setup{
	"iptables":   {"iptables", []family{ipv4}},
	"nftables":   {"nftables", []family{ipv4}},
	"dual-stack": {"nftables", []family{ipv4, ipv6}},
	"ipv6":       {"iptables", []family{ipv6}},
	"fastpath":   {"iptables", []family{ipv4}},
}

// each is what is said of each family, joined.
func each(families []family, separator string, say func(f family) string) string {
	var all []string
	for _, f := range families {
		all = append(all, say(f))
	}
	return strings.Join(all, separator)
}

// apiURL is where the API server listens.
func (s setup) apiURL() string { return "https://" + net.JoinHostPort(s.families[0].Node, "6443") }

// podNets are the networks of the pods, as Kubernetes' flags take them.
func (s setup) podNets() string {
	return each(s.families, ",", func(f family) string { return f.PodNet })
}

// cni is how pods get their addresses: a link to each, without a bridge, which would take the module br_netfilter.
func (s setup) cni() string {
	return fmt.Sprintf(`{"cniVersion": "0.4.0", "name": "cluster", "plugins": [{"type": "ptp", "ipam": {
	"type": "host-local", "dataDir": "/run/cni",
	"ranges": [%s],
	"routes": [%s]}}]}
`,
		each(s.families, ", ", func(f family) string { return fmt.Sprintf(`[{"subnet": %q}]`, f.PodNet) }),
		each(s.families, ", ", func(f family) string { return fmt.Sprintf(`{"dst": %q}`, f.Default) }))
}
