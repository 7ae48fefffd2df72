package nodecache

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
)

// nftOwn returns the tables that nodecache processes have.
func nftOwn(t testing.TB, c *nftables.Conn) (own []*nftables.Table) {
	t.Helper()
	all, err := c.ListTables()
	must(t, err)
	for _, table := range all {
		if strings.HasPrefix(table.Name, "nodecache-") {
			own = append(own, table)
		}
	}
	return own
}

// elements returns what the kernel has in the sets of the one table, by role.
func elements(t testing.TB) map[string]string {
	t.Helper()
	c, err := dialNFT()
	must(t, err)
	defer c.CloseLasting()
	own := nftOwn(t, c)
	if len(own) != 1 {
		t.Fatalf("%d tables of ours, want one", len(own))
	}
	sets, err := c.GetSets(own[0])
	must(t, err)
	got := map[string][]desired.Endpoint{}
	for _, s := range sets {
		els, err := c.GetSetElements(s)
		must(t, err)
		role := strings.TrimRight(s.Name, "46")
		for _, el := range els {
			k := el.Key
			a, _ := netip.AddrFromSlice(k[4 : len(k)-4])
			e := desired.Endpoint{Addr: a, Proto: map[byte]string{6: "tcp", 17: "udp"}[k[0]], Port: binary.BigEndian.Uint16(k[len(k)-4:])}
			if fmt.Sprint(familyOf(a)) != s.Name[len(role):] {
				t.Errorf("%s is in the set %s", e, s.Name)
			}
			got[role] = append(got[role], e)
		}
	}
	out := map[string]string{}
	for role, es := range got {
		slices.SortFunc(es, desired.Compare)
		out[role] = list(es)
	}
	return out
}

func wantElements(t *testing.T, queries, answers, clients string) {
	t.Helper()
	got := elements(t)
	for role, want := range map[string]string{roleQueries: queries, roleAnswers: answers, roleClients: clients} {
		if got[role] != want {
			t.Errorf("the set %s has %q, want %q", role, got[role], want)
		}
	}
}

// newTestNFT returns the backend, or skips where the kernel has no owned tables.
func newTestNFT(t *testing.T) *nft {
	t.Helper()
	needRoot(t)
	testkit.NeedOwnedTables(t)
	fw := newNFT()
	t.Cleanup(func() {
		remove(t, fw)
		c, err := dialNFT()
		must(t, err)
		defer c.CloseLasting()
		if own := nftOwn(t, c); len(own) != 0 {
			t.Errorf("%d tables are left", len(own))
		}
	})
	return fw
}

func TestNFTTakesQueriesOnlyOnceServed(t *testing.T) {
	fw := newTestNFT(t)
	fw.enforce(dnsOn("10.96.0.10")) // before anything is ensured
	must(t, fw.withdraw(t.Context(), dnsOn("10.96.0.10")))
	es := dnsOn("169.254.20.10", "fd00:20::10")
	all := list(es)
	_, err := fw.apply(t.Context(), es, standing{})
	must(t, err)
	wantElements(t, "", all, "")
	fw.enforce(es)
	wantElements(t, all, all, all)
	if n, err := fw.apply(t.Context(), es, standing{}); n != 0 || err != nil {
		t.Errorf("a second apply found %d missing, error %v", n, err)
	}
	wantElements(t, all, all, all)
}

func TestNFTLeaveTakesNewUDPQueriesOnly(t *testing.T) {
	fw := newTestNFT(t)
	es := dnsOn("169.254.20.10", "fd00:20::10")
	all := list(es)
	_, err := fw.apply(t.Context(), es, standing{})
	must(t, err)
	fw.enforce(es)
	must(t, fw.withdraw(t.Context(), dnsOn("169.254.20.10")))
	rest := list(slices.DeleteFunc(slices.Clone(es), func(e desired.Endpoint) bool { return e == dnsOn("169.254.20.10")[0] }))
	wantElements(t, rest, all, rest)
	must(t, fw.withdraw(t.Context(), dnsOn("169.254.20.10"))) // again
	wantElements(t, rest, all, rest)
}

func TestNFTReloadKeepsWhatStays(t *testing.T) {
	fw := newTestNFT(t)
	old, next := dnsOn("169.254.20.10", "fd00:20::10"), dnsOn("10.96.0.10", "fd00:20::10")
	both := dnsOn("169.254.20.10", "10.96.0.10", "fd00:20::10")
	_, err := fw.apply(t.Context(), old, standing{})
	must(t, err)
	fw.enforce(old)
	_, err = fw.apply(t.Context(), both, standing{})
	must(t, err)
	wantElements(t, list(old), list(both), list(old))
	fw.enforce(both)
	_, err = fw.apply(t.Context(), next, standing{})
	must(t, err)
	wantElements(t, list(next), list(next), list(next))
}

// More elements than a netlink message or a socket's usual buffer holds.
func TestNFTTakesManyEndpoints(t *testing.T) {
	fw := newTestNFT(t)
	var es []desired.Endpoint
	for i := range 2500 {
		es = append(es, dnsOn(fmt.Sprintf("10.%d.%d.1", 1+i/250, i%250), fmt.Sprintf("fd00:20::%x", i+1))...)
	}
	_, err := fw.apply(t.Context(), es, standing{})
	must(t, err)
	fw.enforce(es)
	missing, err := fw.apply(t.Context(), es, standing{})
	must(t, err)
	for s, has := range fw.has { // as read back
		if missing != 0 || len(has) != len(es)/2 {
			t.Errorf("the set %s%d has %d elements, want %d; %d are missing", s.role, s.family, len(has), len(es)/2, missing)
		}
	}
	_, err = fw.apply(t.Context(), es[:4], standing{})
	must(t, err)
	slices.SortFunc(es[:4], desired.Compare)
	wantElements(t, list(es[:4]), list(es[:4]), list(es[:4]))
}

func TestNFTTableIsNobodyElsesToChange(t *testing.T) {
	fw := newTestNFT(t)
	es := dnsOn("169.254.20.10")
	_, err := fw.apply(t.Context(), es, standing{})
	must(t, err)
	other, err := nftables.New()
	must(t, err)
	other.DelTable(fw.table)
	if err := other.Flush(); err == nil {
		t.Error("another process can delete the table")
	}
	other.FlushRuleset()
	other.Flush() // whatever it says
	wantElements(t, "", list(es), "")
}

func TestNFTTableGoesWithItsSocket(t *testing.T) {
	testkit.NeedOwnedTables(t)
	needRoot(t)
	fw := newNFT()
	_, err := fw.apply(t.Context(), dnsOn("169.254.20.10", "fd00:20::10"), standing{})
	must(t, err)
	fw.conn.CloseLasting() // as the kernel does when the process dies
	c, err := nftables.New()
	must(t, err)
	eventually(t, "the table is gone", func() bool { return len(nftOwn(t, c)) == 0 })
}

// A table of a process that was killed is the kernel's to remove; a foreign one
// is not touched, whatever its name.
func TestNFTLeavesForeignTables(t *testing.T) {
	testkit.NeedOwnedTables(t)
	needRoot(t)
	c, err := nftables.New()
	must(t, err)
	foreign := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "nodecache-foreign"})
	must(t, c.Flush())
	defer func() { c.DelTable(foreign); c.Flush() }()
	fw := newNFT()
	_, err = fw.apply(t.Context(), dnsOn("169.254.20.10"), standing{})
	must(t, err)
	if own := nftOwn(t, c); len(own) != 2 {
		t.Errorf("%d tables, want ours and the foreign one", len(own))
	}
	remove(t, fw)
	remove(t, fw)
	if own := nftOwn(t, c); len(own) != 1 || own[0].Name != "nodecache-foreign" {
		t.Errorf("left are %v", own)
	}
}

func TestNFTPutsTableBack(t *testing.T) {
	fw := newTestNFT(t)
	es := dnsOn("169.254.20.10", "fd00:20::10")
	_, err := fw.apply(t.Context(), es, standing{})
	must(t, err)
	fw.enforce(es)
	fw.conn.DelTable(fw.table) // only its owner could
	must(t, fw.conn.Flush())
	n, err := fw.apply(t.Context(), es, standing{})
	must(t, err)
	if n != len(es) {
		t.Errorf("%d were missing, want %d", n, len(es))
	}
	wantElements(t, "", list(es), "")
	fw.enforce(es)
	wantElements(t, list(es), list(es), list(es))
}

func TestNodeWithNFTables(t *testing.T) {
	testkit.NeedOwnedTables(t)
	n, _ := newTestNode(t)
	cfg, err := read(corefile{"nodecache {\ninterface nctest0\nfirewall nftables\nuntracked 8080\n}", "169.254.20.10 fd00:20::10", dns53})
	must(t, err)
	up(t, n, cfg)
	want := dnsOn("169.254.20.10", "fd00:20::10")
	want = append(want, extraPort("169.254.20.10", 8080), extraPort("fd00:20::10", 8080))
	slices.SortFunc(want, desired.Compare)
	wantElements(t, list(want), list(want), list(want))
	n.exit()
	c, err := nftables.New()
	must(t, err)
	if own := nftOwn(t, c); len(own) != 0 {
		t.Errorf("%d tables are left", len(own))
	}
}
