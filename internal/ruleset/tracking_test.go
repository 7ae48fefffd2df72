package ruleset

import (
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// ours are the chains of a cache.
func ours(c Chain) bool {
	return strings.HasPrefix(c.Name, "NODECACHE-") || strings.HasPrefix(c.Table, "nodecache-")
}

// A cache's rules in the table raw as iptables-save prints them, with rules of others
// before the jump there, and chains of theirs.
const rawTable = `*raw
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:NODECACHE-PREROUTING - [0:0]
%s
-A PREROUTING -m comment --comment "nodecache: DNS cache of this node" -j NODECACHE-PREROUTING
-A NODECACHE-PREROUTING -d 10.96.0.10/32 -p udp -m udp --dport 53 -m socket -m comment --comment "nodecache: queries to 10.96.0.10:53/udp" -j NOTRACK
COMMIT
`

// calico is what Calico has in the table raw of a node, with a policy that keeps what comes
// from one network out of connection tracking.
const calico = `:cali-PREROUTING - [0:0]
:cali-from-host-endpoint - [0:0]
-A PREROUTING -m comment --comment "cali:6gwbT8clXdHdC1b1" -j cali-PREROUTING
-A cali-PREROUTING -m comment --comment "cali:x" -j MARK --set-xmark 0x0/0xf0000
-A cali-PREROUTING -i cali+ -m comment --comment "cali:y" -j MARK --set-xmark 0x40000/0x40000
-A cali-PREROUTING -m comment --comment "cali:z" -m mark --mark 0x40000/0x40000 -m rpfilter --validmark --invert -j DROP
-A cali-PREROUTING -m comment --comment "cali:v" -m mark --mark 0x0/0x40000 -j cali-from-host-endpoint
-A cali-PREROUTING -m comment --comment "cali:w" -m mark --mark 0x10000/0x10000 -j ACCEPT
%s`

const calicoPolicy = `-A cali-from-host-endpoint -s 10.1.0.0/16 -j MARK --set-xmark 0x10000/0x10000
-A cali-from-host-endpoint -m mark --mark 0x10000/0x10000 -j NOTRACK
-A cali-from-host-endpoint -m mark --mark 0x10000/0x10000 -j RETURN`

func TestTrackingByTextOfIptables(t *testing.T) {
	for before, want := range map[string]string{
		"":                                                 "untracked",
		"-A PREROUTING ! -p 253 -j ACCEPT":                 "tracked by PREROUTING 1",
		"-A PREROUTING -j RETURN":                          "tracked by PREROUTING 1",
		"-A PREROUTING -j NOTRACK":                         "untracked",
		"-A PREROUTING -j CT --notrack":                    "untracked",
		"-A PREROUTING -j CT --zone 7":                     "tracked by PREROUTING 1",
		"-A PREROUTING -p udp -j CT --helper tftp":         "tracked by PREROUTING 1",
		"-A PREROUTING -p tcp -j ACCEPT":                   "untracked",
		"-A PREROUTING -j DROP":                            "",
		"-A PREROUTING -i eth0 -j DROP":                    "untracked",
		"-A PREROUTING -i eth0 -j ACCEPT":                  "untracked tracked by PREROUTING 1",
		"-A PREROUTING -i lo -j ACCEPT":                    "untracked",
		"-A PREROUTING -s 10.0.1.0/24 -j ACCEPT":           "untracked tracked by PREROUTING 1",
		"-A PREROUTING -p udp -m udp --dport 53 -j ACCEPT": "tracked by PREROUTING 1",
		"-A PREROUTING -d 10.96.0.11/32 -j ACCEPT":         "untracked",
		"-A PREROUTING -m set --match-set x src -j ACCEPT": "untracked tracked by PREROUTING 1",
		"-A PREROUTING -m mark --mark 0x1/0x1 -j ACCEPT":   "untracked",
		"-A PREROUTING -m mark ! --mark 0x1/0x1 -j ACCEPT": "tracked by PREROUTING 1",
		"-A PREROUTING -j MARK --set-xmark 0x4/0xc\n-A PREROUTING -m mark --mark 0x4/0xc -j ACCEPT": "tracked by PREROUTING 2",
		"-A PREROUTING -j CONNMARK --restore-mark\n-A PREROUTING -m mark --mark 0x4/0xc -j ACCEPT":  "untracked tracked by PREROUTING 2",
		":x - [0:0]\n-A PREROUTING -j x\n-A x -j ACCEPT":                                            "tracked by x 1",
		":x - [0:0]\n-A PREROUTING -j x\n-A x -j RETURN":                                            "untracked",
		":x - [0:0]\n-A PREROUTING -g x\n-A x -p tcp -j DROP":                                       "tracked by PREROUTING 1",
		":x - [0:0]\n-A PREROUTING -g x\n-A x -j RETURN":                                            "tracked by PREROUTING 1",
		":x - [0:0]\n-A PREROUTING -g x\n-A x -j NOTRACK":                                           "untracked",
		":x - [0:0]\n-A PREROUTING -j x\n-A x -j x":                                                 "untracked", // not known, so not said
		fmt.Sprintf(calico, ""):                                                                     "untracked",
		fmt.Sprintf(calico, calicoPolicy):                                                           "untracked",
		fmt.Sprintf(calico, strings.ReplaceAll(calicoPolicy, "NOTRACK", "LOG")):                     "untracked tracked by cali-PREROUTING 5",
	} {
		r := Of(unix.NFPROTO_IPV4, fmt.Sprintf(rawTable, before))
		if got := saidOf(r.Tracking(query(own4), unix.NF_INET_PRE_ROUTING, ours)); got != want {
			t.Errorf("with %s\nit is %q, want %q", before, got, want)
		}
	}
	r := Of(unix.NFPROTO_IPV4, strings.ReplaceAll(fmt.Sprintf(rawTable, ""), "-A NODECACHE-PREROUTING", "-A OTHER"))
	if got := saidOf(r.Tracking(query(own4), unix.NF_INET_PRE_ROUTING, ours)); got != "tracked" {
		t.Errorf("without a rule of ours it is %q", got)
	}
}

func saidOf(t Tracking) string {
	var words []string
	if t.Untracked {
		words = append(words, "untracked")
	}
	if t.Tracked {
		words = append(words, "tracked")
	}
	for _, p := range t.By {
		words = append(words, "by", p.Chain.Name, fmt.Sprint(p.Rule))
	}
	return strings.Join(words, " ")
}

// A query by way of lo meets other rules than one that goes out by a link.
func TestTrackingOfOwnQueries(t *testing.T) {
	text := strings.ReplaceAll(fmt.Sprintf(rawTable, "-A PREROUTING -o lo -j ACCEPT"), "PREROUTING", "OUTPUT")
	r := Of(unix.NFPROTO_IPV4, text)
	for loopback, want := range map[bool]string{false: "untracked", true: "tracked by OUTPUT 1"} {
		p := query(own4)
		p.Src, p.Loopback = own4, loopback
		if got := saidOf(r.Tracking(p, unix.NF_INET_LOCAL_OUT, ours)); got != want {
			t.Errorf("by lo %v: it is %q, want %q", loopback, got, want)
		}
	}
}

// What chains of nf_tables before and after those of a cache come to, as the kernel has
// them.
func TestTrackingInNFTables(t *testing.T) {
	const cache = `table inet nodecache-1 {
		set queries4 { type inet_proto . ipv4_addr . inet_service; elements = { udp . 10.96.0.10 . 53 }; }
		chain prerouting { type filter hook prerouting priority -350; meta nfproto ipv4 meta l4proto . ip daddr . th dport @queries4 socket transparent { 0, 1 } notrack; }
	}
	`
	for chains, want := range map[string]string{
		"": "untracked",
		"chain a { type filter hook prerouting priority -400; accept; }":                                                                  "untracked",
		"chain a { type filter hook prerouting priority -400; drop; }":                                                                    "",
		"chain a { type filter hook prerouting priority -400; policy drop; iif lo accept; }":                                              "",
		"chain a { type filter hook prerouting priority -400; notrack; }":                                                                 "untracked",
		"chain a { type filter hook prerouting priority -400; ct zone set 3; }":                                                           "tracked by a 1",
		"chain a { type filter hook prerouting priority -300; udp dport 53 ct zone set 3; }":                                              "tracked by a 1",
		"chain a { type filter hook prerouting priority -300; udp dport 54 ct zone set 3; }":                                              "untracked",
		"chain a { type filter hook prerouting priority -300; iifname eth1 ct zone set 3; }":                                              "untracked tracked by a 1",
		"chain a { type filter hook prerouting priority -150; ct zone set 3; }":                                                           "untracked",
		"chain a { type filter hook output priority -400; ct zone set 3; }":                                                               "untracked",
		"chain b { ct zone set 3; }; chain a { type filter hook prerouting priority -300; jump b; }":                                      "tracked by b 1",
		"chain a { type filter hook prerouting priority -300; meta mark set 4; meta mark 4 ct zone set 3; }":                              "tracked by a 2",
		"chain a { type filter hook prerouting priority -300; meta mark 4 ct zone set 3; }":                                               "untracked",
		"chain a { type filter hook prerouting priority -300; udp dport vmap { 53 : accept, 54 : drop }; ct zone set 3; }":                "untracked",
		"chain b { ct zone set 3; }; chain a { type filter hook prerouting priority -300; udp dport vmap { 52 : accept, 53 : jump b }; }": "tracked by b 1",
	} {
		inKernel(t, cache+"table ip theirs { "+chains+"; }", func(r *Ruleset) {
			if got := saidOf(r.Tracking(query(own4), unix.NF_INET_PRE_ROUTING, ours)); got != want {
				t.Errorf("with %s\nit is %q, want %q", chains, got, want)
			}
		}, "nft", "-f", "-")
	}
}
