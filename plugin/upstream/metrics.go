package upstream

import (
	"sync"

	"github.com/coredns/coredns/plugin"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

func counter(name, help string, labels ...string) *prometheus.CounterVec {
	return promauto.NewCounterVec(prometheus.CounterOpts{Namespace: plugin.Namespace, Subsystem: directive, Name: name, Help: help}, labels)
}

var (
	requestDuration = promauto.NewHistogramVec(prometheus.HistogramOpts{
		Namespace:                   plugin.Namespace,
		Subsystem:                   directive,
		Name:                        "request_duration_seconds",
		Buckets:                     plugin.TimeBuckets,
		NativeHistogramBucketFactor: plugin.NativeHistogramBucketFactor,
		Help:                        "Histogram of the time that each answer of an upstream took.",
	}, []string{"to", "rcode"})
	attemptFailures = counter("attempt_failures_total", "Counter of attempts to get an answer that an upstream did not give, most of which another attempt has got.", "to", "reason")
	askedAgain      = counter("asked_again_total", "Counter of queries for which a second server or connection was asked, as the first was late or had failed.", "reason")
	failures        = counter("failures_total", "Counter of queries that no upstream has answered in time, and that got SERVFAIL or REFUSED.", "reason")
	gathered        = promauto.NewCounter(prometheus.CounterOpts{Namespace: plugin.Namespace, Subsystem: directive, Name: "gathered_total",
		Help: "Counter of queries that got what came of the same question of another client, which was under way already."})
	probeFailures = counter("probe_failures_total", "Counter of probes of an upstream that got no answer.", "to")
	serverUp      = newHealth("server_up", "Gauge that is 0 while an upstream does not answer, and else 1.", "to")
	serverTCP     = newHealth("server_tcp", "Gauge that is 0 while an upstream answers over UDP but not over TCP, and else 1.", "to")
	fileServers   = newCount("file_servers", "Gauge of the nameservers that a file names and that can be asked.", "file")
)

func gauge(name, help, label string) *prometheus.GaugeVec {
	return promauto.NewGaugeVec(prometheus.GaugeOpts{Namespace: plugin.Namespace, Subsystem: directive, Name: name, Help: help}, []string{label})
}

// A health is a gauge of servers, 1 while all that ask one of them find it well. Several stanzas
// may ask the same one, as do the old and the new configuration during a reload.
type health struct {
	*prometheus.GaugeVec
	mu  sync.Mutex
	all map[string]*judged
}

// A judged server is asked by so many, of which so many find it ill.
type judged struct{ by, ill int }

func newHealth(name, help, label string) *health {
	return &health{GaugeVec: gauge(name, help, label), all: map[string]*judged{}}
}

func (h *health) change(server string, by, ill int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	j := h.all[server]
	if j == nil {
		j = &judged{}
		h.all[server] = j
	}
	j.by += by
	j.ill += ill
	if j.by <= 0 {
		delete(h.all, server)
		h.DeleteLabelValues(server)
		return
	}
	value := 1.0
	if j.ill > 0 {
		value = 0
	}
	h.WithLabelValues(server).Set(value)
}

func (h *health) add(server string)           { h.change(server, 1, 0) }
func (h *health) ill(server string, more int) { h.change(server, 0, more) }
func (h *health) drop(server string, ill bool) {
	n := 0
	if ill {
		n = -1
	}
	h.change(server, -1, n)
}

// A count is a gauge by file, which several stanzas may follow.
type count struct {
	*prometheus.GaugeVec
	mu sync.Mutex
	by map[string]int
}

func newCount(name, help, label string) *count {
	return &count{GaugeVec: gauge(name, help, label), by: map[string]int{}}
}

func (c *count) follow(file string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.by[file]++
}

func (c *count) set(file string, n int) { c.WithLabelValues(file).Set(float64(n)) }

func (c *count) forget(file string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.by[file]--; c.by[file] <= 0 {
		delete(c.by, file)
		c.DeleteLabelValues(file)
	}
}
