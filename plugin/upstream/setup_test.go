package upstream

import (
	"os"
	"strings"
	"testing"

	"github.com/coredns/caddy"
	"github.com/prometheus/client_golang/prometheus"
)

func TestParse(t *testing.T) {
	for _, c := range []struct{ stanza, want string }{
		{"upstream . 10.0.0.1", ""},
		{"upstream example.org 10.0.0.1:5353 [2001:db8::1]:53 2001:db8::1 fe80::1%eth0 dns://10.0.0.2 tls://9.9.9.9%dns.quad9.net /run/none.conf", ""},
		{"upstream . 10.0.0.1 {\nexcept a.test b.test\nexcept c.test\nforce_tcp\nprefer_udp\nexpire 10s\nmax_age 60s\nmax_idle_conns 3\nmax_fails 3\nmax_concurrent 10\npatience 3s\npolicy round_robin\nfailover SERVFAIL\nhealth_check 1s no_rec domain example.org\n}", ""},
		{"upstream . tls://9.9.9.9 {\ntls\ntls_servername dns.quad9.net\n}", ""},
		{"upstream", "wants a zone"},
		{"upstream .", "wants a zone"},
		{"upstream . nobody", "neither an address nor a file"},
		{"upstream . https://9.9.9.9", "only dns:// and tls://"},
		{"upstream . 10.0.0.1:0", "no port"},
		{"upstream . 10.0.0.1:x", "no port"},
		{"upstream 10.0.0.0/22 10.0.0.1", "not one zone"},
		{"upstream . 10.0.0.1 {\nforce_tcp yes\n}", "takes no value"},
		{"upstream . 10.0.0.1 {\nforce_tcp\nforce_tcp\n}", "twice"},
		{"upstream . 10.0.0.1 {\nexcept\n}", "at least one zone"},
		{"upstream . 10.0.0.1 {\nmax_age 5s\n}", "less than expire"},
		{"upstream . 10.0.0.1 {\nexpire -1s\n}", "between"},
		{"upstream . 10.0.0.1 {\nexpire soon\n}", "expire soon"},
		{"upstream . 10.0.0.1 {\nmax_fails -1\n}", "no number"},
		{"upstream . 10.0.0.1 {\npolicy best\n}", "none of"},
		{"upstream . 10.0.0.1 {\nfailover NOERROR\n}", "no code"},
		{"upstream . 10.0.0.1 {\nhealth_check\n}", "takes a duration"},
		{"upstream . 10.0.0.1 {\nhealth_check 1s twice\n}", "unknown option"},
		{"upstream . 10.0.0.1 {\npatience 1ms\n}", "between"},
		{"upstream . 10.0.0.1 {\ntls /no/such.pem\n}", "tls:"},
		{"upstream . 10.0.0.1 {\ndoh_method GET\n}", `unknown property "doh_method"`},
		{"upstream . tls://9.9.9.9%a.test {\ntls_servername b.test\n}", "tls_servername"},
		{"upstream . " + strings.Repeat("10.0.0.1 ", 16), "no more than 15"},
	} {
		_, err := parseAll(caddy.NewTestController("dns", c.stanza))
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.stanza, err, c.want)
		}
	}
}

// The README has every metric with its labels and its help.
func TestReadmeHasTheMetrics(t *testing.T) {
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	ch := make(chan *prometheus.Desc, 8)
	n := 0
	for _, c := range []prometheus.Collector{requestDuration, attemptFailures, askedAgain, failures, gathered, probeFailures, serverUp, serverTCP, fileServers} {
		c.Describe(ch)
		parts := strings.Split((<-ch).String(), `"`)
		labels := "{"
		if c == prometheus.Collector(gathered) {
			labels = "` - "
		}
		if line := "* `" + parts[1] + labels; !strings.Contains(string(text), line) || !strings.Contains(string(text), "` - "+parts[3]) {
			t.Errorf("the README lacks %s: %s", parts[1], parts[3])
		}
		n++
	}
	if got := strings.Count(string(text), "\n* `coredns_upstream_"); got != n {
		t.Errorf("the README has %d metrics, there are %d", got, n)
	}
}
