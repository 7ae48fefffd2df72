package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// Kubernetes' own specs of DNS that pass without the cache pass with it, while everybody asks and
// the cache is updated again and again.
func TestKubernetesSpecs(t *testing.T) {
	kit, suite := os.Getenv("CLUSTER_KIT"), os.Getenv("CLUSTER_SPECS")
	if kit == "" || suite == "" {
		t.Skip("make test-e2e runs this: it takes Kubernetes' end-to-end suite")
	}
	makeImages(t, kit)
	makeProbeImages(t, kit, suite)
	for _, mode := range []string{"iptables", "nftables"} {
		t.Run(mode, func(t *testing.T) {
			s := newSite(t, kit, mode)
			without := map[string]specs{}
			for _, p := range phases {
				without[p.name] = s.specs(suite, "no cache", p, nil)
			}
			for _, w := range []way{
				{"single", "single", nil}, {"pair", "ha", nil},
				{"single-no-fastpath", "single", []string{"no-fastpath"}}, {"pair-no-fastpath", "ha", []string{"no-fastpath"}},
			} {
				if mode == "nftables" {
					w.components = append(w.components, "nftables")
				}
				t.Run(w.name, func(t *testing.T) {
					outer := s.T
					s.T = t
					defer func() { s.T = outer }()
					s.passWith(suite, w, without)
				})
			}
		})
	}
}

// A way to have the cache.
type way struct {
	name       string
	base       string // of k8s/base
	components []string
}

// A phase is the specs that are run at a time.
type phase struct {
	name, focus, skip string
	components        []string // that they need of the manifests
	loaded            bool     // while everybody asks, and the cache is updated
}

var phases = []phase{
	{"DNS", `\[sig-network\] (DNS|Services .*ExternalName)`, `\[Serial\]`, nil, true},
	// They give the cluster's DNS another ConfigMap, with names of the world outside, and restart all of
	// it. So all names have to be asked there, and who asks meanwhile can't have answers.
	{"DNS configMap", `\[sig-network\] DNS.*\[Serial\]`, "", []string{"cluster-upstream"}, false},
}

// makeProbeImages makes the images that the specs' pods are made of, by the names that the suite has for them.
func makeProbeImages(t *testing.T, kit, suite string) {
	t.Helper()
	names, err := output(exec.Command(suite, "-list-images"))
	if err != nil {
		t.Fatal(err)
	}
	for short, config := range map[string]ImageConfig{
		"agnhost":           {Entrypoint: []string{"/agnhost"}, Cmd: []string{"pause"}},
		"glibc-dns-testing": {},
	} {
		named := regexp.MustCompile(`(?m)^\S*/`+short+`:\S+$`).FindAllString(names, -1)
		if len(named) == 0 {
			t.Fatalf("%s -list-images names no %s: %s", suite, short, names)
		}
		for i, name := range named {
			image := Image{Name: name, Root: filepath.Join(kit, "probes", short), Config: config}
			if err := image.Archive(filepath.Join(kit, "images", fmt.Sprintf("%s-%d.tar", short, i))); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// passWith puts the cache on the node, runs all specs, and takes the cache away.
func (s *site) passWith(suite string, w way, without map[string]specs) {
	for _, p := range phases {
		dir, sets := s.kustomization(w, p.components)
		s.kubectl("apply", "-k", dir)
		s.rolled(sets...)
		s.cached()
		s.answers(false)
		with := s.specs(suite, w.name, p, sets)
		for _, name := range slices.Sorted(maps.Keys(without[p.name].state)) {
			if without[p.name].state[name] == passed && with.state[name] != passed {
				s.Errorf("%s: has %s; without the cache it has passed", name, with.state[name])
			}
		}
		s.answers(false)
		s.kubectl(namespace, "delete", "daemonset", ours)
		s.rolled()
		s.kubectl("delete", "-k", dir, "--ignore-not-found")
	}
}

// kustomization writes one for a way to have the cache, and says which DaemonSets it makes.
func (s *site) kustomization(w way, more []string) (dir string, sets []string) {
	s.Helper()
	dir = filepath.Join(s.state, "kustomization")
	s.must(os.MkdirAll(dir, 0o755))
	manifests, err := filepath.Abs(path("k8s"))
	s.must(err)
	manifests, err = filepath.Rel(dir, manifests)
	s.must(err)
	text := fmt.Sprintf("resources: [%s]\n", filepath.Join(manifests, "base", w.base))
	var components []string
	for _, name := range slices.Concat(w.components, more) {
		components = append(components, filepath.Join(manifests, "components", name))
	}
	if components != nil {
		text += fmt.Sprintf("components: [%s]\n", strings.Join(components, ", "))
	}
	s.must(os.WriteFile(filepath.Join(dir, "kustomization.yaml"), []byte(text), 0o644))
	if w.base == "ha" {
		return dir, []string{"nodecache-a", "nodecache-b"}
	}
	return dir, []string{"nodecache"}
}

// What became of specs.
type specs struct {
	summary string
	state   map[string]string // by the spec's name
}

// passed is what Ginkgo calls a spec's state.
const passed = "passed"

// specs runs specs, and updates DaemonSets one after the other until they are through.
func (s *site) specs(suite, title string, p phase, sets []string) (found specs) {
	s.Helper()
	file := func(typ string) string {
		return filepath.Join(s.Logs(), "e2e-"+strings.ReplaceAll(title+"-"+p.name, " ", "-")+typ)
	}
	s.must(os.RemoveAll(file(".json")))
	log, err := os.Create(file(".log"))
	s.must(err)
	defer log.Close()
	cmd := s.command([]string{"-n"}, suite, "-kubeconfig="+filepath.Join(s.state, "admin.kubeconfig"), "-provider=local",
		"-ginkgo.focus="+p.focus, "-ginkgo.skip="+p.skip, "-ginkgo.no-color", "-ginkgo.v", "-ginkgo.json-report="+file(".json"))
	cmd.Stdout, cmd.Stderr = log, log
	updates := 0
	run := func() {
		ended := make(chan error, 1)
		s.must(cmd.Start())
		s.Cleanup(func() { cmd.Process.Kill() })
		go func() { ended <- cmd.Wait() }()
		for {
			select {
			case err := <-ended:
				if err != nil { // a spec has failed, or the suite: its report tells
					s.Logf("%s, %s: %v; its log is %s", title, p.name, err, log.Name())
				}
				return
			default:
			}
			if !p.loaded || len(sets) == 0 {
				ended <- <-ended
				continue
			}
			s.kubectl(namespace, "rollout", "restart", "daemonset/"+sets[updates%len(sets)])
			s.rolled(sets...)
			updates++
		}
	}
	begun := time.Now()
	if p.loaded && len(sets) > 0 {
		s.step(fmt.Sprintf("specs of %s, %s, under updates", p.name, title), kinds, all, run)
	} else {
		run()
	}
	s.must(found.read(file(".json"), log.Name()))
	var lines strings.Builder
	for _, name := range slices.Sorted(maps.Keys(found.state)) {
		fmt.Fprintf(&lines, "%-8s %s\n", found.state[name], name)
	}
	s.Logf("== %s, %s: %d updates meanwhile, in %v\n%s\n%s", title, p.name, updates, time.Since(begun).Round(time.Second), found.summary, &lines)
	fmt.Fprintf(&s.lines, "%s, %s, %d updates meanwhile: %s\n", title, p.name, updates, found.summary)
	return found
}

// read reads what Ginkgo has reported of the specs that were chosen, and its own summary.
func (f *specs) read(report, log string) error {
	text, err := os.ReadFile(report)
	if err != nil {
		return err
	}
	var suites []struct {
		SpecReports []struct {
			ContainerHierarchyTexts []string
			LeafNodeType            string
			LeafNodeText, State     string
			Failure                 struct{ Message string }
		}
	}
	if err := json.Unmarshal(text, &suites); err != nil {
		return fmt.Errorf("reading Ginkgo's report %s: %w", report, err)
	}
	f.state = map[string]string{}
	for _, suite := range suites {
		for _, spec := range suite.SpecReports {
			if spec.LeafNodeType != "It" || spec.State == "skipped" && spec.Failure.Message == "" {
				continue // no spec but what is around them, or not chosen
			}
			state := spec.State
			if spec.State == "skipped" {
				state += " (" + spec.Failure.Message + ")"
			}
			f.state[strings.Join(append(spec.ContainerHierarchyTexts, spec.LeafNodeText), " ")] = state
		}
	}
	if text, err = os.ReadFile(log); err != nil {
		return err
	}
	f.summary = strings.Join(regexp.MustCompile(`(?m)^(Ran \d+ of .*|(SUCCESS|FAIL)! .*)$`).FindAllString(string(text), -1), "; ")
	if f.summary == "" || !slices.Contains(slices.Collect(maps.Values(f.state)), passed) {
		return errors.New("the specs did not run: see " + log)
	}
	return nil
}
