package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestListsModulesAndLicences(t *testing.T) {
	t.Chdir("../..") // the product's module
	binary := filepath.Join(t.TempDir(), "coredns")
	if out, err := exec.Command("go", "build", "-o", binary, "./cmd/coredns").CombinedOutput(); err != nil {
		t.Fatalf("building: %v\n%s", err, out)
	}
	b, err := list(binary, "v1.2.3")
	if err != nil {
		t.Fatal(err)
	}
	main := b.Metadata.Component
	if main.Name != "github.com/contentful-labs/coredns-nodecache" || main.Version != "v1.2.3" || len(main.Licenses) != 1 {
		t.Errorf("the binary itself is %+v", main)
	}
	i := slices.IndexFunc(b.Components, func(c component) bool { return c.Name == "github.com/miekg/dns" })
	if i < 0 {
		t.Fatalf("no DNS library in %+v", b.Components)
	}
	c := b.Components[i]
	if c.Version == "" || len(c.Hashes) != 1 || len(c.Hashes[0].Content) != 64 || len(c.Licenses) != 1 || c.Licenses[0].License.ID != "BSD-3-Clause" {
		t.Errorf("the DNS library is %+v", c)
	}
	if slices.ContainsFunc(b.Components, func(c component) bool { return strings.HasPrefix(c.Name, "sigs.k8s.io/kustomize") }) {
		t.Error("what only tests need is in the binary")
	}
}

func TestUnknownLicenceIsNone(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "LICENSE"), []byte("All rights reserved."), 0o644); err != nil {
		t.Fatal(err)
	}
	if ls, err := licences(dir); err != nil || len(ls) > 0 {
		t.Errorf("got %v, %v", ls, err)
	}
}
