package fastpath

import (
	"testing"
	"time"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin/metrics/vars"
	"github.com/coredns/coredns/plugin/test"
	"github.com/coredns/coredns/request"
	"github.com/prometheus/client_golang/prometheus"
)

// Types without a label of their own share what they are counted in.
func TestCountsAreBounded(t *testing.T) {
	v := &serving{server: &dnsserver.Server{Addr: "dns://192.0.2.1:53"}, counts: map[countsKey]*counts{}}
	b := &Block{}
	for n := range 1000 {
		q := &query{block: b}
		v.countsFor(q, question("example.org.", uint16(1000+n)), true)
	}
	if len(v.counts) > 1 {
		t.Errorf("%d kinds of counts for types that CoreDNS calls other", len(v.counts))
	}
}

// A hit is counted under the type under which prometheus would.
func TestTypeLabels(t *testing.T) {
	labels := func() map[string]float64 {
		families, err := prometheus.DefaultGatherer.Gather()
		must(t, err)
		values := map[string]float64{}
		for _, f := range families {
			if f.GetName() != "coredns_dns_requests_total" {
				continue
			}
			for _, m := range f.GetMetric() {
				for _, l := range m.GetLabel() {
					if l.GetName() == "type" {
						values[l.GetValue()] += m.GetCounter().GetValue()
					}
				}
			}
		}
		return values
	}
	for typ := range uint16(300) {
		before := labels()
		r := request.Request{W: &test.ResponseWriter{}, Req: question("example.org.", typ)}
		vars.Report("test", r, ".", "", "NOERROR", "", 0, time.Now())
		want := typeLabel(typ)
		after := labels()
		if after[want] != before[want]+1 {
			t.Errorf("type %d is not counted as %s", typ, want)
		}
	}
}
