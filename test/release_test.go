package e2e

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// release010 is the commit that has the protocol between processes of release 0.1.0.
const release010 = "12d90c8"

// released returns the path of the binary of a commit. It is built once, as it takes
// minutes. Where the commit is not at hand the test is skipped.
func released(t *testing.T, commit string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("..", "build", "release-"+commit, "coredns"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err == nil {
		return path
	}
	archive := exec.Command("git", "-C", "..", "archive", "--format=tar", commit)
	var stderr strings.Builder
	archive.Stderr = &stderr
	source, err := archive.Output()
	if err != nil {
		t.Skipf("the source of an old release takes git and its commit %s: %v: %s", commit, err, stderr.String())
	}
	dir := t.TempDir()
	if err := unpack(source, dir); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	draft := fmt.Sprintf("%s.%d", path, os.Getpid())
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-tags", "grpcnotrace", "-o", draft, "./cmd/coredns")
	build.Dir = dir
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building %s: %v\n%s", commit, err, out)
	}
	if err := os.Rename(draft, path); err != nil {
		t.Fatal(err)
	}
	return path
}

// unpack writes the files of a tar archive below dir.
func unpack(archive []byte, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		switch h.Typeflag {
		case tar.TypeDir:
			err = root.MkdirAll(filepath.Clean(h.Name), 0o755)
		case tar.TypeReg:
			var text []byte
			if text, err = io.ReadAll(r); err == nil {
				err = root.WriteFile(h.Name, text, 0o644)
			}
		}
		if err != nil {
			return err
		}
	}
}

// serveReleased is serve with the binary of an old release.
func (n *node) serveReleased(path, corefile string) *process {
	n.Helper()
	p, err := n.Start(path, corefile, lab.Options{})
	n.must(err)
	n.Cleanup(func() {
		if n.Failed() {
			n.Logf("the log of the old release, process %d:\n%s", p.Pid, p.Log())
		}
		p.Kill()
	})
	n.must(p.WaitServing())
	n.must(p.WaitLog(0, inPlace))
	return &process{p, n}
}

// An update from the old release and one back to it lose no query, and the last one to
// leave takes everything along, whichever it is.
func TestBesideOldRelease(t *testing.T) {
	for _, back := range []bool{false, true} {
		for _, b := range []backend{iptablesNFT, iptablesLegacy, nftables} {
			name := "update"
			if back {
				name = "way back"
			}
			t.Run(name+"/"+strings.ReplaceAll(b.String(), " ", "-"), func(t *testing.T) {
				old := released(t, release010)
				n := newNode(t, b)
				n.warm()
				before := n.snapshot()
				first, second := func() *process { return n.serveReleased(old, n.corefile()) }, func() *process { return n.serve(n.corefile()) }
				if back {
					first, second = second, first
				}
				goes := first()
				tr := n.flow(addrs...)
				stays := second()
				tr.more(100)
				goes.exit(syscall.SIGTERM)
				tr.more(100)
				tr.end(name)
				n.must(n.FlushConntrack())
				n.answersEverybody(false, addrs...)
				n.untracked()
				stays.exit(syscall.SIGTERM)
				n.same("after both have left", before, n.snapshot())
				for _, p := range []*process{goes, stays} {
					if log := p.Log(); strings.Contains(log, "nothing is taken away") || strings.Contains(log, "what it said last") || strings.Contains(log, "is ignored") {
						n.Errorf("the two do not understand each other:\n%s", log)
					}
				}
			})
		}
	}
}
