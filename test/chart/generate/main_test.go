package main

import (
	"os"
	"path/filepath"
	"testing"
)

// Files that are made of others are what these are now.
func TestGenerated(t *testing.T) {
	const root = "../../.."
	files, err := Generate(root)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range files {
		got, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Error(err)
		} else if string(got) != want {
			t.Errorf("%s is not what it is made of: run make manifests", name)
		}
	}
	there, err := filepath.Glob(filepath.Join(root, chartDir, "files", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range there {
		if name := chartDir + "/files/" + filepath.Base(path); files[name] == "" {
			t.Errorf("%s is made of nothing", name)
		}
	}
}
