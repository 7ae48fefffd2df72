package nodecachemode

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
)

// What stands for something in a template. Deployments fill in some of these before.
const (
	localDNS  = "__PILLAR__LOCAL__DNS__"        // the addresses of -localip
	dnsServer = "__PILLAR__DNS__SERVER__"       // nothing: -localip has it already
	clusterAt = "__PILLAR__CLUSTER__DNS__"      // the ClusterIP of -upstreamsvc
	upstreams = "__PILLAR__UPSTREAM__SERVERS__" // upstreamNameservers, else /etc/resolv.conf
	dnsDomain = "__PILLAR__DNS__DOMAIN__"       // clusterDomain; node-cache leaves it as it is
	metricsAt = "__PROMETHEUS__ENDPOINT__"      // -prometheus-listen-address
)

const clusterDomain = "cluster.local"

// What node-cache changes when there are upstreamNameservers: they are asked over UDP. It does so
// for this text alone, blanks and all, and a template with other blanks keeps TCP. So does this.
const (
	overTCP = "\n    forward . " + upstreams + " {\n            force_tcp\n    }\n"
	overUDP = "\n    forward . " + upstreams + "\n"
)

// fill makes a Corefile of a template. from names the template in errors.
func (f *Flags) fill(template, from string, s Settings) (string, error) {
	servers := "/etc/resolv.conf"
	if len(s.Upstreams) > 0 {
		servers = strings.Join(s.Upstreams, " ")
		template = strings.ReplaceAll(template, overTCP, overUDP)
	}
	cluster := ""
	if strings.Contains(template, clusterAt) {
		variable := serviceVariable(f.UpstreamService)
		a, err := netip.ParseAddr(os.Getenv(variable))
		if err != nil {
			return "", fmt.Errorf("-upstreamsvc %s: %s asks for %s, but the environment variable %s is %q; name a Service with a ClusterIP of this pod's namespace that is older than the pod",
				f.UpstreamService, from, clusterAt, variable, os.Getenv(variable))
		}
		cluster = a.String()
	}
	first := f.LocalIPs[0].String()
	if f.LocalIPs[0].Is6() {
		first = "[" + first + "]"
	}
	text := strings.NewReplacer(
		localDNS+":", first+":", // health takes one address and a port
		localDNS, f.locals(), dnsServer, "", clusterAt, cluster, upstreams, servers,
		dnsDomain, clusterDomain, metricsAt, f.PrometheusAt,
	).Replace(template)
	if len(s.StubDomains) > 0 && !strings.HasSuffix(text, "\n") {
		text += "\n"
	}
	for _, domain := range slices.Sorted(maps.Keys(s.StubDomains)) {
		text += fmt.Sprintf("\n%s:%s {\n    errors\n    cache 30\n    bind %s\n    forward . %s\n}\n",
			domain, f.Port, f.locals(), strings.Join(s.StubDomains[domain], " "))
	}
	return text, nil
}

// locals are the addresses of -localip as bind takes them.
func (f *Flags) locals() string {
	var all []string
	for _, a := range f.LocalIPs {
		all = append(all, a.String())
	}
	return strings.Join(all, " ")
}

// serviceVariable is where Kubernetes tells a container of a Service's ClusterIP.
func serviceVariable(service string) string {
	return strings.ToUpper(strings.ReplaceAll(service, "-", "_")) + "_SERVICE_HOST"
}
