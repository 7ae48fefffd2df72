// Package image tests the start of the container image.
package image

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// start runs the entrypoint in a new network namespace, after a script has put rules
// there. It returns what it logs and what a stand-in for coredns prints: its arguments and
// the variant of the iptables and ip6tables that it finds.
func start(t *testing.T, rules string, env ...string) (string, error) {
	t.Helper()
	// A container's root can lack the capabilities too.
	if err := exec.Command("unshare", "--net", "true").Run(); err != nil {
		t.Skipf("making a network namespace needs root: %v", err)
	}
	for _, variant := range []string{"legacy", "nft"} {
		if _, err := os.Stat("/usr/sbin/xtables-" + variant + "-multi"); err != nil {
			t.Skipf("needs both variants of iptables: %v", err)
		}
	}
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if out, err := exec.Command("./layout", dir).CombinedOutput(); err != nil {
		t.Fatalf("layout: %v\n%s", err, out)
	}
	const coredns = `#!/bin/sh
echo "args $*"
for c in iptables ip6tables iptables-save ip6tables-restore; do $c --version; done
`
	if err := os.WriteFile(filepath.Join(dir, "coredns"), []byte(coredns), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--net", "sh", "-ec", rules+"\nexec "+here+"/entrypoint -conf 'a b'")
	cmd.Env = append(os.Environ(), "IPTABLES_DIR="+dir, "PATH="+dir+":/usr/sbin:/usr/bin:/sbin:/bin")
	cmd.Env = append(cmd.Env, env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestChoice(t *testing.T) {
	const legacyRules = `
		iptables-legacy -A INPUT -p udp --dport 1 -j ACCEPT
		iptables-legacy -A INPUT -p udp --dport 2 -j ACCEPT`
	const nftRules = `
		iptables-nft -A INPUT -p udp --dport 1 -j ACCEPT
		iptables-nft -A INPUT -p udp --dport 2 -j ACCEPT
		iptables-nft -A INPUT -p udp --dport 3 -j ACCEPT`

	for name, tt := range map[string]struct {
		rules string
		env   []string
		want  string
	}{
		"nothing":           {"", nil, "nft"},
		"nft hint":          {legacyRules + "\niptables-nft -t mangle -N KUBE-IPTABLES-HINT", nil, "nft"},
		"nft canary, IPv6":  {legacyRules + "\nip6tables-nft -t mangle -N KUBE-KUBELET-CANARY", nil, "nft"},
		"legacy hint":       {nftRules + "\niptables-legacy -t mangle -N KUBE-IPTABLES-HINT", nil, "legacy"},
		"legacy canary, v6": {nftRules + "\nip6tables-legacy -t mangle -N KUBE-KUBELET-CANARY", nil, "legacy"},
		"both hint":         {"for v in legacy nft; do iptables-$v -t mangle -N KUBE-IPTABLES-HINT; done", nil, "nft"},
		"another's chain":   {"iptables-legacy -t mangle -N KUBE-IPTABLES-HINTS", nil, "nft"},
		"legacy rules":      {legacyRules, nil, "legacy"},
		"legacy IPv6 rules": {strings.ReplaceAll(legacyRules, "iptables", "ip6tables"), nil, "legacy"},
		"more nft rules":    {legacyRules + nftRules, nil, "nft"},
		"forced legacy":     {nftRules, []string{"IPTABLES_VARIANT=legacy"}, "legacy"},
		"forced nft":        {legacyRules, []string{"IPTABLES_VARIANT=nft"}, "nft"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out, err := start(t, tt.rules, tt.env...)
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if !strings.Contains(out, "entrypoint: iptables is "+tt.want+" (") {
				t.Errorf("does not log that iptables is %s:\n%s", tt.want, out)
			}
			if !strings.Contains(out, "args -conf a b\n") {
				t.Errorf("the arguments do not reach coredns:\n%s", out)
			}
			version := map[string]string{"nft": "(nf_tables)\n", "legacy": "(legacy)\n"}[tt.want]
			if strings.Count(out, version) != 4 {
				t.Errorf("coredns does not find the variant %s:\n%s", tt.want, out)
			}
		})
	}
}

// A look at the legacy tables must not create them: every packet would pass through
// them from then on.
func TestChoiceLoadsNoLegacyTable(t *testing.T) {
	// The stand-in for coredns is started in the same namespace: have it print the tables.
	out, err := start(t, `cat > "$IPTABLES_DIR/coredns" <<-'END'
		#!/bin/sh
		cat /proc/net/ip_tables_names /proc/net/ip6_tables_names 2>/dev/null
		END`)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if strings.Count(out, "\n") != 1 {
		t.Errorf("legacy tables are there, or more than one line is logged:\n%s", out)
	}
}

func TestUnknownVariantIsRefused(t *testing.T) {
	out, err := start(t, "", "IPTABLES_VARIANT=ipfw")
	if err == nil || !strings.Contains(out, "IPTABLES_VARIANT is ipfw") || strings.Contains(out, "args") {
		t.Errorf("started with an unknown variant (%v):\n%s", err, out)
	}
}
