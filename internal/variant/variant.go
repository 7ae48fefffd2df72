// Package variant chooses which of the two variants of iptables, legacy or nft, a container
// uses: the node's. The rules of one are invisible to the other, so a container's have to
// stand beside those of kubelet and kube-proxy.
package variant

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

const (
	legacy = "legacy"
	nft    = "nft"
)

// Env is the variable that decides instead.
const Env = "IPTABLES_VARIANT"

// Dir is where an image has both: the folders legacy and nft, each with all commands of one.
const Dir = "/usr/lib/nodecache/iptables"

// Use puts the commands of the node's variant first in this process's PATH, where dir has
// both, and returns what it has chosen and why; "" where dir does not exist. The choice is
//
//  1. what Env says;
//  2. the variant that has a chain by which kubelet tells which one it uses;
//  3. the variant that has more rules;
//  4. nft.
func Use(dir string) (choice string, err error) {
	if _, err := os.Stat(dir); err != nil {
		return "", nil
	}
	name, why := os.Getenv(Env), Env
	switch name {
	case legacy, nft:
	case "":
		name, why = choose(dir)
	default:
		return "", fmt.Errorf("%s is %q, it has to be %s or %s, or to be left out: then it is the node's own", Env, name, legacy, nft)
	}
	if err := os.Setenv("PATH", filepath.Join(dir, name)+":"+os.Getenv("PATH")); err != nil {
		return "", fmt.Errorf("choosing iptables-%s: %w", name, err)
	}
	return fmt.Sprintf("%s (%s)", name, why), nil
}

func choose(dir string) (name, why string) {
	if hinted(dir, nft) {
		return nft, "kubelet's chains are there"
	}
	if inUse("mangle") && hinted(dir, legacy) {
		return legacy, "kubelet's chains are there"
	}
	// Without a table, the legacy one prints those that are in use, and loads none.
	l, n := rules(dir, legacy), rules(dir, nft)
	if l > n {
		return legacy, fmt.Sprintf("%d rules, nft has %d", l, n)
	}
	return nft, fmt.Sprintf("%d rules, legacy has %d", n, l)
}

// The chains are kubelet's since 1.24 and before it (KEP-3178).
var hints = regexp.MustCompile(`(?m)^:KUBE-(IPTABLES-HINT|KUBELET-CANARY) `)

func hinted(dir, variant string) bool {
	return hints.Match(save(dir, variant, "-t", "mangle"))
}

// inUse tells whether the legacy table is there. To ask iptables itself would have the
// kernel load the table, for good.
func inUse(table string) bool {
	for _, list := range []string{"/proc/net/ip_tables_names", "/proc/net/ip6_tables_names"} {
		if text, err := os.ReadFile(list); err == nil && slices.Contains(strings.Fields(string(text)), table) {
			return true
		}
	}
	return false
}

func rules(dir, variant string) int {
	text := save(dir, variant)
	n := bytes.Count(text, []byte("\n-A"))
	if bytes.HasPrefix(text, []byte("-A")) {
		n++
	}
	return n
}

// patience is how long one look may take: tens of thousands of rules take a second.
const patience = 10 * time.Second

// save returns the rules of both families. What does not work here, such as a variant that
// the kernel lacks, has none.
func save(dir, variant string, args ...string) (text []byte) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, program := range []string{"iptables-save", "ip6tables-save"} {
		out, _ := exec.CommandContext(ctx, filepath.Join(dir, variant, program), args...).Output()
		text = append(text, out...)
	}
	return text
}
