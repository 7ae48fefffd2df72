package lab

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
)

// Snapshot describes the node's links, addresses, routes and firewall: two nodes
// with the same snapshot are the same to a packet. What tells nothing is left out:
// counters, times, comments, the numbers of links, hardware addresses, the order of a
// link's addresses, of tables and of a table's chains, the local routes that the kernel makes for an address somewhat
// later than the address, the random part of a table's name, and tables in which
// there is nothing but the kernel's own chains.
func (l *Lab) Snapshot() (string, error) {
	var s strings.Builder
	section := func(title, text string) {
		fmt.Fprintf(&s, "== %s\n%s", title, text)
		if text != "" && !strings.HasSuffix(text, "\n") {
			fmt.Fprintln(&s)
		}
	}
	for _, c := range []struct {
		command   string
		normalise func(string) string
	}{
		{"ip -d addr", plainLinks},
		{"ip route show table all", plainRoutes},
		{"ip -6 route show table all", plainRoutes},
		{"ip rule", nil},
		{"ip -6 rule", nil},
		{"iptables-legacy-save", plainIptables},
		{"ip6tables-legacy-save", plainIptables},
		// nft shows these rules too, but not what all of them do.
		{"iptables-nft-save", plainIptables},
		{"ip6tables-nft-save", plainIptables},
		{"nft list ruleset", plainNftables},
	} {
		words := strings.Fields(c.command)
		out, err := l.Node.Run(words[0], words[1:]...)
		if err != nil {
			return "", err
		}
		if c.normalise != nil {
			out = c.normalise(out)
		}
		section(c.command, out)
	}
	// The lists of the recent match go with the last rule that uses them.
	err := l.Node.Do(func() error {
		for _, dir := range []string{"xt_recent", "ip6t_recent"} {
			// Not /proc/net: that is the main thread's namespace.
			entries, err := os.ReadDir("/proc/thread-self/net/" + dir)
			if os.IsNotExist(err) {
				continue
			}
			if err != nil {
				return err
			}
			for _, e := range entries {
				section(dir, e.Name())
			}
		}
		return nil
	})
	return s.String(), err
}

var (
	linkNumber = regexp.MustCompile(`(?m)^\d+: `)
	peerNumber = regexp.MustCompile(`@if\d+`)
	hardware   = regexp.MustCompile(`link/ether [0-9a-f:]+`)
	qdisc      = regexp.MustCompile(` qdisc \S+`)
)

func plainLinks(text string) string {
	text = linkNumber.ReplaceAllString(text, "N: ")
	text = peerNumber.ReplaceAllString(text, "@ifN")
	text = hardware.ReplaceAllString(text, "link/ether XX")
	text = qdisc.ReplaceAllString(text, "") // of a link that is down: whether it ever was up
	var out, addrs []string
	for line := range strings.Lines(strings.ReplaceAll(text, "\n       valid_lft", " valid_lft")) {
		line = strings.TrimRight(line, " \n")
		if strings.HasPrefix(line, "    inet") {
			addrs = append(addrs, line)
			continue
		}
		slices.Sort(addrs)
		out, addrs = append(append(out, addrs...), line), nil
	}
	slices.Sort(addrs)
	return strings.Join(append(out, addrs...), "\n")
}

// plainRoutes sorts: where an address has been removed and added again, its routes
// come last.
func plainRoutes(text string) string {
	var lines []string
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); !strings.Contains(line, " table local ") {
			lines = append(lines, line)
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

var chainCounters = regexp.MustCompile(`\[\d+:\d+\]`)

// plainIptables takes the output of iptables-save.
func plainIptables(text string) string {
	var tables []string
	var name string
	var chains, rules []string
	content := false
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(chainCounters.ReplaceAllString(line, "[0:0]"))
		switch {
		case line == "", strings.HasPrefix(line, "#"):
		case strings.HasPrefix(line, "*"):
			name, chains, rules, content = line, nil, nil, false
		case strings.HasPrefix(line, ":"):
			chains = append(chains, line)
			content = content || !strings.HasSuffix(line, " ACCEPT [0:0]")
		case line != "COMMIT":
			rules = append(rules, line)
			content = true
		case content:
			slices.Sort(chains)
			// Chain by chain, in which alone the order says something.
			slices.SortStableFunc(rules, func(a, b string) int {
				return strings.Compare(strings.Fields(a)[1], strings.Fields(b)[1])
			})
			tables = append(tables, strings.Join(slices.Concat([]string{name}, chains, rules), "\n"))
		}
	}
	slices.Sort(tables)
	return strings.Join(tables, "\n")
}

var (
	ruleCounters = regexp.MustCompile(`packets \d+ bytes \d+`)
	expiry       = regexp.MustCompile(` expires \S+`)
	ownerTable   = regexp.MustCompile(`table inet nodecache-\S+ \{.*`)
)

// plainNftables takes the output of nft list ruleset. The chains and the tables that
// iptables-nft makes for the kernel's hooks stay when they are empty, as the chains
// of iptables-legacy do.
func plainNftables(text string) string {
	text = ruleCounters.ReplaceAllString(text, "packets 0 bytes 0")
	text = expiry.ReplaceAllString(text, "")
	text = ownerTable.ReplaceAllString(text, "table inet nodecache-XX {")
	var tables, parts []string
	var head string
	var part []string // of the table: what is in it, a block each
	content := false  // there is something other than an empty hook
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		word := strings.TrimSpace(line)
		switch {
		case word == "", strings.HasPrefix(word, "#"):
		case head == "":
			head, parts, part = line, nil, nil
			content = !strings.HasPrefix(head, "table ip ") && !strings.HasPrefix(head, "table ip6 ")
		case line == "}":
			if content {
				slices.Sort(parts)
				tables = append(tables, strings.Join(slices.Concat([]string{head}, parts, []string{line}), "\n"))
			}
			head = ""
		default:
			part = append(part, line)
			if strings.HasPrefix(line, "\t\t") || strings.HasSuffix(line, "{") {
				continue // inside a block
			}
			hook := len(part) == 3 && strings.HasPrefix(strings.TrimSpace(part[1]), "type ") &&
				strings.HasSuffix(part[1], "policy accept;")
			if !hook {
				parts, content = append(parts, strings.Join(part, "\n")), true
			}
			part = nil
		}
	}
	slices.Sort(tables)
	return strings.Join(tables, "\n")
}
