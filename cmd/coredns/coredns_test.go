package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/coredns/caddy"
)

// nodecache has to bring the addresses of bind before anything listens on them.
func TestNodecacheStandsRightAfterBind(t *testing.T) {
	bind := slices.Index(directives, "bind")
	if bind < 0 || bind+1 == len(directives) || directives[bind+1] != "nodecache" {
		t.Errorf("nodecache is not right after bind in %v", directives)
	}
}

func TestAllDirectivesAreCompiledIn(t *testing.T) {
	others := caddy.ListPlugins()["others"]
	for _, d := range directives {
		// A plugin of caddy's own, such as on, is for every type of server.
		if !slices.Contains(others, "dns."+d) && !slices.Contains(others, d) {
			t.Errorf("%s is in plugin.cfg, but its package brings no such plugin", d)
		}
	}
}

// CoreDNS is also built from its own tree, with one line more in its plugin.cfg.
func TestBuildInCoreDNSTree(t *testing.T) {
	if testing.Short() {
		t.Skip("builds all of CoreDNS: not with -short")
	}
	repo, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	tree := filepath.Join(t.TempDir(), "coredns")
	run := func(dir string, argv ...string) string {
		t.Helper()
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.Dir = dir
		// As `make` has it, so that what it has compiled is not compiled again.
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-mod=mod -trimpath -buildvcs=false", "GOWORK=off")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v\n%s%s", strings.Join(argv, " "), err, out, &stderr)
		}
		return strings.TrimSpace(string(out))
	}

	const self = "github.com/contentful-labs/coredns-nodecache"
	source := run(repo, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/coredns/coredns")
	if err := os.CopyFS(tree, os.DirFS(source)); err != nil {
		t.Fatal(err)
	}
	// The module cache is read-only, and so is its copy.
	run(tree, "chmod", "-R", "u+w", ".")

	config := filepath.Join(tree, "plugin.cfg")
	text, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	with := strings.Replace(string(text), "\nbind:bind\n", "\nbind:bind\nnodecache:"+self+"\n", 1)
	if with == string(text) {
		t.Fatal("CoreDNS's plugin.cfg has no line bind:bind")
	}
	if err := os.WriteFile(config, []byte(with), 0o644); err != nil {
		t.Fatal(err)
	}
	run(tree, "go", "mod", "edit", "-require="+self+"@v0.0.0", "-replace="+self+"="+repo)
	run(tree, "go", "generate", "coredns.go")
	run(tree, "go", "build", "-tags", "grpcnotrace")

	plugins := strings.Fields(run(tree, "./coredns", "-plugins"))
	if !slices.Contains(plugins, "nodecache") && !slices.Contains(plugins, "dns.nodecache") {
		t.Errorf("the binary's plugins are %v, without nodecache", plugins)
	}
}
