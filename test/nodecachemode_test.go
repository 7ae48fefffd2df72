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
	"time"

	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

var updateRows = flag.Bool("update-rows", false, "write what node-cache was seen to do into the rows")

// A container is a process as a container runtime starts it: with a file system of its own, what a
// manifest of node-cache adds to the usual capabilities, and the node's network.
type container struct {
	*process
	root string // its file system
}

// contained starts an image's entry point with a row's command line, environment and files.
func (n *node) contained(image, path, entry string, r row, args ...string) *container {
	n.Helper()
	const script = `
		root=$1 lock=$2 drop=$3 path=$4 entry=$5
		shift 5
		env=
		while [ "$1" != -- ]; do env="$env $1"; shift; done
		shift
		args=
		while [ "$1" != -- ]; do args="$args $1"; shift; done
		mount --bind "$root" "$root"
		mkdir -p "$root/proc" "$root/dev" "$root/run"
		mount -t proc proc "$root/proc"
		mount -t tmpfs tmpfs "$root/dev"
		mkdir "$root/dev/net"
		mknod -m 666 "$root/dev/null" c 1 3
		mknod -m 666 "$root/dev/net/tun" c 10 200
		: >>"$lock"
		: >"$root/run/xtables.lock"
		mount --bind "$lock" "$root/run/xtables.lock"
		# shellcheck disable=SC2086 # words
		exec env -i "PATH=$path" $env "$(command -v capsh)" --drop="$drop" --chroot="$root" --shell="$entry" -- $args`
	root := filepath.Join(n.MakeDir(), "root")
	if out, err := exec.Command("cp", "-a", image, root).CombinedOutput(); err != nil {
		n.Fatalf("copying the image: %v: %s", err, out)
	}
	files := r.files()
	files["resolv.conf"] = "nameserver " + lab.DNSAddr.String() + "\n"
	for name, text := range files {
		to := filepath.Join(root, "etc", name)
		n.must(os.MkdirAll(filepath.Dir(to), 0o755))
		n.must(os.WriteFile(to, []byte(text), 0o644))
	}
	via := []string{"unshare", "--mount", "sh", "-ec", script, "sh", root, n.XtablesLock(), allBut(n, []string{"NET_ADMIN", "NET_BIND_SERVICE", "NET_RAW"}), path, entry}
	via = append(append(via, r.env...), "--")
	via = append(append(append(via, r.args...), args...), "--")
	return &container{n.launch("", lab.Options{Via: via}), root}
}

// replacement starts our image with a command line of node-cache. Manifests leave the program to
// the image.
func (n *node) replacement(r row, args ...string) *container {
	n.Helper()
	path, entry := stage(n.T, "iptables")
	return n.replacementBy("iptables", path, entry, r, args...)
}

func (n *node) replacementBy(target, path, entry string, r row, args ...string) *container {
	n.Helper()
	c := n.contained(imageRoot(n.T, target), path, entry, r, args...)
	n.must(c.WaitServing())
	if strings.Contains(r.sections["Corefile"], "nodecache") {
		n.must(c.WaitLog(0, inPlace))
	}
	return c
}

// original starts node-cache itself: its binary in an image that has both variants of iptables, as its own has.
func (n *node) original(r row, args ...string) *container {
	n.Helper()
	root := filepath.Join(n.MakeDir(), "root")
	for _, words := range [][]string{{"cp", "-a", imageRoot(n.T, "iptables"), root}, {"rm", "-f", root + "/node-cache"}, {"cp", reference(), root + "/node-cache"}} {
		if out, err := exec.Command(words[0], words[1:]...).CombinedOutput(); err != nil {
			n.Fatalf("%v: %v: %s", words, err, out)
		}
	}
	// It can't do without the dummy driver, but takes any link of the name.
	n.commands(n.Node, "ip link show nodelocaldns >/dev/null 2>&1 || ip link add nodelocaldns type dummy 2>/dev/null || ip tuntap add nodelocaldns mode tun")
	// Without -pidfile or this its rules come after a minute.
	c := n.contained(root, "/usr/lib/nodecache/iptables/"+string(n.backend.iptables)+":/usr/sbin:/usr/bin:/sbin:/bin", "/node-cache", r, append(args, "-syncinterval", "1ns")...)
	n.must(c.WaitServing())
	if strings.Contains(r.sections["args"], "-setupiptables=false") {
		return c
	}
	rules := ""
	if !eventually(func() bool {
		rules, _ = n.Node.Run("iptables-save")
		return strings.Count(rules, "NodeLocal DNS Cache") == 12*len(localIPs(r))
	}) {
		n.Fatalf("node-cache's rules are\n%s", rules)
	}
	return c
}

func localIPs(r row) (all []netip.Addr) {
	for i, arg := range r.args {
		list, ok := strings.CutPrefix(arg, "-localip=")
		if arg == "-localip" {
			list, ok = r.args[i+1], true
		}
		if ok {
			for _, s := range strings.Split(list, ",") {
				all = append(all, netip.MustParseAddr(s))
			}
		}
	}
	return all
}

// seen is what a pod, the node, kubelet and Prometheus see of a cache.
func (n *node) seen(r row) string {
	n.Helper()
	var out strings.Builder
	for _, a := range localIPs(r) {
		link, err := n.Node.Run("ip", "-o", "addr", "show", "to", a.String())
		n.must(err)
		if f := strings.Fields(link); len(f) > 3 {
			fmt.Fprintf(&out, "%s on %s\n", f[3], f[1])
		}
		n.must(n.FlushConntrack())
		for _, c := range n.clients() {
			for _, proto := range protos {
				fmt.Fprintf(&out, "%v over %s from the %s:", a, proto, c.name)
				for _, name := range []string{"a.cluster.local.", "www.example.com.", "my.example.org.", "db.corp.example."} {
					fmt.Fprintf(&out, " %s", answerTo(c.ns, proto, netip.AddrPortFrom(a, 53).String(), name))
				}
				fmt.Fprintln(&out)
			}
		}
		entries, err := n.ConntrackEntries(a)
		n.must(err)
		fmt.Fprintf(&out, "%v tracked: %v\n", a, len(entries) > 0)
	}
	for _, at := range []string{"8080", "8099", "3989", "9254"} {
		n.must(n.FlushConntrack())
		if text, err := get(n.Node, "http://"+localIPs(r)[0].String()+":"+at+"/health"); err == nil {
			entries, err := n.ConntrackEntries(localIPs(r)[0])
			n.must(err)
			fmt.Fprintf(&out, "health on %s: %s, tracked: %v\n", at, text, len(entries) > 0)
		}
	}
	for at, name := range map[string]string{"9253": "coredns_forward_max_concurrent_rejects_total", "9353": "coredns_nodecache_setup_errors_total"} {
		if text, err := get(n.Node, "http://127.0.0.1:"+at+"/metrics"); err == nil {
			fmt.Fprintf(&out, "metrics on %s: %v\n", at, strings.Contains(text, "\n"+name))
		}
	}
	lines := slices.Sorted(strings.Lines(out.String()))
	return strings.Join(lines, "")
}

// answerTo is what comes for a name, in a word.
func answerTo(ns *lab.Namespace, proto, at, name string) string {
	m := new(dns.Msg)
	m.SetQuestion(name, dns.TypeA)
	var r *dns.Msg
	err := ns.Do(func() (err error) {
		r, _, err = (&dns.Client{Net: proto, Timeout: 5 * time.Second}).Exchange(m, at)
		return err
	})
	if err != nil {
		return "nothing"
	}
	words := []string{dns.RcodeToString[r.Rcode]}
	for _, rr := range r.Answer {
		if a, ok := rr.(*dns.A); ok {
			words = append(words, a.A.String())
		}
	}
	return strings.Join(words, "/")
}

// served are the rows that are started, with what a pod's environment has for them.
var served = []string{"kubernetes", "kubernetes-ipvs", "kubespray", "kops", "gardener", "deliveryhero", "lablabs", "rke2", "served-stub-domains"}

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

// rowNamed is one of the rows.
func rowNamed(t *testing.T, name string) row {
	t.Helper()
	all := rows(t)
	i := slices.IndexFunc(all, func(r row) bool { return r.name == name })
	if i < 0 {
		t.Fatalf("no row %s", name)
	}
	return all[i]
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

// standIn is what node-cache would do on a kernel without its driver, or where there is none to be had.
func (n *node) standIn(addrs []netip.Addr) (begin, end, kill func()) {
	var c *nodeCache
	return func() { c = n.nodeCache("nodelocaldns", addrs...) }, func() { c.leave("nodelocaldns") }, func() { c.Kill() }
}

// clusterAnswers4 is clusterAnswers for a pod and IPv4.
func (n *node) clusterAnswers4() {
	n.Helper()
	for _, proto := range protos {
		n.run(lab.Load{From: n.Pod, Proto: proto, To: on(lab.ClusterIP), Count: 20}, true)
	}
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
