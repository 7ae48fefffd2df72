package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/contentful-labs/coredns-nodecache"

// listed is what `go list -json` says of a package.
type listed struct {
	ImportPath string
	Imports    []string
}

// inside runs go in the folder of the plugin's module.
func inside(t *testing.T, arguments ...string) []byte {
	t.Helper()
	cmd := exec.Command("go", arguments...)
	cmd.Dir = ".."
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go %s: %v", strings.Join(arguments, " "), err)
	}
	return out
}

// Imports point inwards: what is below internal/ knows nothing of what is above it, and what
// only tests need is in no package of the product.
func TestImportsPointInwards(t *testing.T) {
	list := json.NewDecoder(bytes.NewReader(inside(t, "list", "-json=ImportPath,Imports", "./...")))
	seen := 0
	for {
		var p listed
		if err := list.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		seen++
		inner := strings.HasPrefix(p.ImportPath, module+"/internal/")
		for _, i := range p.Imports {
			ours := i == module || strings.HasPrefix(i, module+"/")
			switch {
			case inner && ours && !strings.HasPrefix(i, module+"/internal/"):
				t.Errorf("%s imports %s, which is further out", p.ImportPath, i)
			case i == module+"/internal/testkit" || strings.HasPrefix(i, module+"/test/"):
				t.Errorf("%s imports %s, which is for tests", p.ImportPath, i)
			case (i == "testing") && p.ImportPath != module+"/internal/testkit":
				t.Errorf("%s imports %s", p.ImportPath, i)
			}
		}
	}
	if seen < 5 {
		t.Errorf("%d packages listed", seen)
	}
}

// Who depends on the plugin inherits what it needs itself, and nothing more.
func TestModuleRequiresOnlyWhatThePluginNeeds(t *testing.T) {
	needs := []string{
		"github.com/coredns/caddy", "github.com/coredns/coredns", "github.com/miekg/dns",
		"github.com/vishvananda/netlink", "github.com/coreos/go-iptables", "github.com/google/nftables",
		"github.com/mdlayher/netlink", // what nftables speaks, and internal/ruleset
		"github.com/prometheus/client_golang", "golang.org/x/sys", "golang.org/x/time",
		"go.uber.org/automaxprocs", // of cmd/coredns, as CoreDNS's own main has it
	}
	var mod struct {
		Require []struct {
			Path     string
			Indirect bool
		}
	}
	if err := json.Unmarshal(inside(t, "mod", "edit", "-json"), &mod); err != nil {
		t.Fatal(err)
	}
	for _, r := range mod.Require {
		if !r.Indirect && !slices.Contains(needs, r.Path) {
			t.Errorf("go.mod requires %s: what only tests and tools need belongs to test/go.mod", r.Path)
		}
	}
}
