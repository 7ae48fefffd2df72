package ruleset

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/google/nftables/xt"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// patience bounds a look, and each program that it runs.
const patience = 5 * time.Second

// Look has f look at nf_tables, and at those tables of the legacy iptables. f is called again
// when the rules have changed meanwhile. The connection is of its own, which a process with
// many descriptors can have too.
func Look(legacy []string, f func(*Ruleset)) error {
	texts := readLegacy(legacy)
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return fmt.Errorf("opening nf_tables: %w", err)
	}
	defer conn.Close()
	late := time.Now().Add(patience)
	if err := conn.SetDeadline(late); err != nil {
		return fmt.Errorf("looking at nf_tables: %w", err)
	}
	k := kernel{conn}
	for pause := 10 * time.Millisecond; ; pause *= 2 {
		r := newRuleset()
		before, err := k.generation()
		if err == nil {
			r.read, r.readSet = k.rules, k.set
			r.Chains, err = k.chains()
		}
		for _, t := range texts {
			r.addText(t.family, t.text)
		}
		if err != nil && len(texts) == 0 {
			return err
		}
		f(r)
		if err != nil {
			return nil // a kernel without nf_tables
		}
		if after, err := k.generation(); err == nil && bytes.Equal(before, after) {
			return nil
		}
		if time.Now().Add(pause).After(late) {
			return errors.New("looking at nf_tables: it changes all the time")
		}
		time.Sleep(pause)
	}
}

// kernel reads nf_tables.
type kernel struct{ conn *netlink.Conn }

type attr = netlink.Attribute

func text(typ uint16, s string) attr { return attr{Type: typ, Data: append([]byte(s), 0)} }

// ask sends a request and returns the answers' attributes, after the family.
func (k kernel) ask(what int, flags netlink.HeaderFlags, family byte, attrs ...attr) (answers [][]byte, err error) {
	data, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		return nil, err
	}
	msgs, err := k.conn.Execute(netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | what), Flags: netlink.Request | flags},
		Data:   append([]byte{family, unix.NFNETLINK_V0, 0, 0}, data...),
	})
	if err != nil {
		return nil, fmt.Errorf("asking nf_tables: %w", err)
	}
	for _, m := range msgs {
		if len(m.Data) >= 4 {
			answers = append(answers, m.Data)
		}
	}
	return answers, nil
}

// each calls f for every attribute.
func each(data []byte, f func(typ uint16, b []byte)) {
	ad, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return
	}
	for ad.Next() {
		f(ad.Type(), ad.Bytes())
	}
}

func number(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return binary.BigEndian.Uint32(b)
}

func word(b []byte) string { return string(bytes.TrimRight(b, "\x00")) }

// generation changes with every change of the rules.
func (k kernel) generation() ([]byte, error) {
	answers, err := k.ask(unix.NFT_MSG_GETGEN, 0, unix.NFPROTO_UNSPEC)
	return slices.Concat(answers...), err
}

// dormant returns the tables that have been switched off.
func (k kernel) dormant() (tables map[tableKey]bool, err error) {
	const tableDormant = 1 // NFT_TABLE_F_DORMANT
	answers, err := k.ask(unix.NFT_MSG_GETTABLE, netlink.Dump, unix.NFPROTO_UNSPEC)
	tables = map[tableKey]bool{}
	for _, a := range answers {
		t := tableKey{family: a[0]}
		var flags uint32
		each(a[4:], func(typ uint16, b []byte) {
			switch typ {
			case unix.NFTA_TABLE_NAME:
				t.table = word(b)
			case unix.NFTA_TABLE_FLAGS:
				flags = number(b)
			}
		})
		tables[t] = flags&tableDormant != 0
	}
	return tables, err
}

func (k kernel) chains() (chains []Chain, err error) {
	dormant, err := k.dormant()
	if err != nil {
		return nil, err
	}
	answers, err := k.ask(unix.NFT_MSG_GETCHAIN, netlink.Dump, unix.NFPROTO_UNSPEC)
	for _, a := range answers {
		c := Chain{Family: a[0]}
		each(a[4:], func(typ uint16, b []byte) {
			switch typ {
			case unix.NFTA_CHAIN_TABLE:
				c.Table = word(b)
			case unix.NFTA_CHAIN_NAME:
				c.Name = word(b)
			case unix.NFTA_CHAIN_TYPE:
				c.Type = word(b)
			case unix.NFTA_CHAIN_POLICY:
				c.Drops = number(b) == 0
			case unix.NFTA_CHAIN_HOOK:
				c.Base = true
				each(b, func(typ uint16, b []byte) {
					switch typ {
					case unix.NFTA_HOOK_HOOKNUM:
						c.Hook = number(b)
					case unix.NFTA_HOOK_PRIORITY:
						c.Priority = int32(number(b))
					}
				})
			}
		})
		c.Base = c.Base && !dormant[tableKey{family: c.Family, table: c.Table}]
		if c.Family == unix.NFPROTO_IPV4 || c.Family == unix.NFPROTO_IPV6 || c.Family == unix.NFPROTO_INET {
			chains = append(chains, c)
		}
	}
	return chains, err
}

func (k kernel) rules(c Chain) (rules []Rule, err error) {
	answers, err := k.ask(unix.NFT_MSG_GETRULE, netlink.Dump, c.Family, text(unix.NFTA_RULE_TABLE, c.Table), text(unix.NFTA_RULE_CHAIN, c.Name))
	for _, a := range answers {
		var r Rule
		mine := true // older kernels tell of all chains
		each(a[4:], func(typ uint16, b []byte) {
			switch typ {
			case unix.NFTA_RULE_TABLE:
				mine = mine && word(b) == c.Table
			case unix.NFTA_RULE_CHAIN:
				mine = mine && word(b) == c.Name
			case unix.NFTA_RULE_HANDLE:
				if len(b) >= 8 {
					r.Handle = binary.BigEndian.Uint64(b)
				}
			case unix.NFTA_RULE_EXPRESSIONS:
				each(b, func(_ uint16, b []byte) { r.Exprs = append(r.Exprs, expression(c.Family, b)) })
			case unix.NFTA_RULE_USERDATA:
				r.Comment, _ = userdata.GetString(b, userdata.TypeComment)
			}
		})
		for _, e := range r.Exprs {
			if m, ok := e.(*expr.Match); ok && r.Comment == "" {
				r.Comment = commentOf(m)
			}
		}
		if mine {
			rules = append(rules, r)
		}
	}
	return rules, err
}

func commentOf(m *expr.Match) string {
	switch i := m.Info.(type) {
	case *xt.Comment:
		return word([]byte(*i))
	case *xt.Unknown:
		if m.Name == "comment" {
			return word(*i)
		}
	}
	return ""
}

// expression reads one expression. The library's reading of a whole rule leaves out what it
// does not know.
func expression(family byte, data []byte) (read any) {
	var name string
	var body []byte
	defer func() {
		if recover() != nil { // the library takes it that data is as long as it should be
			read = Opaque(name)
		}
	}()
	each(data, func(typ uint16, b []byte) {
		switch typ {
		case unix.NFTA_EXPR_NAME:
			name = word(b)
		case unix.NFTA_EXPR_DATA:
			body = b
		}
	})
	var e expr.Any
	switch name {
	case "bitwise":
		e = &expr.Bitwise{}
	case "cmp":
		e = &expr.Cmp{}
	case "connlimit":
		e = &expr.Connlimit{}
	case "counter":
		return &expr.Counter{}
	case "ct":
		e = &expr.Ct{}
	case "dynset":
		e = &expr.Dynset{}
	case "fib":
		e = &expr.Fib{}
	case "flow_offload":
		return &expr.FlowOffload{}
	case "immediate":
		e = &expr.Immediate{}
	case "limit":
		return &expr.Limit{}
	case "log":
		return &expr.Log{}
	case "lookup":
		e = &expr.Lookup{}
	case "masq":
		return &expr.Masq{}
	case "match":
		e = &expr.Match{}
	case "meta":
		e = &expr.Meta{}
	case "nat":
		e = &expr.NAT{}
	case "notrack":
		return &expr.Notrack{}
	case "numgen":
		e = &expr.Numgen{}
	case "objref":
		e = &expr.Objref{}
	case "payload":
		e = &expr.Payload{}
	case "quota":
		return &expr.Quota{}
	case "range":
		e = &expr.Range{}
	case "redir":
		return &expr.Redir{}
	case "reject":
		return &expr.Reject{}
	case "target":
		e = &expr.Target{}
	default:
		return Opaque(name)
	}
	err := expr.Unmarshal(family, body, e)
	if i, ok := e.(*expr.Immediate); ok && err == nil && i.Register == unix.NFT_REG_VERDICT {
		e = &expr.Verdict{}
		err = expr.Unmarshal(family, body, e)
	}
	if err != nil {
		return Opaque(name)
	}
	return e
}
