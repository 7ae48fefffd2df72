package loops

import (
	"math"
	"strings"

	"github.com/coredns/caddy/caddyfile"
	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/pkg/fall"
)

// answerers are the plugins that answer themselves for the zones that they name, or else for
// those of the server block, with how many arguments come before the zones; of the last ones
// it is not known.
var answerers = map[string]int{
	"file": 1, "auto": 0, "secondary": 0, "hosts": 1, "template": 2, "dynupdate": 0,
	"kubernetes": 0, "k8s_external": 0, "etcd": 0, "nomad": 0,
	"route53": math.MaxInt, "azure": math.MaxInt, "clouddns": math.MaxInt,
}

// ownZones is what one use of an answerer answers.
type ownZones struct {
	zones plugin.Zones
	but   fall.F // what it passes on
}

// ends tells whether a query for name goes no further.
func (o ownZones) ends(name string) bool {
	return o.zones.Matches(name) != "" && !o.but.Through(name)
}

// answersOf returns what a server block answers itself.
func answersOf(b caddyfile.ServerBlock) (all []ownZones) {
	for name, before := range answerers {
		all = append(all, answersBy(before, b.Tokens[name], b.Keys)...)
	}
	return all
}

// answersBy reads what an answerer has been given, with so many arguments before the zones.
func answersBy(before int, tokens []caddyfile.Token, keys []string) (all []ownZones) {
	d := caddyfile.NewDispenserTokens("", tokens)
	for d.Next() {
		byType := d.Val() == "template"
		args := d.RemainingArgs()
		o := ownZones{zones: plugin.OriginsFromArgsOrServerBlock(args[min(before, len(args)):], keys)}
		for d.NextBlock() {
			if property, values := d.Val(), d.RemainingArgs(); property == "fallthrough" {
				o.but.SetZonesFromArgs(values)
			}
		}
		if byType && (len(args) < 2 || !strings.EqualFold(args[1], "ANY")) {
			continue // queries of other types pass
		}
		all = append(all, o)
	}
	return all
}
