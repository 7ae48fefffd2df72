package serverblocks

import (
	"bytes"
	"fmt"
	"os"
	"regexp"
	"strings"

	"github.com/coredns/caddy/caddyfile"
)

// A Missing is an address that a plugin is given by a variable of the environment that has no value.
type Missing struct {
	At       string // "file:line"
	Plugin   string
	Variable string
}

var (
	// reference is what caddy replaces, in either way to write it.
	reference = regexp.MustCompile(`\{\$([^}]+)\}|\{%([^}]+)%\}`)
	// unexpanded is what Kubernetes leaves of a reference in a container's env to a variable
	// that is not there.
	unexpanded = regexp.MustCompile(`^\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)$`)
)

// MissingOf returns where these plugins are given addresses by variables that have no value, in the
// Corefile that is being set up, of which blocks is what Read has returned.
func MissingOf(blocks []caddyfile.ServerBlock, plugins ...string) (all []Missing) {
	var lines corefileLines
	for _, b := range blocks {
		for _, plugin := range plugins {
			for _, t := range b.Tokens[plugin] {
				m := Missing{Plugin: plugin}
				if left := unexpanded.FindStringSubmatch(t.Text); left != nil {
					m.Variable = left[1]
				} else if t.Text == "" || strings.HasPrefix(t.Text, ":") || strings.HasSuffix(t.Text, "://") {
					m.Variable = emptyIn(lines.line(t))
				}
				if m.Variable != "" {
					m.At = fmt.Sprintf("%s:%d", lines.file(t), t.Line)
					all = append(all, m)
				}
			}
		}
	}
	return all
}

// emptyIn returns the first variable of a line that is empty, or "".
func emptyIn(line string) string {
	for _, m := range reference.FindAllStringSubmatch(line, -1) {
		if name := m[1] + m[2]; os.Getenv(name) == "" {
			return name
		}
	}
	return ""
}

// corefileLines are those of the Corefile and of what it imports, as they were written.
type corefileLines map[string][]string

// file returns where a token stands.
func (corefileLines) file(t caddyfile.Token) string {
	if t.File != "" {
		return t.File
	}
	return Instance().Caddyfile().Path()
}

// line returns the line of a token, or "" where the file can't be read any more.
func (l *corefileLines) line(t caddyfile.Token) string {
	if *l == nil {
		*l = corefileLines{}
	}
	lines, ok := (*l)[t.File]
	if !ok {
		text, err := Instance().Caddyfile().Body(), error(nil)
		if t.File != "" {
			text, err = os.ReadFile(t.File)
		}
		if err == nil {
			lines = strings.Split(string(bytes.ToValidUTF8(text, nil)), "\n")
		}
		(*l)[t.File] = lines
	}
	if t.Line < 1 || t.Line > len(lines) {
		return ""
	}
	return lines[t.Line-1]
}
