package e2e

import (
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/test/dashboard"
	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

const monitoring = "../k8s/monitoring"

func needs(t *testing.T, program string) {
	t.Helper()
	if _, err := exec.LookPath(program); err != nil {
		t.Skipf("needs %s: run make monitoring-test", program)
	}
}

// The rules are those that Prometheus takes, and each alert fires when it has to and
// not before.
func TestMonitoringRules(t *testing.T) {
	needs(t, "promtool")
	for _, args := range []string{"check rules rules.yaml", "test rules rules_test.yaml"} {
		cmd := exec.Command("promtool", strings.Fields(args)...)
		cmd.Dir = monitoring
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", args, err, out)
		} else {
			t.Logf("promtool %s\n%s", args, out)
		}
	}
	rules, tests := read(t, filepath.Join(monitoring, "rules.yaml")), read(t, filepath.Join(monitoring, "rules_test.yaml"))
	for line := range strings.Lines(rules) {
		if _, alert, ok := strings.Cut(strings.TrimSpace(line), "- alert: "); ok && !strings.Contains(tests, "alertname=\""+alert+"\"") {
			t.Errorf("no test of the alert %s", alert)
		}
	}
}

// Each query of the dashboard has data on a pair that has seen all that the dashboard
// shows. A Prometheus that scrapes it is asked, and not the metrics' names.
func TestMonitoringDashboard(t *testing.T) {
	needs(t, "prometheus")
	d, err := dashboard.Read(filepath.Join(monitoring, "dashboard.json"))
	if err != nil {
		t.Fatal(err)
	}
	n := newNode(t, nftables)
	n.serve(n.monitoredWith("prometheus 127.0.0.1:9253"))
	n.serve(n.monitoredWith("prometheus 127.0.0.1:9353"))
	p, err := n.StartPrometheus(map[string]string{"a": "127.0.0.1:9253", "b": "127.0.0.1:9353"})
	n.must(err)
	t.Cleanup(func() { p.Close() })
	flow, err := lab.Flow{From: n.Pod, To: addrs, Rate: 200, Misses: 10, Sockets: 8}.Start()
	n.must(err)
	t.Cleanup(func() { flow.Stop() })

	for _, panel := range d.Panels {
		for _, target := range panel.Targets {
			query := target.Query("10s")
			if strings.HasPrefix(panel.Title, "Faults of nodes") && panel.Type == "table" {
				query = strings.TrimSuffix(query, " > 0") // empty is good
			}
			var got []lab.Series
			has := func() bool {
				got, err = p.Query(query)
				n.must(err)
				return len(got) > 0 && !slices.ContainsFunc(got, func(s lab.Series) bool { return len(s.Values) == 0 || math.IsInf(s.Values[0], 0) }) &&
					slices.ContainsFunc(got, func(s lab.Series) bool {
						// fastpath is on, so that it has what is not zero.
						return !math.IsNaN(s.Values[0]) && (s.Values[0] > 0 || !strings.Contains(query, "_fastpath_"))
					})
			}
			if strings.Contains(query, "drain_duration") {
				// Empty until somebody leaves.
				n.exitsBetweenScrapes()
			}
			if !eventually(has) {
				t.Errorf("%s: nothing for %s: %v", panel.Title, query, got)
				continue
			}
			t.Logf("%s: %d series, the first %s = %v", panel.Title, len(got), target.Legend(got[0].Labels), got[0].Values[0])
		}
	}
}

// monitoredWith is a Corefile with fastpath and another plugin in its server block.
func (n *node) monitoredWith(plugin string) string {
	properties := []string{"sync 1s"}
	if os.Getenv("LAB_FASTPATH") == "" { // which adds it itself
		properties = append(properties, "fastpath")
	}
	return strings.Replace(n.corefile(properties...), "errors", "errors\n    "+plugin, 1)
}

// exitsBetweenScrapes has a third process come and go.
func (n *node) exitsBetweenScrapes() {
	n.Helper()
	n.serve(n.corefile()).exit(syscall.SIGTERM)
}
