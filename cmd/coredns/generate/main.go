// Command generate writes the lists of plugins that are compiled into coredns:
// zplugins.go from plugin.cfg, and zplugins_full.go (build tag full) from CoreDNS's
// own plugin.cfg with what ours adds to it. Run it with `go generate ./cmd/coredns`.
//
// With -check it writes nothing and fails if a file is not what it would write.
package main

import (
	"bytes"
	"flag"
	"fmt"
	"go/format"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// Paths are relative to cmd/coredns, where go generate runs us.
const (
	ourConfig   = "../../plugin.cfg"
	defaultFile = "zplugins.go"
	fullFile    = "zplugins_full.go"
)

func main() {
	log.SetFlags(0)
	check := flag.Bool("check", false, "fail if the generated files are not up to date, write nothing")
	flag.Parse()
	if err := run(*check); err != nil {
		log.Fatal(err)
	}
}

func run(check bool) error {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", coreModule).Output()
	if err != nil {
		return fmt.Errorf("finding the source of %s: %w", coreModule, err)
	}
	// A module that is not yet downloaded has no directory.
	core := strings.TrimSpace(string(out))
	if core == "" {
		return fmt.Errorf("the source of %s is not here: run `go mod download`", coreModule)
	}

	ours, err := readConfig(ourConfig, core)
	if err != nil {
		return err
	}
	theirs, err := readConfig(filepath.Join(core, "plugin.cfg"), core)
	if err != nil {
		return err
	}

	files := []struct {
		name, constraint string
		plugins          []plug
	}{
		{defaultFile, "!full", ours},
		{fullFile, "full", merge(theirs, ours)},
	}
	for _, f := range files {
		src, err := source(f.constraint, f.plugins)
		if err != nil {
			return fmt.Errorf("formatting %s: %w", f.name, err)
		}
		if check {
			old, err := os.ReadFile(f.name)
			if err != nil {
				return fmt.Errorf("reading a generated file: %w", err)
			}
			if !bytes.Equal(old, src) {
				return fmt.Errorf("%s is not what plugin.cfg says: run `make generate` and commit the result", f.name)
			}
			continue
		}
		if err := os.WriteFile(f.name, src, 0o644); err != nil {
			return fmt.Errorf("writing a generated file: %w", err)
		}
	}
	return nil
}

func readConfig(name, core string) ([]plug, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("reading the list of plugins: %w", err)
	}
	isCore := func(dir string) bool {
		st, err := os.Stat(filepath.Join(core, "plugin", dir))
		return err == nil && st.IsDir()
	}
	return parse(name, string(text), isCore)
}

// source returns the Go file that imports plugins and lists their names in order.
func source(constraint string, plugins []plug) ([]byte, error) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "// Code generated from plugin.cfg by cmd/coredns/generate. DO NOT EDIT.\n\n")
	fmt.Fprintf(&b, "//go:build %s\n\npackage main\n\nimport (\n", constraint)
	var paths []string
	for _, p := range plugins {
		paths = append(paths, p.path)
	}
	// Imports are sorted, and one package can serve two names.
	slices.Sort(paths)
	for _, p := range slices.Compact(paths) {
		fmt.Fprintf(&b, "\t_ %q\n", p)
	}
	fmt.Fprintf(&b, ")\n\n// directives are the names of all plugins in the order in which they run.\nvar directives = []string{\n")
	for _, p := range plugins {
		fmt.Fprintf(&b, "\t%q,\n", p.name)
	}
	fmt.Fprintf(&b, "}\n")
	return format.Source(b.Bytes())
}
