// Package serverblocks has the server blocks of the Corefile that is being set up: caddy and
// CoreDNS know them all, and have functions for a plugin's own only.
package serverblocks

import (
	"bytes"
	"fmt"
	"reflect"

	"github.com/coredns/caddy"
	"github.com/coredns/caddy/caddyfile"
	"github.com/coredns/coredns/core/dnsserver"
)

// Read returns the Corefile that is being set up as its tokens, imports and
// variables of the environment resolved: what the other plugins of each server block have
// been given, with file and line. It returns nil where no Corefile is being read (a
// test's controller).
func Read(directives []string) ([]caddyfile.ServerBlock, error) {
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

// Instance is the instance whose Corefile is being set up.
func Instance() *caddy.Instance {
	all := caddy.Instances()
	return all[len(all)-1]
}

// Configs returns the configurations of all server blocks. CoreDNS has no function
// for that.
func Configs(ctx caddy.Context) ([]*dnsserver.Config, error) {
	v := reflect.Indirect(reflect.ValueOf(ctx))
	if v.Kind() != reflect.Struct {
		return nil, fmt.Errorf("its context is a %T", ctx)
	}
	f := v.FieldByName("configs")
	if !f.IsValid() || f.Type() != reflect.TypeFor[[]*dnsserver.Config]() {
		return nil, fmt.Errorf("%T has no list of configurations", ctx)
	}
	var all []*dnsserver.Config
	for i := range f.Len() {
		all = append(all, (*dnsserver.Config)(f.Index(i).UnsafePointer()))
	}
	return all, nil
}
