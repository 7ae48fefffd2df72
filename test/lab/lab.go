// Package lab builds a small cluster out of network namespaces, for tests with
// real packets:
//
//	pod ---- 10.0.1.0/24 ---- node ---- 10.0.2.0/24 ---- dns
//	.2       fd00:1::/64   .1      .1   fd00:2::/64       .2
//
// The node forwards, tracks connections, and has kube-proxy's rules: what is sent
// to the cluster's DNS service (10.96.0.10 and fd00:96::10) is sent on to the
// cluster's DNS server in dns. CoreDNS is started on the node as a process of its
// own.
//
// Nothing of the machine's own network is touched. A lab has no names that
// another one could have too, so that any number of them can stand side by side.
// It takes root, iproute2, iptables and nft.
package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The addresses of the lab.
var (
	PodAddr  = netip.MustParseAddr("10.0.1.2")
	PodAddr6 = netip.MustParseAddr("fd00:1::2")
	DNSAddr  = netip.MustParseAddr("10.0.2.2")
	DNSAddr6 = netip.MustParseAddr("fd00:2::2")

	// ClusterIP and ClusterIP6 are the addresses of the cluster's DNS service.
	ClusterIP  = netip.MustParseAddr("10.96.0.10")
	ClusterIP6 = netip.MustParseAddr("fd00:96::10")

	// LinkLocal and Local6 are the addresses that only a node's cache has.
	LinkLocal = netip.MustParseAddr("169.254.20.10")
	Local6    = netip.MustParseAddr("fd00:20::10")
)

// Iptables is a variant of iptables: what the name iptables stands for on a node.
type Iptables string

// The variants.
const (
	NFT    Iptables = "nft"
	Legacy Iptables = "legacy"
)

// A Lab is the namespaces, and what runs in them.
type Lab struct {
	Node, Pod, DNS *Namespace
	Cluster        *Cluster // the cluster's DNS server
	Dir            string   // a directory that goes with the lab
	Env            []string // the environment of every process of the lab

	processes []*CoreDNS
	resolvers []*Resolver
}

// New makes a lab. Its owner has to close it.
func New(variant Iptables) (_ *Lab, err error) {
	l := new(Lab)
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("making the lab: %w", err), l.Close())
		}
	}()
	if l.Dir, err = os.MkdirTemp("", "lab"); err != nil {
		return nil, err
	}
	if err := l.setEnv(variant); err != nil {
		return nil, err
	}
	for _, n := range []struct {
		ns   **Namespace
		name string
	}{{&l.Node, "node"}, {&l.Pod, "pod"}, {&l.DNS, "dns"}} {
		if *n.ns, err = newNamespace(n.name, l.Env); err != nil {
			return nil, err
		}
	}
	if err := l.wire(); err != nil {
		return nil, err
	}
	if err := l.proxy(); err != nil {
		return nil, err
	}
	l.Cluster, err = serveCluster(l.DNS)
	return l, err
}

// Close ends every process of the lab and removes everything.
func (l *Lab) Close() error {
	var errs []error
	for _, p := range l.processes {
		p.Kill()
	}
	for _, r := range l.resolvers {
		r.Die()
	}
	if l.Cluster != nil {
		errs = append(errs, l.Cluster.close())
	}
	for _, n := range []*Namespace{l.Node, l.Pod, l.DNS} {
		if n != nil {
			errs = append(errs, n.close())
		}
	}
	if l.Dir != "" {
		errs = append(errs, os.RemoveAll(l.Dir))
	}
	return errors.Join(errs...)
}

// setEnv makes a PATH in which iptables is the variant, and gives the lab a lock
// file of its own: by default all of a machine's namespaces share one.
func (l *Lab) setEnv(variant Iptables) error {
	bin := filepath.Join(l.Dir, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		return err
	}
	path := os.Getenv("PATH") + ":/usr/sbin:/sbin"
	for _, ipt := range []string{"iptables", "ip6tables"} {
		for _, what := range []string{"", "-save", "-restore"} {
			target, err := lookPath(ipt+"-"+string(variant)+what, []string{"PATH=" + path})
			if err != nil {
				return err
			}
			if err := os.Symlink(target, filepath.Join(bin, ipt+what)); err != nil {
				return err
			}
		}
	}
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "PATH=") {
			l.Env = append(l.Env, v)
		}
	}
	l.Env = append(l.Env, "PATH="+bin+":"+path, "XTABLES_LOCKFILE="+l.XtablesLock())
	return nil
}

// XtablesLock is the path of the lock that the lab's iptables takes.
func (l *Lab) XtablesLock() string { return filepath.Join(l.Dir, "xtables.lock") }

// lookPath is exec.LookPath with the PATH of env.
func lookPath(name string, env []string) (string, error) {
	for _, v := range env {
		dirs, ok := strings.CutPrefix(v, "PATH=")
		if !ok {
			continue
		}
		for _, dir := range filepath.SplitList(dirs) {
			path := filepath.Join(dir, name)
			if s, err := os.Stat(path); err == nil && !s.IsDir() && s.Mode()&0o111 != 0 {
				return path, nil
			}
		}
	}
	return "", fmt.Errorf("looking for %s in PATH: %w", name, os.ErrNotExist)
}

// wire joins the namespaces.
func (l *Lab) wire() error {
	for _, n := range []*Namespace{l.Node, l.Pod, l.DNS} {
		if err := n.Do(func() error { return setUp("lo") }); err != nil {
			return err
		}
	}
	err := l.Node.Do(func() error {
		for _, s := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
			if err := Sysctl(s, "1"); err != nil {
				return err
			}
		}
		return errors.Join(
			join("to-pod", 0x11, l.Pod, 0x12),
			join("to-dns", 0x21, l.DNS, 0x22))
	})
	if err != nil {
		return err
	}
	for _, side := range []struct {
		ns     *Namespace
		link   string
		addrs  []string
		routes [][2]string // destination, gateway
	}{
		{l.Node, "to-pod", []string{"10.0.1.1/24", "fd00:1::1/64", "fe80::1/64"}, nil},
		// As a node has: without a default route nothing could be sent to the
		// service's address, kube-proxy or not.
		{l.Node, "to-dns", []string{"10.0.2.1/24", "fd00:2::1/64", "fe80::1/64"},
			[][2]string{{"0.0.0.0/0", "10.0.2.2"}, {"::/0", "fd00:2::2"}}},
		{l.Pod, "eth0", []string{PodAddr.String() + "/24", PodAddr6.String() + "/64", "fe80::2/64"},
			[][2]string{{"0.0.0.0/0", "10.0.1.1"}, {"::/0", "fd00:1::1"}}},
		{l.DNS, "eth0", []string{DNSAddr.String() + "/24", DNSAddr6.String() + "/64", "fe80::2/64"},
			[][2]string{{"10.0.1.0/24", "10.0.2.1"}, {"fd00:1::/64", "fd00:2::1"}}},
	} {
		err := side.ns.Do(func() error {
			// A link-local address of the kernel's comes late, so each link is
			// given one; without it, there is no neighbour discovery.
			if err := Sysctl("ipv6/conf/"+side.link+"/addr_gen_mode", "1"); err != nil {
				return err
			}
			if err := setUp(side.link); err != nil {
				return err
			}
			if err := AddAddrs(side.link, side.addrs...); err != nil {
				return err
			}
			for _, r := range side.routes {
				_, dst, err := net.ParseCIDR(r[0])
				if err != nil {
					return err
				}
				err = netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: net.ParseIP(r[1])})
				if err != nil {
					return fmt.Errorf("adding the route to %s: %w", r[0], err)
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("setting up %s of %s: %w", side.link, side.ns.name, err)
		}
	}
	// A link that is up reports its carrier somewhat later, and routes read
	// otherwise until then.
	for _, side := range []struct {
		ns   *Namespace
		link string
	}{{l.Node, "to-pod"}, {l.Node, "to-dns"}, {l.Pod, "eth0"}, {l.DNS, "eth0"}} {
		if err := side.ns.Do(func() error { return awaitCarrier(side.link) }); err != nil {
			return err
		}
	}
	return nil
}

func awaitCarrier(name string) error {
	for late := time.Now().Add(Patience); ; time.Sleep(time.Millisecond) {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("looking up %s: %w", name, err)
		}
		if link.Attrs().OperState == netlink.OperUp {
			return nil
		}
		if time.Now().After(late) {
			return fmt.Errorf("waiting for the carrier of %s: not within %v", name, Patience)
		}
	}
}

// join makes a pair of links: name in the namespace of this thread, eth0 in peer.
// Fixed hardware addresses make two labs look alike.
func join(name string, mac byte, peer *Namespace, peerMAC byte) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	attrs.HardwareAddr = net.HardwareAddr{2, 0, 0, 0, 0, mac}
	err := netlink.LinkAdd(&netlink.Veth{
		LinkAttrs:        attrs,
		PeerName:         "eth0",
		PeerNamespace:    netlink.NsFd(int(peer.handle)),
		PeerHardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, peerMAC},
	})
	if err != nil {
		return fmt.Errorf("adding the link %s: %w", name, err)
	}
	return nil
}

func setUp(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("looking up %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("setting %s up: %w", name, err)
	}
	return nil
}

// AddAddrs adds addresses to a link in the namespace of this thread.
func AddAddrs(name string, addrs ...string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("looking up %s: %w", name, err)
	}
	for _, a := range addrs {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			return err
		}
		// Without it an IPv6 address can't be bound for a moment, even where
		// duplicate address detection is switched off.
		addr.Flags |= unix.IFA_F_NODAD
		if err := netlink.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("adding %s to %s: %w", a, name, err)
		}
	}
	return nil
}

// Sysctl sets a setting of the namespace of this thread.
func Sysctl(path, value string) error {
	return os.WriteFile("/proc/sys/net/"+path, []byte(value), 0)
}

// proxy adds what kube-proxy does for the cluster's DNS service. As it does, it
// masquerades what does not come from a pod: a host client's query has the node's
// address, or, where the node's cache has died, that of the service itself.
func (l *Lab) proxy() error {
	for _, f := range []struct {
		restore, service, server, pods string
	}{
		{"iptables-restore", ClusterIP.String(), netip.AddrPortFrom(DNSAddr, 53).String(), "10.0.1.0/24"},
		{"ip6tables-restore", ClusterIP6.String(), netip.AddrPortFrom(DNSAddr6, 53).String(), "fd00:1::/64"},
	} {
		var rules strings.Builder
		fmt.Fprintln(&rules, "*nat")
		for _, proto := range []string{"udp", "tcp"} {
			for _, chain := range []string{"PREROUTING", "OUTPUT"} {
				fmt.Fprintf(&rules, "-A %s -d %s -p %s --dport 53 -j DNAT --to-destination %s\n",
					chain, f.service, proto, f.server)
			}
			fmt.Fprintf(&rules, "-A POSTROUTING ! -s %s -p %s -m conntrack --ctstate DNAT --ctorigdst %s -j MASQUERADE\n",
				f.pods, proto, f.service)
		}
		fmt.Fprintln(&rules, "COMMIT")
		if _, err := l.Node.RunInput(rules.String(), f.restore, "--noflush", "--wait"); err != nil {
			return fmt.Errorf("adding kube-proxy's rules: %w", err)
		}
	}
	return nil
}
