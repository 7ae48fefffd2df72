package main

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// packages returns Debian's packages of an image whose file system is at root, from what
// scanners of images read too: a file of fields for each, and the distribution's name.
func packages(root string) (cs []component, err error) {
	release, err := fields(filepath.Join(root, "etc", "os-release"), "=")
	if err != nil {
		return nil, err
	}
	distro := release["ID"] + "-" + strings.Trim(release["VERSION_ID"], `"`)
	dir := filepath.Join(root, "var", "lib", "dpkg", "status.d")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		f, err := fields(filepath.Join(dir, e.Name()), ": ")
		if err != nil {
			return nil, err
		}
		c := component{Type: "library", Name: f["Package"], Version: f["Version"]}
		c.PURL = fmt.Sprintf("pkg:deb/%s/%s@%s?arch=%s&distro=%s", release["ID"], c.Name, url.QueryEscape(c.Version), f["Architecture"], distro)
		c.BOMRef = c.PURL
		if c.Licenses, err = stated(filepath.Join(root, "usr", "share", "doc", c.Name, "copyright")); err != nil {
			return nil, err
		}
		cs = append(cs, c)
	}
	return cs, nil
}

// fields reads the lines KEY SEPARATOR VALUE of a file.
func fields(path, separator string) (map[string]string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	f := map[string]string{}
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), separator); ok && f[key] == "" {
			f[key] = value
		}
	}
	return f, nil
}

// stated returns the licences that a package's copyright file names, as Debian calls them
// (DEP-5), or where it is free text, the file.
func stated(path string) (ls []license, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var names []string
	for line := range strings.Lines(string(text)) {
		if name, ok := strings.CutPrefix(line, "License: "); ok && strings.HasPrefix(string(text), "Format:") {
			names = append(names, strings.TrimSpace(name))
		}
	}
	if len(names) == 0 {
		names = []string{"as in /usr/share/doc/" + filepath.Base(filepath.Dir(path)) + "/copyright"}
	}
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		l := license{}
		l.License.Name = name
		ls = append(ls, l)
	}
	return ls, nil
}
