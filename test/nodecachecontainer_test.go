package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

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
	via := []string{"unshare", "--mount", "sh", "-ec", script, "sh", root, n.XtablesLock(), allBut(n, r.caps), path, entry}
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
	rules, save := "", "iptables-save"
	if localIPs(r)[0].Is6() {
		save = "ip6tables-save"
	}
	if !eventually(func() bool {
		rules, _ = n.Node.Run(save)
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
	for _, at := range []uint16{8080, 8099, 3989, 9254} {
		n.must(n.FlushConntrack())
		if text, err := get(n.Node, "http://"+netip.AddrPortFrom(localIPs(r)[0], at).String()+"/health"); err == nil {
			entries, err := n.ConntrackEntries(localIPs(r)[0])
			n.must(err)
			fmt.Fprintf(&out, "health on %d: %s, tracked: %v\n", at, text, len(entries) > 0)
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
