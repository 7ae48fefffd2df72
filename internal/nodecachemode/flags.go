// Package nodecachemode has CoreDNS take the place of node-cache (the program of the DaemonSet
// node-local-dns, sigs.k8s.io/node-local-dns): it reads node-cache's flags, its template and the
// ConfigMap kube-dns, and makes of them a Corefile with the nodecache plugin.
//
// What is said of node-cache here is what version 1.26.8 does, and its main branch of 2026.
package nodecachemode

import (
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Name is the program's, and the first argument that stands for it.
const Name = "node-cache"

// Wanted says whether a command line, with the program's name first, is meant for node-cache, and
// returns the arguments without the name. That is so by the program's name, by the first argument,
// or where there is the one flag that node-cache can't do without: manifests have only arguments,
// and leave the program to the image.
func Wanted(args []string) (rest []string, yes bool) {
	if len(args) == 0 {
		return nil, false
	}
	rest = args[1:]
	switch {
	case filepath.Base(args[0]) == Name:
		return rest, true
	case len(rest) > 0 && rest[0] == Name:
		return rest[1:], true
	}
	return rest, slices.ContainsFunc(rest, func(arg string) bool {
		name, _, _ := strings.Cut(arg, "=")
		return name == "-localip" || name == "--localip"
	})
}

// Flags are node-cache's, and CoreDNS's own as far as they matter here.
type Flags struct {
	LocalIPs                []netip.Addr
	Template, Corefile      string // the paths
	ConfigMap               string // the folder in which the ConfigMap kube-dns is mounted, or ""
	UpstreamService         string
	Interface               string
	SetUpLink, SetUpRules   bool
	Sync                    time.Duration
	SkipTeardown            bool
	Port, HealthPort        string
	MetricsAt, PrometheusAt string
	SignalReload            bool
	Print                   bool

	localIPs string
	set      *flag.FlagSet
}

// defaultConfigMap is where node-cache looks for the ConfigMap kube-dns by itself.
const defaultConfigMap = "/etc/kube-dns"

// Register adds node-cache's flags to those that CoreDNS has: -conf, -dns.port and the like.
func (f *Flags) Register(set *flag.FlagSet) {
	f.set, f.Sync = set, time.Minute
	set.StringVar(&f.localIPs, "localip", "", "addresses to serve, with commas between them; IPv4 and IPv6 may stand together")
	set.StringVar(&f.Template, "basecorefile", "/etc/coredns/Corefile.base", "the template that the Corefile is made of")
	set.StringVar(&f.Corefile, "corefile", "/etc/Corefile", "where to write the Corefile, unless -conf says so")
	set.StringVar(&f.ConfigMap, "kubednscm", "", "folder of the ConfigMap kube-dns (stubDomains, upstreamNameservers); "+defaultConfigMap+" if there is one")
	set.StringVar(&f.UpstreamService, "upstreamsvc", "kube-dns", "Service of the cluster's DNS, of whose ClusterIP the environment tells")
	set.StringVar(&f.Interface, "interfacename", "nodelocaldns", "interface to put the addresses on")
	set.BoolVar(&f.SetUpLink, "setupinterface", true, "make that interface")
	set.BoolVar(&f.SetUpRules, "setupiptables", true, "write firewall rules")
	set.Var((*interval)(&f.Sync), "syncinterval", "seconds between two checks of the interface and the rules")
	set.BoolVar(&f.SkipTeardown, "skipteardown", false, "leave the interface and the rules at an exit")
	set.StringVar(&f.HealthPort, "health-port", "8080", "port of the health plugin, to keep out of connection tracking")
	set.StringVar(&f.MetricsAt, "metrics-listen-address", "0.0.0.0:9353", "address for metrics, beside that of the prometheus plugin")
	set.StringVar(&f.PrometheusAt, "prometheus-listen-address", ":9253", "what __PROMETHEUS__ENDPOINT__ in the template stands for")
	set.BoolVar(&f.SignalReload, "reloadwithsignal", false, "reload when the template or the ConfigMap changes, without the reload plugin too")
	set.BoolVar(&f.Print, "print", false, "print the Corefile, and exit (node-cache itself lacks this)")
	// What earlier versions had.
	set.Bool("setupebtables", false, "accepted without effect: the rules work with bridges (up to 1.21)")
	set.String("initialdelay", "", "accepted without effect: nothing is waited for (early versions)")
}

// Check reads what the flags have been given, once they are parsed.
func (f *Flags) Check() error {
	if f.localIPs == "" {
		return errors.New("-localip is missing; give the addresses to serve, such as -localip 169.254.20.10,10.96.0.10")
	}
	f.LocalIPs = nil
	for _, s := range strings.Split(f.localIPs, ",") {
		a, err := netip.ParseAddr(strings.TrimSpace(s))
		if err != nil || a.Zone() != "" || a.IsUnspecified() || a.Is4In6() {
			return fmt.Errorf("-localip: %q is no address to serve, such as 169.254.20.10 or fd00:20::10", s)
		}
		if !slices.Contains(f.LocalIPs, a) {
			f.LocalIPs = append(f.LocalIPs, a)
		}
	}
	if len(f.Interface) > 15 || f.Interface == "" || f.Interface == "none" || strings.ContainsAny(f.Interface, "/:% \t\n\"{}#") {
		return fmt.Errorf("-interfacename: %q can't be the name of an interface: it has 1 to 15 letters", f.Interface)
	}
	f.Port = f.given("dns.port")
	for name, port := range map[string]string{"-dns.port": f.Port, "-health-port": f.HealthPort} {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return fmt.Errorf("%s: %q is no port; a port is 1 to 65535", name, port)
		}
	}
	for name, at := range map[string]string{"-metrics-listen-address": f.MetricsAt, "-prometheus-listen-address": f.PrometheusAt} {
		if _, _, err := net.SplitHostPort(at); err != nil {
			return fmt.Errorf("%s: %q is no address with a port, such as 127.0.0.1:9353: %w", name, at, err)
		}
	}
	// node-cache has -conf win even where it is not given; then it writes to "", and serves what the folder has.
	if conf := f.given("conf"); conf != "" {
		f.Corefile = conf
	}
	return nil
}

// given returns the value of one of CoreDNS's own flags.
func (f *Flags) given(name string) string {
	if o := f.set.Lookup(name); o != nil {
		return o.Value.String()
	}
	return ""
}

// Ignored names the flags that have been given and have no effect.
func (f *Flags) Ignored() (names []string) {
	f.set.Visit(func(o *flag.Flag) {
		if o.Name == "setupebtables" || o.Name == "initialdelay" {
			names = append(names, "-"+o.Name)
		}
	})
	return names
}

// interval is -syncinterval. node-cache takes a duration for it and counts its nanoseconds as
// seconds, so that 60ns is a minute in its manifests, 60 is refused and 60s is no time at all.
// Here 60, 60s and 60ns are all a minute.
type interval time.Duration

func (i *interval) String() string { return time.Duration(*i).String() }

func (i *interval) Set(s string) error {
	d, err := time.ParseDuration(s)
	if n, e := strconv.ParseUint(s, 10, 32); e == nil {
		d, err = time.Duration(n)*time.Second, nil
	}
	if err == nil && d < time.Millisecond && d > 0 {
		d *= time.Second / time.Nanosecond
	}
	if err != nil || d < 100*time.Millisecond || d > 24*time.Hour {
		return errors.New("it is 1 to 86400 seconds, or a duration such as 500ms or 5m")
	}
	*i = interval(d)
	return nil
}
