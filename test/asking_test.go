package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// The lab of the tests of the plugin upstream: two DNS pods of the cluster behind a Service of
// which only the cache knows, and two resolvers of the node's.
type askingLab struct {
	*node
	pods      [2]*lab.Resolver
	resolvers [2]*lab.Resolver
	resolv    string // the node's resolv.conf
}

var (
	upstreamService = netip.MustParseAddr("10.96.0.11")
	podAddrs        = [2]netip.Addr{netip.MustParseAddr("10.0.2.11"), netip.MustParseAddr("10.0.2.12")}
	resolverAddrs   = [2]netip.Addr{netip.MustParseAddr("10.0.2.21"), netip.MustParseAddr("10.0.2.22")}
)

// What they answer.
const (
	podSays      = "192.0.2.11"
	resolverSays = "192.0.2.21"
	otherSays    = "192.0.2.22"
)

func newAskingLab(t *testing.T) *askingLab {
	t.Helper()
	a := &askingLab{node: newNode(t, nftables)}
	for i := range a.pods {
		var err error
		a.pods[i], err = a.Resolver(podAddrs[i], lab.Says(podSays, 30))
		a.must(err)
		a.resolvers[i], err = a.Resolver(resolverAddrs[i], lab.Says([]string{resolverSays, otherSays}[i], 30))
		a.must(err)
	}
	a.must(a.Balance(upstreamService, podAddrs[:]...))
	a.resolv = filepath.Join(a.Dir, "resolv.conf")
	a.names(resolverAddrs[0].String())
	return a
}

// names writes the node's resolv.conf.
func (a *askingLab) names(addresses ...string) {
	a.Helper()
	text := "search lab\n"
	for _, s := range addresses {
		text += "nameserver " + s + "\n"
	}
	a.must(os.WriteFile(a.resolv, []byte(text), 0o644))
}

// corefile has the cluster's names and all others, as the shipped one.
func (a *askingLab) corefile(cluster, others string) string {
	block := func(zone, upstream string) string {
		return zone + ":53 {\nbind 169.254.20.10 10.96.0.10\nnodecache {\nfirewall nftables\n}\nerrors\nprometheus 169.254.20.10:9253\ncache {\nsuccess 9984 30 0\nservfail 0\n}\nshield\nupstream . " + upstream + "\n}\n"
	}
	return block("cluster.local", upstreamService.String()+" {\nforce_tcp\nmax_age 60s\n"+cluster+"\n}") +
		block(".", a.resolv+" {\nprefer_udp\n"+others+"\n}")
}

// asking is one for new names of a zone.
func (a *askingLab) asking(zone string, rate int, address string) lab.Asking {
	return lab.Asking{From: a.Pod, To: lab.LinkLocal, Rate: rate, Query: lab.NewNames(zone), Right: lab.IsAddress(address)}
}

// one asks for one new name, with EDNS.
func (a *askingLab) one(zone string) (*dns.Msg, time.Duration) {
	a.Helper()
	q := lab.NewNames(zone)(0).SetEdns0(1232, false)
	began := time.Now()
	var m *dns.Msg
	a.must(a.Pod.Do(func() (err error) {
		c := dns.Client{Timeout: 10 * time.Second}
		m, _, err = c.Exchange(q, linkLocal53)
		return err
	}))
	return m, time.Since(began)
}

// addressOf is the address of a new name, or the code of the failure.
func (a *askingLab) addressOf(zone string) string {
	a.Helper()
	m, _ := a.one(zone)
	if len(m.Answer) != 1 {
		return dns.RcodeToString[m.Rcode]
	}
	return m.Answer[0].(*dns.A).A.String()
}

// becomesAddress waits until new names of a zone have an address, or a failure.
func (a *askingLab) becomesAddress(zone, want string) {
	a.Helper()
	got := ""
	if !eventually(func() bool { got = a.addressOf(zone); return got == want }) {
		a.Errorf("%s: %s, want %s", zone, got, want)
	}
}

// A resolv.conf that names nobody fails only the names that are asked there, and at once; what
// it names later is asked then.
func TestResolvConfIsFollowed(t *testing.T) {
	a := newAskingLab(t)
	fails := func() {
		a.Helper()
		a.becomesAddress("example.test.", "SERVFAIL")
		m, took := a.one("example.test.")
		if m.Rcode != dns.RcodeServerFailure || extended(m) != dns.ExtendedErrorCodeNotReady || took > 2*time.Second {
			a.Errorf("after %v: %v", took, m)
		}
		if got := a.addressOf("cluster.local."); got != podSays {
			a.Errorf("cluster.local has %s", got)
		}
	}
	for name, spoil := range map[string]func(){
		"missing":   func() { os.Remove(a.resolv) },
		"empty":     func() { a.must(os.WriteFile(a.resolv, nil, 0o644)) },
		"odd":       func() { a.must(os.WriteFile(a.resolv, []byte("nameserver\nnameserver nobody\nsearch x\n\x00"), 0o644)) },
		"ourselves": func() { a.names("169.254.20.10", "10.96.0.10") },
		"folder":    func() { os.Remove(a.resolv); a.must(os.Mkdir(a.resolv, 0o755)) },
		"dangling":  func() { os.Remove(a.resolv); a.must(os.Symlink("nowhere", a.resolv)) },
	} {
		a.sub(name, func(n *node) {
			a := &askingLab{node: n, pods: a.pods, resolvers: a.resolvers, resolv: a.resolv}
			clean := func() { a.must(os.RemoveAll(a.resolv)) }
			clean()
			spoil()
			p := a.serve(a.corefile("", ""))
			defer p.Kill()
			fails()
			a.has(p.Log(), "[ERROR] plugin/upstream", a.resolv, "queries get SERVFAIL")
			clean()
			a.names(resolverAddrs[0].String())
			a.becomesAddress("example.test.", resolverSays)
			// And when it comes to be so while it runs.
			clean()
			spoil()
			fails()
			clean()
			a.names("10.96.0.10", resolverAddrs[1].String())
			a.becomesAddress("example.test.", otherSays)
		})
	}
	a.sub("changes", func(n *node) {
		a := &askingLab{node: n, pods: a.pods, resolvers: a.resolvers, resolv: a.resolv}
		a.names(resolverAddrs[0].String())
		p := a.serve(a.corefile("", ""))
		a.becomesAddress("example.test.", resolverSays)
		a.names(resolverAddrs[1].String())
		a.becomesAddress("example.test.", otherSays)
		a.resolvers[0].Answers(lab.Silent)
		a.must(os.WriteFile(a.resolv+".new", []byte("nameserver "+resolverAddrs[0].String()+"\n"), 0o644))
		a.resolvers[0].Answers(lab.Says(resolverSays, 30))
		a.must(os.Rename(a.resolv+".new", a.resolv))
		a.becomesAddress("example.test.", resolverSays)
		if got := strings.Count(p.Log(), "[ERROR]"); got > 0 {
			a.Errorf("%d errors in the log", got)
		}
	})
}

// extended is the code of an answer's extended error.
func extended(m *dns.Msg) uint16 {
	if o := m.IsEdns0(); o != nil {
		for _, option := range o.Option {
			if e, ok := option.(*dns.EDNS0_EDE); ok {
				return e.InfoCode
			}
		}
	}
	return dns.ExtendedErrorCodeOther
}

// Of two DNS pods behind one address one dies, and its connections are reset: no query fails.
func TestPodDiesWithResets(t *testing.T) {
	a := newAskingLab(t)
	a.serve(a.corefile("", ""))
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan *lab.Outcome, 1)
	go func() {
		tally, err := a.asking("cluster.local.", 200, podSays).Run(ctx)
		if err != nil {
			t.Error(err)
		}
		done <- tally
	}()
	time.Sleep(time.Second) // of load, not for anything
	for range 3 {
		a.pods[0].Die()
		time.Sleep(time.Second / 2)
		a.must(a.pods[0].Start())
		a.pods[1].Reset()
		time.Sleep(time.Second / 2)
	}
	stop()
	if tally := <-done; tally.Failed() > 0 || tally.Sent < 500 {
		t.Error(tally)
	}
}

// TCP that does not get through costs a query or two a moment, and no more.
func TestTCPIsFiltered(t *testing.T) {
	for _, verdict := range []string{"drop", "reject"} {
		t.Run(verdict, func(t *testing.T) {
			a := newAskingLab(t)
			for _, r := range append(a.pods[:], a.resolvers[:]...) {
				a.must(r.Block("tcp", verdict))
			}
			a.resolvers[0].Answers(manyAddresses)
			p := a.serve(a.corefile("", ""))
			tally, err := a.asking("cluster.local.", 50, podSays).Within(3 * time.Second)
			a.must(err)
			if tally.Failed() > 0 {
				t.Error("names of the cluster: ", tally)
			}
			// 100 addresses do not fit into 512 bytes.
			big := lab.Asking{From: a.Pod, To: lab.LinkLocal, Rate: 20, Query: lab.NewNames("big.test.")}
			if tally, err = big.Within(time.Second); err != nil || tally.Failed() > 0 {
				t.Error("large answers: ", tally, err)
			}
			a.must(p.WaitLog(0, "answers over UDP, but not over TCP"))
			if got := strings.Count(p.Log(), "but not over TCP"); got > 2 {
				t.Errorf("said %d times", got)
			}
			m := a.metrics()
			if v := m[`coredns_upstream_server_tcp{to="10.96.0.11:53"}`]; v != "0" {
				t.Errorf("server_tcp is %q", v)
			}
		})
	}
}

func manyAddresses(r *dns.Msg, _ bool) *dns.Msg {
	m := new(dns.Msg).SetReply(r)
	for i := range 100 {
		rr, _ := dns.NewRR(fmt.Sprintf("%s 60 IN A 192.0.2.%d", r.Question[0].Name, i))
		m.Answer = append(m.Answer, rr)
	}
	return m
}

// metrics are the lines of the process's metrics.
func (a *askingLab) metrics() map[string]string {
	a.Helper()
	body, err := get(a.Node, "http://169.254.20.10:9253/metrics")
	a.must(err)
	all := map[string]string{}
	for line := range strings.Lines(body) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "} "); ok {
			all[name+"}"] = value
		}
	}
	return all
}

// Names whose servers are silent take no place from others: good ones are answered.
func TestDeadNamesBesideGoodOnes(t *testing.T) {
	a := newAskingLab(t)
	a.resolvers[0].Answers(lab.ForNames("dead.test.", lab.After(4*time.Second, lab.Fails(dns.RcodeServerFailure)), lab.Says(resolverSays, 30)))
	p := a.serve(a.corefile("", ""))
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Second)
	defer cancel()
	done := make(chan *lab.Outcome, 1)
	go func() {
		dead := lab.Asking{From: a.Pod, To: lab.LinkLocal, Rate: 600, Query: lab.NewNames("dead.test."), Right: func(int, *dns.Msg) bool { return false }}
		tally, err := dead.Run(ctx)
		if err != nil {
			t.Error(err)
		}
		done <- tally
	}()
	good, err := a.asking("good.test.", 20, resolverSays).Run(ctx)
	a.must(err)
	dead := <-done
	t.Logf("good: %v; dead: %v", good, dead)
	if good.Failed() > 0 {
		t.Error("good names: ", good)
	}
	if dead.Refused > 0 {
		t.Error("dead names: ", dead)
	}
	if got := strings.Count(p.Log(), "[ERROR]"); got > 10 {
		t.Errorf("%d errors in the log", got)
	}
}

// An upstream that is gone costs a query no more than its client's patience; with another one
// next to nothing.
func TestUpstreamIsGone(t *testing.T) {
	a := newAskingLab(t)
	a.names(resolverAddrs[0].String(), resolverAddrs[1].String())
	a.resolvers[1].Answers(lab.Says(resolverSays, 30))
	a.serve(a.corefile("", ""))
	a.becomesAddress("cluster.local.", podSays)
	a.must(a.Unbalance(upstreamService))
	a.must(a.FlushConntrack())
	a.must(a.resolvers[0].Block("", "drop"))
	gone, err := a.asking("cluster.local.", 20, podSays).Within(time.Second)
	a.must(err)
	if gone.Servfail != gone.Sent {
		t.Error("with no upstream: ", gone)
	}
	tally, err := a.asking("example.test.", 100, resolverSays).Within(3 * time.Second)
	a.must(err)
	if tally.Failed() > 0 || tally.Late > 0 {
		t.Error("with one of two: ", tally)
	}
	// A name that is asked for all the time is no later than others when it is over.
	known := lab.Asking{From: a.Pod, To: lab.LinkLocal, Rate: 5, Query: func(int) *dns.Msg { return new(dns.Msg).SetQuestion("same.cluster.local.", dns.TypeA) }}
	if out, err := known.Within(8 * time.Second); err != nil || out.Right > 0 || out.Lost > 0 {
		t.Error("one name: ", out, err)
	}
	a.must(a.Balance(upstreamService, podAddrs[:]...))
	a.becomesAddress("cluster.local.", podSays)
	began := time.Now()
	if !eventually(func() bool {
		return exchange(a.Pod, "udp", linkLocal53, "same.cluster.local.", 5*time.Second) == dns.RcodeSuccess
	}) {
		t.Error("the name is not answered any more")
	}
	t.Logf("answered %v after others", time.Since(began).Round(time.Millisecond))
}
