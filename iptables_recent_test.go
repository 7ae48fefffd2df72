package nodecache

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

// withoutRecent has iptables-restore refuse the match recent, as it does where
// the kernel lacks the module.
func withoutRecent(t *testing.T, v *variant) {
	for _, p := range []string{"iptables-restore", "ip6tables-restore"} {
		v.script(t, p, `
input=
while IFS= read -r line; do
	case $line in *"-m recent"*) echo "$0: Couldn't load match 'recent'" >&2; exit 2;; esac
	input="$input$line
"
done
printf %s "$input" | $real "$@"`)
	}
}

func TestRulesWithoutMatchRecent(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		withoutRecent(t, v)
		fw := newIPTables(func() { t.Error("the rules count as gone") })
		es := dnsOn("169.254.20.10", "fd00:20::10")
		_, err := fw.apply(t.Context(), es, standing{})
		must(t, err)
		fw.enforce(es)
		for f, x := range fw.families {
			if !x.noRecent {
				t.Errorf("IPv%d: the match recent is not given up", f)
			}
			wantRules(t, v, x, ofFamily(es, f))
		}
		if text := v.rules(t); !strings.Contains(text, "--dst-type LOCAL") || strings.Contains(text, "recent") {
			t.Errorf("not the rules without recent:\n%s", text)
		}
		if len(fw.heart.addrs) != 0 {
			t.Errorf("the heart beats for %v, whose lists are not there", fw.heart.addrs)
		}
		if n, err := fw.apply(t.Context(), es, standing{}); n != 0 || err != nil {
			t.Errorf("a second apply found %d missing, error %v", n, err)
		}
		remove(t, fw)
	})
}

// What fails once, such as for want of memory, does not take the guard away for good.
func TestOneFailureDoesNotGiveUpRecent(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		once := filepath.Join(v.dir, "failed")
		v.script(t, "iptables-restore", fmt.Sprintf(`
if [ ! -e %[1]s ]; then
	: >%[1]s
	echo "iptables-restore: line 3 failed: Cannot allocate memory" >&2
	exit 1
fi
exec $real "$@"`, once))
		fw := newIPTables(nil)
		es := dnsOn("169.254.20.10")
		_, err := fw.apply(t.Context(), es, standing{})
		wantError(t, err, "Cannot allocate memory")
		if fw.families[ipv4].noRecent {
			t.Error("the match recent is given up")
		}
		_, err = fw.apply(t.Context(), es, standing{})
		must(t, err)
		wantRules(t, v, fw.families[ipv4], es)
		remove(t, fw)
	})
}

// Where the kernel comes to have the match, the rules get it at a later check.
func TestRecentIsTriedAgain(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		withoutRecent(t, v)
		fw := newIPTables(nil)
		es := dnsOn("169.254.20.10")
		for range 2 {
			_, err := fw.apply(t.Context(), es, standing{})
			must(t, err)
			if !fw.families[ipv4].noRecent {
				t.Error("the match recent is not given up")
			}
		}
		v.script(t, "iptables-restore", `exec $real "$@"`)
		n, err := fw.apply(t.Context(), es, standing{})
		must(t, err)
		if n != 0 {
			t.Errorf("%d rules count as removed by somebody", n)
		}
		if fw.families[ipv4].noRecent {
			t.Error("the match recent is given up for good")
		}
		wantRules(t, v, fw.families[ipv4], es)
		remove(t, fw)
	})
}
