package nodecache

import (
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"github.com/coredns/caddy"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
)

// checked reads one block and has the machine looked at.
func checked(t *testing.T, in corefile, ours ...string) (*config, error) {
	t.Helper()
	cfg, err := read(in)
	must(t, err)
	b, err := parse(caddy.NewTestController("dns", in.directive))
	must(t, err)
	return cfg, cfg.check(b, ours)
}

func TestCheckNamesMissingNetAdmin(t *testing.T) {
	needRoot(t)
	// A capability is a thread's: this one is not given back to the runtime.
	runtime.LockOSThread()
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	must(t, unix.Capget(&head, &data[0]))
	had := data
	data[0].Effective &^= 1 << unix.CAP_NET_ADMIN
	must(t, unix.Capset(&head, &data[0]))
	defer func() {
		if err := unix.Capset(&head, &had[0]); err == nil {
			runtime.UnlockOSThread()
		}
	}()
	_, err := checked(t, corefile{"nodecache", "169.254.20.10", dns53})
	wantError(t, err, "needs the capability NET_ADMIN")
	_, err = checked(t, corefile{"nodecache {\ninterface none\nfirewall nftables\n}", "127.0.0.1", dns53})
	wantError(t, err, "needs the capability NET_ADMIN")
	// Who asks for neither needs no capability.
	_, err = checked(t, corefile{"nodecache {\ninterface none\nfirewall none\n}", "127.0.0.1", dns53})
	wantError(t, err, "")
}

func TestCheckNamesMissingIPTables(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	t.Setenv("PATH", dir)
	const v4, v6 = "169.254.20.10", "fd00:20::10"
	const ipt = "nodecache {\nfirewall iptables\n}"
	have := func(names ...string) {
		for _, n := range names {
			must(t, os.WriteFile(filepath.Join(dir, n), []byte("#!/bin/sh\n"), 0o755))
		}
	}
	_, err := checked(t, corefile{ipt, v4, dns53})
	wantError(t, err, "Testfile:2 - Error during parsing: firewall iptables: finding the program iptables: ")
	have("iptables", "iptables-save")
	_, err = checked(t, corefile{ipt, v4, dns53})
	wantError(t, err, "finding the program iptables-restore: ")
	have("iptables-restore")
	_, err = checked(t, corefile{ipt, v4, dns53})
	wantError(t, err, "")
	_, err = checked(t, corefile{ipt, v4 + " " + v6, dns53})
	wantError(t, err, "finding the program ip6tables: ")
	_, err = checked(t, corefile{"nodecache", v6, dns53}) // auto takes what is there
	wantError(t, err, "")
}

func TestCheckRefusesAddressOnIPVSLink(t *testing.T) {
	needRoot(t)
	cleanLinks(t)
	must(t, (&netif{name: nodelinks.IPVS}).add())
	defer removeLink(t, nodelinks.IPVS)
	addAddr(t, nodelinks.IPVS, "10.96.0.10/32")
	_, err := checked(t, corefile{"nodecache", "169.254.20.10 10.96.0.10", dns53})
	wantError(t, err, "Testfile:1 - Error during parsing: bind 10.96.0.10: the link kube-ipvs0 carries this address")
	_, err = checked(t, corefile{"nodecache", "169.254.20.10", dns53})
	wantError(t, err, "")
}

func TestAddressOfAnotherLinkIsServedThere(t *testing.T) {
	newTestLink(t, "10.96.0.10")
	in := corefile{"nodecache", "169.254.20.10 10.96.0.10 127.0.0.1", dns53}
	on := func(cfg *config) []netip.Addr {
		return cfg.state(func(b string) string { return b }).Links["nodelocaldns"]
	}
	cfg, err := checked(t, in)
	must(t, err)
	if got, want := on(cfg), addrs("169.254.20.10"); !slices.Equal(got, want) {
		t.Errorf("ours to carry are %v, want %v", got, want)
	}
	// A link that a reload's old configuration has is no other.
	cfg, err = checked(t, in, testLink)
	must(t, err)
	if got, want := on(cfg), addrs("10.96.0.10", "169.254.20.10"); !slices.Equal(got, want) {
		t.Errorf("ours to carry are %v, want %v", got, want)
	}
}

func TestProgramsOfAddresses(t *testing.T) {
	cfg, err := read(corefile{"nodecache", "169.254.20.10 10.96.0.10", dns53}, corefile{"nodecache {\ninterface six\n}", "fd00:20::10", dns53})
	must(t, err)
	if got, want := cfg.binaries("nodelocaldns"), []string{"iptables", "iptables-save", "iptables-restore"}; !slices.Equal(got, want) {
		t.Errorf("IPv4 takes %v, want %v", got, want)
	}
	if got, want := cfg.binaries("six"), []string{"ip6tables", "ip6tables-save", "ip6tables-restore"}; !slices.Equal(got, want) {
		t.Errorf("IPv6 takes %v, want %v", got, want)
	}
}

// lookPath finds one of the system's programs, or skips the test.
func lookPath(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%v", err)
	}
	return path
}
