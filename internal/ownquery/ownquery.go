// Package ownquery tells whether a query that this process sends itself comes to a cache on this
// node, out of connection tracking, and when somebody else has asked last. Rules that stand
// say neither.
package ownquery

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// label begins the name of our own queries. It is the same each time, so that a release that
// does not know it has one such name to cache for a zone.
const label = "nodecache-asked"

// wireLabel is label as it stands in a query.
var wireLabel = append([]byte{byte(len(label))}, label...)

const headerLen = 12 // of a DNS message

// Is tells of a query as it comes from the network whether it has the name of our own.
func Is(query []byte) bool {
	return len(query) > headerLen && bytes.HasPrefix(query[headerLen:], wireLabel)
}

// id is of this network namespace on this machine, since caches that share it answer for one
// another.
var id = sync.OnceValue(func() string {
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	ns, _ := os.Readlink("/proc/self/ns/net")
	sum := sha256.Sum256([]byte(string(boot) + ns))
	return "nodecache " + hex.EncodeToString(sum[:8])
})

// Answer answers r if it is a query of a cache on this node, which has come from the address
// that it was sent to. Any other counts as somebody else's.
func Answer(w dns.ResponseWriter, r *dns.Msg) (own bool) {
	if len(r.Question) != 1 || !strings.HasPrefix(r.Question[0].Name, label+".") || !sameHost(w.LocalAddr(), w.RemoteAddr()) {
		Somebody()
		return false
	}
	m := new(dns.Msg)
	m.SetReply(r)
	m.Answer = []dns.RR{&dns.TXT{Hdr: dns.RR_Header{Name: r.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET}, Txt: []string{id()}}}
	w.WriteMsg(m) // whoever asked sees whether it came
	return true
}

func sameHost(a, b net.Addr) bool { return hostOf(a) != nil && hostOf(a).Equal(hostOf(b)) }

func hostOf(a net.Addr) net.IP {
	switch a := a.(type) {
	case *net.UDPAddr:
		return a.IP
	case *net.TCPAddr:
		return a.IP
	}
	return nil
}

// somebody is set by each query of somebody else, and last is when one had come at the last
// look.
var (
	somebody atomic.Bool
	lastLock sync.Mutex
	last     = time.Now()
)

// Somebody notes a query of somebody else.
func Somebody() {
	if !somebody.Load() { // to store each time would cost the CPUs their cache line
		somebody.Store(true)
	}
}

var _ = promauto.NewGaugeFunc(prometheus.GaugeOpts{
	Namespace: plugin.Namespace,
	Subsystem: "nodecache",
	Name:      "last_query_timestamp_seconds",
	Help:      "Unix time by which the last query of anybody but nodecache itself had come, as of the scrape after it; at first that of the start.",
}, func() float64 {
	lastLock.Lock()
	defer lastLock.Unlock()
	if somebody.Swap(false) {
		last = time.Now()
	}
	return float64(last.UnixMilli()) / 1e3
})
