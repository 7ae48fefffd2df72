package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
	"github.com/contentful-labs/coredns-nodecache/test/manifest"
)

// The subjects.
const (
	without   = "without"
	nodeCache = "node-cache"
	ours      = "ours"
)

var subjects = []string{without, nodeCache, ours}

var (
	upstreamService = netip.MustParseAddr("10.96.0.11")
	podAddrs        = []netip.Addr{netip.MustParseAddr("10.0.2.11"), netip.MustParseAddr("10.0.2.12")}
	resolverAddrs   = []netip.Addr{netip.MustParseAddr("10.0.2.21"), netip.MustParseAddr("10.0.2.22"), netip.MustParseAddr("10.0.2.23")}
)

// What they answer.
const (
	clusterSays  = "192.0.2.11"
	resolverSays = "192.0.2.21"
)

// A site is a lab with what a cluster's DNS asks: two of its pods, for the names of the cluster, and
// resolvers for all others, of which /etc/resolv.conf names two.
type site struct {
	*lab.Lab
	subject   string
	program   string
	pods      []*lab.Resolver
	resolvers []*lab.Resolver
	resolv    string
}

func newSite(program, subject string) (*site, error) {
	l, err := lab.New(lab.NFT)
	if err != nil {
		return nil, err
	}
	s := &site{Lab: l, subject: subject, program: program, resolv: filepath.Join(l.Dir, "resolv.conf")}
	for _, a := range podAddrs {
		r, err := l.Resolver(a, lab.ForNames("cluster.local.", lab.Says(clusterSays, 30), lab.Silent))
		if err != nil {
			return nil, errors.Join(err, l.Close())
		}
		s.pods = append(s.pods, r)
	}
	for _, a := range resolverAddrs {
		r, err := l.Resolver(a, lab.Says(resolverSays, 30))
		if err != nil {
			return nil, errors.Join(err, l.Close())
		}
		s.resolvers = append(s.resolvers, r)
	}
	err = errors.Join(l.Balance(upstreamService, podAddrs...), s.names(0, 1))
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return s, nil
}

func (s *site) close() { s.Close() }

// server is where a pod asks for the names of a zone. Without a cache it asks one of the cluster's two
// DNS pods for its names; for all others these stand for a CoreDNS that asks the resolvers.
func (s *site) server(zone string) netip.Addr {
	if s.subject == without && zone == cluster {
		return upstreamService
	}
	return lab.LinkLocal
}

// names has /etc/resolv.conf name some of the resolvers.
func (s *site) names(which ...int) error {
	text := ""
	for _, i := range which {
		text += "nameserver " + resolverAddrs[i].String() + "\n"
	}
	return os.WriteFile(s.resolv, []byte(text), 0o644)
}

// start starts the subject. Without a cache it is the cluster's DNS.
func (s *site) start() error {
	var corefile string
	o := lab.Options{}
	switch s.subject {
	case without:
		// kubeadm's, with what stands for the plugin kubernetes.
		corefile = fmt.Sprintf(".:53 {\nbind %s\nerrors\ncache 30\nforward cluster.local %s\nforward . %s {\nmax_concurrent 1000\n}\n}\n",
			lab.LinkLocal, strings.Join(texts(podAddrs), " "), s.resolv)
	case nodeCache:
		zone := func(name, cache, upstream string) string {
			return fmt.Sprintf("%s:53 {\nbind %s\nerrors\n%s\nreload\nloop\nforward . %s\n}\n", name, lab.LinkLocal, cache, upstream)
		}
		cluster := upstreamService.String() + " {\nforce_tcp\n}"
		corefile = zone("cluster.local", "cache {\nsuccess 9984 30\ndenial 9984 5\n}", cluster) + zone("in-addr.arpa", "cache 30", cluster) +
			zone("ip6.arpa", "cache 30", cluster) + zone(".", "cache 30", s.resolv)
	case ours:
		var err error
		if corefile, o, err = s.shipped(); err != nil {
			return err
		}
	}
	if s.subject != ours {
		if err := s.Node.Do(func() error { return lab.AddAddrs("lo", lab.LinkLocal.String()+"/32") }); err != nil {
			return err
		}
	}
	p, err := s.Start(s.program, corefile, o)
	if err == nil {
		err = p.WaitServing()
	}
	if err == nil && s.subject == ours {
		err = p.WaitLog(0, "plugin/nodecache: in place")
	}
	if *verbose && p != nil {
		time.AfterFunc(4*time.Second, func() { fmt.Fprintf(os.Stderr, "%s:\n%s\n", s.subject, p.Log()) })
	}
	if errors.Is(err, lab.ErrExited) {
		return nil // which is what a pod sees then
	}
	return err
}

func texts(addrs []netip.Addr) (all []string) {
	for _, a := range addrs {
		all = append(all, a.String())
	}
	return all
}

// shipped is what kubelet makes of the manifest.
func (s *site) shipped() (string, lab.Options, error) {
	var o lab.Options
	m, err := manifest.Read("k8s/node-local.yaml")
	if err != nil {
		return "", o, err
	}
	spec := m.DaemonSets[0].Spec.Template.Spec
	c := spec.Containers[0]
	env, err := manifest.Env(c, map[string]string{"KUBE_DNS_SERVICE_HOST": lab.ClusterIP.String(), "KUBE_DNS_UPSTREAM_SERVICE_HOST": upstreamService.String()},
		map[string]string{"status.hostIP": "10.0.2.1"})
	if err != nil {
		return "", o, err
	}
	env["FIREWALL"] = "nftables"
	for name, value := range env {
		o.Env = append(o.Env, name+"="+value)
	}
	if o.Files, err = m.Files(spec, c, "/etc/coredns"); err != nil {
		return "", o, err
	}
	for name, text := range o.Files {
		o.Files[name] = strings.ReplaceAll(text, "/etc/resolv.conf", s.resolv)
	}
	corefile := o.Files["Corefile"]
	delete(o.Files, "Corefile")
	return corefile, o, nil
}
