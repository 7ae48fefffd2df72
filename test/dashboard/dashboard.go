// Package dashboard reads a dashboard of Grafana and draws its panels from what a
// Prometheus says, without Grafana.
package dashboard

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
)

// A Dashboard is what is read of its JSON.
type Dashboard struct {
	Title  string
	Panels []Panel
}

// A Panel is one of a dashboard's. Its place is in units of a grid of 24 columns.
type Panel struct {
	Title, Description, Type string
	GridPos                  struct{ X, Y, W, H int }
	FieldConfig              struct {
		Defaults struct {
			Unit   string
			Custom struct{ Stacking struct{ Mode string } }
		}
	}
	Targets []Target
}

// A Target is a query of a panel.
type Target struct{ Expr, LegendFormat string }

// Read reads a dashboard's file.
func Read(path string) (*Dashboard, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	d := new(Dashboard)
	if err := json.Unmarshal(b, d); err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	return d, nil
}

// Query is the expression with the variables that Grafana would fill in: all instances,
// and rates over the window (such as 5s).
func (t Target) Query(window string) string {
	return strings.NewReplacer("$__rate_interval", window, "$instance", ".*").Replace(t.Expr)
}

// Legend is a series' name.
func (t Target) Legend(labels map[string]string) string {
	s := t.LegendFormat
	for k, v := range labels {
		s = strings.ReplaceAll(s, "{{"+k+"}}", v)
	}
	return s
}
