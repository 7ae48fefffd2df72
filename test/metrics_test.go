package e2e

import (
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/miekg/dns"
)

// metrics returns what a process exports at the address on the node, by series. In a reload
// the plugin prometheus does not listen for a moment.
func (n *node) metrics(at string) map[string]float64 {
	n.Helper()
	var body string
	var err error
	eventually(func() bool {
		body, err = get(n.Node, "http://"+at+"/metrics")
		return err == nil
	})
	n.must(err)
	series := map[string]float64{}
	for line := range strings.Lines(body) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), " ")
		if v, err := strconv.ParseFloat(value, 64); ok && err == nil && !strings.HasPrefix(line, "#") {
			series[strings.TrimPrefix(name, "coredns_nodecache_")] = v
		}
	}
	return series
}

// shows waits until a process exports these values.
func (n *node) shows(at string, want map[string]float64) {
	n.Helper()
	var got map[string]float64
	if eventually(func() bool {
		got = n.metrics(at)
		for name, v := range want {
			if g, ok := got[name]; !ok || g != v {
				return false
			}
		}
		return true
	}) {
		return
	}
	for name, v := range want {
		if g, ok := got[name]; !ok || g != v {
			n.Errorf("%s is %v, want %v", name, g, v)
		}
	}
}

func (n *node) monitored(port int, properties ...string) string {
	return n.corefile(append([]string{"sync 100ms"}, properties...)...) +
		fmt.Sprintf("lab.test {\n bind 127.0.0.1\n prometheus 127.0.0.1:%d\n}\n", port)
}

// The gauges tell a whole node from one that lacks something.
func TestMetricsOfWhatIsInPlace(t *testing.T) {
	forBackends(t, func(n *node) {
		n.serve(n.monitored(9253))
		const at = "127.0.0.1:9253"
		n.shows(at, map[string]float64{
			"ready":                              1,
			`objects_wanted{object="link"}`:      1,
			`objects_in_place{object="link"}`:    1,
			`objects_wanted{object="address"}`:   4,
			`objects_in_place{object="address"}`: 4,
			`objects_wanted{object="rule"}`:      8,
			`objects_in_place{object="rule"}`:    8,
			`processes{state="serving"}`:         1,
			"sync_interval_seconds":              0.1,
		})
		before := n.metrics(at)["last_sync_success_timestamp_seconds"]
		if !eventually(func() bool { return n.metrics(at)["last_sync_success_timestamp_seconds"] > before }) {
			t.Errorf("no later check than that at %v", before)
		}
		// A link in the way keeps ours from coming back.
		if !eventually(func() bool {
			_, err := n.Node.RunInput("link del nodelocaldns\nlink add nodelocaldns type bridge\n", "ip", "-batch", "-")
			return err == nil // else ours was back first
		}) {
			t.Fatal("no link could be put in the way")
		}
		missing := map[string]float64{
			"ready":                              0,
			`objects_wanted{object="link"}`:      1,
			`objects_in_place{object="link"}`:    0,
			`objects_wanted{object="address"}`:   4,
			`objects_in_place{object="address"}`: 0,
		}
		n.shows(at, missing)
		n.commands(n.Node, "ip link del nodelocaldns")
		n.shows(at, map[string]float64{"ready": 1, `objects_in_place{object="address"}`: 4})
		for name := range n.metrics(at) {
			if strings.HasPrefix(name, "info{") && !strings.Contains(name, `backend="`+n.backend.firewall) {
				t.Errorf("%s: the backend is %s", name, n.backend.firewall)
			}
		}
	})
}

// A process that stays counts the exits of those that go, with the queries that they
// gave up, and knows how many there are.
func TestMetricsOfExits(t *testing.T) {
	n := newNode(t, nftables)
	n.serve(n.monitored(9253))
	const at = "127.0.0.1:9253"
	twin := n.serve(n.corefile())
	n.shows(at, map[string]float64{`processes{state="serving"}`: 2, `drains_total{outcome="complete"}`: 0})
	twin.exit(syscall.SIGTERM)
	n.shows(at, map[string]float64{`processes{state="serving"}`: 1,
		`drains_total{outcome="complete"}`: 1, `drains_total{outcome="cut_short"}`: 0,
		"drain_duration_seconds_count": 1, "drain_queries_given_up_total": 0})

	twin = n.serve(n.corefile())
	n.must(syscall.Kill(twin.Pid, syscall.SIGSTOP))
	n.shows(at, map[string]float64{`processes{state="silent"}`: 1, `processes{state="serving"}`: 1})
	n.must(syscall.Kill(twin.Pid, syscall.SIGCONT))
	n.shows(at, map[string]float64{`processes{state="silent"}`: 0, `processes{state="serving"}`: 2})
	twin.Kill()

	// One that holds a query for longer than an exit waits.
	twin = n.serve(n.block(".:53", "169.254.20.11") + "slow.lab {\n bind 169.254.20.11\n nodecache {\n firewall nftables\n }\n erratic {\n delay 1 30s\n drop 0\n }\n}\n")
	n.must(n.Pod.Do(func() error {
		c, err := dns.Dial("udp", "169.254.20.11:53")
		if err != nil {
			return err
		}
		defer c.Close()
		if err := c.WriteMsg(new(dns.Msg).SetQuestion("a.slow.lab.", dns.TypeA)); err != nil {
			return err
		}
		// From the same socket, so that it is read after the slow one.
		m := new(dns.Msg).SetQuestion("a.lab.", dns.TypeA)
		_, _, err = new(dns.Client).ExchangeWithConn(m, c)
		return err
	}))
	twin.exit(syscall.SIGTERM)
	n.shows(at, map[string]float64{`drains_total{outcome="cut_short"}`: 1, "drain_duration_seconds_count": 2})
	if v := n.metrics(at)["drain_queries_given_up_total"]; v < 1 {
		t.Errorf("%v queries given up, want one at least", v)
	}
}
