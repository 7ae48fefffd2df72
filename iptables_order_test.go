package nodecache

import (
	"slices"
	"strings"
	"testing"
	"time"
)

// firsts returns the first rule of each chain from which ours are jumped to, IPv4.
func (v *variant) firsts(t *testing.T) (lines []string) {
	t.Helper()
	for _, h := range hooks {
		lines = append(lines, v.printed(t, ipv4, h.table).chains[h.builtin][0])
	}
	return lines
}

// A rule before ours that keeps their packets from them comes after them at the next look;
// one that does not stays where it is, and costs no rewriting.
func TestRulesBeforeOurs(t *testing.T) {
	for _, c := range []struct {
		name, table string
		rules       []string // "CHAIN rule"
		moves       int      // jumps
	}{
		{"accept", "raw", []string{"PREROUTING ! -p 253 -j ACCEPT"}, 1},
		{"accept in output", "raw", []string{"OUTPUT -p udp -j ACCEPT"}, 1},
		{"accept in output by lo", "raw", []string{"OUTPUT -o lo -j ACCEPT"}, 1},
		{"return", "raw", []string{"PREROUTING -j RETURN"}, 1},
		{"by source", "raw", []string{"PREROUTING -s 10.0.0.0/8 -p udp --dport 53 -j ACCEPT"}, 1},
		{"zone", "raw", []string{"PREROUTING -j CT --zone 3", "OUTPUT -j CT --zone 3"}, 2},
		{"helper", "raw", []string{"PREROUTING -p udp -j CT --helper tftp"}, 1},
		{"chain that accepts", "raw", []string{"theirs -p udp -j ACCEPT", "PREROUTING -j theirs"}, 1},
		{"goto", "raw", []string{"theirs -p tcp --dport 99 -j ACCEPT", "PREROUTING -g theirs"}, 1},
		{"drop of what is not tracked", "filter", []string{"INPUT -m conntrack --ctstate UNTRACKED -j DROP"}, 1},
		{"drop of answers", "filter", []string{"OUTPUT -p udp --sport 53 -j REJECT"}, 1},

		{"accept of others", "raw", []string{"PREROUTING -d 10.96.0.11 -j ACCEPT"}, 0},
		{"accept of another port", "raw", []string{"PREROUTING -p udp --dport 54 -j ACCEPT"}, 0},
		{"a comment", "raw", []string{"PREROUTING -p icmp -m comment --comment COMMIT -j ACCEPT"}, 0},
		{"accept of ICMP", "raw", []string{"PREROUTING -p icmp -j ACCEPT"}, 0},
		{"notrack and accept", "raw", []string{"PREROUTING -s 10.1.0.0/16 -j NOTRACK", "PREROUTING -s 10.1.0.0/16 -j LOG"}, 0},
		{"drop", "raw", []string{"PREROUTING -i eth9 -j DROP"}, 0},
		{"marks", "raw", []string{"theirs -j MARK --set-xmark 0x0/0xf0000", "theirs -m mark --mark 0x10000/0x10000 -j ACCEPT", "PREROUTING -j theirs"}, 0},
		{"chain that returns", "raw", []string{"theirs -p udp -j RETURN", "PREROUTING -j theirs"}, 0},
		{"accept in filter", "filter", []string{"INPUT -j ACCEPT", "OUTPUT -j ACCEPT"}, 0},
		{"drop of invalid", "filter", []string{"INPUT -m conntrack --ctstate INVALID -j DROP"}, 0},
		{"drop by link", "filter", []string{"INPUT -i eth9 -p udp --dport 53 -j DROP"}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			variants(t, func(t *testing.T, v *variant) {
				fw, own := newIPTables(nil), dnsOn("10.96.0.10", "169.254.20.10")
				_, err := fw.apply(t.Context(), own, standing{})
				must(t, err)
				v.run(t, "iptables", "-t", c.table, "-N", "theirs")
				var theirs []string
				for _, r := range slices.Backward(c.rules) {
					chain, rule, _ := strings.Cut(r, " ")
					at := []string{"-t", c.table, "-I", chain, "1"}
					v.run(t, "iptables", append(at, strings.Fields(rule)...)...)
					theirs = append(theirs, chain)
				}
				moved := v.firsts(t)
				v.count(t)
				n, err := fw.apply(t.Context(), own, standing{})
				must(t, err)
				if n != c.moves {
					t.Errorf("%d were missing, want %d", n, c.moves)
				}
				restores := 0
				for _, p := range v.called(t) {
					if strings.HasSuffix(p, "-restore") {
						restores++
					}
				}
				if restores != min(c.moves, 1) {
					t.Errorf("iptables-restore has run %d times", restores)
				}
				for i, h := range hooks {
					first := v.firsts(t)[i]
					if ours := strings.HasSuffix(first, " -j "+h.chain); ours != (c.moves > 0 || strings.HasSuffix(moved[i], " -j "+h.chain)) {
						t.Errorf("the first rule of %s %s is %q", h.table, h.builtin, first)
					}
				}
				if v.name == "nft" && !fw.stands() {
					t.Error("it does not stand as it was left")
				}
				if n, err := fw.apply(t.Context(), own, standing{}); n != 0 || err != nil {
					t.Errorf("at the second look %d were missing, error %v", n, err)
				}
				if len(fw.displaced()) > 0 {
					t.Errorf("it is said to be displaced: %v", fw.displaced())
				}
				remove(t, fw)
				for _, chain := range append(theirs, "theirs") {
					v.run(t, "iptables", "-t", c.table, "-F", chain)
				}
				v.run(t, "iptables", "-t", c.table, "-X", "theirs")
			})
		})
	}
}

// A jump that somebody has given a condition leads not all of its packets any more.
func TestJumpWithCondition(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		fw, own := newIPTables(nil), dnsOn("10.96.0.10")
		_, err := fw.apply(t.Context(), own, standing{})
		must(t, err)
		v.run(t, "iptables", "-t", "raw", "-R", "PREROUTING", "1", "-s", "10.1.0.0/16", "-j", "NODECACHE-PREROUTING")
		if n, err := fw.apply(t.Context(), own, standing{}); n != 1 || err != nil {
			t.Errorf("%d were missing, error %v", n, err)
		}
		wantRules(t, v, fw.families[ipv4], own)
		remove(t, fw)
	})
}

// Whoever puts its rule first again and again has its way in the end, which is told; when
// its rule has been gone for long, that is forgotten.
func TestGivesWayToWhoeverInsists(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		fw, own := newIPTables(nil), dnsOn("10.96.0.10")
		_, err := fw.apply(t.Context(), own, standing{})
		must(t, err)
		rule := []string{"PREROUTING", "-p", "udp", "-j", "ACCEPT"}
		for i := range movesMost + 3 {
			v.run(t, "iptables", append([]string{"-t", "raw", "-I"}, rule...)...)
			n, err := fw.apply(t.Context(), own, standing{})
			must(t, err)
			given := i >= movesMost
			if (n == 1) == given || (len(fw.displaced()) == 1) != given {
				t.Errorf("time %d: %d were missing, displaced: %v", i, n, fw.displaced())
			}
			if given && v.name == "nft" && !fw.stands() {
				t.Error("what is left as it is counts as changed")
			}
			v.run(t, "iptables", append([]string{"-t", "raw", "-D"}, rule...)...)
		}
		again := func() int {
			t.Helper()
			_, err := fw.apply(t.Context(), own, standing{})
			must(t, err)
			v.run(t, "iptables", append([]string{"-t", "raw", "-I"}, rule...)...)
			n, err := fw.apply(t.Context(), own, standing{})
			must(t, err)
			v.run(t, "iptables", append([]string{"-t", "raw", "-D"}, rule...)...)
			return n
		}
		if n := again(); n != 0 {
			t.Error("it fights on soon after")
		}
		fw.families[ipv4].before(hooks[0]).moved = time.Now().Add(-2 * movesForget)
		if n := again(); n != 1 {
			t.Error("it does not begin anew long after")
		}
		remove(t, fw)
	})
}
