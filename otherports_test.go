package nodecache

import (
	"fmt"
	"net"
	"testing"

	"github.com/coredns/coredns/core/dnsserver"

	_ "github.com/coredns/coredns/plugin/pprof"
	_ "github.com/coredns/coredns/plugin/ready"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"

	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
)

// Plugins that begin to listen while CoreDNS serves and is reloaded get in nobody's way.
func TestLatecomersListenAmidReloads(t *testing.T) {
	c := newCoreDNS(t)
	dnsserver.Directives = []string{"bind", "nodecache", "ready", "pprof", "whoami"}
	var held []net.Listener
	var at []desired.Endpoint
	for range 2 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		t.Cleanup(func() { l.Close() })
		held = append(held, l)
		at = append(at, desired.Endpoint{Addr: addr("127.0.0.1"), Proto: "tcp", Port: l.Addr().(*net.TCPAddr).AddrPort().Port()})
	}
	corefile := serverBlock("example.org", "", "169.254.20.10") +
		fmt.Sprintf("example.net:5399 {\nbind 127.0.0.1\nready %s\npprof %s\n}\n", held[0].Addr(), held[1].Addr())
	must(t, c.start(corefile))
	t.Cleanup(func() { c.instance.ShutdownCallbacks() })
	missing := func(want int) func() bool {
		return func() bool { return exported(t, "ports_taken") == float64(want) }
	}
	must(t, c.reload(corefile))
	eventually(t, "both wait", missing(2))
	held[0].Close()
	eventually(t, "ready listens", missing(1))
	wantError(t, c.reload(corefile+"example.com:5399 {\nbind 192.0.2.77\n}\n"), "cannot assign requested address")
	eventually(t, "pprof waits still", missing(1))
	held[1].Close()
	must(t, c.reload(corefile))
	eventually(t, "both listen", missing(0))
	eventually(t, "there are sockets", func() bool { ok, err := sockets.Listening(at); return ok && err == nil })
	c.wantAnswers("169.254.20.10")
}
