package upstream

import (
	"context"
	"fmt"
	"net"
	"sync/atomic"
	"testing"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/forward"
	ctest "github.com/coredns/coredns/plugin/test"
	"github.com/miekg/dns"
)

// What is asked for costs no more than it does with forward.
func BenchmarkMiss(b *testing.B) {
	f := serveBench(b)
	for _, option := range []string{"prefer_udp", "force_tcp"} {
		b.Run("upstream-"+option, func(b *testing.B) {
			all, err := parseAll(caddy.NewTestController("dns", "upstream . "+f+" {\n"+option+"\n}"))
			if err != nil {
				b.Fatal(err)
			}
			all[0].servers.start()
			defer all[0].servers.close()
			misses(b, all[0])
		})
		b.Run("forward-"+option, func(b *testing.B) {
			c := caddy.NewTestController("dns", "forward . "+f+" {\n"+option+"\n}")
			action, err := caddy.DirectiveAction("dns", "forward")
			if err == nil {
				err = action(c)
			}
			if err != nil {
				b.Fatal(err)
			}
			h := dnsserver.GetConfig(c).Plugin[0](nil).(*forward.Forward)
			h.OnStartup()
			defer h.OnShutdown()
			misses(b, h)
		})
	}
}

func misses(b *testing.B, h plugin.Handler) {
	b.ReportAllocs()
	var workers atomic.Int64
	b.RunParallel(func(pb *testing.PB) {
		w := &ctest.ResponseWriter{}
		name := fmt.Sprintf("www%d.example.org.", workers.Add(1)) // what two ask at once is asked but once
		for pb.Next() {
			if code, err := h.ServeDNS(context.Background(), w, new(dns.Msg).SetQuestion(name, dns.TypeA)); code != 0 || err != nil {
				b.Error(code, err)
			}
		}
	})
}

// serveBench is a server that answers as fast as can be, in this process.
func serveBench(b *testing.B) string {
	p, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	l, err := net.Listen("tcp", p.LocalAddr().String())
	if err != nil {
		b.Fatal(err)
	}
	h := dns.HandlerFunc(answerWith("192.0.2.1"))
	go (&dns.Server{PacketConn: p, Handler: h}).ActivateAndServe()
	go (&dns.Server{Listener: l, Handler: h, MaxTCPQueries: -1}).ActivateAndServe()
	b.Cleanup(func() { p.Close(); l.Close() })
	return p.LocalAddr().String()
}
