package nodecachemode

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
)

// listenAt has this program be another one, which listens until its input ends.
const listenAt = "NODECACHEMODE_LISTEN_AT"

func TestMain(m *testing.M) {
	at := os.Getenv(listenAt)
	if at == "" {
		os.Exit(testkit.Main(m))
	}
	c, err := net.ListenPacket("udp", at)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	defer c.Close()
	fmt.Println("bound")
	io.Copy(io.Discard, os.Stdin)
}

// The rules that node-cache has left for the addresses go, whatever variant wrote them, and no others.
func TestRemoveLeft(t *testing.T) {
	testkit.NeedRoot(t)
	shell := func(script string) string {
		t.Helper()
		cmd := exec.Command("sh", "-ec", script)
		cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	const rules = `
		add() { $1 -t raw -I PREROUTING -p udp -d $2 --dport 53 -j NOTRACK -m comment --comment "NodeLocal DNS Cache: skip conntrack"
			$1 -t raw -I OUTPUT -p tcp -s $2 --sport 8080 -j NOTRACK -m comment --comment "NodeLocal DNS Cache: skip conntrack"
			$1 -t filter -I INPUT -p udp -d $2 --dport 53 -j ACCEPT -m comment --comment "NodeLocal DNS Cache: allow DNS traffic"; }`
	save := func() string {
		return shell("for c in iptables ip6tables; do for t in raw filter; do $c-save -t $t | grep ^-A || true; done; done")
	}
	shell(rules + "\nadd iptables 10.96.0.11; iptables -t raw -A PREROUTING -p udp -d 169.254.20.10 --dport 53 -j NOTRACK -m comment --comment 'mine: skip conntrack'")
	theirs := save()
	shell(rules + "\nadd iptables 169.254.20.10; add iptables 10.96.0.10; add ip6tables fd00:20::10; add iptables 10.96.0.10")
	all := save()

	s, err := source("-localip", "169.254.20.10,10.96.0.10,fd00:20::10", "-setupiptables=false")
	testkit.Must(t, err)
	if busy, n, err := s.RemoveLeft(); busy || n != 0 || err != nil {
		t.Errorf("without rules to set up: %v, %d, %v", busy, n, err)
	}
	s.SetUpRules = true

	shell("ip addr add 10.96.0.10/32 dev lo")
	other := exec.Command("/proc/self/exe")
	other.Env = append(os.Environ(), listenAt+"=10.96.0.10:53")
	stdin, err := other.StdinPipe()
	testkit.Must(t, err)
	stdout, err := other.StdoutPipe()
	testkit.Must(t, err)
	testkit.Must(t, other.Start())
	word := make([]byte, 5)
	if _, err := stdout.Read(word); err != nil || string(word) != "bound" {
		t.Fatalf("%q, %v", word, err)
	}
	if busy, n, err := s.RemoveLeft(); !busy || n != 0 || err != nil || save() != all {
		t.Errorf("while another process listens: %v, %d, %v\n%s", busy, n, err, save())
	}
	stdin.Close()
	testkit.Must(t, other.Wait())

	if busy, n, err := s.RemoveLeft(); busy || n != 12 || err != nil || save() != theirs {
		t.Errorf("%v, %d, %v; left is\n%s\nwant\n%s", busy, n, err, save(), theirs)
	}
	if !strings.Contains(theirs, "mine") {
		t.Fatal("the rules of others were not there")
	}
}
