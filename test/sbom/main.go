// Command sbom lists what a binary is made of, as CycloneDX 1.6 in JSON: the modules
// that its build information names, each with its version, its hash and the licences
// that its files in the module cache say, and with -root Debian's packages of an image. It
// fails if a module has no licence that it knows, which the usual tool for this passes over.
// It runs in the folder of the binary's module; make sbom does.
//
//	sbom -root build/image/amd64/iptables ./coredns >sbom.json
package main

import (
	"cmp"
	"debug/buildinfo"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/google/licensecheck"
)

// The parts of CycloneDX 1.6 that are written.
type (
	bom struct {
		BOMFormat   string      `json:"bomFormat"`
		SpecVersion string      `json:"specVersion"`
		Version     int         `json:"version"`
		Metadata    metadata    `json:"metadata"`
		Components  []component `json:"components"`
	}
	metadata struct {
		Component component `json:"component"`
	}
	component struct {
		Type     string    `json:"type"`
		Name     string    `json:"name"`
		Version  string    `json:"version,omitempty"`
		PURL     string    `json:"purl,omitempty"`
		BOMRef   string    `json:"bom-ref"`
		Hashes   []hash    `json:"hashes,omitempty"`
		Licenses []license `json:"licenses,omitempty"`
	}
	hash struct {
		Algorithm string `json:"alg"`
		Content   string `json:"content"`
	}
	license struct {
		License struct {
			ID   string `json:"id,omitempty"`
			Name string `json:"name,omitempty"`
		} `json:"license"`
	}
)

func main() {
	log.SetFlags(0)
	version := flag.String("version", "", "the version of the binary")
	root := flag.String("root", "", "the file system of an image, to list its packages too")
	table := flag.Bool("table", false, "print a table of modules and licences instead")
	flag.Parse()
	if flag.NArg() != 1 {
		log.Fatal("sbom [-version VERSION] [-root DIR] [-table] BINARY")
	}
	b, err := list(flag.Arg(0), *version)
	if err != nil {
		log.Fatalf("listing what %s is made of: %v", flag.Arg(0), err)
	}
	if *root != "" {
		debs, err := packages(*root)
		if err != nil {
			log.Fatalf("listing the packages of %s: %v", *root, err)
		}
		b.Components = append(b.Components, debs...)
	}
	if *table {
		for _, c := range b.Components {
			var ids []string
			for _, l := range c.Licenses {
				ids = append(ids, cmp.Or(l.License.ID, l.License.Name))
			}
			fmt.Printf("%s %s %s\n", c.Name, c.Version, strings.Join(ids, ", "))
		}
		return
	}
	out := json.NewEncoder(os.Stdout)
	out.SetIndent("", "  ")
	if err := out.Encode(b); err != nil {
		log.Fatal(err)
	}
}

func list(binary, version string) (*bom, error) {
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		return nil, err
	}
	dirs, err := moduleDirs()
	if err != nil {
		return nil, err
	}
	b := &bom{BOMFormat: "CycloneDX", SpecVersion: "1.6", Version: 1}
	b.Metadata.Component = component{Type: "application", Name: info.Main.Path, Version: version, BOMRef: "main"}
	if b.Metadata.Component.Licenses, err = licences("."); err != nil {
		return nil, err
	}
	goVersion := strings.TrimPrefix(info.GoVersion, "go")
	std := component{Type: "library", Name: "std", Version: goVersion, PURL: "pkg:golang/std@" + goVersion, BOMRef: "std"}
	std.Licenses = []license{id("BSD-3-Clause")} // the LICENSE of Go's own tree
	b.Components = append(b.Components, std)
	var errs []error
	for _, m := range info.Deps {
		c, err := of(m, dirs)
		errs = append(errs, err)
		b.Components = append(b.Components, c)
	}
	return b, errors.Join(errs...)
}

func of(m *debug.Module, dirs map[string]string) (component, error) {
	if m.Replace != nil {
		m = m.Replace
	}
	at := m.Path + "@" + m.Version
	c := component{Type: "library", Name: m.Path, Version: m.Version, PURL: "pkg:golang/" + at, BOMRef: at}
	// That of the module as the Go checksum database has it (h1:).
	if sum, ok := strings.CutPrefix(m.Sum, "h1:"); ok {
		if b, err := base64.StdEncoding.DecodeString(sum); err == nil {
			c.Hashes = []hash{{"SHA-256", hex.EncodeToString(b)}}
		}
	}
	dir := dirs[at]
	if dir == "" {
		return c, fmt.Errorf("%s is not in the module cache: run go mod download", at)
	}
	var err error
	if c.Licenses, err = licences(dir); err == nil && len(c.Licenses) == 0 {
		err = fmt.Errorf("%s: no licence is known in %s", at, dir)
	}
	return c, err
}

// moduleDirs returns where the source of each module@version is.
func moduleDirs() (map[string]string, error) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{with or .Replace .}}{{.Path}}@{{.Version}} {{.Dir}}{{end}}", "all").Output()
	if err != nil {
		return nil, fmt.Errorf("listing the modules: %w", err)
	}
	dirs := map[string]string{}
	for line := range strings.Lines(string(out)) {
		at, dir, _ := strings.Cut(strings.TrimSpace(line), " ")
		dirs[at] = dir
	}
	return dirs, nil
}

// licences returns what the files at the root of a module say.
func licences(dir string) ([]license, error) {
	entries, err := fs.ReadDir(os.DirFS(dir), ".")
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, e := range entries {
		name := strings.ToUpper(e.Name())
		if e.IsDir() || !slices.ContainsFunc([]string{"LICENSE", "LICENCE", "COPYING", "UNLICENSE", "NOTICE"}, func(p string) bool { return strings.HasPrefix(name, p) }) {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		for _, m := range licensecheck.Scan(text).Match {
			if !m.IsURL && !slices.Contains(ids, m.ID) {
				ids = append(ids, m.ID)
			}
		}
	}
	slices.Sort(ids)
	var ls []license
	for _, i := range ids {
		ls = append(ls, id(i))
	}
	return ls, nil
}

func id(s string) (l license) {
	l.License.ID = s
	return l
}
