package cluster

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// The images between which a DaemonSet of node-cache changes.
const (
	theirImage = "cluster.test/node-cache:1"
	ourImage   = "cluster.test/nodecache:1"
)

// A DaemonSet of node-cache itself, whose binary NODE_CACHE names, has nothing but its image
// changed to ours and back while everybody asks; what is lost is printed.
func TestNodeCacheReplaced(t *testing.T) {
	kit, binary := os.Getenv("CLUSTER_KIT"), os.Getenv("NODE_CACHE")
	if kit == "" || binary == "" {
		t.Skip("make test-cluster runs this, with NODE_CACHE naming the binary of sigs.k8s.io/node-local-dns")
	}
	makeImages(t, kit)
	makeNodeCacheImages(t, kit, binary)
	t.Run("iptables", func(t *testing.T) { // node-cache knows no other
		s := newSite(t, kit, "iptables")
		s.withNodeCache()
		s.imageChanged("node-cache to this image", ourImage)
		s.updatedWithoutSurge()
		s.imageChanged("back to node-cache", theirImage)
	})
}

// makeNodeCacheImages makes ours, and one of node-cache with both variants of iptables as its own has.
func makeNodeCacheImages(t *testing.T, kit, binary string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	roots, err := filepath.Glob(path("build/image/*/iptables"))
	must(err)
	if len(roots) != 1 {
		t.Fatalf("build/image/*/iptables is %q, want one; make image-root makes it", roots)
	}
	dockerfile, err := os.ReadFile(path("Dockerfile"))
	must(err)
	config, err := startOf(string(dockerfile), "iptables")
	must(err)
	must(Image{Name: ourImage, Root: roots[0], Config: config}.Archive(filepath.Join(kit, "images", "ours.tar")))

	theirs := filepath.Join(t.TempDir(), "root")
	for _, words := range [][]string{{"cp", "-a", roots[0], theirs}, {"rm", theirs + "/node-cache", theirs + "/usr/bin/coredns"}, {"cp", binary, theirs + "/node-cache"}} {
		if out, err := exec.Command(words[0], words[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", words, err, out)
		}
	}
	config = ImageConfig{Entrypoint: []string{"/node-cache"}, Env: []string{"PATH=/usr/lib/nodecache/iptables/nft:/usr/sbin:/usr/bin:/sbin:/bin"}}
	must(Image{Name: theirImage, Root: theirs, Config: config}.Archive(filepath.Join(kit, "images", "theirs.tar")))
}

// dummy makes the link that node-cache needs and, without the kernel's driver, can't make.
func (s *site) dummy() {
	s.Helper()
	if HasDummy() {
		return
	}
	if _, err := s.OnNode("ip", "link", "show", "nodelocaldns"); err == nil {
		return
	}
	_, err := s.OnNode("ip", "tuntap", "add", "nodelocaldns", "mode", "tun")
	s.must(err)
}

// cached waits until the cache answers everybody.
func (s *site) cached() {
	s.Helper()
	for _, from := range clients {
		load := lab.Load{Proto: "udp", To: s.services, Zone: zone, Count: 16, Workers: workers}
		s.must(poll("the cache answers "+from, func() error {
			if r := s.ask(from, []lab.Load{load})(false)[0]; !r.AllAnswered(false) {
				return errors.New(r.String())
			}
			return nil
		}))
	}
}

// some is the judge of what can't be without loss.
func some(_ string, _ kind, r *lab.Result) string {
	if r.Answered == 0 {
		return "want some answered"
	}
	return ""
}

func (s *site) withNodeCache() {
	s.dummy()
	file := s.filled("testdata/nodecache/node-local-dns.yaml")
	s.step("node-cache is applied", kinds[:3], some, func() {
		s.kubectl("apply", "-f", file)
		s.rolled("node-local-dns")
		s.cached()
	})
	out, err := s.OnNode("ip", "-brief", "address", "show", "nodelocaldns")
	s.must(err)
	s.Logf("# ip -brief address show nodelocaldns\n%s", out)
}

// imageChanged changes the image, and nothing else.
func (s *site) imageChanged(title, image string) {
	s.step(title, kinds, some, func() {
		stop, done := make(chan struct{}), make(chan struct{})
		go func() { // what the kernel of a node would have
			defer close(done)
			for image == theirImage && !HasDummy() {
				select {
				case <-stop:
					return
				default:
					s.OnNode("sh", "-c", "ip link show nodelocaldns || ip tuntap add nodelocaldns mode tun; sleep 0.1")
				}
			}
		}()
		s.kubectl(namespace, "set", "image", "daemonset/node-local-dns", "node-cache="+image)
		s.rolled("node-local-dns")
		s.cached()
		close(stop)
		<-done
	})
	s.answers(false)
	out, err := s.OnNode("ip", "-brief", "address", "show", "nodelocaldns")
	s.must(err)
	s.Logf("# ip -brief address show nodelocaldns\n%s", out)
}

func (s *site) updatedWithoutSurge() {
	s.step("this image is updated, without surge", kinds, some, func() {
		s.kubectl(namespace, "rollout", "restart", "daemonset/node-local-dns")
		s.rolled("node-local-dns")
		s.cached()
	})
	s.answers(false)
}
