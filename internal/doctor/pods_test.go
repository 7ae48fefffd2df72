package doctor

import (
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
)

// sh runs commands, one a line.
func sh(t *testing.T, commands string) {
	t.Helper()
	if out, err := exec.Command("sh", "-ec", commands).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", commands, err, out)
	}
}

// What drops the queries of every pod that can be seen is told; not where one of many is served,
// and not where others may be, of which it can't be seen by which link they ask.
func TestFirewallDropsOfPods(t *testing.T) {
	testkit.NeedRoot(t)
	const pods = 40
	// What the pods' ends of their links are in.
	pod := exec.Command("sleep", "infinity")
	pod.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	must(t, pod.Start())
	t.Cleanup(func() {
		pod.Process.Kill()
		pod.Wait()
		sh(t, "nft delete table inet doctorpods")
	})
	var links, drops strings.Builder
	for i := range pods {
		fmt.Fprintf(&links, "ip link add cali%d type veth peer name eth%d netns %d; ip link set cali%d up; ip route add 10.9.0.%d dev cali%d\n", i, i, pod.Process.Pid, i, i+1, i)
		if i+1 < pods {
			fmt.Fprintf(&drops, "iifname cali%d drop;", i)
		}
	}
	sh(t, links.String())
	rules := func(rules string) {
		t.Helper()
		sh(t, "nft -f - <<'END'\nadd table inet doctorpods\ndelete table inet doctorpods\ntable inet doctorpods { chain in { type filter hook input priority 0; "+rules+"\n}; }\nEND\n")
	}
	site := Site{Untracked: dnsOn("10.96.0.10")}
	check := func(when string, want bool) {
		t.Helper()
		found := firewallDrops(site)
		if len(found) > 0 != want || want && !strings.Contains(found[0], "query of this node's pods") {
			t.Errorf("%s: found %q, want one: %v", when, found, want)
		}
	}
	rules(drops.String())
	check("the last pod is served", false)
	rules(`iifname "cali*" drop`)
	check("none is", true)
	rules(`iifname "cali*" drop; iifname doctor-docker drop`)
	// As of Docker, whose containers ask by a bridge.
	sh(t, fmt.Sprintf(`ip link add doctor-docker type bridge
		ip link add vethd type veth peer name ethd netns %d
		ip link set vethd master doctor-docker up
		ip link set doctor-docker up
		ip addr add 10.8.0.1/24 dev doctor-docker`, pod.Process.Pid))
	check("none is, nor a container", true)
	// As with Cilium, whose links no route leads to.
	sh(t, fmt.Sprintf("ip link add lxc0 type veth peer name ethl netns %d; ip link set lxc0 up", pod.Process.Pid))
	check("others can't be seen", false)
}
