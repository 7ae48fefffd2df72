package e2e

import (
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
	"github.com/contentful-labs/coredns-nodecache/test/manifest"
)

// imageRoot is where make image-root has laid an image out.
func imageRoot(t *testing.T, target string) string {
	t.Helper()
	root, err := filepath.Abs(filepath.Join("..", "build", "image", runtime.GOARCH, target))
	if err == nil {
		_, err = os.Stat(root)
	}
	if err != nil {
		t.Fatalf("no image to test: %v; run make image-root", err)
	}
	return root
}

// stage is how the Dockerfile has an image started.
func stage(t *testing.T, target string) (path, entrypoint string) {
	t.Helper()
	text := read(t, filepath.Join("..", "Dockerfile"))
	_, text, ok := strings.Cut(text, "\nFROM scratch AS "+target+"\n")
	if !ok {
		t.Fatalf("the Dockerfile has no target %s", target)
	}
	text, _, _ = strings.Cut(text, "\nFROM ")
	if !strings.Contains(text, "COPY --from=build /root-of/"+target+" /\n") || !strings.Contains(text, "USER 0:0\n") {
		t.Errorf("the target %s is\n%s", target, text)
	}
	env := regexp.MustCompile(`(?m)^ENV PATH=(\S+)$`).FindStringSubmatch(text)
	entry := regexp.MustCompile(`(?m)^ENTRYPOINT \["(\S+)"\]$`).FindStringSubmatch(text)
	if env == nil || entry == nil {
		t.Fatalf("the target %s has no PATH or no entry point:\n%s", target, text)
	}
	return env[1], entry[1]
}

// contain has a pod's process started as a container runtime does: on the image's file
// system, read-only, with what the manifest mounts, exactly its capabilities and nothing
// else in the environment.
func (n *node) contain(p *pod, root, path, entry string, lock bool) {
	n.Helper()
	const script = `
		root=$1 resolvers=$2 lock=$3 drop=$4 path=$5 entry=$6
		shift 6
		env=
		while [ "$1" != -- ]; do env="$env $1"; shift; done
		for corefile; do :; done
		mount --bind "$root" "$root"
		mkdir -p "$root/proc" "$root/dev" "$root/run" "$root/etc/coredns"
		: >"$root/etc/resolv.conf"
		mount -t proc proc "$root/proc"
		mount -t tmpfs tmpfs "$root/dev"
		mkdir "$root/dev/net"
		mknod -m 666 "$root/dev/null" c 1 3
		mknod -m 666 "$root/dev/net/tun" c 10 200 # a machine may lack the dummy driver
		mount --bind "$resolvers" "$root/etc/resolv.conf"
		mount --bind "$(dirname "$corefile")" "$root/etc/coredns"
		mount -o remount,bind,ro "$root/etc/coredns"
		if [ -n "$lock" ]; then
			: >>"$lock"
			: >"$root/run/xtables.lock"
			mount --bind "$lock" "$root/run/xtables.lock"
		fi
		mount -o remount,bind,ro "$root"
		# shellcheck disable=SC2086 # words
		exec env -i "PATH=$path" $env "$(command -v capsh)" --no-new-privs --drop="$drop" \
			--chroot="$root" --shell="$entry" -- -conf /etc/coredns/Corefile`
	copied := filepath.Join(n.MakeDir(), "root")
	out, err := exec.Command("cp", "-a", root, copied).CombinedOutput()
	if err != nil {
		n.Fatalf("copying the image: %v: %s", err, out)
	}
	held := ""
	if lock {
		held = n.XtablesLock()
	}
	via := []string{"unshare", "--mount", "sh", "-ec", script, "sh", copied, filepath.Join(n.Dir, "resolv.conf"), held, allBut(n, p.caps), path, entry}
	p.options.Via = append(append(via, p.options.Env...), "--")
	p.options.Env = nil
	p.corefile = strings.ReplaceAll(p.corefile, filepath.Join(n.Dir, "resolv.conf"), "/etc/resolv.conf")
	for name, text := range p.options.Files {
		p.options.Files[name] = strings.ReplaceAll(text, filepath.Join(n.Dir, "resolv.conf"), "/etc/resolv.conf")
	}
}

// MakeDir makes a directory that goes with the node.
func (n *node) MakeDir() string {
	n.Helper()
	dir, err := os.MkdirTemp(n.Dir, "")
	n.must(err)
	return dir
}

// allBut is what capsh has to drop to leave only these.
func allBut(n *node, caps []string) string {
	n.Helper()
	text, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	n.must(err)
	last, err := strconv.Atoi(strings.TrimSpace(string(text)))
	n.must(err)
	var drop []string
	for i := range last + 1 {
		if !slices.ContainsFunc(caps, func(c string) bool { return capabilityBits[c] == i }) {
			drop = append(drop, strconv.Itoa(i))
		}
	}
	return strings.Join(drop, ",")
}

// Each image, as a container runtime starts it, answers and leaves nothing.
func TestImages(t *testing.T) {
	for _, c := range []struct {
		target, manifest string
		variant          lab.Iptables
		lock             bool
		says             string
	}{
		{"iptables", "overlays/iptables", lab.NFT, true, " (nf_tables)"},
		{"iptables", "overlays/iptables", lab.Legacy, true, " (legacy)"},
		{"nftables", "overlays/nftables", lab.NFT, false, "out of connection tracking by nftables"},
		{"nftables", "overlays/nftables", lab.Legacy, false, "out of connection tracking by nftables"},
		{"nftables", "overlays/cilium", lab.NFT, false, "no firewall"},
	} {
		t.Run(c.target+"/"+filepath.Base(c.manifest)+"/"+string(c.variant), func(t *testing.T) {
			n := newNode(t, backend{iptables: c.variant})
			m, err := manifest.Build(filepath.Join("..", "k8s", c.manifest))
			n.must(err)
			if len(m.Policies) > 0 {
				n.eth0()
			}
			p := n.pod(m, m.DaemonSets[0], custom)
			path, entry := stage(t, c.target)
			n.contain(p, imageRoot(t, c.target), path, entry, c.lock)
			before := n.snapshot()
			running := n.up(p)
			n.has(running.Log(), c.says)
			n.has(capSets(n, running.Pid), strings.Join(p.caps, ","))
			mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", running.Pid))
			n.must(err)
			if !regexp.MustCompile(`(?m)^\S+ \S+ \S+ \S+ / ro[, ]`).Match(mounts) {
				n.Errorf("the root file system can be written:\n%s", mounts)
			}
			n.serves(p)
			running.exit(syscall.SIGTERM)
			n.quiet(running.Log())
			n.same("after the exit", before, n.snapshot())
		})
	}
}

// With a read-only file system legacy iptables needs the lock to be mounted, and says so.
// iptables-nft takes no lock.
func TestImageWithoutTheLock(t *testing.T) {
	for _, variant := range []lab.Iptables{lab.NFT, lab.Legacy} {
		t.Run(string(variant), func(t *testing.T) {
			n := newNode(t, backend{iptables: variant})
			m, err := manifest.Build(filepath.Join("..", "k8s", "overlays", "iptables"))
			n.must(err)
			p := n.pod(m, m.DaemonSets[0])
			path, entry := stage(t, "iptables")
			n.contain(p, imageRoot(t, "iptables"), path, entry, false)
			before := n.snapshot()
			if variant == lab.NFT {
				n.up(p).exit(syscall.SIGTERM)
			} else {
				n.has(n.refuse(p.corefile, p.options), "/run/xtables.lock", "Read-only file system")
			}
			n.same("afterwards", before, n.snapshot())
		})
	}
}

// What the images hold: nothing that runs but what is needed, all for one architecture.
func TestImageFiles(t *testing.T) {
	machine := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[runtime.GOARCH]
	for target, want := range map[string][]string{
		"nftables": {"usr/bin/coredns"},
		"iptables": {
			"usr/bin/coredns", "usr/sbin/xtables-legacy-multi", "usr/sbin/xtables-nft-multi",
		},
	} {
		t.Run(target, func(t *testing.T) {
			root := imageRoot(t, target)
			var programs []string
			err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
				if err != nil || !d.Type().IsRegular() {
					return err
				}
				info, err := d.Info()
				if err != nil {
					return err
				}
				name, err := filepath.Rel(root, path)
				if err != nil {
					return err
				}
				if info.Mode()&(fs.ModeSetuid|fs.ModeSetgid) != 0 || info.Mode().Perm()&0o022 != 0 {
					t.Errorf("%s has the mode %v", name, info.Mode())
				}
				f, err := elf.Open(path)
				if err == nil {
					defer f.Close()
					if f.Machine != machine {
						t.Errorf("%s is for %v", name, f.Machine)
					}
					if target == "nftables" && slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
						t.Errorf("%s is not static", name)
					}
				}
				if info.Mode().Perm()&0o111 != 0 && !strings.Contains(name, ".so") {
					programs = append(programs, name)
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if slices.Sort(programs); !slices.Equal(programs, want) {
				t.Errorf("the programs are %v, want %v", programs, want)
			}
			if _, err := os.Stat(filepath.Join(root, "etc/ssl/certs/ca-certificates.crt")); err != nil {
				t.Error(err)
			}
		})
	}
}

// A scanner of images finds the distribution, its release and the packages: else it looks
// nothing up, and reports an image without faults.
func TestImageNamesItsDistribution(t *testing.T) {
	for target, want := range map[string][]string{
		"nftables": {"base-files", "ca-certificates"},
		"iptables": {"base-files", "ca-certificates", "iptables", "libc6", "libxtables12"},
	} {
		t.Run(target, func(t *testing.T) {
			root := imageRoot(t, target)
			release := map[string]string{}
			for line := range strings.Lines(read(t, filepath.Join(root, "etc", "os-release"))) {
				key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
				release[key] = strings.Trim(value, `"`)
			}
			version := strings.TrimSpace(read(t, filepath.Join(root, "etc", "debian_version")))
			if release["ID"] != "debian" || release["VERSION_ID"] == "" || !strings.HasPrefix(version, release["VERSION_ID"]+".") {
				t.Errorf("it is %s %s, and Debian %s", release["ID"], release["VERSION_ID"], version)
			}
			for _, name := range want {
				fields := map[string]string{}
				for line := range strings.Lines(read(t, filepath.Join(root, "var", "lib", "dpkg", "status.d", name))) {
					key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
					fields[key] = value
				}
				if fields["Package"] != name || fields["Version"] == "" || fields["Architecture"] == "" {
					t.Errorf("of %s it says %v", name, fields)
				}
				read(t, filepath.Join(root, "usr", "share", "doc", name, "copyright"))
			}
		})
	}
}

// The Dockerfile makes what make image-root makes, and nothing else.
func TestDockerfileMakesTheImageRoot(t *testing.T) {
	makefile := read(t, filepath.Join("..", "Makefile"))
	for line := range strings.Lines(read(t, filepath.Join("..", "Dockerfile"))) {
		command, ok := strings.CutPrefix(strings.TrimSpace(line), "RUN ")
		if !ok || strings.HasPrefix(command, "go mod download") {
			continue
		}
		words := strings.Fields(command)
		target := strings.TrimSuffix(words[1], "$TARGETARCH")
		if words[0] != "make" || !strings.Contains(makefile, "\n"+target) {
			t.Errorf("runs %q", command)
		}
	}
}
