package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

// ClusterTTL is the TTL of every answer of the cluster's DNS server. A CoreDNS with
// the cache plugin hands on at most an hour, so that the TTL tells who answered.
const ClusterTTL = 24 * 60 * 60

// A Cluster is the cluster's DNS server. It knows every name. A first label such as
// slow-1500ms-7 makes it answer after 1.5 s.
type Cluster struct {
	servers []*dns.Server
	queries atomic.Int64
}

var (
	clusterA    = net.IPv4(192, 0, 2, 1)
	clusterAAAA = net.ParseIP("2001:db8::1")
)

func serveCluster(ns *Namespace) (*Cluster, error) {
	c := new(Cluster)
	err := ns.Do(func() error {
		for _, addr := range []netip.Addr{DNSAddr, DNSAddr6} {
			at := netip.AddrPortFrom(addr, 53).String()
			packets, err := net.ListenPacket("udp", at)
			if err != nil {
				return err
			}
			c.servers = append(c.servers, &dns.Server{PacketConn: packets, Handler: c})
			listener, err := net.Listen("tcp", at)
			if err != nil {
				return err
			}
			c.servers = append(c.servers, &dns.Server{Listener: listener, Handler: c, MaxTCPQueries: -1})
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("starting the cluster's DNS server: %w", err), c.close())
	}
	for _, s := range c.servers {
		go s.ActivateAndServe()
	}
	return c, nil
}

// Queries says how many queries have reached the cluster so far.
func (c *Cluster) Queries() int64 { return c.queries.Load() }

// ServeDNS implements dns.Handler.
func (c *Cluster) ServeDNS(w dns.ResponseWriter, r *dns.Msg) {
	c.queries.Add(1)
	m := new(dns.Msg)
	m.SetReply(r)
	if len(r.Question) == 1 {
		q := r.Question[0]
		if label, ok := strings.CutPrefix(q.Name, "slow-"); ok {
			delay, _, _ := strings.Cut(label, "-")
			if d, err := time.ParseDuration(delay); err == nil {
				time.Sleep(d)
			}
		}
		hdr := dns.RR_Header{Name: q.Name, Rrtype: q.Qtype, Class: dns.ClassINET, Ttl: ClusterTTL}
		switch q.Qtype {
		case dns.TypeA:
			m.Answer = append(m.Answer, &dns.A{Hdr: hdr, A: clusterA})
		case dns.TypeAAAA:
			m.Answer = append(m.Answer, &dns.AAAA{Hdr: hdr, AAAA: clusterAAAA})
		}
	}
	w.WriteMsg(m)
}

func (c *Cluster) close() error {
	for _, s := range c.servers {
		// Closing its socket ends a server, also one that has not started yet;
		// Shutdown would wait for slow answers.
		if s.PacketConn != nil {
			s.PacketConn.Close()
		}
		if s.Listener != nil {
			s.Listener.Close()
		}
	}
	return nil
}
