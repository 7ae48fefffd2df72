package nodecache

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

// nft is the firewall backend that speaks netlink with nf_tables itself. All its
// rules stand in a table of this process's own with the flag owner (Linux 5.12):
// the kernel removes it when the process ends, however it ends, and lets nobody
// else change it, a flush of the whole ruleset included. The rules look
// endpoints up in sets, so their number does not grow with that of the addresses.
//
// It has no ACCEPT rules: an accept ends only its own table's hook, and a drop in
// another table still holds.
type nft struct {
	conn  *nftables.Conn // keeps one socket open, which the table belongs to
	table *nftables.Table
	sets  map[setOf]*nftables.Set
	// has is what the kernel had in the sets at the last look, or change.
	has map[setOf]map[desired.Endpoint]bool
}

// setOf names one of the table's sets.
type setOf struct {
	family family
	role   string
}

// The roles of the sets, each with a rule of its own.
const (
	roleQueries = "queries" // from elsewhere, in prerouting, while a socket is there
	roleAnswers = "answers" // in output
	roleClients = "clients" // queries of the node's own programs, in output
)

var (
	hooksOfNFT = map[string]*nftables.ChainHook{"prerouting": nftables.ChainHookPrerouting, "output": nftables.ChainHookOutput}
	rolesOfNFT = []struct{ role, chain string }{{roleQueries, "prerouting"}, {roleAnswers, "output"}, {roleClients, "output"}}
)

// priorityOfNFT is before that of iptables' table raw (-300), whose chains could have a packet
// tracked before ours are asked, and after the defragmentation (-400), without which there are
// fragments without ports.
const priorityOfNFT = -350

func newNFT() *nft { return &nft{} }

func (t *nft) String() string { return "nftables" }

func (t *nft) apply(_ context.Context, es []desired.Endpoint, _ standing) (missing int, err error) {
	es = plain(es)
	if t.table != nil {
		switch missing, err = t.readBack(); {
		case errors.Is(err, unix.ENOENT):
			// Only a new network namespace or a kernel's bug could bring this about.
			missing = len(es)
			t.close()
		case err != nil:
			return 0, setupError(errFirewall, fmt.Errorf("looking into the nftables table %s: %w", t.table.Name, err))
		}
	}
	if len(es) == 0 {
		if t.table == nil {
			return 0, nil
		}
		t.conn.DelTable(t.table)
		if err := t.flush("removing"); err != nil {
			return 0, err
		}
		t.close()
		return 0, nil
	}
	if t.table == nil {
		if err := t.create(); err != nil {
			t.close()
			return 0, err
		}
	}
	want := setOfAll(es)
	return missing, t.change(es, func(role string, e desired.Endpoint, stands bool) bool {
		return want[e] && (stands || role == roleAnswers)
	})
}

func (t *nft) enforce(es []desired.Endpoint) {
	es = plain(es)
	if t.table == nil {
		return
	}
	served := setOfAll(es)
	err := t.change(es, func(role string, e desired.Endpoint, stands bool) bool {
		switch role {
		case roleQueries:
			// Where there is no socket the rule for queries is out of force anyway,
			// and it has to stay for connections that are still open.
			return stands || served[e]
		case roleClients:
			return served[e]
		}
		return stands
	})
	if err != nil {
		log.Errorf("%v", count(err))
	}
}

func (t *nft) withdraw(_ context.Context, gone []desired.Endpoint) error {
	if t.table == nil {
		return nil
	}
	left := setOfAll(plain(gone))
	return t.change(nil, func(role string, e desired.Endpoint, stands bool) bool {
		return stands && (role == roleAnswers || e.Proto != "udp" || !left[e])
	})
}

// plain returns es as this backend tells them apart: whose port it is does not
// matter to its rules.
func plain(es []desired.Endpoint) []desired.Endpoint {
	es = slices.Clone(es)
	for i := range es {
		es[i].Extra = false
	}
	return es
}

func setOfAll(es []desired.Endpoint) map[desired.Endpoint]bool {
	set := map[desired.Endpoint]bool{}
	for _, e := range es {
		set[e] = true
	}
	return set
}

// create makes the table, its sets, chains and rules, as one transaction.
func (t *nft) create() (err error) {
	if t.conn, err = dialNFT(); err != nil {
		return setupError(errFirewall, err)
	}
	id := make([]byte, 4) // a process's number is not unique among containers
	rand.Read(id)
	t.table = t.conn.CreateTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "nodecache-" + hex.EncodeToString(id), Flags: nftables.TableFlagOwner})
	t.sets, t.has = map[setOf]*nftables.Set{}, map[setOf]map[desired.Endpoint]bool{}
	chains := map[string]*nftables.Chain{}
	for name, hook := range hooksOfNFT {
		chains[name] = t.conn.AddChain(&nftables.Chain{Name: name, Table: t.table, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityRef(priorityOfNFT)})
	}
	for _, f := range []family{ipv4, ipv6} {
		for _, r := range rolesOfNFT {
			s := setOf{f, r.role}
			addr := nftables.TypeIPAddr
			if f == ipv6 {
				addr = nftables.TypeIP6Addr
			}
			t.has[s] = map[desired.Endpoint]bool{}
			t.sets[s] = &nftables.Set{
				Table: t.table, Name: fmt.Sprintf("%s%d", r.role, f), Concatenation: true,
				KeyType: nftables.MustConcatSetType(nftables.TypeInetProto, addr, nftables.TypeInetService),
			}
			if err := t.conn.AddSet(t.sets[s], nil); err != nil {
				return setupError(errFirewall, fmt.Errorf("adding the nftables set %s: %w", t.sets[s].Name, err))
			}
			t.conn.AddRule(&nftables.Rule{Table: t.table, Chain: chains[r.chain], Exprs: lookup(s, t.sets[s])})
		}
	}
	err = t.flush("making")
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		err = fmt.Errorf("%w (firewall nftables needs Linux 5.12 or newer with nf_tables and nft_socket; firewall iptables does with less)", err)
	}
	return err
}

// lookup is the rule of one set, in nft's words for queries4:
//
//	meta nfproto ipv4 meta l4proto . ip daddr . th dport @queries4 socket exists notrack
func lookup(s setOf, set *nftables.Set) []expr.Any {
	// A concatenation's parts stand in neighbouring 32-bit registers.
	const reg = 8 // NFT_REG32_00
	proto, addrLen, daddr, saddr := byte(unix.NFPROTO_IPV4), uint32(4), uint32(16), uint32(12)
	if s.family == ipv6 {
		proto, addrLen, daddr, saddr = unix.NFPROTO_IPV6, 16, 24, 8
	}
	addr, port := daddr, uint32(2)
	if s.role == roleAnswers {
		addr, port = saddr, 0
	}
	rule := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: []byte{proto}},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg},
		&expr.Payload{DestRegister: reg + 1, Base: expr.PayloadBaseNetworkHeader, Offset: addr, Len: addrLen},
		&expr.Payload{DestRegister: reg + 1 + addrLen/4, Base: expr.PayloadBaseTransportHeader, Offset: port, Len: 2},
		&expr.Lookup{SourceRegister: reg, SetName: set.Name, SetID: set.ID},
	}
	if s.role == roleQueries {
		// The rule ends here when there is no socket. The key is transparent since
		// the others also end it for a connection that is only half open.
		rule = append(rule, &expr.Socket{Key: expr.SocketKeyTransparent, Register: reg})
	}
	return append(rule, &expr.Notrack{})
}

// change has each set hold what wanted says of it, asked about what the set has and
// about es, as one transaction.
func (t *nft) change(es []desired.Endpoint, wanted func(role string, e desired.Endpoint, stands bool) bool) error {
	next := map[setOf]map[desired.Endpoint]bool{}
	for s, has := range t.has {
		var comes, leaves []nftables.SetElement
		next[s] = map[desired.Endpoint]bool{}
		for e := range has {
			if wanted(s.role, e, true) {
				next[s][e] = true
			} else {
				leaves = append(leaves, nftables.SetElement{Key: elementKey(e)})
			}
		}
		for _, e := range es {
			if familyOf(e.Addr) == s.family && !has[e] && !next[s][e] && wanted(s.role, e, false) {
				next[s][e] = true
				comes = append(comes, nftables.SetElement{Key: elementKey(e)})
			}
		}
		// The errors of these two are those of marshalling values of fixed length.
		if len(comes) > 0 {
			t.conn.SetAddElements(t.sets[s], comes)
		}
		if len(leaves) > 0 {
			t.conn.SetDeleteElements(t.sets[s], leaves)
		}
	}
	// One that fails has changed nothing, or what it has the next apply reads back.
	if err := t.flush("writing"); err != nil {
		return err
	}
	t.has = next
	return nil
}

// readTries is how often a set is read in which something seems to lack. While the kernel
// resizes a set's table, as it does for a moment after many elements have come, a dump passes
// some over (seen on 6.18). Nobody else can take any away, so what one of the dumps has is
// there.
const (
	readTries = 5
	readAgain = 2 * time.Millisecond
)

// readBack takes over what the kernel has in the sets, and returns how many endpoints
// it lacks of what was written.
func (t *nft) readBack() (missing int, err error) {
	gone := map[desired.Endpoint]bool{}
	has := map[setOf]map[desired.Endpoint]bool{}
	for s, set := range t.sets {
		has[s] = map[desired.Endpoint]bool{}
		var lacks []desired.Endpoint
		for try := range readTries {
			if try > 0 {
				time.Sleep(readAgain)
			}
			elements, err := nfLook.GetSetElements(set)
			if err != nil {
				return 0, err
			}
			for _, el := range elements {
				if e, ok := endpointOfKey(el.Key); ok {
					has[s][e] = true
				}
			}
			lacks = nil
			for e := range t.has[s] {
				if !has[s][e] {
					lacks = append(lacks, e)
				}
			}
			if len(lacks) == 0 {
				break
			}
		}
		for _, e := range lacks {
			gone[e] = true
		}
	}
	t.has = has
	return len(gone), nil
}

// elementKey is e as an element: protocol, address and port, each padded to 4 bytes.
func elementKey(e desired.Endpoint) []byte {
	proto := byte(unix.IPPROTO_UDP)
	if e.Proto == "tcp" {
		proto = unix.IPPROTO_TCP
	}
	k := append([]byte{proto, 0, 0, 0}, e.Addr.AsSlice()...)
	return append(binary.BigEndian.AppendUint16(k, e.Port), 0, 0)
}

// endpointOfKey is the endpoint of an element, if it is one of ours.
func endpointOfKey(k []byte) (e desired.Endpoint, ok bool) {
	if len(k) < 8 {
		return e, false
	}
	addr, ok := netip.AddrFromSlice(k[4 : len(k)-4])
	e = desired.Endpoint{Addr: addr, Proto: map[byte]string{unix.IPPROTO_UDP: "udp", unix.IPPROTO_TCP: "tcp"}[k[0]], Port: binary.BigEndian.Uint16(k[len(k)-4:])}
	return e, ok && e.Proto != ""
}

func (t *nft) flush(doing string) error {
	if err := t.conn.Flush(); err != nil {
		if errors.Is(err, unix.EPERM) {
			err = fmt.Errorf("%w (the capability NET_ADMIN is missing)", err)
		}
		return setupError(errFirewall, fmt.Errorf("%s the nftables table %s: %w", doing, t.table.Name, err))
	}
	return nil
}

func (t *nft) close() {
	if t.conn != nil {
		t.conn.CloseLasting()
	}
	*t = nft{}
}
