package cluster

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
	"github.com/contentful-labs/coredns-nodecache/test/manifest"
)

func TestMain(m *testing.M) {
	RunNode()
	os.Exit(m.Run())
}

// The manifests, applied as they stand to a Kubernetes with kube-proxy in each mode, lose no
// query that they promise not to lose.
func TestManifests(t *testing.T) {
	kit := os.Getenv("CLUSTER_KIT")
	if kit == "" {
		t.Skip("make test-cluster runs this: it takes Kubernetes' programs")
	}
	makeImages(t, kit)
	if !HasDummy() {
		t.Log("this kernel has no dummy driver: the node's runtime gives every container /dev/net/tun")
	}
	for _, mode := range []string{"iptables", "nftables"} {
		t.Run(mode, func(t *testing.T) {
			s := newSite(t, kit, mode)
			s.applied()
			s.updated()
			s.reloaded()
			s.killed("iptables")
			s.overlaid("k8s/overlays/" + mode)
			s.killed(mode)
			s.paired()
			s.halves()
			s.removed()
		})
	}
}

// The manifests, and what they make.
const (
	single    = "k8s/node-local.yaml"
	pair      = "k8s/node-local-ha.yaml"
	namespace = "--namespace=kube-system"
	ours      = "--selector=app.kubernetes.io/name=nodecache"
)

func path(name string) string { return filepath.Join("..", "..", name) }

// makeImages makes the images that the manifests name, and those of the test.
func makeImages(t *testing.T, kit string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	images := filepath.Join(kit, "images")
	must(os.RemoveAll(images))
	must(os.MkdirAll(images, 0o755))
	for _, name := range []string{"ask", "coredns"} {
		root := t.TempDir()
		must(os.Link(filepath.Join(kit, "bin", name), filepath.Join(root, name)))
		for _, as := range map[string][]string{"ask": {PauseImage, "cluster.test/ask:1"}, "coredns": {"cluster.test/coredns:1"}}[name] {
			i := Image{Name: as, Root: root, Config: ImageConfig{Entrypoint: []string{"/" + name}}}
			must(i.Archive(filepath.Join(images, strings.NewReplacer("/", "_", ":", "_").Replace(as)+".tar")))
		}
	}
	dockerfile, err := os.ReadFile(path("Dockerfile"))
	must(err)
	made := map[string]bool{}
	for _, name := range []string{single, pair, "k8s/overlays/iptables", "k8s/overlays/nftables"} {
		read := manifest.Build
		if filepath.Ext(name) == ".yaml" {
			read = manifest.Read
		}
		m, err := read(path(name))
		must(err)
		for _, d := range m.DaemonSets {
			as := d.Spec.Template.Spec.Containers[0].Image
			if made[as] {
				continue
			}
			made[as] = true
			target := "iptables"
			if strings.HasSuffix(as, "-nftables") {
				target = "nftables"
			}
			root, err := filepath.Glob(path("build/image/*/" + target))
			must(err)
			if len(root) != 1 {
				t.Fatalf("build/image/*/%s is %q, want one; make image-root makes it", target, root)
			}
			config, err := startOf(string(dockerfile), target)
			must(err)
			i := Image{Name: as, Root: root[0], Config: config}
			must(i.Archive(filepath.Join(images, "nodecache-"+target+".tar")))
		}
	}
}

// startOf is how a target of a Dockerfile has its image started.
func startOf(dockerfile, target string) (c ImageConfig, err error) {
	_, text, ok := strings.Cut(dockerfile, "\nFROM scratch AS "+target+"\n")
	if !ok {
		return c, fmt.Errorf("the Dockerfile has no target %s", target)
	}
	text, _, _ = strings.Cut(text, "\nFROM ")
	for _, m := range regexp.MustCompile(`(?m)^(ENV|ENTRYPOINT|CMD) (.*)$`).FindAllStringSubmatch(text, -1) {
		switch m[1] {
		case "ENV":
			c.Env = append(c.Env, m[2])
		case "ENTRYPOINT":
			err = json.Unmarshal([]byte(m[2]), &c.Entrypoint)
		case "CMD":
			err = json.Unmarshal([]byte(m[2]), &c.Cmd)
		}
		if err != nil {
			return c, fmt.Errorf("reading the Dockerfile: %s: %w", m[0], err)
		}
	}
	return c, nil
}

// A site is a cluster, those who ask in it, and what they have seen.
type site struct {
	*testing.T
	*Cluster
	single, pair    applied          // what puts one cache on the node, and two
	services, local []netip.AddrPort // where the cluster's DNS can be asked, and the cache alone
	table           *tabwriter.Writer
	lines           strings.Builder // of the table
	steps           int
	seen            map[string]bool // lines of events and logs
}

// An applied is arguments of kubectl apply, and what to call them.
type applied struct {
	title string
	args  []string
}

func newSite(t *testing.T, kit, mode string) *site {
	t.Helper()
	s := &site{T: t, seen: map[string]bool{}, single: applied{single, []string{"-f", path(single)}}, pair: applied{pair, []string{"-f", path(pair)}}}
	s.table = tabwriter.NewWriter(&s.lines, 0, 0, 2, ' ', 0)
	fmt.Fprintln(s.table, "\tfrom\tqueries\tsent\tlost\trefused\twrong\tretried\tby the cluster\tlongest gap")
	begun := time.Now()
	c, err := New(kit, mode)
	if err != nil {
		t.Fatal(err)
	}
	s.Cluster = c
	t.Cleanup(func() {
		if t.Failed() {
			s.show("get", "pods", "--all-namespaces", "--output=wide")
			t.Logf("the logs of Kubernetes' programs are in %s", c.Logs())
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		s.table.Flush()
		t.Logf("%s:\n%s", mode, s.lines.String())
	})
	t.Logf("the node was ready after %v", time.Since(begun).Round(100*time.Millisecond))
	s.show("version")
	at := func(addr string) netip.AddrPort { return netip.AddrPortFrom(netip.MustParseAddr(addr), 53) }
	s.services = []netip.AddrPort{at(s.setup.families[0].DNS)}
	for _, f := range s.setup.families {
		s.local = append(s.local, at(f.Local))
	}
	s.kubectl("apply", "-f", "testdata/clients.yaml", "-f", s.filled("testdata/dns.yaml"))
	s.kubectl(namespace, "rollout", "status", "deployment/coredns", "--timeout=3m")
	for _, from := range clients {
		s.kubectl("rollout", "status", "deployment/"+from, "--timeout=3m")
	}
	s.show("get", "pods", "--all-namespaces", "--output=wide")
	// kube-proxy learns somewhat later that the pods of the cluster's DNS are ready.
	for _, from := range clients {
		load := lab.Load{Proto: "udp", To: s.services, Zone: zone, Count: 16, Workers: workers, Timeout: 500 * time.Millisecond}
		s.must(poll("the cluster answers "+from, func() error {
			if r := s.ask(from, []lab.Load{load})(false)[0]; !r.AllAnswered(true) {
				return errors.New(r.String())
			}
			return nil
		}))
	}
	s.answers(true)
	s.news()
	return s
}

// filled is a file with the address of the cluster's DNS Service in the place of CLUSTERIP.
func (s *site) filled(name string) (file string) {
	s.Helper()
	text, err := os.ReadFile(name)
	s.must(err)
	file = filepath.Join(s.TempDir(), filepath.Base(name))
	s.must(os.WriteFile(file, []byte(strings.ReplaceAll(string(text), "CLUSTERIP", s.setup.families[0].DNS)), 0o644))
	return file
}

// clients are those of testdata/clients.yaml.
var clients = []string{"pod", "host-network"}

func (s *site) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// kubectl runs kubectl and returns what it says.
func (s *site) kubectl(args ...string) string {
	s.Helper()
	out, err := s.Kubectl(args...)
	s.must(err)
	return out
}

// show has a person see what kubectl says.
func (s *site) show(args ...string) {
	s.Helper()
	out, err := s.Kubectl(args...)
	if err != nil {
		s.Error(err)
	}
	s.Logf("$ kubectl %s\n%s", strings.Join(args, " "), out)
}

// news shows the events and the lines of the logs that are new.
func (s *site) news() {
	s.Helper()
	for _, args := range [][]string{
		{namespace, "get", "events", "--sort-by=.metadata.creationTimestamp", "--no-headers",
			"--output=custom-columns=TYPE:.type,REASON:.reason,OBJECT:.involvedObject.name,COUNT:.count,MESSAGE:.message"},
		{namespace, "logs", ours, "--prefix", "--tail=-1"},
		{namespace, "logs", ours, "--prefix", "--tail=-1", "--previous"},
	} {
		out, err := s.Kubectl(args...)
		if err != nil && !slices.Contains(args, "--previous") {
			s.Error(err)
		}
		var fresh strings.Builder
		for line := range strings.Lines(out) {
			if !s.seen[line] {
				s.seen[line] = true
				fresh.WriteString(line)
			}
		}
		if fresh.Len() > 0 {
			s.Logf("$ kubectl %s   # what is new\n%s", strings.Join(args, " "), fresh.String())
		}
	}
}

// A kind of queries.
type kind struct {
	name string
	lab.Load
}

// workers is how many queries of a kind can be on their way at a time: enough that those which
// a killed cache held, and which are waited for, do not keep all others from being sent.
const workers = 16

// Mostly names that the cache knows, of the cluster and of the world outside. Those of the cluster
// are asked at its Services, the others at the cache's own addresses.
var kinds = []kind{
	{"UDP, ClusterIP, known names", lab.Load{Proto: "udp", Zone: zone, Rate: 200}},
	{"UDP, ClusterIP, new names", lab.Load{Proto: "udp", Zone: zone, Rate: 50, Names: lab.Misses}},
	{"TCP, ClusterIP, known names", lab.Load{Proto: "tcp", Zone: zone, Rate: 50}},
	{"UDP, local address, outside", lab.Load{Proto: "udp", Rate: 200}},
}

// zone is answered by the cluster's DNS.
const zone = "lab.cluster.local."

// ask runs loads in a pod. The function that it returns has them end by themselves, or at once,
// and returns what became of them.
func (s *site) ask(from string, loads []lab.Load) func(stop bool) []lab.Result {
	s.Helper()
	text, err := json.Marshal(loads)
	s.must(err)
	cmd := s.KubectlCommand("exec", "--stdin", "deployment/"+from, "--", "/ask", "load", string(text))
	var stderr strings.Builder
	cmd.Stderr = &stderr
	stdin, err := cmd.StdinPipe()
	s.must(err)
	stdout, err := cmd.StdoutPipe()
	s.must(err)
	s.must(cmd.Start())
	lines := bufio.NewReader(stdout)
	if line, err := lines.ReadString('\n'); line != "running\n" {
		stdin.Close()
		io.Copy(io.Discard, lines)
		s.Fatalf("starting loads in %s: %q, %v, %v: %s", from, line, err, cmd.Wait(), stderr.String())
	}
	return func(stop bool) (results []lab.Result) {
		s.Helper()
		if stop {
			s.must(stdin.Close())
		}
		err := json.NewDecoder(lines).Decode(&results)
		stdin.Close()
		io.Copy(io.Discard, lines)
		if failed := cmd.Wait(); err != nil || failed != nil || len(results) != len(loads) {
			s.Fatalf("the loads of %s: %v, %v: %s", from, err, failed, stderr.String())
		}
		return results
	}
}

// A judge says what is wrong with what became of a kind of queries.
type judge func(from string, k kind, r *lab.Result) string

// all is the judge who wants every query answered.
func all(_ string, _ kind, r *lab.Result) string {
	if r.Sent == 0 || r.Answered != r.Sent {
		return "want all answered"
	}
	return ""
}

// step does something while everybody asks, and shows what became of it.
func (s *site) step(title string, which []kind, judge judge, do func()) {
	s.Helper()
	s.steps++
	s.Logf("== %s", title)
	var loads []lab.Load
	for _, k := range which {
		k.Load.Tag = fmt.Sprint("-", s.steps)
		if k.Load.Names == lab.Hits {
			k.Load.Tag = ""
		}
		k.Load.Count, k.Load.Workers, k.Load.To = 1<<30, workers, s.services
		if k.Zone != zone {
			k.Load.To = s.local
		}
		loads = append(loads, k.Load)
	}
	ends := make([]func(bool) []lab.Result, len(clients))
	for i, from := range clients {
		ends[i] = s.ask(from, loads)
	}
	do()
	first := title
	for i, from := range clients {
		for j, r := range ends[i](true) {
			fmt.Fprintf(s.table, "%s\t%s\t%s\t%d\t%d\t%d\t%d\t%d\t%d\t%v\n", first, from, which[j].name, r.Sent, r.Lost,
				r.Refused, r.Wrong, r.Retried, r.FromCluster, r.Gap.Round(time.Millisecond))
			first = ""
			if wrong := judge(from, which[j], &r); wrong != "" {
				s.Errorf("%s: %s: %s: %s; the first of %d that were not answered:\n%s", title, from, which[j].name, wrong,
					r.Sent-r.Answered, strings.Join(r.Errors[:min(len(r.Errors), 3)], "\n"))
			}
		}
	}
	s.show(namespace, "get", "pods", ours, "--output=wide")
	s.news()
}

// answers checks who answers the ClusterIP: the cluster itself, or the cache.
func (s *site) answers(cluster bool) {
	s.Helper()
	for _, from := range clients {
		for _, proto := range []string{"udp", "tcp"} {
			// Of different names, lest answers of a cache that has just come are all it has.
			load := lab.Load{Proto: proto, To: s.services, Zone: zone, Count: 64, Workers: workers}
			if r := s.ask(from, []lab.Load{load})(false)[0]; !r.AllAnswered(cluster) {
				s.Errorf("%s asks over %s, want all answered by the cluster itself: %v: %v", from, proto, cluster, &r)
			}
		}
		got := s.kubectl("exec", "deployment/"+from, "--", "/ask", "lookup", "kubernetes.default.svc.cluster.local")
		if want := s.setup.families[0].API; strings.TrimSpace(got) != want {
			s.Errorf("%s looks kubernetes.default.svc.cluster.local up: %q, want %s", from, got, want)
		}
	}
}

// rolled waits until DaemonSets have what they are to have, and nothing is left of what was.
func (s *site) rolled(names ...string) {
	s.Helper()
	for _, name := range names {
		s.kubectl(namespace, "rollout", "status", "daemonset/"+name, "--timeout=3m")
	}
	s.must(poll("no other pod is left", func() error {
		out, err := s.Kubectl(namespace, "get", "pods", ours, "--output=name")
		if err == nil && len(strings.Fields(out)) != len(names) {
			err = fmt.Errorf("the pods are %q", strings.Fields(out))
		}
		return err
	}))
}

// settling is the judge while a cache is new. Its Service is as new: until kube-proxy has found the pods
// behind it, the cluster's names can't be had through the cache.
func settling(_ string, _ kind, r *lab.Result) string {
	if r.Answered == 0 || r.Lost+r.Refused > workers {
		return "want no more than SERVFAIL, until kube-proxy knows the new Service"
	}
	return ""
}

func (s *site) applied() {
	s.step("apply "+s.single.title, kinds[:3], settling, func() {
		s.kubectl(append([]string{"apply"}, s.single.args...)...)
		s.rolled("nodecache")
	})
	s.answers(false)
	out, err := s.OnNode("ip", "-brief", "address", "show", "nodelocaldns")
	s.must(err)
	s.Logf("# ip -brief address show nodelocaldns\n%s", out)
}

func (s *site) updated() {
	s.step("update with surge", kinds, all, func() {
		s.kubectl(namespace, "rollout", "restart", "daemonset/nodecache")
		s.rolled("nodecache")
	})
	s.answers(false)
}

func (s *site) reloaded() {
	s.step("reload after a change of the ConfigMap", kinds, all, func() {
		config := s.kubectl(namespace, "get", "configmap", "nodecache", "--output=yaml")
		changed := strings.Replace(config, "max_concurrent 1000", "max_concurrent 2000", 1)
		if changed == config {
			s.Fatal("the Corefile has no max_concurrent to change")
		}
		file := filepath.Join(s.TempDir(), "configmap.yaml")
		s.must(os.WriteFile(file, []byte(changed), 0o644))
		s.kubectl("apply", "-f", file)
		// Kubelet looks at a pod's volumes when the pod changes, and else once a minute.
		s.kubectl(namespace, "annotate", "pods", ours, "changed=now")
		s.logged("Reloading complete")
	})
	s.answers(false)
}

// logged waits until a pod's log has a text.
func (s *site) logged(text string) {
	s.Helper()
	s.must(poll("the log says "+text, func() error {
		out, err := s.Kubectl(namespace, "logs", ours, "--tail=-1")
		if err == nil && !strings.Contains(out, text) {
			err = fmt.Errorf("it says %s", out)
		}
		return err
	}))
}

// container is the id of a pod's container, or of one in the place of another that has ended.
func (s *site) container(selector, ended string) (id string) {
	s.Helper()
	s.must(poll("the container runs", func() error {
		out, err := s.Kubectl(namespace, "get", "pods", "--selector="+selector,
			"--output=jsonpath={.items[*].status.containerStatuses[?(@.ready==true)].containerID}")
		_, id, _ = strings.Cut(strings.TrimSpace(out), "://")
		if err == nil && (id == "" || id == ended) {
			err = fmt.Errorf("the container that is ready is %q", out)
		}
		return err
	}))
	return id
}

// killed kills the container, whose firewall backend is given: of firewall auto iptables.
func (s *site) killed(backend string) {
	const selector = "app.kubernetes.io/instance=single"
	// What was asked when it died is lost. A pod's next query reaches the cluster, and so does
	// that of the node's own programs, with iptables when a list of the kernel's has run out.
	held := func(from string, k kind, r *lab.Result) string {
		switch {
		case k.Zone != zone || from == "host-network" && backend == "iptables":
			return ""
		case k.Names == lab.Hits && r.FromCluster == 0:
			return "want some answered by the cluster"
		case r.Wrong > 0 || r.Lost+r.Refused > workers:
			return "want no more lost than were on their way"
		}
		return ""
	}
	s.step("container killed, "+s.single.title, kinds, held, func() {
		id := s.container(selector, "")
		s.must(s.Kill(id))
		s.container(selector, id)
	})
	s.answers(false)
	// The DaemonSet's controller looks at a pod again minReadySeconds after it became ready, but
	// of two such looks that it has before it only the earlier one takes place. An update until
	// then would stand still after its new pod has become ready.
	s.must(poll("the pod counts as available", func() error {
		out, err := s.Kubectl(namespace, "get", "daemonset", ours, "--output=jsonpath={.items[*].status.numberAvailable}")
		if err == nil && out != "1" {
			err = fmt.Errorf("%q pods are available", out)
		}
		return err
	}))
}

func (s *site) overlaid(overlay string) {
	s.single = applied{overlay, []string{"-k", path(overlay)}}
	s.step("update to "+overlay, kinds, all, func() {
		s.kubectl(append([]string{"apply"}, s.single.args...)...)
		s.rolled("nodecache")
	})
	s.answers(false)
}

func (s *site) paired() {
	s.step("change to "+s.pair.title, kinds, all, func() {
		s.kubectl(append([]string{"apply"}, s.pair.args...)...)
		for _, half := range []string{"nodecache-a", "nodecache-b"} {
			s.kubectl(namespace, "rollout", "status", "daemonset/"+half, "--timeout=3m")
		}
		s.kubectl(namespace, "delete", "daemonset/nodecache", "configmap/nodecache")
		s.rolled("nodecache-a", "nodecache-b")
	})
	s.answers(false)
}

func (s *site) halves() {
	for _, half := range []string{"a", "b"} {
		s.step("pair: restart of "+half, kinds, all, func() {
			s.kubectl(namespace, "rollout", "restart", "daemonset/nodecache-"+half)
			s.rolled("nodecache-a", "nodecache-b")
		})
	}
	held := func(_ string, _ kind, r *lab.Result) string {
		if r.Wrong > 0 || r.Lost+r.Refused > workers {
			return "want no more lost than were on their way"
		}
		return ""
	}
	for _, half := range []string{"a", "b"} {
		s.step("pair: container of "+half+" killed", kinds, held, func() {
			selector := "app.kubernetes.io/instance=" + half
			id := s.container(selector, "")
			s.must(s.Kill(id))
			s.container(selector, id)
		})
	}
	s.answers(false)
}

func (s *site) removed() {
	// The DaemonSets first: a cache without the Service behind it has nobody to ask.
	s.step("delete the DaemonSets", kinds[:3], all, func() {
		s.kubectl(namespace, "delete", "daemonset", ours)
		s.rolled()
	})
	s.kubectl(append([]string{"delete", "--ignore-not-found"}, s.pair.args...)...)
	s.services = s.services[:1] // the cluster's own
	s.answers(true)
	s.leftNothing()
}

// leftNothing checks that the node has nothing of ours any more.
func (s *site) leftNothing() {
	s.Helper()
	for _, command := range [][]string{
		{"ip", "-brief", "address"}, {"iptables-nft-save"}, {"ip6tables-nft-save"},
		{"iptables-legacy-save"}, {"ip6tables-legacy-save"}, {"nft", "list", "ruleset"},
	} {
		out, err := s.OnNode(command...)
		s.must(err)
		for line := range strings.Lines(out) {
			names := []string{"nodelocaldns", "nodecache"}
			for _, f := range s.setup.families {
				names = append(names, f.Local, " "+f.DNS+"/")
			}
			for _, ours := range names {
				// kube-proxy has rules for the ClusterIP.
				if strings.Contains(strings.ToLower(line), ours) && (command[0] == "ip" || !strings.HasPrefix(ours, " ")) {
					s.Errorf("left on the node, says %s: %s", strings.Join(command, " "), line)
				}
			}
		}
	}
}
