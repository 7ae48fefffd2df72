package nodecache

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/coredns/coredns/core/dnsserver"
	"github.com/miekg/dns"

	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/hosts"
	_ "github.com/coredns/coredns/plugin/log"
)

// fastBlock is a server block that knows www.example.org.
func fastBlock(fastpath, address string, lines ...string) string {
	return fmt.Sprintf(".:53 {\nbind %s\nnodecache {\ninterface %s\nfirewall nftables\n%s\n}\n%s\nhosts {\n192.0.2.1 www.example.org\n}\n}\n",
		address, testLink, fastpath, strings.Join(append([]string{"cache"}, lines...), "\n"))
}

func newFastCoreDNS(t *testing.T) *coreDNS {
	c := newCoreDNS(t)
	dnsserver.Directives = []string{"bind", "nodecache", "log", "cache", "hosts", "whoami"}
	return c
}

// ask asks for www.example.org, and wants the answer.
func ask(t *testing.T, at string) {
	t.Helper()
	m := new(dns.Msg).SetQuestion("www.example.org.", dns.TypeA)
	client := dns.Client{Timeout: 10 * time.Second}
	r, _, err := client.Exchange(m, netip.AddrPortFrom(addr(at), 53).String())
	must(t, err)
	if len(r.Answer) != 1 || !strings.HasSuffix(r.Answer[0].String(), "192.0.2.1") {
		t.Fatalf("%s answers %v", at, r)
	}
}

// Fastpath comes and goes with reloads, and whatever a query meets, it is answered.
func TestFastpathOverReloads(t *testing.T) {
	c := newFastCoreDNS(t)
	const v4, v6 = "169.254.20.10", "fd00:20::10"
	hit := func(at string) func() bool {
		before := exported(t, "fastpath_hits_total")
		return func() bool { ask(t, at); return exported(t, "fastpath_hits_total") > before }
	}
	must(t, c.start(fastBlock("fastpath", v4)))
	eventually(t, "the question is answered past the plugins", hit(v4))
	must(t, c.reload(fastBlock("fastpath 64", v4+" "+v6)))
	eventually(t, "it is after a reload", hit(v4))
	eventually(t, "it is on a new address", hit(v6))

	must(t, c.reload(fastBlock("", v4)))
	before := exported(t, "fastpath_hits_total")
	for range 5 {
		ask(t, v4)
	}
	if exported(t, "fastpath_hits_total") != before {
		t.Error("without fastpath a question is answered past the plugins")
	}

	// A Corefile without the directive, on an address that stays, and another one.
	addAddr(t, "lo", v4+"/32")
	defer delAddr(t, "lo", v4+"/32")
	must(t, c.reload(fastBlock("fastpath", v4)))
	must(t, c.reload(fmt.Sprintf(".:53 {\nbind %s\nhosts {\n192.0.2.1 www.example.org\n}\n}\n", v4)))
	ask(t, v4)
	must(t, c.reload(fmt.Sprintf(".:53 {\nbind %s\ncache\nhosts {\n192.0.2.1 www.example.org\n}\n}\n", v4)))
	ask(t, v4)
	must(t, c.reload(".:53 {\nbind 127.0.0.1\nwhoami\n}\n"))
	must(t, c.reload(fastBlock("fastpath", v4)))
	eventually(t, "it is ready", theNode.ready.Load)
	eventually(t, "it is answered past the plugins again", hit(v4))
}

func TestFastpathRefusesWhatItCanNotDoJustice(t *testing.T) {
	for name, c := range map[string]struct{ corefile, shouldErr string }{
		"no cache":        {strings.Replace(fastBlock("fastpath", "169.254.20.10"), "cache\n", "", 1), "fastpath needs the plugin cache"},
		"log":             {fastBlock("fastpath", "169.254.20.10", "log"), "fastpath can't go with the plugin log"},
		"too few entries": {fastBlock("fastpath 1", "169.254.20.10"), "fastpath 1 is out of range"},
		"no number":       {fastBlock("fastpath many", "169.254.20.10"), `fastpath "many" is no number of entries, and not auto`},
		"auto twice":      {fastBlock("fastpath auto auto", "169.254.20.10"), `fastpath auto "auto" is no number of entries`},
	} {
		t.Run(name, func(t *testing.T) {
			coredns := newFastCoreDNS(t)
			wantError(t, coredns.start(c.corefile), c.shouldErr)
		})
	}
}
