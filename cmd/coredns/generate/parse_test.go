package main

import (
	"reflect"
	"strings"
	"testing"
)

func isCore(dir string) bool { return dir == "bind" || dir == "metrics" || dir == "health" }

func TestParse(t *testing.T) {
	const text = "# comment\n\nbind:bind\n  x:example.org/x  \r\nprometheus:metrics"
	got, err := parse("plugin.cfg", text, isCore)
	if err != nil {
		t.Fatal(err)
	}
	want := []plug{
		{"bind", "github.com/coredns/coredns/plugin/bind"},
		{"x", "example.org/x"},
		{"prometheus", "github.com/coredns/coredns/plugin/metrics"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("parse = %v, want %v", got, want)
	}
}

func TestParseNamesTheBadLine(t *testing.T) {
	for text, want := range map[string]string{
		"bind:bind\nhealth":             `f:2: "health" is not name:package`,
		"bind:bind\n:health":            `f:2: ":health" is not name:package`,
		"bind:":                         `f:1: "bind:" is not name:package`,
		"bind:bind:bind":                `f:1: "bind:bind:bind" is not name:package`,
		"bind: bind":                    `f:1: "bind: bind" is not name:package`,
		"# c\nbind:bind\n\nbind:health": "f:4: bind is already on line 2",
		"bind:bimd":                     "f:1: CoreDNS has no plugin bimd",
		"# nothing":                     "f: lists no plugin",
	} {
		_, err := parse("f", text, isCore)
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("parse(%q) says %v, want %s", text, err, want)
		}
	}
}

func TestMergeKeepsPlaces(t *testing.T) {
	list := func(s string) (l []plug) {
		for _, f := range strings.Fields(s) {
			name, path, _ := strings.Cut(f, ":")
			l = append(l, plug{name, path})
		}
		return l
	}
	for _, tt := range []struct{ theirs, ours, want string }{
		{"bind:1 etcd:1 health:1", "bind:1 nodecache:2 health:1", "bind:1 nodecache:2 etcd:1 health:1"},
		{"bind:1 health:1", "first:2 bind:1 a:2 b:2 health:1 last:2", "first:2 bind:1 a:2 b:2 health:1 last:2"},
		{"bind:1 health:1", "bind:1 health:2", "bind:1 health:2"},
	} {
		if got := merge(list(tt.theirs), list(tt.ours)); !reflect.DeepEqual(got, list(tt.want)) {
			t.Errorf("merge(%s, %s) = %v, want %s", tt.theirs, tt.ours, got, tt.want)
		}
	}
}
