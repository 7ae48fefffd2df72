// Package manifest reads what kubectl would apply.
package manifest

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

// A Manifest is the objects of one file or kustomization.
type Manifest struct {
	Services   []corev1.Service
	ConfigMaps []corev1.ConfigMap
	DaemonSets []appsv1.DaemonSet
	Policies   []RedirectPolicy
	Monitors   []monitoring.ServiceMonitor
	Rules      []monitoring.PrometheusRule
	Pods       []corev1.Pod
}

// A RedirectPolicy is what is used here of cilium.io/v2 CiliumLocalRedirectPolicy, whose
// own package would bring all of Cilium.
type RedirectPolicy struct {
	APIVersion string   `json:"apiVersion"`
	Kind       string   `json:"kind"`
	Metadata   Metadata `json:"metadata"`
	Spec       struct {
		RedirectFrontend struct {
			ServiceMatcher struct {
				ServiceName string `json:"serviceName"`
				Namespace   string `json:"namespace"`
			} `json:"serviceMatcher"`
		} `json:"redirectFrontend"`
		RedirectBackend struct {
			LocalEndpointSelector struct {
				MatchLabels map[string]string `json:"matchLabels"`
			} `json:"localEndpointSelector"`
			ToPorts []struct {
				Port     string          `json:"port"`
				Name     string          `json:"name"`
				Protocol corev1.Protocol `json:"protocol"`
			} `json:"toPorts"`
		} `json:"redirectBackend"`
	} `json:"spec"`
}

// Metadata is the part of an object's metadata that is used here.
type Metadata struct {
	Name      string            `json:"name"`
	Namespace string            `json:"namespace"`
	Labels    map[string]string `json:"labels"`
}

// Read decodes a file as kubectl apply -f sends it, as strictly as the API server
// validates fields: an unknown or repeated one is an error.
func Read(file string) (*Manifest, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	m, err := Decode(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return m, nil
}

// BuildOn builds components on a base, such as single, all of them of the folder k8s. The
// kustomization that says so is written into dir.
func BuildOn(dir, k8s, base string, components ...string) (*Manifest, error) {
	if err := Combine(dir, k8s, base, components...); err != nil {
		return nil, err
	}
	return Build(dir)
}

// Combine writes the kustomization of components on a base into dir.
func Combine(dir, k8s, base string, components ...string) error {
	k8s, err := filepath.Abs(k8s)
	if err == nil {
		k8s, err = filepath.Rel(dir, k8s) // kustomize takes no other
	}
	text := "resources:\n- " + k8s + "/base/" + base + "\ncomponents:\n"
	for _, c := range components {
		text += "- " + k8s + "/components/" + c + "\n"
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "kustomization.yaml"), []byte(text), 0o600)
	}
	if err != nil {
		return fmt.Errorf("combining %v on %s: %w", components, base, err)
	}
	return nil
}

// Build builds a kustomization as kubectl apply -k does, and decodes it as Read does.
func Build(dir string) (*Manifest, error) {
	built, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		return nil, fmt.Errorf("building %s: %w", dir, err)
	}
	text, err := built.AsYaml()
	if err != nil {
		return nil, fmt.Errorf("building %s: %w", dir, err)
	}
	m, err := Decode(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", dir, err, text)
	}
	return m, nil
}

// Decode decodes YAML documents as Read does.
func Decode(text []byte) (*Manifest, error) {
	m := new(Manifest)
	documents := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(text)))
	for i := 0; ; i++ {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return m, nil
		}
		if err == nil {
			err = m.add(document)
		}
		if err != nil {
			return nil, fmt.Errorf("document %d: %w", i, err)
		}
	}
}

func (m *Manifest) add(document []byte) (err error) {
	var kind struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
	}
	if err := yaml.Unmarshal(document, &kind); err != nil {
		return err
	}
	switch what := kind.APIVersion + " " + kind.Kind; what {
	case " ": // comments
	case "v1 Service":
		m.Services, err = appendStrict(m.Services, document)
	case "v1 ConfigMap":
		m.ConfigMaps, err = appendStrict(m.ConfigMaps, document)
	case "apps/v1 DaemonSet":
		m.DaemonSets, err = appendStrict(m.DaemonSets, document)
	case "cilium.io/v2 CiliumLocalRedirectPolicy":
		m.Policies, err = appendStrict(m.Policies, document)
	case "monitoring.coreos.com/v1 ServiceMonitor":
		m.Monitors, err = appendStrict(m.Monitors, document)
	case "monitoring.coreos.com/v1 PrometheusRule":
		m.Rules, err = appendStrict(m.Rules, document)
	case "v1 Pod":
		m.Pods, err = appendStrict(m.Pods, document)
	default:
		err = fmt.Errorf("unexpected kind %s", what)
	}
	return err
}

func appendStrict[T any](all []T, document []byte) ([]T, error) {
	var one T
	err := yaml.UnmarshalStrict(document, &one)
	return append(all, one), err
}

// ConfigMap returns the one of a name, or nil.
func (m *Manifest) ConfigMap(name string) *corev1.ConfigMap {
	i := slices.IndexFunc(m.ConfigMaps, func(c corev1.ConfigMap) bool { return c.Name == name })
	if i < 0 {
		return nil
	}
	return &m.ConfigMaps[i]
}

// Files returns what a container finds below a directory, by the path from there: what
// kubelet makes of the volumes that are mounted there. custom are the ConfigMaps that
// the user has.
func (m *Manifest) Files(pod corev1.PodSpec, c corev1.Container, dir string, custom ...corev1.ConfigMap) (map[string]string, error) {
	all := &Manifest{ConfigMaps: append(slices.Clone(m.ConfigMaps), custom...)}
	files := map[string]string{}
	for _, mount := range c.VolumeMounts {
		below, ok := strings.CutPrefix(mount.MountPath+"/", dir+"/")
		if !ok {
			continue
		}
		i := slices.IndexFunc(pod.Volumes, func(v corev1.Volume) bool { return v.Name == mount.Name })
		if i < 0 {
			return nil, fmt.Errorf("%s mounts the volume %s, which the pod does not have", c.Name, mount.Name)
		}
		v := pod.Volumes[i]
		sources := []corev1.VolumeProjection{}
		switch {
		case v.ConfigMap != nil:
			sources = append(sources, corev1.VolumeProjection{ConfigMap: &corev1.ConfigMapProjection{
				LocalObjectReference: v.ConfigMap.LocalObjectReference, Items: v.ConfigMap.Items, Optional: v.ConfigMap.Optional,
			}})
		case v.Projected != nil:
			sources = v.Projected.Sources
		default:
			return nil, fmt.Errorf("the volume %s is no ConfigMap", v.Name)
		}
		for _, s := range sources {
			if err := all.project(s.ConfigMap, func(name, text string) { files[path.Join(below, name)] = text }); err != nil {
				return nil, fmt.Errorf("the volume %s: %w", v.Name, err)
			}
		}
	}
	return files, nil
}

func (m *Manifest) project(p *corev1.ConfigMapProjection, file func(name, text string)) error {
	cm := m.ConfigMap(p.Name)
	switch {
	case cm == nil && p.Optional != nil && *p.Optional:
		return nil
	case cm == nil:
		return fmt.Errorf("there is no ConfigMap %s", p.Name)
	case p.Items == nil:
		for key, text := range cm.Data {
			file(key, text)
		}
	}
	for _, item := range p.Items {
		text, ok := cm.Data[item.Key]
		if !ok {
			return fmt.Errorf("the ConfigMap %s has no key %s", cm.Name, item.Key)
		}
		file(item.Path, text)
	}
	return nil
}

// Env returns the environment that kubelet gives a container. services are the variables of the
// Services of its namespace, fields the values of the downward API by path, such as status.hostIP.
func Env(c corev1.Container, services, fields map[string]string) (map[string]string, error) {
	env := maps.Clone(services)
	if env == nil {
		env = map[string]string{}
	}
	for _, e := range c.Env {
		switch {
		case e.ValueFrom == nil:
			// Only variables further up and those of Services are expanded. Others stay as they are.
			for name, value := range env {
				e.Value = strings.ReplaceAll(e.Value, "$("+name+")", value)
			}
			env[e.Name] = e.Value
		case e.Value == "" && e.ValueFrom.FieldRef != nil && fields[e.ValueFrom.FieldRef.FieldPath] != "":
			env[e.Name] = fields[e.ValueFrom.FieldRef.FieldPath]
		default:
			return nil, fmt.Errorf("the variable %s can't be set: %v", e.Name, e)
		}
	}
	return env, nil
}
