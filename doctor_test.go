package nodecache

import (
	"fmt"
	stdlog "log"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// NetworkManager's files are as those of 1.42: of a link that it has noted, of one to
// which it applies a profile, and of one that it does not manage.
func TestNetworkManager(t *testing.T) {
	needRoot(t)
	cleanLinks(t)
	i := &netif{name: testLink}
	l, err := i.ensureLink()
	must(t, err)
	t.Cleanup(func() { must(t, i.prune(nil)) })

	const managed = "[device]\nmanaged=true\nconnection-uuid=7b51333c-56a3-44c2-8b1f-3a73088a785b\nnm-owned=false\n"
	const external = "[connection]\nid=nodelocaldns\nuuid=7b51333c-56a3-44c2-8b1f-3a73088a785b\ntype=dummy\n\n[.nmmeta]\nnm-generated=true\nvolatile=true\nexternal=true\n"
	for name, tt := range map[string]struct {
		device, profile string
		want            bool
	}{
		"no NetworkManager":   {"", "", false},
		"unmanaged":           {"[device]\nnm-owned=false\n", "", false},
		"noted":               {managed, external, false},
		"by a profile":        {managed, "", true},
		"another one's noted": {managed, strings.Replace(external, "7b51", "0000", 1), true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			defer func(d string) { networkManagerState = d }(networkManagerState)
			networkManagerState = dir
			for file, text := range map[string]string{
				fmt.Sprintf("devices/%d", l.Attrs().Index): tt.device, "system-connections/nodelocaldns.nmconnection": tt.profile,
			} {
				if text != "" {
					must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, file)), 0o755))
					must(t, os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644))
				}
			}
			found := networkManager(site{links: map[string]bool{testLink: true}})
			if len(found) > 0 != tt.want {
				t.Errorf("found %q, want one: %v", found, tt.want)
			}
		})
	}
}

func TestExaminesAgain(t *testing.T) {
	was := faults
	defer func() { faults = was }()
	var full []string
	faults = []fault{{"full", func(site) []string { return full }}, {"other", func(site) []string { return []string{"always"} }}}
	var text strings.Builder
	stdlog.SetOutput(&text)
	defer stdlog.SetOutput(os.Stdout)
	n := newNode()
	for i, step := range []struct {
		again bool
		full  []string
		says  []string
	}{
		{false, nil, []string{"always", "1 found"}},
		{true, nil, nil},
		{true, []string{"90 of 100"}, []string{"90 of 100", "2 found"}},
		{true, []string{"91 of 100"}, nil},
		{true, nil, []string{"1 found"}},
		{true, []string{"92 of 100"}, []string{"92 of 100", "2 found"}},
		{false, []string{"92 of 100"}, []string{"92 of 100", "always", "2 found"}},
	} {
		text.Reset()
		full = step.full
		n.examine(site{}, step.again)
		lines := strings.Split(strings.TrimSpace(text.String()), "\n")
		if text.Len() == 0 {
			lines = nil
		}
		if !slices.EqualFunc(lines, step.says, strings.HasSuffix) {
			t.Errorf("look %d says %q, want %q", i, lines, step.says)
		}
	}
}
