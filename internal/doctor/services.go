package doctor

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/ruleset"
)

// UpstreamServiceGone is the fault that the address of an upstream, which was that of a Service,
// is that of none any more.
const UpstreamServiceGone = "upstream_service_gone"

// Services are those that are asked, by the addresses that this process was given.
type Services struct {
	mu    sync.Mutex
	names map[netip.Addr]string // namespace/name
	left  map[netip.Addr]string // those that are elsewhere, and have another address in the variables
}

// OfServices returns those upstreams of which Kubernetes has told this process the address.
func (s Site) OfServices() []Upstream {
	return slices.DeleteFunc(slices.Clone(s.Upstreams), func(u Upstream) bool {
		return !slices.ContainsFunc(u.Servers, func(at netip.AddrPort) bool {
			return s.ofService(at.Addr())
		})
	})
}

// ofService tells whether Kubernetes has told this process an address as that of a Service.
func (s Site) ofService(a netip.Addr) bool {
	return len(VariablesOf(a)) > 0 || s.Services.hasLeft(a) != ""
}

// VariablesOf returns the variables by which Kubernetes has given a Service's address to this
// container.
func VariablesOf(a netip.Addr) (names []string) {
	for _, v := range os.Environ() {
		if name, value, ok := strings.Cut(v, "="); ok && strings.HasSuffix(name, "_SERVICE_HOST") {
			if at, err := netip.ParseAddr(value); err == nil && at == a {
				names = append(names, name)
			}
		}
	}
	return names
}

// upstreamServiceGone finds upstreams whose address this process was given at its start as that of
// a Service, and that no rule of kube-proxy's knows any more. Where the Service is elsewhere now
// and answers, it says so instead.
func upstreamServiceGone(s Site) (found []string) {
	all := s.asked()
	s.Services.keep(s.Upstreams)
	for _, u := range s.Upstreams {
		for _, at := range u.Servers {
			names := VariablesOf(at.Addr())
			a, asked := all[at]
			left := s.Services.hasLeft(at.Addr())
			if !asked || len(names) == 0 && left == "" {
				continue
			}
			if len(names) == 0 {
				if a.udp != nil && a.tcp != nil {
					found = append(found, fmt.Sprintf("the upstream %s (%s) was the address of the Service %s when this process started, and nothing answers there any more: the reload that is to ask the Service at its new address is not in force: see in the log why it has failed; it is tried again", at.Addr(), u, left))
				}
				continue
			}
			if a.udp == nil || a.tcp == nil {
				s.Services.learn(at.Addr())
				continue
			}
			if s.leadsOn(at) {
				continue
			}
			service, to := s.Services.now(at.Addr())
			if to.IsValid() && answersAt(netip.AddrPortFrom(to, at.Port()), u) {
				s.Services.leave(at.Addr(), to, service)
				s.Moved(service, at.Addr(), to)
				continue
			}
			remedy := "restart this pod if the Service has been made anew, so that it gets the new address; if not, see whether the Service is there and has endpoints"
			if service != "" {
				remedy = "see whether the Service " + service + " is there and has endpoints; when it is, and its DNS answers, it is asked at the address that it has then"
			}
			found = append(found, fmt.Sprintf("the upstream %s (%s) was the address of a Service when this process started (%s), and nothing answers there any more, nor does a rule of kube-proxy's lead on from it: %s", at.Addr(), u, names[0], remedy))
		}
	}
	return found
}

// answersAt tells whether an upstream could be asked at an address.
func answersAt(at netip.AddrPort, u Upstream) bool {
	protos := []string{"tcp", "udp"}
	if u.OnlyTCP {
		protos = protos[:1]
	}
	return slices.ContainsFunc(protos, func(proto string) bool { return ask(proto, at, u.Zone, askTypes[0]) == nil })
}

// learn notes whose address it is, while the rules say so. The namespace counts: anybody who may
// make a Service can give it a name that another one has elsewhere.
func (k *Services) learn(a netip.Addr) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.names[a] != "" {
		return
	}
	for name, at := range clusterIPs() {
		if slices.Contains(at, a) {
			if k.names == nil {
				k.names = map[netip.Addr]string{}
			}
			k.names[a] = name
		}
	}
}

// leave notes that a Service is followed from one address, which is asked until a reload is in
// force, to another.
func (k *Services) leave(from, to netip.Addr, service string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.left == nil {
		k.left = map[netip.Addr]string{}
	}
	k.left[from] = service
	if k.names == nil {
		k.names = map[netip.Addr]string{}
	}
	k.names[to] = service
}

// keep forgets what has been left and is asked no more.
func (k *Services) keep(asked []Upstream) {
	if k == nil {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	maps.DeleteFunc(k.left, func(a netip.Addr, _ string) bool {
		return !slices.ContainsFunc(asked, func(u Upstream) bool {
			return slices.ContainsFunc(u.Servers, func(at netip.AddrPort) bool { return at.Addr() == a })
		})
	})
}

// hasLeft returns the Service that has been followed away from an address, or "".
func (k *Services) hasLeft(a netip.Addr) string {
	if k == nil {
		return ""
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.left[a]
}

// now returns the Service that has had an address, and the one of the same family that it has
// now, if there is one alone.
func (k *Services) now(was netip.Addr) (service string, to netip.Addr) {
	k.mu.Lock()
	service = k.names[was]
	k.mu.Unlock()
	if service == "" {
		return "", netip.Addr{}
	}
	at := slices.DeleteFunc(clusterIPs()[service], func(a netip.Addr) bool { return a.Is4() != was.Is4() || a == was })
	if len(at) != 1 {
		return service, netip.Addr{}
	}
	return service, at[0]
}

func clusterIPs() map[string][]netip.Addr {
	return look([]string{"nat"}, (*ruleset.Ruleset).ClusterIPs)
}

// leadsOn tells whether rules may translate the address of what this node sends to a server. It is
// true where it can't be told: where no rule translates our own addresses either, it is not kube-proxy
// with iptables or nftables that has the Services.
func (s Site) leadsOn(at netip.AddrPort) bool {
	family := unix.AF_INET
	if at.Addr().Is6() {
		family = unix.AF_INET6
	}
	if len(s.behind(family)) == 0 {
		return true
	}
	return !look([]string{"nat"}, func(r *ruleset.Ruleset) (certain bool) {
		for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
			query := ruleset.Packet{Proto: proto, Dst: at.Addr(), DstPort: at.Port(), State: ruleset.StateNew}
			for _, res := range r.Through(query, unix.NF_INET_LOCAL_OUT, "nat") {
				if res.Translated {
					return false
				}
			}
		}
		return true
	})
}
