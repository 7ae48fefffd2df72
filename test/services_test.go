package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// serviceRules are those of kube-proxy for the Service of the cache's upstreams, in one of its
// modes: A adds and D deletes them.
func (n *node) serviceRules(mode, how, service, at string) {
	n.Helper()
	for _, proto := range protos {
		switch mode {
		case "iptables":
			n.commands(n.Node, fmt.Sprintf(`iptables -t nat -%s KUBE-SERVICES -d %s/32 -p %s -m comment --comment "%s:dns cluster IP" -m %[3]s --dport 53 -j KUBE-SVC-%[3]s`, how, at, proto, service))
		case "nftables":
			n.commands(n.Node, fmt.Sprintf(`nft '%s element ip kube-proxy service-ips { %s . %s . 53 : goto service-ULMVA6XW-%s/%[3]s/dns }'`,
				map[string]string{"A": "add", "D": "delete"}[how], at, proto, service))
		}
	}
	n.must(n.FlushConntrack())
}

// kubeProxy is what these rules stand in.
func (n *node) kubeProxy(mode string, services ...string) {
	n.Helper()
	switch mode {
	case "iptables":
		n.commands(n.Node, `iptables -t nat -N KUBE-SERVICES
			iptables -t nat -A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES`)
		for _, proto := range protos {
			n.commands(n.Node, fmt.Sprintf(`iptables -t nat -N KUBE-SVC-%[1]s
				iptables -t nat -A KUBE-SVC-%[1]s -p %[1]s -j DNAT --to-destination 10.0.2.2:53`, proto))
		}
	case "nftables":
		rules := "table ip kube-proxy {\n map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }\n"
		for _, service := range services {
			for _, proto := range protos {
				rules += fmt.Sprintf(" chain service-ULMVA6XW-%s/%s/dns { dnat to 10.0.2.2; }\n", service, proto)
			}
		}
		rules += ` chain services { ip daddr . meta l4proto . th dport vmap @service-ips; }
			chain nat-output { type nat hook output priority -100; jump services; }` + "\n}\n"
		_, err := n.Node.RunInput(rules, "nft", "-f", "-")
		n.must(err)
	}
}

// The Service of the upstreams is deleted and made anew, with another address: it is asked there,
// by the same process, and what is cached is answered all the time.
func TestFollowsService(t *testing.T) {
	const ours, foreign = "kube-system/kube-dns-upstream", "else/kube-dns-upstream"
	for _, c := range []struct {
		mode string
		backend
	}{{"iptables", iptablesNFT}, {"iptables", iptablesLegacy}, {"nftables", nftables}} {
		t.Run(c.mode+"-"+strings.ReplaceAll(c.backend.String(), " ", "-"), func(t *testing.T) {
			n := newNode(t, c.backend)
			n.kubeProxy(c.mode, ours, foreign)
			n.serviceRules(c.mode, "A", ours, "10.96.0.11")
			corefile := strings.Replace(n.monitored(9253), "forward . "+lab.DNSAddr.String()+" {", "forward . {$KUBE_DNS_UPSTREAM_SERVICE_HOST} {\n force_tcp", 1)
			p := n.serveWith(corefile, lab.Options{Env: []string{"KUBE_DNS_UPSTREAM_SERVICE_HOST=10.96.0.11"}})
			n.must(p.WaitLog(0, examined+"0 found"))
			const fault = `node_faults{fault="upstream_service_gone"}`
			cached := lab.Load{From: n.Pod, Proto: "udp", To: on(lab.ClusterIP), Count: 100}
			n.run(cached, false)
			cached.Count, cached.Rate = endless, 50
			loads := n.start(cached)

			// Its pods being away for a moment is no reason, nor is a Service that is not there any
			// more, nor one of another namespace.
			mark := p.Mark()
			n.commands(n.DNS, `nft 'table inet f { chain input { type filter hook input priority 0; th dport 53 drop; }; }'`)
			synced := n.metrics("127.0.0.1:9253")["last_sync_success_timestamp_seconds"]
			for n.metrics("127.0.0.1:9253")["last_sync_success_timestamp_seconds"] < synced+4 { // two looks at least
				time.Sleep(100 * time.Millisecond)
			}
			n.shows("127.0.0.1:9253", map[string]float64{fault: 0})
			n.commands(n.DNS, "nft delete table inet f")
			n.serviceRules(c.mode, "D", ours, "10.96.0.11")
			n.serviceRules(c.mode, "A", foreign, "10.96.0.12")
			n.shows("127.0.0.1:9253", map[string]float64{fault: 1})
			said := p.Log()[mark:]
			n.has(said, "see whether the Service "+ours+" is there and has endpoints")
			if strings.Contains(said, "eloading") {
				n.Errorf("it has reloaded: %s", said)
			}

			n.serviceRules(c.mode, "A", ours, "10.96.0.13")
			n.must(p.WaitLog(mark, "[INFO] Reloading complete"))
			n.has(p.Log()[mark:], "the Service "+ours+" is at 10.96.0.13 now, where its DNS answers, and not at 10.96.0.11 any more: reloading with KUBE_DNS_UPSTREAM_SERVICE_HOST=10.96.0.13")
			n.answersEverybody(false, lab.ClusterIP, lab.LinkLocal)
			n.run(lab.Load{From: n.Pod, Proto: "udp", To: on(lab.ClusterIP), Names: lab.Misses, Count: 20}, false)
			n.shows("127.0.0.1:9253", map[string]float64{fault: 0, "reload_pending": 0})
			n.stop(loads)

			// The next reload asks it there too, and the next move is followed again.
			p.reload(corefile + "# once more\n")
			n.run(lab.Load{From: n.Pod, Proto: "udp", To: on(lab.ClusterIP), Names: lab.Misses, Tag: "more", Count: 20}, false)
			mark = p.Mark()
			n.serviceRules(c.mode, "D", ours, "10.96.0.13")
			n.serviceRules(c.mode, "A", ours, "10.96.0.14")
			n.must(p.WaitLog(mark, "reloading with KUBE_DNS_UPSTREAM_SERVICE_HOST=10.96.0.14"))
			n.must(p.WaitLog(mark, "[INFO] Reloading complete"))
			if reloads := strings.Count(p.Log(), "Reloading complete"); reloads != 3 {
				n.Errorf("it has reloaded %d times, want 3", reloads)
			}

			// A move that can't be followed, as the Corefile has become a bad one, is told for as long.
			n.must(p.Configure("bad {\n"))
			mark = p.Mark()
			n.serviceRules(c.mode, "D", ours, "10.96.0.14")
			n.serviceRules(c.mode, "A", ours, "10.96.0.15")
			n.must(p.WaitLog(mark, "reloading with KUBE_DNS_UPSTREAM_SERVICE_HOST=10.96.0.15"))
			n.shows("127.0.0.1:9253", map[string]float64{fault: 1})
			n.has(p.Log()[mark:], "the reload that is to ask the Service at its new address is not in force")
			p.reload(corefile + "# mended\n")
			n.shows("127.0.0.1:9253", map[string]float64{fault: 0})
			n.run(lab.Load{From: n.Pod, Proto: "udp", To: on(lab.ClusterIP), Names: lab.Misses, Tag: "mended", Count: 20}, false)
		})
	}
}
