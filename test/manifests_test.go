package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/miekg/dns"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/contentful-labs/coredns-nodecache/test/chart"
	"github.com/contentful-labs/coredns-nodecache/test/lab"
	"github.com/contentful-labs/coredns-nodecache/test/manifest"
)

const (
	nodeIP  = "10.0.2.1"
	nodeIP6 = "fd00:2::1"
	podIP   = "10.0.3.2" // of node.eth0
)

// A pod is what kubelet makes of a DaemonSet, on a lab's node.
type pod struct {
	corefile string
	options  lab.Options
	env      map[string]string
	probes   []string // URLs that kubelet asks
	metrics  string   // host:port
	bound    []netip.Addr
	caps     []string
	ownNet   bool
}

// pod does kubelet's part: environment, files, capabilities.
func (n *node) pod(m *manifest.Manifest, ds appsv1.DaemonSet, custom ...corev1.ConfigMap) *pod {
	n.Helper()
	spec := ds.Spec.Template.Spec
	c := spec.Containers[0]
	ip := nodeIP
	ipv6 := slices.ContainsFunc(c.Env, func(e corev1.EnvVar) bool { return e.Name == "HOST_IP" })
	if ipv6 {
		ip = nodeIP6
	}
	// Those of the Services. The upstream one is the cluster's DNS server itself.
	services := map[string]string{}
	clusterIP, upstream := lab.ClusterIP.String(), lab.DNSAddr.String()
	if ipv6 {
		clusterIP, upstream = lab.ClusterIP6.String(), lab.DNSAddr6.String()
	}
	for _, s := range m.Services {
		switch s.Name {
		case "kube-dns-upstream":
			services["KUBE_DNS_UPSTREAM_SERVICE_HOST"] = upstream
		case "kube-dns-ipv6":
			services["KUBE_DNS_IPV6_SERVICE_HOST"] = lab.ClusterIP6.String()
		}
	}
	services[dnsService(c)] = clusterIP
	env, err := manifest.Env(c, services, map[string]string{"status.hostIP": ip})
	n.must(err)
	files, err := m.Files(spec, c, "/etc/coredns", custom...)
	n.must(err)
	// The node's own resolvers, which dnsPolicy Default brings, are the cluster's DNS too.
	resolvers := filepath.Join(n.Dir, "resolv.conf")
	n.must(os.WriteFile(resolvers, []byte("nameserver "+lab.DNSAddr.String()+"\n"), 0o644))
	for name, text := range files {
		files[name] = strings.ReplaceAll(text, "/etc/resolv.conf", resolvers)
	}
	p := &pod{corefile: files["Corefile"], env: env, ownNet: !spec.HostNetwork}
	delete(files, "Corefile")
	p.options.Files = files
	for name, value := range env {
		p.options.Env = append(p.options.Env, name+"="+value)
	}
	for _, name := range c.SecurityContext.Capabilities.Add {
		p.caps = append(p.caps, string(name))
	}
	p.options.Via = privileged(p.caps...)

	own := podIP // where a probe without a host goes
	for _, probe := range []*corev1.Probe{c.LivenessProbe, c.ReadinessProbe} {
		host := probe.HTTPGet.Host
		switch {
		case host == "":
			host = own
		case strings.Contains(host, ":"):
			host = "[" + host + "]"
		}
		p.probes = append(p.probes, fmt.Sprintf("http://%s:%s%s", host, probe.HTTPGet.Port.String(), probe.HTTPGet.Path))
	}
	p.metrics = env["NODE_IP"] + ":" + env["METRICS_PORT"]
	for _, word := range strings.Fields(files["bind.conf"])[1:] {
		if name, ok := strings.CutPrefix(word, "{$"); ok {
			word = env[strings.TrimSuffix(name, "}")]
		}
		if word == "eth0" {
			p.bound = append(p.bound, netip.MustParseAddr(podIP))
			p.metrics = podIP + p.metrics
			continue
		}
		p.bound = append(p.bound, netip.MustParseAddr(word))
	}
	return p
}

// dnsService is the variable of the Service that the cluster's DNS has: kube-dns, or the one from
// which the container takes its address instead.
func dnsService(c corev1.Container) string {
	for _, e := range c.Env {
		if name, ok := strings.CutSuffix(strings.TrimPrefix(e.Value, "$("), "_SERVICE_HOST)"); ok && e.Name == "KUBE_DNS_SERVICE_HOST" {
			return name + "_SERVICE_HOST"
		}
	}
	return "KUBE_DNS_SERVICE_HOST"
}

// up starts the pod and waits until its probes say that it is ready.
func (n *node) up(p *pod) *process {
	n.Helper()
	running := n.launch(p.corefile, p.options)
	n.must(running.WaitServing())
	n.must(running.WaitLog(0, inPlace))
	for _, url := range p.probes {
		var err error
		if !eventually(func() bool { _, err = get(n.Node, url); return err == nil }) {
			n.Errorf("the probe %s: %v", url, err)
		}
	}
	return running
}

// custom is what a user adds.
var custom = corev1.ConfigMap{Data: map[string]string{
	"example.server": `example.org:53 {
    import node
    cache 30
    hosts {
        203.0.113.9 my.example.org
    }
}
`,
	"example.override": "hosts {\n    203.0.113.10 one.more.example.com\n    203.0.113.11 one.more.svc.cluster.local\n    fallthrough\n}\n",
	"domain.server":    "corp.local:53 {\n    import cluster\n}\n",
}}

func init() { custom.Name = "nodecache-custom" }

// ask asks the cache for an address.
func (n *node) ask(c client, at netip.Addr, name string) (*dns.Msg, error) {
	m := new(dns.Msg).SetQuestion(name, dns.TypeA)
	var answer *dns.Msg
	err := c.ns.Do(func() (err error) {
		answer, err = dns.Exchange(m, netip.AddrPortFrom(at, 53).String())
		return err
	})
	return answer, err
}

// serves checks that a running pod does all that its manifest says.
func (n *node) serves(p *pod) {
	n.Helper()
	for _, c := range n.clientsOf(p) {
		for _, proto := range protos {
			n.run(lab.Load{From: c.ns, Proto: proto, To: on(p.bound...), Count: 5 * len(p.bound)}, false)
		}
	}
	n.answersOf(p, map[string]string{
		"a.default.svc.cluster.local.": "192.0.2.1",
		"www.example.com.":             "192.0.2.1",
		"my.example.org.":              "203.0.113.9",
		"one.more.example.com.":        "203.0.113.10",
		"one.more.svc.cluster.local.":  "203.0.113.11",
		"a.corp.local.":                "192.0.2.1",
	})
	body, err := get(n.Node, "http://"+p.metrics+"/metrics")
	n.must(err)
	n.has(body, "coredns_cache_entries", "coredns_nodecache_setup_errors_total")
	if p.ownNet {
		return
	}
	for _, other := range append([]netip.Addr{netip.MustParseAddr("127.0.0.1")}, p.bound...) {
		port, err := strconv.ParseUint(p.env["METRICS_PORT"], 10, 16)
		n.must(err)
		at := netip.AddrPortFrom(other, uint16(port))
		if _, err := get(n.Node, "http://"+at.String()+"/metrics"); !errors.Is(err, syscall.ECONNREFUSED) {
			n.Errorf("asking %s for metrics: %v, want a refusal", at, err)
		}
	}
}

// clientsOf are those who can ask a pod.
func (n *node) clientsOf(p *pod) []client {
	n.Helper()
	if p.ownNet {
		// Here the node's namespace stands for the pod's own.
		return []client{{"host", n.Node}}
	}
	return n.clients()
}

// answersOf checks what everybody is answered, by name.
func (n *node) answersOf(p *pod, names map[string]string) {
	n.Helper()
	for _, c := range n.clientsOf(p) {
		for _, at := range p.bound {
			for name, want := range names {
				answer, err := n.ask(c, at, name)
				if err != nil || len(answer.Answer) != 1 || !strings.HasSuffix(answer.Answer[0].String(), want) {
					n.Errorf("%s asks %s for %s and gets %v, %v", c.name, at, name, answer, err)
				}
			}
		}
	}
}

// quiet checks that a log has nothing to worry about.
func (n *node) quiet(log string) {
	n.Helper()
	for line := range strings.Lines(log) {
		if strings.Contains(line, "is still running") {
			continue // an emulated machine is slow
		}
		if strings.Contains(line, "[WARNING]") || strings.Contains(line, "[ERROR]") && !strings.Contains(line, "HINFO") {
			n.Error(strings.TrimSpace(line))
		}
	}
}

// Every manifest as it stands, with exactly its capabilities, answers and leaves nothing.
func TestManifests(t *testing.T) {
	k8s := filepath.Join("..", "k8s")
	read := func(file string) func() (*manifest.Manifest, error) {
		return func() (*manifest.Manifest, error) { return manifest.Read(filepath.Join(k8s, file)) }
	}
	manifests := map[string]func() (*manifest.Manifest, error){
		"node-local.yaml": read("node-local.yaml"), "node-local-ha.yaml": read("node-local-ha.yaml"),
	}
	overlays, err := os.ReadDir(filepath.Join(k8s, "overlays"))
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range overlays {
		manifests[o.Name()] = func() (*manifest.Manifest, error) {
			return manifest.Build(filepath.Join(k8s, "overlays", o.Name()))
		}
	}
	// What of the chart no kustomization has.
	manifests["chart"] = rendered(`
pair: {enabled: true}
config:
  firewall: nftables
  extraClusterDomains: [corp.test]
  extraOverrides: |
    template IN A values.example.com {
        answer "{{ .Name }} 60 IN A 203.0.113.12"
    }
  extraServerBlocks: |
    values.test:53 {
        import node
        template IN A {
            answer "{{ .Name }} 60 IN A 203.0.113.13"
        }
    }
  upstreamServers: ["` + lab.DNSAddr.String() + `"]
  cache: {success: 2000, denial: 1024}
  healthPort: 9800
`)
	for name, load := range manifests {
		for _, variant := range []lab.Iptables{lab.NFT, lab.Legacy} {
			t.Run(name+"/"+string(variant), func(t *testing.T) {
				n := newNode(t, backend{iptables: variant})
				m, err := load()
				n.must(err)
				if len(m.Policies) > 0 {
					n.eth0()
				}
				before := n.snapshot()
				var pods []*pod
				var running []*process
				for _, ds := range m.DaemonSets {
					p := n.pod(m, ds, custom)
					pods = append(pods, p)
					running = append(running, n.up(p))
				}
				for _, p := range pods {
					n.serves(p)
					if name == "chart" {
						n.answersOf(p, map[string]string{
							"values.example.com.": "203.0.113.12", "my.values.test.": "203.0.113.13", "a.corp.test.": "192.0.2.1",
						})
					}
				}
				for i, r := range running {
					n.has(r.Log(), firewallOf(pods[i].env["FIREWALL"]))
					r.exit(syscall.SIGTERM)
					n.quiet(r.Log())
					if i < len(running)-1 {
						n.serves(pods[i+1])
					}
				}
				n.same("after the exit", before, n.snapshot())
			})
		}
	}
}

// rendered is the chart with values.
func rendered(values string) func() (*manifest.Manifest, error) {
	return func() (*manifest.Manifest, error) {
		r, err := chart.Render(filepath.Join("..", "charts", "nodecache"), "nodecache", values)
		if err != nil {
			return nil, err
		}
		return manifest.Decode([]byte(r.Objects))
	}
}

// firewallOf is what the log says of a backend.
func firewallOf(word string) string {
	switch word {
	case "":
		return inPlace
	case "auto":
		word = "iptables"
	}
	return "tracking by " + word
}

// Without a ConfigMap of the user's there is nothing to import, and nothing to warn of.
func TestManifestWithoutCustomBlocks(t *testing.T) {
	n := newNode(t, iptablesNFT)
	m, err := manifest.Read(filepath.Join("..", "k8s", "node-local.yaml"))
	n.must(err)
	p := n.up(n.pod(m, m.DaemonSets[0]))
	n.quiet(p.Log())
	p.exit(syscall.SIGTERM)
}

// With the components all names are asked of the cluster's DNS, over UDP, and queries are logged:
// although the node's resolvers are nowhere, and nothing gets through to the cluster over TCP.
func TestComponents(t *testing.T) {
	n := newNode(t, iptablesNFT)
	m, err := manifest.BuildOn(t.TempDir(), filepath.Join("..", "k8s"), "single", "cluster-upstream", "udp", "query-log")
	n.must(err)
	p := n.pod(m, m.DaemonSets[0])
	n.must(os.WriteFile(filepath.Join(n.Dir, "resolv.conf"), []byte("nameserver 203.0.113.1\n"), 0o644))
	for _, command := range []string{
		"nft add table inet filtered",
		"nft add chain inet filtered in { type filter hook input priority 0 ; }",
		"nft add rule inet filtered in tcp dport 53 drop",
	} {
		words := strings.Fields(command)
		_, err := n.DNS.Run(words[0], words[1:]...)
		n.must(err)
	}
	running := n.up(p)
	n.answersOf(p, map[string]string{"a.default.svc.cluster.local.": "192.0.2.1", "www.example.com.": "192.0.2.1"})
	n.has(running.Log(), `"A IN www.example.com. udp `, `"A IN a.default.svc.cluster.local. udp `)
	running.exit(syscall.SIGTERM)
}

// A user's block that comes while the cache runs is taken at the next look for changes, and
// one that is bad is refused without harm.
func TestCustomBlocksAreReloaded(t *testing.T) {
	n := newNode(t, iptablesNFT)
	m, err := manifest.Read(filepath.Join("..", "k8s", "node-local.yaml"))
	n.must(err)
	p := n.pod(m, m.DaemonSets[0])
	p.corefile = strings.Replace(p.corefile, "    reload\n", "    reload 2s 1s\n", 1)
	running := n.up(p)
	file := filepath.Join(filepath.Dir(running.Corefile), "custom", "example.server")
	change := func(text string) int {
		mark := running.Mark()
		n.must(os.WriteFile(file+".new", []byte(text), 0o644))
		n.must(os.Rename(file+".new", file))
		return mark
	}
	n.must(running.WaitReload(change(custom.Data["example.server"])))
	answer, err := n.ask(client{"pod", n.Pod}, lab.LinkLocal, "my.example.org.")
	if err != nil || len(answer.Answer) != 1 {
		t.Fatalf("the new block does not answer: %v, %v", answer, err)
	}
	// An upstream for some names goes before the one for all others.
	var packets net.PacketConn
	n.must(n.DNS.Do(func() (err error) { packets, err = net.ListenPacket("udp", resolverAt); return err }))
	other := &dns.Server{PacketConn: packets, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		w.WriteMsg(new(dns.Msg).SetRcode(q, dns.RcodeNameError))
	})}
	go other.ActivateAndServe()
	t.Cleanup(func() { other.Shutdown() })
	mark := running.Mark()
	override := filepath.Join(filepath.Dir(file), "example.override")
	n.must(os.WriteFile(override, []byte("upstream other.test "+resolverAt+"\n"), 0o644))
	n.must(running.WaitReload(mark))
	for name, rcode := range map[string]int{"a.other.test.": dns.RcodeNameError, "www.example.com.": dns.RcodeSuccess} {
		answer, err := n.ask(client{"pod", n.Pod}, lab.LinkLocal, name)
		if err != nil || answer.Rcode != rcode {
			t.Errorf("%s: %v, %v, want %s", name, answer, err, dns.RcodeToString[rcode])
		}
	}
	n.must(running.WaitLog(change("example.org:53 {\n    import node\n    nonsense\n}\n"), "nonsense"))
	answer, err = n.ask(client{"pod", n.Pod}, lab.LinkLocal, "my.example.org.")
	if err != nil || len(answer.Answer) != 1 {
		t.Errorf("after a bad block the old one does not answer: %v, %v", answer, err)
	}
	running.exit(syscall.SIGTERM)
}
