package nodecache

import (
	"net/netip"
	"os"
	"regexp"
	"sync/atomic"
	"testing"
)

// lastSeen returns when an address was last renewed in its list, in jiffies.
func lastSeen(a netip.Addr) string {
	b, _ := os.ReadFile(recentPath(a))
	m := regexp.MustCompile(`last_seen: (\d+)`).FindSubmatch(b)
	if m == nil {
		return ""
	}
	return string(m[1])
}

func TestHeartRenewsLists(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		fw := newIPTables(func() { t.Error("the rules count as gone") })
		es := dnsOn("169.254.20.10", "fd00:20::10")
		_, err := fw.apply(t.Context(), es, standing{})
		must(t, err)
		for _, a := range addrs("169.254.20.10", "fd00:20::10") {
			if got := lastSeen(a); got != "" {
				t.Errorf("%s is in its list (%s) before anybody listens", a, got)
			}
		}
		fw.enforce(es)
		for _, a := range addrs("169.254.20.10", "fd00:20::10") {
			first := lastSeen(a)
			if first == "" {
				t.Errorf("%s is not in its list", a)
			}
			eventually(t, a.String()+" is renewed", func() bool { s := lastSeen(a); return s != "" && s != first })
		}
		// What is served no longer goes out of force at once.
		fw.enforce(ofFamily(es, ipv6))
		if got := lastSeen(addr("169.254.20.10")); got != "" {
			t.Errorf("169.254.20.10 is still in its list (%s)", got)
		}
		if got := lastSeen(addr("fd00:20::10")); got == "" {
			t.Error("fd00:20::10 is no more in its list")
		}
		fw.enforce(nil)
		if fw.heart.stop != nil {
			t.Error("the heart beats for nothing")
		}
		remove(t, fw)
	})
}

func TestHeartNoticesFlushedRules(t *testing.T) {
	variants(t, func(t *testing.T, v *variant) {
		var flushed atomic.Int32
		fw := newIPTables(func() { flushed.Add(1) })
		es := dnsOn("169.254.20.10")
		_, err := fw.apply(t.Context(), es, standing{})
		must(t, err)
		fw.enforce(es)
		v.run(t, "iptables", "-t", "raw", "-F")
		eventually(t, "flushed is called", func() bool { return flushed.Load() > 0 })
		_, err = fw.apply(t.Context(), es, standing{})
		must(t, err)
		fw.enforce(es)
		if lastSeen(addr("169.254.20.10")) == "" {
			t.Error("the address is not in the new list")
		}
		remove(t, fw)
	})
}
