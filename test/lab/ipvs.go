package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
)

// UpstreamIP and UpstreamIP6 are the addresses of the second Service in front of the cluster's
// DNS, by which a cache asks it.
var (
	UpstreamIP  = netip.MustParseAddr("10.96.0.11")
	UpstreamIP6 = netip.MustParseAddr("fd00:96::11")
)

// ErrNoIPVS says that this kernel has no IPVS.
var ErrNoIPVS = errors.New("this kernel has no IPVS")

// IPVS has kube-proxy be in IPVS mode: in the place of the rules that New has made there are
// virtual services for both Services of the cluster's DNS, whose addresses are on kube-ipvs0.
// What does not come from a pod is masqueraded, as with the rules.
func (l *Lab) IPVS() error {
	if out, err := l.Node.Run("ipvsadm", "-Ln"); err != nil {
		if strings.Contains(err.Error(), "Can't initialize ipvs") {
			err = ErrNoIPVS
		}
		return fmt.Errorf("listing virtual services: %w: %s", err, out)
	}
	var services strings.Builder
	for _, f := range []struct {
		restore, pods string
		server        netip.Addr
		services      []netip.Addr
	}{
		{"iptables-restore", "10.0.1.0/24", DNSAddr, []netip.Addr{ClusterIP, UpstreamIP}},
		{"ip6tables-restore", "fd00:1::/64", DNSAddr6, []netip.Addr{ClusterIP6, UpstreamIP6}},
	} {
		// Without --noflush what the table has goes.
		rules := "*nat\n"
		for _, service := range f.services {
			at := netip.AddrPortFrom(service, 53)
			for _, proto := range []string{"u", "t"} {
				fmt.Fprintf(&services, "-A -%s %s -s rr\n-a -%s %s -r %s -m\n", proto, at, proto, at, netip.AddrPortFrom(f.server, 53))
			}
			for _, proto := range []string{"udp", "tcp"} {
				for _, chain := range []string{"PREROUTING", "OUTPUT"} {
					rules += fmt.Sprintf("-A %s ! -s %s -d %s -p %s --dport 53 -j MARK --or-mark 0x4000\n", chain, f.pods, service, proto)
				}
			}
		}
		rules += "-A POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE\nCOMMIT\n"
		if _, err := l.Node.RunInput(rules, f.restore, "--wait"); err != nil {
			return fmt.Errorf("replacing kube-proxy's rules: %w", err)
		}
	}
	if _, err := l.Node.RunInput(services.String(), "ipvsadm", "-R"); err != nil {
		return fmt.Errorf("making virtual services: %w", err)
	}
	return l.Node.Do(func() error {
		if err := Sysctl("ipv4/vs/conntrack", "1"); err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "kube-ipvs0"
		if err := netlink.LinkAdd(&netlink.Dummy{LinkAttrs: attrs}); err != nil {
			return fmt.Errorf("adding the link %s: %w", attrs.Name, err)
		}
		if err := Sysctl("ipv6/conf/"+attrs.Name+"/addr_gen_mode", "1"); err != nil {
			return err
		}
		if err := setUp(attrs.Name); err != nil {
			return err
		}
		return AddAddrs(attrs.Name, ClusterIP.String()+"/32", UpstreamIP.String()+"/32", ClusterIP6.String()+"/128", UpstreamIP6.String()+"/128")
	})
}

// IPVSConnections says how many connections the virtual service of an address has had, of
// UDP and TCP.
func (l *Lab) IPVSConnections(service netip.Addr) (sum int, err error) {
	out, err := l.Node.Run("ipvsadm", "-Ln", "--stats", "--exact")
	if err != nil {
		return 0, err
	}
	found := false
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) < 3 || f[0] != "UDP" && f[0] != "TCP" || f[1] != netip.AddrPortFrom(service, 53).String() {
			continue
		}
		n, err := strconv.Atoi(f[2])
		if err != nil {
			return 0, fmt.Errorf("reading ipvsadm's statistics: %q: %w", line, err)
		}
		sum, found = sum+n, true
	}
	if !found {
		return 0, fmt.Errorf("there is no virtual service of %s: %s", service, out)
	}
	return sum, nil
}
