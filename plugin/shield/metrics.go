package shield

import (
	"github.com/coredns/coredns/plugin"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// What a question that can't be resolved is answered from.
const (
	reasonFailure = "failure"
	reasonDenial  = "denial"
)

var (
	answered = promauto.NewCounterVec(prometheus.CounterOpts{
		Namespace: plugin.Namespace,
		Subsystem: name,
		Name:      "answers_total",
		Help:      "Counter of queries that were answered from memory: with a failure that was not long ago, or in place of a failure with the last denial.",
	}, []string{"server", "reason"})
	bypassed = promauto.NewCounterVec(prometheus.CounterOpts{
		Namespace: plugin.Namespace,
		Subsystem: name,
		Name:      "bypasses_total",
		Help:      "Counter of queries that went past the cache, since the last answer to the same question could not be kept.",
	}, []string{"server"})
)
