package nodecache

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

var update = flag.Bool("update", false, "write the files testdata/*.golden anew")

// saved is a table as of an iptables-save's output, less its first and last line.
func saved(t testing.TB, name, text string) *table {
	t.Helper()
	got, err := readTable(name, "*"+name+"\n"+text+"COMMIT\n")
	must(t, err)
	return got
}

func TestInputOfIPTablesRestore(t *testing.T) {
	v4, v6 := dnsOn("169.254.20.10", "10.96.0.10"), dnsOn("fd00:20::10")
	none := map[string]*table{"raw": saved(t, "raw", ""), "filter": saved(t, "filter", "")}
	// Two processes at once could leave a jump twice.
	doubled := map[string]*table{
		"raw": saved(t, "raw", `:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:NODECACHE-PREROUTING - [0:0]
:NODECACHE-OUTPUT - [0:0]
-A PREROUTING -m comment --comment "nodecache: DNS cache of this node" -j NODECACHE-PREROUTING
-A PREROUTING -p udp -j FOREIGN
-A PREROUTING -m comment --comment "nodecache: DNS cache of this node" -j NODECACHE-PREROUTING
-A OUTPUT -m comment --comment "nodecache: DNS cache of this node" -j NODECACHE-OUTPUT
`),
		"filter": saved(t, "filter", ":INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n"),
	}
	// Of another process and of another release, and one of nobody's.
	shared := map[string]*table{
		"raw": saved(t, "raw", `:NODECACHE-PREROUTING - [0:0]
-A NODECACHE-PREROUTING -d 10.9.9.9/32 -p udp -m udp --dport 53 -m socket --transparent -m comment --comment "nodecache: queries to 10.9.9.9:53/udp" -j NOTRACK
-A NODECACHE-PREROUTING -d 169.254.20.10/32 -p udp -m comment --comment "nodecache: new words for 169.254.20.10:53/udp" -j NOTRACK
-A NODECACHE-PREROUTING -d 10.8.8.8/32 -p udp -m comment --comment "nodecache: queries to 10.8.8.8:53/udp" -j NOTRACK
-A NODECACHE-PREROUTING -p udp -j ACCEPT
`),
		"filter": saved(t, "filter", ""),
	}
	script := func(x *xtables, have map[string]*table, own []desired.Endpoint, o standing) []byte {
		return x.rewrite(have, own, o).script()
	}
	for name, input := range map[string][]byte{
		"v4":        script(&xtables{family: ipv4}, none, v4, standing{}),
		"v6":        script(&xtables{family: ipv6}, none, v6, standing{}),
		"extra":     script(&xtables{family: ipv4}, none, append(dnsOn("169.254.20.10"), extraPort("169.254.20.10", 8080)), standing{}),
		"leaving":   script(&xtables{family: ipv4}, none, v4, standing{Leaving: v4[:2]}),
		"no-recent": script(&xtables{family: ipv6, noRecent: true}, none, v6, standing{}),
		"repair":    script(&xtables{family: ipv4}, doubled, dnsOn("169.254.20.10"), standing{}),
		"removal":   script(&xtables{family: ipv4}, doubled, nil, standing{}),
		"nothing":   script(&xtables{family: ipv4}, none, nil, standing{}),
		"others":    script(&xtables{family: ipv4}, shared, dnsOn("169.254.20.10")[:1], standing{Others: dnsOn("10.9.9.9", "169.254.20.10", "10.7.7.7")}),
		"last":      script(&xtables{family: ipv4}, shared, dnsOn("169.254.20.10")[:1], standing{}),
		"unknown":   script(&xtables{family: ipv4}, shared, dnsOn("169.254.20.10")[:1], standing{Unknown: true, Leaving: dnsOn("169.254.20.10")}),
	} {
		file := filepath.Join("testdata", "restore-"+name+".golden")
		if *update {
			must(t, os.MkdirAll("testdata", 0o755))
			must(t, os.WriteFile(file, input, 0o644))
		}
		want, err := os.ReadFile(file)
		must(t, err)
		if !bytes.Equal(input, want) {
			t.Errorf("%s differs; got\n%s", file, input)
		}
	}
}
