package upstream

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	_ "github.com/coredns/coredns/plugin/bind"
)

// A reload that fails leaves nothing behind of what it had begun.
func TestFailedReloadIsClosed(t *testing.T) {
	dnsserver.Directives = append(dnsserver.Directives, directive)
	dir := t.TempDir()
	file := func(name string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("nameserver 192.0.2.1\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	a, b := file("a"), file("b")
	followers := func(file string) int {
		fileServers.mu.Lock()
		defer fileServers.mu.Unlock()
		return fileServers.by[file]
	}
	corefile := func(file, port string) caddy.Input {
		return caddy.CaddyfileInput{Filepath: "Corefile", ServerTypeName: "dns", Contents: fmt.Appendf(nil, ".:%s {\nbind 127.0.0.1\nupstream . %s\n}\n", port, file)}
	}
	inst, err := caddy.Start(corefile(a, "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { inst.ShutdownCallbacks(); inst.Stop() }()
	taken, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	_, port, _ := net.SplitHostPort(taken.LocalAddr().String())
	if _, err := inst.Restart(corefile(b, port)); err == nil {
		t.Fatal("it listens on a port that is taken")
	}
	if followers(a) != 1 || followers(b) != 0 {
		t.Errorf("%d follow the file in force and %d that of the reload; want 1 and 0", followers(a), followers(b))
	}
	if inst, err = inst.Restart(corefile(b, "0")); err != nil {
		t.Fatal(err)
	}
	if followers(a) != 0 || followers(b) != 1 {
		t.Errorf("after a reload %d follow the old file and %d the new one; want 0 and 1", followers(a), followers(b))
	}
}
