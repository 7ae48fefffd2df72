package nodecachemode

import (
	"bytes"
	"fmt"
	"net/netip"
	"os/exec"
	"regexp"
	"slices"
	"strings"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/sockets"
)

// ruleOf finds in a line of iptables-save a rule of node-cache, and the address that it is for.
var ruleOf = regexp.MustCompile(`^-A (?:PREROUTING|INPUT|OUTPUT) -[sd] ([0-9a-f.:]+)/(?:32|128) .*--comment "NodeLocal DNS Cache: (?:skip conntrack|allow DNS traffic)"`)

// RemoveLeft removes the rules that a node-cache which was killed, or had -skipteardown, has left
// for the addresses of -localip, as node-cache itself does when it leaves: they match although
// nobody listens, so that the cluster could not answer in this process's place. There are none as
// long as another process listens there: they may be that one's. It returns whether that is so,
// and how many it has removed.
func (f *Flags) RemoveLeft() (busy bool, removed int, err error) {
	if !f.SetUpRules {
		return false, 0, nil
	}
	var es []desired.Endpoint
	port := uint16(0)
	if _, err := fmt.Sscan(f.Port, &port); err != nil {
		return false, 0, err
	}
	for _, a := range f.LocalIPs {
		for _, proto := range []string{"udp", "tcp"} {
			es = append(es, desired.Endpoint{Addr: a, Proto: proto, Port: port})
		}
	}
	if len(sockets.Strangers(es)) > 0 {
		return true, 0, nil
	}
	for family, is := range map[string]func(netip.Addr) bool{"iptables": netip.Addr.Is4, "ip6tables": netip.Addr.Is6} {
		if !slices.ContainsFunc(f.LocalIPs, is) {
			continue
		}
		if _, err := exec.LookPath(family + "-save"); err != nil {
			continue // an image without iptables
		}
		for _, table := range []string{"raw", "filter"} {
			n, err := f.removeFrom(family, table)
			if removed += n; err != nil {
				return false, removed, err
			}
		}
	}
	return false, removed, nil
}

// removeFrom removes node-cache's rules of one table, all of them or none.
func (f *Flags) removeFrom(family, table string) (int, error) {
	rules, err := exec.Command(family+"-save", "-t", table).Output()
	if err != nil {
		return 0, fmt.Errorf("running %s-save -t %s: %w", family, table, err)
	}
	var lines []string
	for line := range strings.Lines(string(rules)) {
		m := ruleOf.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		if a, err := netip.ParseAddr(m[1]); err == nil && slices.Contains(f.LocalIPs, a) {
			lines = append(lines, "-D"+strings.TrimPrefix(line, "-A"))
		}
	}
	if len(lines) == 0 {
		return 0, nil
	}
	cmd := exec.Command(family+"-restore", "--noflush", "--wait", "5")
	cmd.Stdin = strings.NewReader("*" + table + "\n" + strings.Join(lines, "") + "COMMIT\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("running %s-restore to remove %d rules of node-cache from the table %s: %w: %s", family, len(lines), table, err, bytes.TrimSpace(out))
	}
	return len(lines), nil
}
