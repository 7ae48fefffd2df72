// Package serverblocks has the server blocks of the Corefile that is being set up: caddy and
// CoreDNS know them all, and have functions for a plugin's own only.
package serverblocks

import (
	"bytes"
	"fmt"
	"reflect"
	"strconv"
	"strings"

	"github.com/coredns/caddy"
	"github.com/coredns/caddy/caddyfile"
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/plugin/pkg/transport"
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

// Instance is the instance whose Corefile is being set up; an empty one where none is being
// read.
func Instance() *caddy.Instance {
	if all := caddy.Instances(); len(all) > 0 {
		return all[len(all)-1]
	}
	return &caddy.Instance{}
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

// ParseKey reads a server block's key, such as dns://cluster.local.:53, and
// returns what its transport is served over.
func ParseKey(key string) (protos []string, port uint16, err error) {
	trans, rest, found := strings.Cut(key, "://")
	if !found {
		trans, rest = transport.DNS, key
	}
	switch trans {
	case transport.DNS:
		protos = []string{"udp", "tcp"}
	case transport.TLS, transport.GRPC, transport.HTTPS:
		protos = []string{"tcp"}
	case transport.QUIC, transport.HTTPS3:
		protos = []string{"udp"}
	default:
		return nil, 0, fmt.Errorf("nodecache does not know the transport %s", trans)
	}
	s := dnsserver.Port
	if i := strings.LastIndexByte(rest, ':'); i >= 0 {
		s = rest[i+1:]
	}
	p, err := strconv.ParseUint(s, 10, 16)
	if err != nil || p == 0 {
		return nil, 0, fmt.Errorf("%q is no port", s)
	}
	return protos, uint16(p), nil
}

// ZoneOf returns the zone of a server block's key, such as cluster.local.
func ZoneOf(key string) string {
	if _, rest, found := strings.Cut(key, "://"); found {
		key = rest
	}
	if i := strings.LastIndexByte(key, ':'); i >= 0 {
		key = key[:i]
	}
	return key
}

// ErrorAt is an error of what stands at a position, "file:line". It has the form of those of
// caddy's parser.
func ErrorAt(at, format string, args ...any) error {
	return fmt.Errorf("%s - Error during parsing: %w", at, fmt.Errorf(format, args...))
}
