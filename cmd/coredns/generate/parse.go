package main

import (
	"fmt"
	"slices"
	"strings"
)

const coreModule = "github.com/coredns/coredns"

// A plug is one line of a plugin.cfg: the name that a Corefile uses, and the package.
type plug struct{ name, path string }

// parse reads the plugin.cfg called file. isCore tells whether CoreDNS has a plugin
// in the directory plugin/dir; what CoreDNS has not must be a full import path.
func parse(file, text string, isCore func(dir string) bool) ([]plug, error) {
	var plugins []plug
	lineOf := map[string]int{}
	for i, line := range strings.Split(text, "\n") {
		n := i + 1
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, path, ok := strings.Cut(line, ":")
		if !ok || name == "" || path == "" || strings.ContainsAny(line, " \t\"'`\\") || strings.Contains(path, ":") {
			return nil, fmt.Errorf("%s:%d: %q is not name:package", file, n, line)
		}
		if first, dup := lineOf[name]; dup {
			return nil, fmt.Errorf("%s:%d: %s is already on line %d", file, n, name, first)
		}
		lineOf[name] = n
		host, _, _ := strings.Cut(path, "/")
		switch {
		case isCore(path):
			path = coreModule + "/plugin/" + path
		case !strings.Contains(host, "."):
			return nil, fmt.Errorf("%s:%d: CoreDNS has no plugin %s, and it is not a full package path either", file, n, path)
		}
		plugins = append(plugins, plug{name, path})
	}
	if len(plugins) == 0 {
		return nil, fmt.Errorf("%s: lists no plugin", file)
	}
	return plugins, nil
}

// merge returns theirs with what only ours has, each behind the line that it follows in
// ours. Where both name a plugin the package is ours, and the place theirs.
func merge(theirs, ours []plug) []plug {
	all := slices.Clone(theirs)
	at := 0 // where a line of ours that theirs lacks goes
	for _, p := range ours {
		i := slices.IndexFunc(all, func(q plug) bool { return q.name == p.name })
		if i < 0 {
			i = at
			all = slices.Insert(all, i, p)
		}
		all[i].path = p.path
		at = i + 1
	}
	return all
}
