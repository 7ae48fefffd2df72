package ruleset

import (
	"fmt"
	"testing"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// reader makes what it is asked for of a fuzzer's bytes.
type reader struct{ data []byte }

func (r *reader) byte() byte {
	if len(r.data) == 0 {
		return 0
	}
	b := r.data[0]
	r.data = r.data[1:]
	return b
}

func (r *reader) bytes() []byte {
	n := min(int(r.byte())%20, len(r.data))
	b := r.data[:n]
	r.data = r.data[n:]
	return b
}

func (r *reader) expression() any {
	reg := func() uint32 { return uint32(r.byte()) % 32 }
	switch r.byte() % 22 {
	case 0:
		return &expr.Meta{Key: expr.MetaKey(r.byte() % 30), Register: reg(), SourceRegister: r.byte()%8 == 0}
	case 1:
		return &expr.Cmp{Op: expr.CmpOp(r.byte() % 7), Register: reg(), Data: r.bytes()}
	case 2:
		return &expr.Payload{Base: expr.PayloadBase(r.byte() % 4), DestRegister: reg(), Offset: uint32(r.byte()), Len: uint32(r.byte())}
	case 3:
		return &expr.Lookup{SourceRegister: reg(), DestRegister: reg(), IsDestRegSet: r.byte()%2 == 0, SetName: r.name(), Invert: r.byte()%2 == 0}
	case 4:
		return &expr.Range{Op: expr.CmpOp(r.byte() % 2), Register: reg(), FromData: r.bytes(), ToData: r.bytes()}
	case 5:
		return &expr.Bitwise{SourceRegister: reg(), DestRegister: reg(), Len: uint32(r.byte()), Mask: r.bytes(), Xor: r.bytes()}
	case 6:
		return &expr.Ct{Key: expr.CtKey(r.byte() % 20), Register: reg(), SourceRegister: r.byte()%8 == 0}
	case 7:
		return &expr.Immediate{Register: reg(), Data: r.bytes()}
	case 8:
		return &expr.Fib{Register: reg(), ResultADDRTYPE: r.byte()%2 == 0, FlagSADDR: r.byte()%2 == 0, FlagDADDR: r.byte()%2 == 0}
	case 9:
		return &expr.NAT{Type: expr.NATType(r.byte() % 2), RegAddrMin: reg()}
	case 10:
		return &expr.Objref{Type: int(r.byte() % 12)}
	case 11:
		u := xt.Unknown(r.bytes())
		return &expr.Match{Name: []string{"multiport", "state", "comment", "set", "mark"}[r.byte()%5], Info: &u}
	case 12:
		info, err := xt.Unmarshal([]string{"udp", "tcp", "conntrack", "addrtype"}[r.byte()%4], unix.NFPROTO_IPV6, uint32(r.byte()%4), r.data)
		if err != nil {
			return &expr.Match{}
		}
		return &expr.Match{Info: info}
	case 13:
		u := xt.Unknown(r.bytes())
		return &expr.Target{Name: []string{"DNAT", "REJECT", "LOG", "OTHER", "CT", "MARK", "CONNMARK"}[r.byte()%7], Info: &u}
	case 14:
		return Opaque([]string{"socket", "byteorder", "other"}[r.byte()%3])
	case 15:
		return expression(r.byte(), r.data)
	case 16:
		return &expr.Limit{}
	case 17:
		return &expr.Reject{}
	}
	return &expr.Verdict{Kind: expr.VerdictKind(r.byte()%11) - 5, Chain: r.name()}
}

func (r *reader) name() string { return fmt.Sprint(r.byte() % 6) }

// Whatever stands in a ruleset, something is said of every packet, within the bound.
func FuzzEvaluate(f *testing.F) {
	f.Add([]byte{2, 0, 18, 3, 1, 18, 2, 2, 18, 3, 0})
	f.Add([]byte("\x03\x00\x08\x01\x0c\x02\x00\x05\x00\x00\x01\x03\x03\x00\x00\x00\x01\x00"))
	f.Fuzz(func(t *testing.T, data []byte) {
		in := reader{data}
		r := newRuleset()
		for i := range 5 {
			c := Chain{Family: unix.NFPROTO_INET, Table: "t", Name: fmt.Sprint(i), Base: i < 2, Type: "filter", Hook: unix.NF_INET_LOCAL_IN, Drops: i == 1, Priority: -300}
			r.Chains = append(r.Chains, c)
			var rules []Rule
			for range in.byte() % 6 {
				var rule Rule
				for range in.byte() % 8 {
					rule.Exprs = append(rule.Exprs, in.expression())
				}
				rules = append(rules, rule)
			}
			r.rules[c.key(c.Name)] = rules
			var els []element
			for range in.byte() % 6 {
				el := element{Element: Element{From: in.bytes(), Data: in.bytes()}, end: in.byte()%3 == 0, catchAll: in.byte()%9 == 0}
				if in.byte()%3 == 0 {
					el.To = in.bytes()
				}
				if in.byte()%2 == 0 {
					el.Verdict = &Verdict{int32(in.byte()%11) - 5, in.name()}
				}
				if in.byte()%5 == 0 {
					el = readElement(in.data)
				}
				els = append(els, el)
			}
			r.sets[c.key(c.Name)] = assemble(els, in.byte()%2 == 0, []int{int(in.byte()), 2})
		}
		for _, p := range []Packet{query(own4), query(own6), answer(own4), answer(own6)} {
			for _, res := range r.Through(p, unix.NF_INET_LOCAL_IN, "filter") {
				if !res.Accept && !res.Drop && !res.Translated {
					t.Errorf("nothing becomes of %v in chain %s", p, res.Chain.Name)
				}
				if res.Drop && len(res.Places) == 0 && !res.Accept {
					t.Errorf("%v is dropped nowhere", p)
				}
			}
		}
		for _, p := range []Packet{query(own4), answer(own6)} {
			for _, by := range r.Tracking(p, unix.NF_INET_LOCAL_IN, func(c Chain) bool { return c.Name == "2" }).By {
				if by.Rule < 1 || by.Rule > len(r.rules[by.Chain.key(by.Chain.Name)]) {
					t.Errorf("%v is tracked by %v, which is no rule", p, by)
				}
			}
		}
		if r.work > maxWork+10 {
			t.Errorf("%d rules were looked at", r.work)
		}
	})
}

// The same with whatever iptables-save prints.
func FuzzLegacy(f *testing.F) {
	f.Add(kubeProxy)
	f.Add(fmt.Sprintf(rawTable, fmt.Sprintf(calico, calicoPolicy)))
	f.Add("*filter\n:INPUT DROP [0:0]\n:A - [0:0]\n-A INPUT ! -s 10.0.0.0/8 -p udp -m multiport --dports 1,2:3 -m comment --comment \"a \\\" b\" -g A\n-A A -i eth+ --ctstate NEW -j INPUT\nCOMMIT\n")
	f.Fuzz(func(t *testing.T, text string) {
		r := newRuleset()
		r.addText(unix.NFPROTO_IPV4, text)
		for _, hook := range []uint32{unix.NF_INET_PRE_ROUTING, unix.NF_INET_LOCAL_IN} {
			r.Tracking(query(own4), hook, func(Chain) bool { return false })
			for _, res := range r.Through(query(own4), hook, "filter", "nat") {
				if !res.Accept && !res.Drop && !res.Translated {
					t.Errorf("nothing becomes of a query in chain %s of\n%s", res.Chain.Name, text)
				}
			}
		}
	})
}

// A ruleset that is too long to look at is not known to drop anything.
func TestBounded(t *testing.T) {
	r := newRuleset()
	c := Chain{Family: unix.NFPROTO_INET, Table: "t", Name: "input", Base: true, Type: "filter", Hook: unix.NF_INET_LOCAL_IN, Drops: true}
	r.Chains = []Chain{c}
	r.rules[c.key(c.Name)] = make([]Rule, 20_000)
	for i := range 200 {
		got := said(r.Through(query(own4), unix.NF_INET_LOCAL_IN, "filter"))
		if i == 0 && got != "drop" {
			t.Errorf("at first it is known to %q", got)
		}
		if i == 199 && got != "accept drop" {
			t.Errorf("in the end it is known to %q", got)
		}
	}
	if r.work > maxWork+200 {
		t.Errorf("%d rules were looked at", r.work)
	}
}
