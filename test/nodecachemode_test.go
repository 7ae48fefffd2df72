package e2e

import (
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

var updateRows = flag.Bool("update-rows", false, "write what node-cache was seen to do into the rows")

// served are the rows that are started, with what a pod's environment has for them.
var served = []string{"kubernetes", "kubernetes-ipvs", "kubernetes-ipv6", "kubespray", "kops", "gardener", "deliveryhero", "lablabs", "rke2", "served-stub-domains"}

// With only the image changed, the command lines of the installers, of the charts and of
// Kubernetes' own addon serve: the same answers, addresses and rules as node-cache, as it was seen.
func TestNodeCacheArguments(t *testing.T) {
	for _, r := range rows(t) {
		if !slices.Contains(served, r.name) {
			continue
		}
		t.Run(r.name, func(t *testing.T) {
			if reference() != "" {
				n := newNode(t, iptablesNFT)
				c := n.original(r)
				if seen := n.seen(r); *updateRows {
					path := filepath.Join(rowsDir, r.name+".txt")
					text := read(t, path)
					head, tail, _ := strings.Cut(text, "-- Corefile --\n")
					head, _, _ = strings.Cut(head, "-- seen --\n")
					n.must(os.WriteFile(path, []byte(head+"-- seen --\n"+seen+"-- Corefile --\n"+tail), 0o644))
					r.sections["seen"] = seen
				} else if seen != r.sections["seen"] {
					t.Errorf("node-cache was seen to\n%s\nthe row has\n%s", seen, r.sections["seen"])
				}
				c.exit(syscall.SIGTERM)
			}
			n := newNode(t, iptablesNFT)
			before := n.snapshot()
			c := n.replacement(r)
			if seen := n.seen(r); seen != r.sections["seen"] {
				t.Errorf("seen\n%s\nof node-cache was seen\n%s", seen, r.sections["seen"])
			}
			if text := read(t, filepath.Join(c.root, "etc/Corefile")); text != r.sections["Corefile"] {
				t.Errorf("/etc/Corefile is\n%s", text)
			}
			c.exit(syscall.SIGTERM)
			if strings.Contains(c.Log(), "[ERROR]") {
				t.Errorf("errors were logged:\n%s", c.Log())
			}
			if !strings.Contains(r.sections["args"], "-skipteardown=true") && !strings.HasSuffix(r.sections["args"], "-skipteardown\n") {
				n.same("after the exit", before, n.snapshot())
			}
		})
	}
}

// Both images take the place, by the entry point that they have and as the program that node-cache's image has.
func TestNodeCacheImages(t *testing.T) {
	r := rowNamed(t, "kubernetes")
	for _, c := range []struct{ target, entry, says string }{
		{"iptables", "/node-cache", "iptables is legacy"},
		{"nftables", "/node-cache", "out of connection tracking by nftables"},
		{"nftables", "", "out of connection tracking by nftables"},
	} {
		t.Run(c.target+strings.ReplaceAll(c.entry, "/", "-"), func(t *testing.T) {
			n := newNode(t, iptablesLegacy)
			before := n.snapshot()
			path, entry := stage(t, c.target)
			if c.entry != "" {
				entry = c.entry
			}
			p := n.replacementBy(c.target, path, entry, r)
			n.has(p.Log(), c.says)
			n.answersEverybody(false, localIPs(r)...)
			p.exit(syscall.SIGTERM)
			n.same("after the exit", before, n.snapshot())
		})
	}
}

// In a pod's own network, to whose address queries are redirected, that address is served too.
func TestNodeCacheInOwnNetwork(t *testing.T) {
	r := rowNamed(t, "own-network")
	n := newNode(t, iptablesNFT)
	n.eth0()
	before := n.snapshot()
	c := n.replacement(r)
	for _, a := range []string{podIP, "169.254.20.25", "127.0.0.1"} {
		for _, proto := range protos {
			if got := answerTo(n.Node, proto, a+":53", "a.cluster.local."); got != "NOERROR/192.0.2.1" {
				t.Errorf("%s over %s: %s", a, proto, got)
			}
		}
	}
	c.exit(syscall.SIGTERM)
	n.same("after the exit", before, n.snapshot())

	// deliveryhero's chart gives no capability there, and node-cache does without the interface.
	r.caps = []string{"NET_BIND_SERVICE", "NET_RAW"}
	path, entry := stage(t, "iptables")
	c = n.contained(imageRoot(t, "iptables"), path, entry, r)
	n.must(c.WaitServing())
	n.has(c.Log(), "the interface nodelocaldns is not made")
	if got := answerTo(n.Node, "udp", podIP+":53", "a.cluster.local."); got != "NOERROR/192.0.2.1" {
		t.Errorf("without the capability: %s", got)
	}
	c.exit(syscall.SIGTERM)
	n.same("after the exit without the capability", before, n.snapshot())
}

// Without a template the Corefile of -conf is served, and stays as it is written.
func TestNodeCacheWithoutTemplate(t *testing.T) {
	r := rowNamed(t, "no-template")
	n := newNode(t, iptablesNFT)
	c := n.replacement(r)
	n.answersEverybody(true, lab.LinkLocal)
	path := filepath.Join(c.root, "etc/Corefile")
	if text := read(t, path); text != r.sections["corefile"] {
		t.Errorf("/etc/Corefile has become\n%s", text)
	}
	n.must(os.WriteFile(path, []byte(strings.Replace(r.sections["corefile"], "bind", "cache 30\n    bind", 1)), 0o644))
	mark := c.Mark()
	n.must(c.Signal(syscall.SIGUSR1))
	n.must(c.WaitReload(mark))
	n.answersEverybody(false, lab.LinkLocal)
}

// What a template for node-cache may name is in the images.
func TestNodeCachePlugins(t *testing.T) {
	out, err := exec.Command(binary(t), "-plugins").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range strings.Fields("bind bufsize cache debug dns64 errors forward health hosts loadbalance log loop prometheus pprof reload rewrite template timeouts trace whoami") {
		if !strings.Contains(string(out), "dns."+name+"\n") {
			t.Errorf("no plugin %s among\n%s", name, out)
		}
	}
}

// What the flags can't mean is said, by the name of the flag, before anything is done.
func TestNodeCacheRefuses(t *testing.T) {
	for _, c := range []struct{ args, says string }{
		{"", "-localip is missing"},
		{"-localip 169.254.20.10,nonsense", `-localip: "nonsense" is no address`},
		{"-localip 0.0.0.0", `-localip: "0.0.0.0" is no address`},
		{"-localip 169.254.20.10 -interfacename a-name-that-is-too-long", `-interfacename: "a-name-that-is-too-long"`},
		{"-localip 169.254.20.10 -health-port 80800", `-health-port: "80800" is no port`},
		{"-localip 169.254.20.10 -dns.port dns", `-dns.port: "dns" is no port`},
		{"-localip 169.254.20.10 -metrics-listen-address 9353", `-metrics-listen-address: "9353"`},
		{"-localip 169.254.20.10 -syncinterval never", "-syncinterval"},
		{"-localip 169.254.20.10 -setupiptables=perhaps", "-setupiptables"},
		{"-localip 169.254.20.10 -setupeptables", "not defined: -setupeptables"},
		{"-localip 169.254.20.10 further", "further"},
		{"-localip 169.254.20.10 -basecorefile /nowhere/template -conf /nowhere/Corefile", "/nowhere/template"},
	} {
		out, err := exec.Command(binary(t), append([]string{"node-cache"}, strings.Fields(c.args)...)...).CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || !strings.Contains(string(out), c.says) {
			t.Errorf("node-cache %s: %v, want %q:\n%s", c.args, err, c.says, out)
		}
	}
	// Without the name too: manifests of node-cache have arguments alone.
	out, _ := exec.Command(binary(t), "-localip", "nonsense").CombinedOutput()
	if !strings.Contains(string(out), "-localip: ") {
		t.Errorf("coredns -localip: %s", out)
	}
}

// The image of a DaemonSet is replaced and put back while a pod asks: the old pod ends, then the
// new one begins, as without surge. What is lost at the local address is what nobody could have
// answered; at the ClusterIP the cluster answers.
func TestNodeCacheReplaced(t *testing.T) {
	r := rowNamed(t, "kubernetes")
	n := newNode(t, iptablesNFT)
	n.warm()
	both := localIPs(r)
	before := n.snapshot()
	begin, end, kill := n.standIn(both)
	if reference() != "" {
		n.Log("with node-cache itself")
		var old *container
		begin, end, kill = func() { old = n.original(r) }, func() { old.exit(syscall.SIGTERM) }, func() { old.Kill() }
	} else {
		n.Log("with a stand-in; NODE_CACHE names node-cache itself")
	}
	begin()
	var ours *container
	n.whileAsked("node-cache ends, ours begins", false, both, func() { end(); ours = n.replacement(r) })
	n.answersEverybody(false, both...)
	n.whileAsked("ours alone", true, both, func() {})
	n.whileAsked("ours is replaced by another of ours", false, both, func() { ours.exit(syscall.SIGTERM); ours = n.replacement(r) })
	n.whileAsked("ours ends, at the ClusterIP", true, []netip.Addr{lab.ClusterIP}, func() { ours.exit(syscall.SIGTERM) })
	n.same("after ours has left", before, n.snapshot())
	ours = n.replacement(r)
	n.whileAsked("back: ours ends, node-cache begins", false, both, func() { ours.exit(syscall.SIGTERM); begin() })
	n.answersEverybody(false, both...)

	// Without a grace period, as with kubespray, node-cache leaves everything.
	n.whileAsked("node-cache is killed, ours begins", false, both, func() { kill(); ours = n.replacement(r) })
	n.must(ours.WaitLog(0, "rules that node-cache has left"))
	n.whileAsked("ours alone, after a node-cache that was killed", true, both, func() {})
	ours.Kill()
	n.clusterAnswers4()
	n.replacement(r).exit(syscall.SIGTERM)
	n.same("after all have left", before, n.snapshot())
}

// Of two processes one leaves without loss, and what is removed comes back.
func TestNodeCachePromises(t *testing.T) {
	r := rowNamed(t, "dual-stack")
	n := newNode(t, iptablesNFT)
	before := n.snapshot()
	both := localIPs(r)
	one := n.replacement(r)
	two := n.replacement(r)
	n.whileAsked("one of two leaves", true, both, func() { one.exit(syscall.SIGTERM) })
	all := n.snapshot()
	n.commands(n.Node, "ip link del dns0\niptables -t raw -F\nip6tables -t raw -F")
	n.becomes("after a removal", all)
	n.whileAsked("the other is killed, and begins again", false, both, func() { two.Kill(); two = n.replacement(r) })
	n.answersEverybody(false, both...)
	two.exit(syscall.SIGTERM)
	n.same("after both have left", before, n.snapshot())
}

// What changes in the template and the ConfigMap is taken up by a reload; what is wrong there
// changes nothing, is said and counted.
func TestNodeCacheReloads(t *testing.T) {
	r := rowNamed(t, "served-stub-domains")
	n := newNode(t, iptablesNFT)
	c := n.replacement(r)
	at := netip.AddrPortFrom(lab.LinkLocal, 53).String()
	write := func(name, text string) {
		n.must(os.WriteFile(filepath.Join(c.root, "etc", name), []byte(text), 0o644))
	}
	reload := func() error {
		mark := c.Mark()
		n.must(c.Signal(syscall.SIGUSR1))
		return c.WaitReload(mark)
	}
	becomes := func(name, want string) {
		n.Helper()
		if got := answerTo(n.Pod, "udp", at, name); got != want {
			n.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	errs := func() float64 {
		text, err := get(n.Node, "http://127.0.0.1:9353/metrics")
		n.must(err)
		var sum float64
		for line := range strings.Lines(text) {
			if v, ok := strings.CutPrefix(line, `coredns_nodecache_setup_errors_total{errortype="configmap"} `); ok {
				fmt.Sscan(v, &sum)
			}
		}
		return sum
	}
	becomes("db.corp.example.", "NOERROR/192.0.2.1")
	becomes("db.other.example.", "SERVFAIL")
	write("kube-dns/stubDomains", `{"other.example": ["10.0.2.2"]}`)
	n.must(reload())
	becomes("db.other.example.", "NOERROR/192.0.2.1")
	becomes("db.corp.example.", "SERVFAIL")

	write("kube-dns/stubDomains", `{"other.example": ["nonsense"]}`)
	n.must(reload())
	becomes("db.other.example.", "NOERROR/192.0.2.1")
	n.has(c.Log(), `stubDomains: other.example: "nonsense" is no address`)
	if got := errs(); got != 1 {
		n.Errorf("%v errors", got)
	}
	write("coredns/Corefile.base", ".:53 {\n")
	if err := reload(); err == nil {
		n.Error("a template that is no Corefile has been taken")
	}
	becomes("db.other.example.", "NOERROR/192.0.2.1")
	write("kube-dns/stubDomains", `{}`)
	write("kube-dns/upstreamNameservers", `[]`)
	write("coredns/Corefile.base", r.sections["template"])
	n.must(reload())
	becomes("db.other.example.", "NOERROR/192.0.2.1")
	c.exit(syscall.SIGTERM)

	// With -reloadwithsignal by itself, and the reload plugin does the same.
	c = n.replacement(r, "-reloadwithsignal")
	write("kube-dns/upstreamNameservers", `["10.0.2.2"]`)
	n.must(c.WaitReload(0))
	becomes("db.third.example.", "NOERROR/192.0.2.1")
	c.exit(syscall.SIGTERM)
}
