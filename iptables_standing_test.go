package nodecache

import (
	"slices"
	"strings"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

// ours returns the lines of our chains, of both families.
func (v *variant) ours(t testing.TB) (lines []string) {
	t.Helper()
	for line := range strings.Lines(v.rules(t)) {
		if strings.HasPrefix(line, "-A NODECACHE-") {
			lines = append(lines, strings.TrimSuffix(line, "\n"))
		}
	}
	return lines
}

// about counts those that name one of the addresses.
func about(lines []string, addresses ...string) (n int) {
	for _, line := range lines {
		if slices.ContainsFunc(addresses, func(a string) bool {
			return strings.Contains(line, " "+a+":") || strings.Contains(line, " ["+a+"]:")
		}) {
			n++
		}
	}
	return n
}

// Whatever another process says that it wants, nothing is written for it.
func TestNothingIsWrittenForOthers(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		fw := newIPTables(nil)
		own := dnsOn("169.254.20.10", "fd00:20::10")
		claim := []desired.Endpoint{
			{Addr: addr("10.250.0.2"), Proto: "tcp", Port: 22},
			{Addr: addr("10.0.0.9"), Proto: "udp\nCOMMIT\n*nat\n-A PREROUTING -j ACCEPT", Port: 53},
			{Addr: addr("fe80::1%x\nCOMMIT\n*nat"), Proto: "udp", Port: 53},
		}
		for range 2 {
			n, err := fw.apply(t.Context(), own, standing{Others: claim, Unknown: true})
			must(t, err)
			if lines := v.ours(t); about(lines, "169.254.20.10", "fd00:20::10") != len(lines) {
				t.Errorf("%d rules were missing, and these stand:\n%s", n, strings.Join(lines, "\n"))
			}
		}
		// With no rule that stands for it, its word keeps no chain either.
		_, err := fw.apply(t.Context(), nil, standing{Others: claim})
		must(t, err)
	})
}

// What stands for another process stays as it is printed, even where this release
// would write it in another way, and goes when nobody wants it any more.
func TestRulesOfOthersStandVerbatim(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		other, fw := newIPTables(nil), newIPTables(nil)
		theirs, own := dnsOn("169.254.20.11", "fd00:20::11"), dnsOn("169.254.20.10", "fd00:20::10")
		_, err := other.apply(t.Context(), theirs, standing{})
		must(t, err)
		// A release to come has a match that is unknown here, and words of its own.
		v.run(t, "iptables", "-t", "raw", "-A", "NODECACHE-PREROUTING", "-d", "169.254.20.11", "-p", "udp", "--dport", "53", "-m", "ttl", "--ttl-gt", "3",
			"-m", "comment", "--comment", "nodecache: far queries to 169.254.20.11:53/udp", "-j", "NOTRACK")
		before := v.ours(t)
		stand := func(what string, o standing, es []desired.Endpoint) {
			t.Helper()
			_, err := fw.apply(t.Context(), es, o)
			must(t, err)
			lines := v.ours(t)
			for _, line := range before {
				if !slices.Contains(lines, line) {
					t.Errorf("%s: this is gone or reads otherwise:\n%s", what, line)
				}
			}
			if n := about(lines, "169.254.20.10", "fd00:20::10"); len(lines) != len(before)+n || (n > 0) != (len(es) > 0) {
				t.Errorf("%s: %d rules of its own, %d of the other's, %d in all", what, n, len(before), len(lines))
			}
		}
		stand("with both", standing{Others: theirs}, own)
		v.count(t)
		stand("with both, again", standing{Others: theirs}, own)
		for _, c := range v.called(t) {
			if strings.HasSuffix(c, "-restore") {
				t.Errorf("a second apply has run %s", c)
			}
		}
		stand("while it does not say what it wants", standing{Unknown: true}, own)
		must(t, fw.withdraw(t.Context(), own))
		stand("while this one leaves", standing{Others: theirs, Leaving: own}, own)
		if lines := v.ours(t); about(lines, "169.254.20.10") != 14-2 {
			t.Errorf("the rules for new UDP queries to what is being left are there again:\n%s", strings.Join(lines, "\n"))
		}
		stand("after this one has left", standing{Others: theirs}, nil)
		// What the other one is missing is its own to write.
		v.run(t, "iptables", "-t", "raw", "-D", "NODECACHE-PREROUTING", "1")
		if n, err := fw.apply(t.Context(), own, standing{Others: theirs}); err != nil || about(v.ours(t), "169.254.20.11") != 14 {
			t.Errorf("%d were missing, error %v, and these stand:\n%s", n, err, strings.Join(v.ours(t), "\n"))
		}
		// Words that it does not know, for what only it wants, are an older release's.
		n, err := other.apply(t.Context(), theirs, standing{Others: own})
		must(t, err)
		if lines := v.ours(t); n != 1 || about(lines, "169.254.20.11") != 14 || strings.Contains(strings.Join(lines, ""), "far") {
			t.Errorf("the other one finds %d missing, want the one; these stand:\n%s", n, strings.Join(v.ours(t), "\n"))
		}
		_, err = fw.apply(t.Context(), own, standing{})
		must(t, err)
		if lines := v.ours(t); about(lines, "169.254.20.10", "fd00:20::10") != len(lines) {
			t.Errorf("nobody wants the other's any more, and these stand:\n%s", strings.Join(lines, "\n"))
		}
		remove(t, fw)
	})
}

// Where a process does not say what it wants, what stands stays.
func TestKeepsWhatStands(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		silent, fw := newIPTables(nil), newIPTables(nil)
		theirs := append(dnsOn("169.254.20.11", "fd00:20::11", "169.254.20.12"), extraPort("169.254.20.11", 8080))
		_, err := silent.apply(t.Context(), theirs, standing{})
		must(t, err)
		must(t, silent.withdraw(t.Context(), dnsOn("169.254.20.12")))
		v.run(t, "iptables", "-A", "NODECACHE-INPUT", "-p", "tcp", "--dport", "99", "-j", "ACCEPT")
		before := v.ours(t)
		unknown := standing{Unknown: true}
		own := dnsOn("169.254.20.10", "fd00:20::10")
		stand := func(own int) { // 7 for each endpoint, less those for new UDP queries
			t.Helper()
			lines := v.ours(t)
			for _, line := range before {
				if !slices.Contains(lines, line) {
					t.Errorf("this is gone or reads otherwise:\n%s", line)
				}
			}
			if want := len(before) + own; len(lines) != want {
				t.Errorf("%d rules stand, want %d:\n%s", len(lines), want, strings.Join(lines, "\n"))
			}
		}
		_, err = fw.apply(t.Context(), own, unknown)
		must(t, err)
		stand(28)
		must(t, fw.withdraw(t.Context(), dnsOn("fd00:20::10")))
		stand(26)
		_, err = fw.apply(t.Context(), nil, unknown)
		must(t, err)
		stand(26)
		_, err = fw.apply(t.Context(), own, standing{})
		must(t, err)
		for f, x := range fw.families {
			wantRules(t, v, x, ofFamily(own, f))
		}
		remove(t, fw)
	})
}
