package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// What a release would run, and what it refuses before it publishes anything.
func TestReleaseDryRun(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{".ci", "k8s", "charts", "go.mod", "go.sum", "CHANGELOG.md"} {
		if _, err := os.Stat(filepath.Join("..", name)); err != nil {
			continue
		}
		if out, err := exec.Command("cp", "-a", filepath.Join("..", name), dir).CombinedOutput(); err != nil {
			t.Fatalf("copying %s: %v: %s", name, err, out)
		}
	}
	release := func(tag string) (string, error) {
		cmd := exec.Command(filepath.Join(dir, ".ci", "release"), "-n", tag)
		cmd.Env = append(os.Environ(), "REGISTRY=registry.example")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	for tag, says := range map[string]string{
		"v9.9.9":  `CHANGELOG.md has no section "## 9.9.9"`,
		"v1.22.0": "v1.22.0 is not above v1.22.0",
		"9.9.9":   "usage: .ci/release",
		"v9.9":    "usage: .ci/release",
	} {
		if out, err := release(tag); err == nil || !strings.Contains(out, says) || strings.Contains(out, "push") {
			t.Errorf("%s: %v\n%s", tag, err, out)
		}
	}

	version := regexp.MustCompile(`v\d+\.\d+\.\d+(-coredns\d+\.\d+\.\d+)`)
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		changed := version.ReplaceAllString(string(text), "v9.9.9$1")
		switch d.Name() {
		case "CHANGELOG.md":
			changed = strings.Replace(changed, "## Unreleased", "## 9.9.9", 1)
		case "Chart.yaml":
			changed = regexp.MustCompile(`(?m)^version: .*`).ReplaceAllString(changed, "version: 9.9.9")
		}
		return os.WriteFile(path, []byte(changed), 0o755)
	})
	if err != nil {
		t.Fatal(err)
	}
	out, err := release("v9.9.9")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	want := []string{
		"make sbom",
		"--target iptables", "--platform linux/amd64,linux/arm64", "--sbom=true", "--provenance=mode=max", "--push",
		"cosign sign --yes registry.example/coredns-nodecache@DIGEST", "cosign attest",
		"--target nftables",
	}
	if _, err := os.Stat(filepath.Join("..", "charts")); err == nil {
		want = append(want, "helm push build/release/nodecache-9.9.9.tgz oci://registry.example/charts")
	}
	want = append(want, "gh release create v9.9.9")
	rest := out
	for _, w := range want {
		_, after, ok := strings.Cut(rest, w)
		if !ok {
			t.Errorf("no %q, or not in this order, in\n%s", w, out)
			continue
		}
		rest = after
	}
	notes, err := os.ReadFile(filepath.Join(dir, "build", "release", "notes.md"))
	if err != nil || !strings.Contains(string(notes), "* ") || strings.Contains(string(notes), "## ") {
		t.Errorf("the notes are %q, %v", notes, err)
	}
}
