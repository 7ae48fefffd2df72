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

func TestListsDebianPackages(t *testing.T) {
	root := t.TempDir()
	for path, text := range map[string]string{
		"etc/os-release":                  "NAME=\"Debian GNU/Linux\"\nVERSION_ID=\"12\"\nID=debian\n",
		"var/lib/dpkg/status.d/libc6":     "Package: libc6\nArchitecture: amd64\nVersion: 2.36-9+deb12u10\nDescription: x\n Version: not this\n",
		"usr/share/doc/libc6/copyright":   "This is free text.\nLicense: none\n",
		"var/lib/dpkg/status.d/libmnl0":   "Package: libmnl0\nArchitecture: amd64\nVersion: 1.0.4-3\n",
		"usr/share/doc/libmnl0/copyright": "Format: dep5\n\nFiles: *\nLicense: LGPL-2.1+\n\nFiles: x\nLicense: GPL-2+\n\nFiles: y\nLicense: LGPL-2.1+\n",
	} {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cs, err := packages(root)
	if err != nil || len(cs) != 2 {
		t.Fatalf("got %+v, %v", cs, err)
	}
	if c := cs[0]; c.PURL != "pkg:deb/debian/libc6@2.36-9%2Bdeb12u10?arch=amd64&distro=debian-12" || len(c.Licenses) != 1 || c.Licenses[0].License.Name != "as in /usr/share/doc/libc6/copyright" {
		t.Errorf("libc6 is %+v", c)
	}
	if c := cs[1]; len(c.Licenses) != 2 || c.Licenses[0].License.Name != "GPL-2+" || c.Licenses[1].License.Name != "LGPL-2.1+" {
		t.Errorf("libmnl0 is %+v", c)
	}
}
