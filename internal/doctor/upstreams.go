package doctor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	pkgparse "github.com/coredns/coredns/plugin/pkg/parse"
	"github.com/coredns/coredns/plugin/pkg/transport"
	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/ruleset"
)

// Upstream is one use of a plugin that asks other DNS servers.
type Upstream struct {
	At      string           // "file:line"
	Plugin  string           // such as forward
	Text    string           // as the Corefile has it: an address, or a file in the form of resolv.conf
	Zone    string           // the queries for which go there
	OnlyTCP bool             // it never asks over UDP
	Follows bool             // it reads a file anew when that changes
	Servers []netip.AddrPort // those asked in plain DNS, as of when the configuration was read
}

func (u Upstream) String() string { return u.Plugin + " at " + u.At }

const (
	// askFor is how long a server may take to answer.
	askFor = 1500 * time.Millisecond
	// mostAsked bounds how many servers are asked.
	mostAsked = 32
)

// askTypes is what it is asked for over UDP, one after the other until it answers.
var askTypes = []uint16{dns.TypeSOA, dns.TypeNS}

// answers is what a server does with a query.
type answers struct{ udp, tcp error } // nil: it answers

// asked asks the servers, once in an examination.
func (s Site) asked() map[netip.AddrPort]answers {
	if s.askOnce == nil {
		return s.askAll()
	}
	return s.askOnce()
}

// askAll asks each of the servers over UDP and TCP, all at once.
func (s Site) askAll() map[netip.AddrPort]answers {
	zones := map[netip.AddrPort]string{}
	for _, u := range s.Upstreams {
		for _, at := range u.Servers {
			if _, ours := s.Addrs[at.Addr()]; !ours && len(zones) < mostAsked {
				zones[at] = u.Zone
			}
		}
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	all := map[netip.AddrPort]answers{}
	for at, zone := range zones {
		wg.Go(func() {
			var a answers
			both := sync.WaitGroup{}
			// Each with a question of its own: a server of this very process would take one
			// that is under way there already for a loop.
			both.Go(func() { a.tcp = ask("tcp", at, zone, dns.TypeA) })
			both.Go(func() {
				for _, typ := range askTypes {
					if a.udp = ask("udp", at, zone, typ); a.udp == nil {
						return
					}
				}
			})
			both.Wait()
			mu.Lock()
			defer mu.Unlock()
			all[at] = a
		})
	}
	wg.Wait()
	return all
}

// ask sends one query. Every answer will do.
func ask(proto string, at netip.AddrPort, zone string, typ uint16) error {
	m := new(dns.Msg)
	m.SetQuestion(dns.Fqdn(zone), typ)
	ctx, cancel := context.WithTimeout(context.Background(), 2*askFor)
	defer cancel()
	_, _, err := (&dns.Client{Net: proto, Timeout: askFor}).ExchangeContext(ctx, m, at.String())
	var n net.Error
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return errors.New("refused")
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return errors.New("reset")
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EACCES):
		return errors.New("this node does not let it out")
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH):
		return errors.New("unreachable")
	case errors.As(err, &n) && n.Timeout():
		return fmt.Errorf("no answer within %s", askFor)
	case errors.As(err, &n):
		return err
	}
	return nil // it may be no good answer, but it is one
}

// upstreamTCP finds servers that answer over UDP and not over TCP, by which answers come that
// are too long for UDP, and all where force_tcp says so.
func upstreamTCP(s Site) (found []string) {
	all := s.asked()
	for _, u := range s.Upstreams {
		for _, at := range u.Servers {
			if a, asked := all[at]; asked && a.udp == nil && a.tcp != nil {
				what := "answers that are too long for UDP do not come"
				if u.OnlyTCP {
					what = "nothing comes from there, as only TCP is asked"
				}
				found = append(found, fmt.Sprintf("the upstream %s (%s) answers over UDP and not over TCP (%v)%s: %s: let TCP to port %d pass, on this node and on the way there", at, u, a.tcp, s.dropped("tcp", at), what, at.Port()))
			}
		}
	}
	return found
}

// upstreamSilent finds servers that do not answer at all, or over TCP only though they are asked
// over UDP.
func upstreamSilent(s Site) (found []string) {
	all := s.asked()
	for _, u := range s.Upstreams {
		for _, at := range u.Servers {
			a, asked := all[at]
			switch {
			case !asked || a.udp == nil || a.tcp == nil && u.OnlyTCP:
			case a.tcp == nil:
				found = append(found, fmt.Sprintf("the upstream %s (%s) answers over TCP and not over UDP (%v)%s: let UDP to port %d pass, or ask it over TCP alone (force_tcp)", at, u, a.udp, s.dropped("udp", at), at.Port()))
			default:
				if !s.ofService(at.Addr()) || s.leadsOn(at) {
					found = append(found, fmt.Sprintf("no DNS server answers at the upstream %s (%s), over UDP (%v) or TCP (%v)%s: what the cache does not know can't be answered: look whether that server runs, and whether this node reaches it", at, u, a.udp, a.tcp, s.dropped("udp", at)))
				}
			}
		}
	}
	return found
}

// dropped says where this node's own firewall drops every query to a server, or "".
func (s Site) dropped(proto string, at netip.AddrPort) string {
	query := ruleset.Packet{Proto: unix.IPPROTO_UDP, Dst: at.Addr(), DstPort: at.Port(), State: ruleset.StateNew}
	if proto == "tcp" {
		query.Proto = unix.IPPROTO_TCP
	}
	return look([]string{"raw", "mangle", "filter", "security"}, func(r *ruleset.Ruleset) string {
		for _, hook := range []uint32{unix.NF_INET_LOCAL_OUT, unix.NF_INET_POST_ROUTING} {
			for _, res := range r.Through(query, hook, "filter", "route") {
				if res.Drop && !res.Accept && len(res.Places) > 0 {
					return ", since this node's firewall drops it (" + res.Places[0].String() + ")"
				}
			}
		}
		return ""
	})
}

// resolversChanged finds files that name other servers than those that are asked.
func resolversChanged(s Site) (found []string) {
	for _, u := range s.Upstreams {
		if u.Follows || !isFile(u.Text) {
			continue
		}
		now := Servers(u.Text)
		if slices.Equal(now, u.Servers) {
			continue
		}
		names := "names no server any more"
		if len(now) > 0 {
			names = "names " + some(now) + " by now"
		}
		found = append(found, fmt.Sprintf("%s %s, and %s still asks %s, as it was when the Corefile was read: reload CoreDNS (SIGUSR1; the plugin reload sees only changes of the Corefile)", u.Text, names, u, some(u.Servers)))
	}
	return found
}

func isFile(text string) bool {
	i, err := os.Stat(text)
	if errors.Is(err, os.ErrNotExist) {
		return strings.HasPrefix(text, "/") // it was there
	}
	return err == nil && !i.IsDir()
}

// Servers returns the servers that a text of the Corefile stands for and that are asked in plain
// DNS, in order.
func Servers(text string) (all []netip.AddrPort) {
	hosts, err := pkgparse.HostPortOrFile(text)
	if err != nil {
		return nil
	}
	for _, h := range hosts {
		kind, h := pkgparse.Transport(h)
		if at, err := netip.ParseAddrPort(h); err == nil && kind == transport.DNS {
			all = append(all, netip.AddrPortFrom(at.Addr().Unmap(), at.Port()))
		}
	}
	return all
}
