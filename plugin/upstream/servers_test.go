package upstream

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/coredns/caddy"

	"github.com/miekg/dns"
)

// A file is followed: what it names now is asked, and nothing if it names nothing.
func TestFileIsFollowed(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "resolv.conf")
	u := start(t, "upstream . "+file)
	named := func() string {
		var all []string
		for _, s := range u.servers.now().all {
			all = append(all, s.name)
		}
		return strings.Join(all, " ")
	}
	u.servers.ours = func(at netip.AddrPort) bool { return at.Addr() == netip.MustParseAddr("169.254.20.10") }
	write := func(text string) {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	check := func(want string) {
		t.Helper()
		eventually(t, "asks "+want, func() bool { return named() == want })
	}
	m := askFor(u, new(dns.Msg).SetQuestion("n.example.", dns.TypeA).SetEdns0(1232, false))
	if m.Rcode != dns.RcodeServerFailure || extended(m) != dns.ExtendedErrorCodeNotReady {
		t.Error(m)
	}
	write("nameserver 192.0.2.1\n")
	check("192.0.2.1:53")
	write("")
	check("")
	write("# a\n; b\nsearch x\noptions y\nnameserver\n  nameserver\t192.0.2.1 # c\r\nnameserver 192.0.2.1\nnameserver 999.1.1.1\nnameserver fe80::1%eth0\nnameserver ::ffff:192.0.2.9\nnameserver 169.254.20.10\nNAMESERVER 192.0.2.3")
	check("192.0.2.1:53 [fe80::1%eth0]:53 192.0.2.9:53")
	write("nameserver 169.254.20.10\n")
	check("")
	// Replaced, as a link that leads elsewhere.
	if err := os.WriteFile(filepath.Join(dir, "other"), []byte("nameserver 2001:db8::1"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(file), os.Symlink("other", file)); err != nil {
		t.Fatal(err)
	}
	check("[2001:db8::1]:53")
	if err := errors.Join(os.Remove(file), syscall.Mkfifo(file, 0o644)); err != nil {
		t.Fatal(err)
	}
	check("")
}

// A query that waits when there come to be other servers is answered by one of these.
func TestServersChangeWhileAQueryWaits(t *testing.T) {
	dead, alive := serve(t, false, silence), serve(t, false, answerWith("192.0.2.1"))
	all, err := parseAll(caddy.NewTestController("dns", "upstream . "+dead.at+" {\npatience 20s\n}"))
	if err != nil {
		t.Fatal(err)
	}
	u := all[0]
	u.servers.choose() // what is changed here nobody else follows
	answer := make(chan *dns.Msg, 1)
	go func() { answer <- ask(u, "n.example.") }()
	eventually(t, "it waits", func() bool { return dead.udp.Load() > 0 })
	u.servers.targets = []target{{address: address{at: netip.MustParseAddrPort(alive.at), way: overUDP}}}
	u.servers.choose()
	if m := <-answer; address1(m) != "192.0.2.1" {
		t.Error(m)
	}
}

// FuzzNameservers: whatever stands in a file is read without a fault, and within bounds.
func FuzzNameservers(f *testing.F) {
	f.Add("nameserver 10.0.0.1\nnameserver fe80::1%eth0\n")
	f.Fuzz(func(t *testing.T, text string) {
		all, odd := nameservers(text)
		if len(odd) > 9 {
			t.Errorf("%d complaints", len(odd))
		}
		for _, at := range all {
			if !at.IsValid() || at.Port() != 53 {
				t.Error(at)
			}
		}
	})
}

// FuzzAnswers: whatever a server sends is taken for an answer only if it is one to the query.
func FuzzAnswers(f *testing.F) {
	q, _ := new(dns.Msg).SetQuestion("www.example.org.", dns.TypeA).Pack()
	f.Add(q)
	f.Fuzz(func(t *testing.T, msg []byte) {
		if answers(msg, q) && (len(msg) < headerLen || msg[0] != q[0] || msg[1] != q[1]) {
			t.Error(msg)
		}
	})
}
