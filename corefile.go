package nodecache

import (
	"bytes"

	"github.com/coredns/caddy"
	"github.com/coredns/caddy/caddyfile"
)

// serverBlocks returns the Corefile that is being set up as its tokens, imports and
// variables of the environment resolved: what the other plugins of each server block have
// been given, with file and line. It returns nil where no Corefile is being read (a
// test's controller).
func serverBlocks(directives []string) ([]caddyfile.ServerBlock, error) {
	// caddy puts an instance at the end of its list before it calls the first setup.
	instances := caddy.Instances()
	if len(instances) == 0 {
		return nil, nil
	}
	in := instances[len(instances)-1].Caddyfile()
	if in == nil {
		return nil, nil
	}
	return caddyfile.Parse(in.Path(), bytes.NewReader(in.Body()), directives)
}
