package nodecache

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
)

// What is wrong with a variable is told before bind says that "" is no address, with the place
// where the variable is named, in an imported file too. Variables that have a value, and empty
// ones that are a part of something else, are left alone.
func TestEmptyVariables(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "bind.conf"), []byte("# two\nbind 169.254.20.10 {$NOWHERE_SERVICE_HOST}\n"), 0o600))
	t.Setenv("SET_SERVICE_HOST", "10.96.0.10")
	t.Setenv("LEFT_SERVICE_HOST", "$(MY_DNS_SERVICE_HOST)")
	directives := dnsserver.Directives
	t.Cleanup(func() { dnsserver.Directives = directives })
	dnsserver.Directives = []string{"root", "bind", "nodecache", "whoami"}
	for corefile, want := range map[string]string{
		".:53 {\nbind 169.254.20.10 {$NOWHERE_SERVICE_HOST}\nnodecache\n}":  "Corefile:2 - Error during parsing: the variable NOWHERE_SERVICE_HOST is empty: Kubernetes sets it to the address of the Service nowhere,",
		".:53 {\nbind {$SET_SERVICE_HOST} {%NOWHERE%}\nnodecache\n}":        "Corefile:2 - Error during parsing: the variable NOWHERE is empty: set it",
		".:53 {\nbind {$LEFT_SERVICE_HOST}\nnodecache\n}":                   "the variable MY_DNS_SERVICE_HOST is empty: Kubernetes sets it to the address of the Service my-dns,",
		"(s) {\nimport bind.conf\n}\n.:53 {\nimport s\nnodecache\n}":        "bind.conf:2 - Error during parsing: the variable NOWHERE_SERVICE_HOST is empty",
		".:53 {\nbind {$SET_SERVICE_HOST}{$NOWHERE} nonsense\nnodecache\n}": "not a valid IP address or interface name: \"nonsense\"",
		".:53 {\nbind \"\"\nnodecache\n}":                                   "not a valid IP address or interface name: \"\"",
		".:53 {\nbind {$NOWHERE_SERVICE_HOST}\nwhoami\n}":                   "not a valid IP address or interface name: \"\"",
	} {
		in := caddy.CaddyfileInput{Filepath: filepath.Join(dir, "Corefile"), Contents: []byte(corefile), ServerTypeName: "dns"}
		i, err := caddy.Start(in)
		if err == nil {
			must(t, i.Stop())
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s\n%v\nwant %s", corefile, err, want)
		}
	}
}
