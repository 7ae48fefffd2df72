package e2e

import (
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// What many clients ask at once the upstream is asked once: a good name whose server takes its
// time, and the first burst of a dead one, which nothing is remembered of.
func TestAsksOnceForManyClients(t *testing.T) {
	const clients = 300
	shielded(t, func(n *node, a *authority, at netip.Addr) {
		a.answers("good.shield.test.", func(r, m *dns.Msg) *dns.Msg {
			time.Sleep(time.Second)
			return zone(0, "$NAME 30 IN A 192.0.2.1")(r, m)
		})
		for name, want := range map[string]string{"good.shield.test.": "NOERROR 192.0.2.1", "dead.shield.test.": "SERVFAIL"} {
			var wg sync.WaitGroup
			for i := range clients {
				wg.Go(func() {
					way := func(m *dns.Msg) {
						if i%2 > 0 { // upstreams see both alike
							m.Question[0].Name = strings.ToUpper(name)
						}
					}
					if m := n.query(at, name, dns.TypeA, way); said(m) != want {
						n.Errorf("%s: %s", name, said(m))
					}
				})
			}
			wg.Wait()
			asked := a.queries(name)
			n.Logf("%s, asked by %d clients, has been asked for %d times", name, clients, asked)
			// One that is late is asked again, over another connection.
			if gathers := strings.HasSuffix(n.Name(), "/upstream"); gathers && asked > 20 || !gathers && asked < 30 {
				n.Errorf("that is not what it should be")
			}
		}
	})
}
