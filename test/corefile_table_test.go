package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// shippedLines are those of the manifests' block for all other names, but for what asks upstreams.
func shippedLines(t *testing.T) string {
	text := read(t, filepath.Join("..", "k8s", "base", "single", "node-local.yaml"))
	m := regexp.MustCompile(`(?s)\n    \.:53 \{.*?(\n        cache \{.*?)\n        import upstream`).FindStringSubmatch(text)
	if m == nil || !strings.Contains(m[1], "shield") {
		t.Fatal("the manifest has no such block any more")
	}
	return m[1]
}

// An option is one line of the shipped Corefile, and what it is measured by.
type option struct {
	line    string // as it is shipped
	instead string // what stands there otherwise
	what    string
	measure func(n *node, a *authority, at netip.Addr) string
}

var options = []option{
	{"shield", "", "one client asks with a subnet, others without: of 50 wrong", func(n *node, a *authority, at netip.Addr) string {
		a.answers("", func(r, m *dns.Msg) *dns.Msg {
			if o := r.IsEdns0(); o != nil && len(o.Option) > 0 {
				return zone(0, "$NAME 30 IN A 192.0.2.66")(r, m)
			}
			return zone(0, "$NAME 30 IN A 192.0.2.1")(r, m)
		})
		n.query(at, "subnet.shield.test.", dns.TypeA, edns(1232, false, subnet(1, 24, "198.51.100.0")))
		return fmt.Sprint(n.others(at, "subnet.shield.test.", "NOERROR 192.0.2.1", 50))
	}},
	{"shield", "", "a record changes from TTL 1 to TTL 0, its server fails later: of 50 the old address", func(n *node, a *authority, at netip.Addr) string {
		const name = "zero.shield.test."
		n.turnsTo(a, at, name, "192.0.2.1", zone(0, "$NAME 0 IN A 192.0.2.2"), "NOERROR 192.0.2.2")
		a.answers(name, refuses(dns.RcodeServerFailure))
		return fmt.Sprint(50 - n.others(at, name, "NOERROR 192.0.2.1", 50))
	}},
	{"shield", "#", "a name is deleted, its server fails later: of 300 within 3 s the deleted address (without: `servfail 1s` too)", func(n *node, a *authority, at netip.Addr) string {
		const name = "gone.shield.test."
		n.turnsTo(a, at, name, "192.0.2.1", zone(dns.RcodeNameError, soa(2, 2)), "NXDOMAIN")
		a.answers(name, refuses(dns.RcodeServerFailure))
		return fmt.Sprint(n.within(3*time.Second, func() bool { return said(n.query(at, name, dns.TypeA)) == "NOERROR 192.0.2.1" }))
	}},
	{"shield", "", "a name fails (SERVFAIL), asked 300 times in 3 s: how often its server is asked", func(n *node, a *authority, at netip.Addr) string {
		a.answers("", refuses(dns.RcodeServerFailure))
		n.within(3*time.Second, func() bool { n.query(at, "dead.shield.test.", dns.TypeA); return false })
		return fmt.Sprint(a.queries("dead.shield.test."))
	}},
	{"shield", "", "the question comes as WwW.ShIeLd.TeSt after www.shield.test: of 50 with another owner name", func(n *node, a *authority, at netip.Addr) string {
		a.answers("", zone(0, "$NAME 30 IN A 192.0.2.1"))
		n.query(at, "www.shield.test.", dns.TypeA)
		wrong := 0
		for range 50 {
			if m := n.query(at, "WwW.ShIeLd.TeSt.", dns.TypeA); len(m.Answer) != 1 || m.Answer[0].Header().Name != "WwW.ShIeLd.TeSt." {
				wrong++
			}
		}
		return fmt.Sprint(wrong)
	}},
	{"loadbalance", "", "four addresses: how often of 400 the most frequent is first", func(n *node, a *authority, at netip.Addr) string {
		a.answers("", zone(0, "$NAME 30 IN A 192.0.2.1", "$NAME 30 IN A 192.0.2.2", "$NAME 30 IN A 192.0.2.3", "$NAME 30 IN A 192.0.2.4"))
		first, most := map[string]int{}, 0
		for range 400 {
			m := n.query(at, "four.shield.test.", dns.TypeA)
			first[m.Answer[0].(*dns.A).A.String()]++
			most = max(most, first[m.Answer[0].(*dns.A).A.String()])
		}
		return fmt.Sprint(most)
	}},
	{"success 9984 30 0", "success 9984 30", "a record of TTL 1 changes: after how long all see it", func(n *node, a *authority, at netip.Addr) string {
		a.answers("", zone(0, "$NAME 1 IN A 192.0.2.1"))
		n.query(at, "short.shield.test.", dns.TypeA)
		a.answers("", zone(0, "$NAME 1 IN A 192.0.2.2"))
		begun := time.Now()
		eventually(func() bool { return said(n.query(at, "short.shield.test.", dns.TypeA)) == "NOERROR 192.0.2.2" })
		return fmt.Sprintf("%.1f s", time.Since(begun).Seconds())
	}},
	{"success 9984 30 0", "success 9984", "a record of TTL 86400: for how long a change is not seen", func(n *node, a *authority, at netip.Addr) string {
		a.answers("", zone(0, "$NAME 86400 IN A 192.0.2.1"))
		return fmt.Sprint(n.query(at, "long.shield.test.", dns.TypeA).Answer[0].Header().Ttl, " s")
	}},
	{"denial 9984 5 0", "denial 9984", "a name that is not there yet, SOA of 3600: for how long it is not seen when it comes", func(n *node, a *authority, at netip.Addr) string {
		a.answers("", zone(dns.RcodeNameError, soa(3600, 3600)))
		return fmt.Sprint(n.query(at, "new.shield.test.", dns.TypeA).Ns[0].Header().Ttl, " s")
	}},
	{"prefetch 10 1m 10%", "", "a record of TTL 3, its server takes 200 ms, asked all the time for 12 s: how many wait", func(n *node, a *authority, at netip.Addr) string {
		answer := zone(0, "$NAME 3 IN A 192.0.2.1")
		a.answers("", func(r, m *dns.Msg) *dns.Msg { time.Sleep(200 * time.Millisecond); return answer(r, m) })
		n.query(at, "hot.shield.test.", dns.TypeA)
		return fmt.Sprint(n.within(12*time.Second, func() bool {
			begun := time.Now()
			n.query(at, "hot.shield.test.", dns.TypeA)
			return time.Since(begun) > 100*time.Millisecond
		}))
	}},
	{"serve_stale 1h verify 1s 30s 30s", "", "a record of TTL 1, its server is silent: of 10 failures, and the longest wait", func(n *node, a *authority, at netip.Addr) string {
		a.answers("", zone(0, "$NAME 1 IN A 192.0.2.1"))
		n.query(at, "stale.shield.test.", dns.TypeA)
		a.answers("", silent)
		failed, longest := 0, time.Duration(0)
		ask := func() {
			begun := time.Now()
			if n.query(at, "stale.shield.test.", dns.TypeA).Rcode != 0 {
				failed++
			}
			longest = max(longest, time.Since(begun))
		}
		eventually(func() bool { ask(); return longest > 300*time.Millisecond }) // until the TTL is over
		for range 9 {
			ask()
		}
		return fmt.Sprintf("%d, %.1f s", failed, longest.Seconds())
	}},
	{"serve_stale 1h verify 1s 30s 30s", "serve_stale 1h immediate", "a record of TTL 1 changes, asked again a while later: the first answer", func(n *node, a *authority, at netip.Addr) string {
		a.answers("", zone(0, "$NAME 1 IN A 192.0.2.1"))
		n.query(at, "later.shield.test.", dns.TypeA)
		a.answers("", zone(0, "$NAME 1 IN A 192.0.2.2"))
		n.within(2*time.Second, func() bool { n.query(at, "other.shield.test.", dns.TypeA); return false })
		return said(n.query(at, "later.shield.test.", dns.TypeA))
	}},
}

// others returns how many of so many queries are answered with something else.
func (n *node) others(at netip.Addr, name, want string, count int) (others int) {
	for range count {
		if said(n.query(at, name, dns.TypeA)) != want {
			others++
		}
	}
	return others
}

// turnsTo has a name of TTL 1 answered in another way, until the cache does.
func (n *node) turnsTo(a *authority, at netip.Addr, name, ip string, then func(r, m *dns.Msg) *dns.Msg, want string) {
	a.answers(name, zone(0, "$NAME 1 IN A "+ip))
	n.query(at, name, dns.TypeA)
	a.answers(name, then)
	if !eventually(func() bool { return said(n.query(at, name, dns.TypeA)) == want }) {
		n.Errorf("%s never becomes %s", name, want)
	}
}

// within asks a hundred times a second for so long, and returns how often it was true.
func (n *node) within(d time.Duration, asks func() bool) (count int) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(d); time.Now().Before(end); <-tick.C {
		if asks() {
			count++
		}
	}
	return count
}

// What docs/corefile.md has of the options: what comes out with each and without. It is a
// measurement, for `make corefile`.
func TestCorefileTable(t *testing.T) {
	if os.Getenv("LAB_COREFILE") == "" {
		t.Skip("a measurement: set LAB_COREFILE")
	}
	shipped := shippedLines(t)
	table := "| Option | Measured | with | without |\n|-|-|-|-|\n"
	for _, o := range options {
		if !strings.Contains(shipped, o.line+"\n") && !strings.HasSuffix(shipped, o.line) {
			t.Fatalf("the manifests have no line %q", o.line)
		}
		var out [2]string
		without := strings.Replace(shipped, o.line, o.instead, 1)
		if o.instead == "#" {
			without = strings.Replace(without, "servfail 0", "servfail 1s", 1)
		}
		for i, lines := range []string{shipped, without} {
			t.Run(fmt.Sprint(o.line, i), func(t *testing.T) {
				n := newNode(t, backend{lab.NFT, "nftables"})
				a := n.authority()
				n.serve(".:53 {\n    bind 169.254.20.10\n    nodecache {\n        firewall nftables\n    }\n    errors" + lines +
					"\n    upstream . " + authorityAt + " {\n        prefer_udp\n    }\n}\n")
				out[i] = o.measure(n, a, lab.LinkLocal)
			})
		}
		table += fmt.Sprintf("| `%s` | %s | %s | %s |\n", o.line, o.what, out[0], out[1])
	}
	fmt.Print(table)
}
