package e2e

import (
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// secondPod gives the node another link with a pod's network behind it, on which nobody asks: what
// is so for every pod can be told from what is for one.
func (n *node) secondPod() {
	n.Helper()
	n.commands(n.Node, `ip link add to-pod2 address 02:00:00:00:00:31 type veth peer name pod2 address 02:00:00:00:00:32
		ip link set to-pod2 addrgenmode none
		ip link set pod2 addrgenmode none
		ip link set to-pod2 up
		ip link set pod2 up
		ip addr add 10.0.3.1/24 dev to-pod2
		ip addr add fd00:3::1/64 dev to-pod2 nodad`)
	if !eventually(func() bool {
		out, err := n.Node.Run("ip", "-br", "link", "show", "dev", "to-pod2")
		return err == nil && strings.Contains(out, " UP ")
	}) {
		n.Fatal("the second pod's link has no carrier")
	}
}

// filters has the node filter so, beside the rules of kube-proxy that a lab has.
func (n *node) filters(k kind) {
	n.Helper()
	n.commands(n.Node, k.setup)
	rules, nft := k.rules, k.nft
	if k.file != "" {
		if text := read(n.T, filepath.Join("testdata", "nodes", k.file)); strings.HasSuffix(k.file, ".nft") {
			nft = text
		} else {
			rules = text
		}
	}
	if nft != "" {
		_, err := n.Node.RunInput(nft, "nft", "-f", "-")
		n.must(err)
		return
	}
	_, err := n.Node.RunInput(wordsOf4.Replace(rules), "iptables-restore", "--noflush", "--wait")
	n.must(err)
	_, err = n.Node.RunInput(wordsOf6.Replace(rules), "ip6tables-restore", "--noflush", "--wait")
	n.must(err)
}

// asksAll has pods and the node's own programs ask by both IP versions over UDP and TCP.
func (n *node) asksAll(want outcome) {
	n.Helper()
	for _, c := range n.clients() {
		for _, proto := range protos {
			ask := lab.Load{From: c.ns, Proto: proto, To: on(addrs...), Count: 2 * len(addrs), Workers: 2 * len(addrs)}
			if c.name == "pod" && want.lost == "pods" {
				ask.Timeout = 200 * time.Millisecond
				if r, err := ask.Run(); err != nil || r.Answered > 0 {
					n.Errorf("pods are said to get no answer over %s: %v, %v", proto, r, err)
				}
				continue
			}
			r, err := ask.Run()
			n.must(err)
			if past := c.name == "host" && want.past; !past || r.Answered < r.Sent {
				n.answered(r, false)
			}
		}
	}
}

// told checks the log and the metrics: what is to be told is, and nothing else.
func (n *node) told(p *process, at string, want []tell) {
	n.Helper()
	differs := ""
	if eventually(func() bool { differs = n.differs(p, at, want); return differs == "" }) {
		return
	}
	n.Errorf("told is not what there is to tell:\n%s", differs)
}

func (n *node) differs(p *process, at string, want []tell) (differs string) {
	said := map[string]bool{}
	for line := range strings.Lines(p.warnings(0)) {
		known := false
		for _, w := range want {
			if saysAll(line, w.words) {
				said[w.words], known = true, true
			}
		}
		if !known {
			differs += "it says " + line
		}
	}
	told := map[string]bool{}
	for _, w := range want {
		told[w.fault] = true
		if !said[w.words] {
			differs += "it does not say " + w.words + "\n"
		}
	}
	faults := 0
	for name, v := range n.metrics(at) {
		fault, ok := strings.CutPrefix(name, `node_faults{fault="`)
		if !ok {
			continue
		}
		faults++
		if told[strings.TrimSuffix(fault, `"}`)] != (v > 0) {
			differs += name + " is " + strconv.FormatFloat(v, 'g', -1, 64) + "\n"
		}
	}
	if faults == 0 {
		differs += "no metric of a fault\n"
	}
	return differs
}

// saysAll tells whether a line has all the words, which are separated by " … ".
func saysAll(line, words string) bool {
	for part := range strings.SplitSeq(words, " … ") {
		if !strings.Contains(line, part) {
			return false
		}
	}
	return true
}

// Beside each kind of rules that other programs write, a cache starts, answers, reloads and leaves
// the node as it was; or it says what keeps it from being asked. docs/rulesets.md has the table.
func TestKindsOfRules(t *testing.T) {
	const at = "127.0.0.1:9253"
	for _, k := range kinds {
		for _, b := range k.backends() {
			t.Run(strings.ReplaceAll(k.name+"/"+b.String(), " ", "-"), func(t *testing.T) {
				t.Parallel()
				n := newNode(t, b)
				n.secondPod()
				n.filters(k)
				before := n.snapshot()
				want := k.nftables
				if b.firewall == "iptables" {
					want = k.iptables
				}
				corefile := n.monitored(9253)
				p, _ := n.examination(corefile)
				if k.after == "" {
					n.asksAll(want)
				}
				for range max(k.often, 1) {
					if k.after != "" {
						n.commands(n.Node, k.after)
						n.checksAgain(at)
					}
				}
				p.again(corefile + "# again\n")
				n.checksAgain(at)
				n.asksAll(want)
				n.told(p, at, want.told)
				p.exit(syscall.SIGTERM)
				n.run(lab.Load{From: n.Pod, Proto: "udp", To: on(lab.ClusterIP), Count: 2}, true)
				n.same("after the exit", before, n.snapshot())
			})
		}
	}
}
