package main

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// This test's own binary has build information too.
func TestListsModulesAndLicences(t *testing.T) {
	t.Chdir("../..")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := list(self, "v1.2.3")
	if err != nil {
		t.Fatal(err)
	}
	main := b.Metadata.Component
	if main.Name != "github.com/contentful-labs/coredns-nodecache" || main.Version != "v1.2.3" || len(main.Licenses) != 1 {
		t.Errorf("the binary itself is %+v", main)
	}
	i := slices.IndexFunc(b.Components, func(c component) bool { return c.Name == "github.com/google/licensecheck" })
	if i < 0 {
		t.Fatalf("no licensecheck in %+v", b.Components)
	}
	c := b.Components[i]
	if c.Version == "" || len(c.Hashes) != 1 || len(c.Hashes[0].Content) != 64 || len(c.Licenses) != 1 || c.Licenses[0].License.ID != "BSD-3-Clause" {
		t.Errorf("licensecheck is %+v", c)
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
