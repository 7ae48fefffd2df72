package nodecache

import (
	"errors"

	"github.com/coredns/coredns/plugin"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// Kinds of setup errors, as node-cache of kubernetes/dns labels them.
const (
	errFirewall       = "iptables"
	errFirewallLock   = "iptables_lock"
	errInterfaceAdd   = "interface_add"
	errInterfaceCheck = "interface_check"
)

// Objects that can be repaired.
const (
	objectLink    = "link"
	objectAddress = "address"
	objectRule    = "rule"
)

var (
	setupErrors = promauto.NewCounterVec(prometheus.CounterOpts{
		Namespace: plugin.Namespace,
		Subsystem: directiveName,
		Name:      "setup_errors_total",
		Help:      "Counter of errors while making or checking the interface, its addresses and the firewall rules.",
	}, []string{"errortype"})
	repairs = promauto.NewCounterVec(prometheus.CounterOpts{
		Namespace: plugin.Namespace,
		Subsystem: directiveName,
		Name:      "repairs_total",
		Help:      "Counter of links, addresses and firewall rules that somebody else had removed and that were put back.",
	}, []string{"object"})
)

func init() {
	// Present from the start, so that a rate over them sees the first error.
	for _, t := range []string{errFirewall, errFirewallLock, errInterfaceAdd, errInterfaceCheck} {
		setupErrors.WithLabelValues(t)
	}
	for _, o := range []string{objectLink, objectAddress, objectRule} {
		repairs.WithLabelValues(o)
	}
}

// typedError is an error with the label under which it is counted.
type typedError struct {
	error
	errortype string
}

func (e typedError) Unwrap() error { return e.error }

func setupError(errortype string, err error) error { return typedError{err, errortype} }

// isFirewallError tells whether a firewall backend could not do its work at all.
func isFirewallError(err error) bool {
	var t typedError
	return errors.As(err, &t) && t.errortype == errFirewall
}

// count counts err, once, where it is reported, and returns it.
func count(err error) error {
	var t typedError
	if errors.As(err, &t) {
		setupErrors.WithLabelValues(t.errortype).Inc()
	}
	return err
}
