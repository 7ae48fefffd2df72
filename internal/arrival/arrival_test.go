package arrival

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/miekg/dns"
)

// answering is plugins that answer with these codes, one a query, and then with the last one.
func answering(rcodes ...int) plugin.Handler {
	asked := 0
	return plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
		rcode := rcodes[min(asked, len(rcodes)-1)]
		asked++
		m := new(dns.Msg)
		m.SetRcode(r, rcode)
		return rcode, w.WriteMsg(m)
	})
}

func TestAwait(t *testing.T) {
	fails := plugin.HandlerFunc(func(context.Context, dns.ResponseWriter, *dns.Msg) (int, error) {
		return dns.RcodeSuccess, errors.New("no upstream")
	})
	full := plugin.HandlerFunc(func(context.Context, dns.ResponseWriter, *dns.Msg) (int, error) {
		return dns.RcodeRefused, nil // the plugin's own
	})
	hangs := plugin.HandlerFunc(func(context.Context, dns.ResponseWriter, *dns.Msg) (int, error) { select {} })
	panics := plugin.HandlerFunc(func(context.Context, dns.ResponseWriter, *dns.Msg) (int, error) { panic("a bug") })
	blocks := []Block{
		{"good.", answering(dns.RcodeNameError)},
		{"late.", answering(dns.RcodeServerFailure, dns.RcodeRefused, dns.RcodeSuccess)},
		{"nothing.", nil},
		{"refused.", answering(dns.RcodeRefused)},
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if silent := Await(ctx, blocks); len(silent) > 0 {
		t.Errorf("%v are silent", silent)
	}
	blocks = append(blocks, Block{".", fails}, Block{"full.", full}, Block{"hangs.", hangs}, Block{"panics.", panics})
	ctx, cancel = context.WithTimeout(context.Background(), 3*askEvery)
	defer cancel()
	if silent, want := Await(ctx, blocks), []string{".", "full.", "hangs.", "panics."}; !slices.Equal(silent, want) {
		t.Errorf("%v are silent, want %v", silent, want)
	}
}

// Every name that is asked for is a name, and in the zone but for that of all.
func TestName(t *testing.T) {
	for _, zone := range []string{".", "cluster.local.", "in-addr.arpa."} {
		name := Block{Zone: zone}.name()
		if _, ok := dns.IsDomainName(name); !ok || !dns.IsSubDomain(zone, name) || name == (Block{Zone: zone}).name() {
			t.Errorf("for %s: %s", zone, name)
		}
	}
}
