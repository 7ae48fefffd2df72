package nodecache

import (
	"fmt"
	"slices"
	"strings"

	"github.com/coredns/caddy"
	"github.com/coredns/caddy/caddyfile"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin"

	"github.com/contentful-labs/coredns-nodecache/internal/serverblocks"
)

// addressed are the plugins that are given addresses, which manifests take from variables. Of an
// empty one they say that "" is no address.
var addressed = []string{"bind", "forward", "grpc", "fanout", "upstream"}

// explainVariables has the Corefile looked at before bind is.
func explainVariables() {
	all := dnsserver.Directives
	for _, name := range all[:max(0, slices.Index(all, "bind"))] {
		caddy.RegisterParsingCallback("dns", name, explainOnce)
	}
}

// lastExplained is the instance whose variables were the last to be looked at.
var lastExplained caddy.Context

func explainOnce(ctx caddy.Context) error {
	if ctx == lastExplained {
		return nil
	}
	lastExplained = ctx
	blocks, err := serverblocks.Read(dnsserver.Directives)
	if err != nil || !slices.ContainsFunc(blocks, func(b caddyfile.ServerBlock) bool { return len(b.Tokens[directiveName]) > 0 }) {
		return nil // not ours to tell
	}
	if missing := serverblocks.MissingOf(blocks, addressed...); len(missing) > 0 {
		m := missing[0]
		return plugin.Error(m.Plugin, serverblocks.ErrorAt(m.At, "%w", missingVariable(m.Variable)))
	}
	return nil
}

// missingVariable says what to do about a variable that has no value.
func missingVariable(name string) error {
	service, ok := strings.CutSuffix(name, "_SERVICE_HOST")
	if !ok {
		return fmt.Errorf("the variable %s is empty: set it in the environment, such as env of the container", name)
	}
	return fmt.Errorf("the variable %s is empty: Kubernetes sets it to the address of the Service %s, if there is one in the pod's own namespace when the container starts. "+
		"If that Service has come since, the next start has it. If the cluster's DNS is a Service of another name, have env of the container take that one's variable, "+
		"such as KUBE_DNS_SERVICE_HOST with the value $(COREDNS_SERVICE_HOST) for coredns",
		name, strings.ReplaceAll(strings.ToLower(service), "_", "-"))
}
