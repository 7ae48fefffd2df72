// Package chart renders charts/nodecache, as Helm does.
package chart

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/common/util"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	"helm.sh/helm/v4/pkg/engine"
	"sigs.k8s.io/yaml"
)

// Namespace is that of the cluster's DNS, where the chart is made to be installed.
const Namespace = "kube-system"

// A Rendered is what `helm install` would apply and say.
type Rendered struct {
	Objects string // YAML documents
	Tests   string // those that `helm test` starts
	Notes   string
}

// Render renders the chart of a directory as a release in kube-system. values are YAML, in the place of
// the chart's own. What the chart's schema refuses is an error.
func Render(dir, release, values string) (*Rendered, error) {
	c, err := loader.LoadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("loading the chart %s: %w", dir, err)
	}
	given := map[string]any{}
	if err := yaml.UnmarshalStrict([]byte(values), &given); err != nil {
		return nil, fmt.Errorf("reading values: %w", err)
	}
	options := common.ReleaseOptions{Name: release, Namespace: Namespace, Revision: 1, IsInstall: true}
	all, err := util.ToRenderValues(c, given, options, common.DefaultCapabilities)
	if err != nil {
		return nil, fmt.Errorf("taking values: %w", err)
	}
	files, err := engine.Render(c, all)
	if err != nil {
		return nil, fmt.Errorf("rendering %s: %w", dir, err)
	}
	r := new(Rendered)
	var names []string
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		text := files[name]
		switch {
		case filepath.Base(name) == "NOTES.txt":
			r.Notes = text
		case strings.Contains(name, "/templates/tests/"):
			r.Tests += "---\n" + text + "\n"
		default:
			r.Objects += "---\n" + text + "\n"
		}
	}
	return r, nil
}
