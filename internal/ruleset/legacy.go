package ruleset

import (
	"context"
	"encoding/binary"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// legacyText is a table as iptables-save prints it.
type legacyText struct {
	family byte
	text   string
}

// readLegacy reads those of the tables that the legacy iptables has in use, which nf_tables
// knows nothing of: to look at the others would load them.
func readLegacy(tables []string) (texts []legacyText) {
	for _, f := range []struct {
		family      byte
		names, save string
	}{{unix.NFPROTO_IPV4, "ip_tables_names", "iptables-legacy-save"}, {unix.NFPROTO_IPV6, "ip6_tables_names", "ip6tables-legacy-save"}} {
		names, _ := os.ReadFile("/proc/thread-self/net/" + f.names)
		for _, table := range strings.Fields(string(names)) {
			if !slices.Contains(tables, table) {
				continue
			}
			program := f.save
			if _, err := exec.LookPath(program); err != nil {
				// Before 1.8 there is no other; after it this may be nf_tables' own.
				program = strings.Replace(program, "-legacy", "", 1)
			}
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			out, err := exec.CommandContext(ctx, program, "-t", table).Output()
			cancel()
			if err == nil && !strings.Contains(string(out[:min(len(out), 100)]), "nf_tables") {
				texts = append(texts, legacyText{f.family, string(out)})
			}
		}
	}
	return texts
}

var (
	legacyHooks = map[string]uint32{"PREROUTING": unix.NF_INET_PRE_ROUTING, "INPUT": unix.NF_INET_LOCAL_IN, "FORWARD": unix.NF_INET_FORWARD,
		"OUTPUT": unix.NF_INET_LOCAL_OUT, "POSTROUTING": unix.NF_INET_POST_ROUTING}
	legacyPriorities = map[string]int32{"raw": -300, "mangle": -150, "nat": -100, "security": 50}
)

// addText adds tables as iptables-save prints them.
func (r *Ruleset) addText(family byte, text string) {
	table := ""
	for line := range strings.Lines(text) {
		words := split(line)
		switch {
		case len(words) == 0:
		case line[0] == '*':
			table = words[0][1:]
		case line[0] == ':' && len(words) > 1:
			c := Chain{Family: family, Table: table, Name: words[0][1:], Legacy: true, Type: "filter", Drops: words[1] == "DROP"}
			c.Hook, c.Base = legacyHooks[c.Name]
			c.Base = c.Base && words[1] != "-"
			c.Priority = legacyPriorities[table]
			if table == "nat" {
				c.Type = "nat"
			}
			r.Chains = append(r.Chains, c)
			r.rules[c.key(c.Name)] = nil
		case words[0] == "-A" && len(words) > 1:
			k := tableKey{family, true, table, words[1]}
			r.rules[k] = append(r.rules[k], parse(words[2:]))
		}
	}
}

// split splits a line into words, of which some stand in quotes.
func split(line string) (words []string) {
	var word strings.Builder
	quoted, begun := false, false
	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case c == '\\' && quoted && i+1 < len(line):
			i++
			word.WriteByte(line[i])
		case c == '"':
			quoted, begun = !quoted, true
		case !quoted && (c == ' ' || c == '\n' || c == '\t'):
			if begun {
				words = append(words, word.String())
			}
			word.Reset()
			begun = false
		default:
			word.WriteByte(c)
			begun = true
		}
	}
	return words
}

// parse reads the matches and the target of a rule. What it does not know is a match that
// says perhaps.
func parse(words []string) (r Rule) {
	add := func(es ...any) { r.Exprs = append(r.Exprs, es...) }
	not := false
	for i := 0; i < len(words); i++ {
		word := words[i]
		if word == "!" {
			not = true
			continue
		}
		arg := ""
		if i+1 < len(words) {
			arg = words[i+1]
		}
		op := expr.CmpOpEq
		if not {
			op = expr.CmpOpNeq
		}
		known := true
		switch word {
		case "-m":
		case "--comment":
			r.Comment = arg
			i++ // whatever it begins with
		case "-s", "-d":
			es, ok := addrMatch(arg, word == "-s", op)
			add(es...)
			known = ok
		case "-p":
			proto, err := strconv.Atoi(arg)
			if n, ok := map[string]int{"udp": unix.IPPROTO_UDP, "tcp": unix.IPPROTO_TCP}[arg]; ok {
				proto, err = n, nil
			} else if err != nil {
				proto = unix.IPPROTO_RAW // some other
			}
			add(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: []byte{byte(proto)}})
		case "-i", "-o":
			name, wild := strings.CutSuffix(arg, "+")
			data := []byte(name)
			if !wild {
				data = append(data, 0)
			}
			key := map[string]expr.MetaKey{"-i": expr.MetaKeyIIFNAME, "-o": expr.MetaKeyOIFNAME}[word]
			add(&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: data})
		case "--dport", "--sport", "--dports", "--sports", "--ports":
			add(ports(word, arg, not))
		case "--mark":
			if info, ok := pair(arg); ok {
				u := xt.Unknown(append(info, map[bool]byte{true: 1}[not]))
				add(&expr.Match{Name: "mark", Info: &u})
			} else {
				known = false
			}
		case "--ctstate", "--state":
			ct := &xt.ConntrackMtinfo3{}
			ct.MatchFlags = uint16(xt.ConntrackState)
			if not {
				ct.InvertFlags = ct.MatchFlags
			}
			for s := range strings.SplitSeq(arg, ",") {
				ct.StateMask |= map[string]uint16{"INVALID": 1, "ESTABLISHED": 2, "RELATED": 4, "NEW": StateNew, "UNTRACKED": xtUntracked}[s]
			}
			add(&expr.Match{Name: "conntrack", Info: ct})
		case "--src-type", "--dst-type":
			info, ok := addrTypeMatch(arg, word == "--src-type", not)
			add(info)
			known = ok
		case "-j", "-g":
			add(target(arg, word == "-g", words[min(i+2, len(words)):]))
			return r
		default:
			known = false
		}
		if !known {
			add(&expr.Match{Name: word}) // says perhaps
		}
		not = false
		for i+1 < len(words) && words[i+1] != "!" && !strings.HasPrefix(words[i+1], "-") {
			i++
		}
	}
	return r
}

func addrMatch(s string, source bool, op expr.CmpOp) (es []any, ok bool) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return nil, false // such as with a mask of no prefix
		}
		p = netip.PrefixFrom(a, a.BitLen())
	}
	n := uint32(p.Addr().BitLen() / 8)
	at := map[bool]uint32{true: 12, false: 16}[source]
	if n == 16 {
		at = map[bool]uint32{true: 8, false: 24}[source]
	}
	mask := make([]byte, n)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return []any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: at, Len: n},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: n, Mask: mask, Xor: make([]byte, n)},
		&expr.Cmp{Op: op, Register: 1, Data: p.Masked().Addr().AsSlice()},
	}, true
}

// ports is a match of one range, or of several, as the match multiport has it.
func ports(option, list string, not bool) *expr.Match {
	info := make([]byte, 48)
	info[0] = map[string]byte{"--sport": 0, "--sports": 0, "--dport": 1, "--dports": 1, "--ports": 2}[option]
	n := 0
	for r := range strings.SplitSeq(list, ",") {
		ends := strings.SplitN(r, ":", 2)
		for _, port := range ends {
			p, err := strconv.ParseUint(port, 10, 16)
			if err != nil || n == 15 {
				return &expr.Match{Name: option} // says perhaps
			}
			binary.NativeEndian.PutUint16(info[2+2*n:], uint16(p))
			n++
		}
		if len(ends) == 2 {
			info[32+n-2] = 1
		}
	}
	info[1] = byte(n)
	if not {
		info[47] = 1
	}
	u := xt.Unknown(info)
	return &expr.Match{Name: "multiport", Info: &u}
}

func addrTypeMatch(list string, source, not bool) (match *expr.Match, ok bool) {
	var types uint16
	for i, name := range []string{"UNSPEC", "UNICAST", "LOCAL", "BROADCAST", "ANYCAST", "MULTICAST", "BLACKHOLE", "UNREACHABLE", "PROHIBIT"} {
		if slices.Contains(strings.Split(list, ","), name) {
			types |= 1 << i
		}
	}
	info := &xt.AddrTypeV1{Dest: types}
	if not {
		info.Flags = 2
	}
	if source {
		info = &xt.AddrTypeV1{Source: types, Flags: info.Flags / 2}
	}
	return &expr.Match{Name: "addrtype", Info: info}, types != 0
}

// target is what a rule does, with the target's own words. To jump to a chain is written
// as to a target.
func target(name string, isGoto bool, words []string) any {
	switch name {
	case "ACCEPT":
		return &expr.Verdict{Kind: expr.VerdictAccept}
	case "DROP":
		return &expr.Verdict{Kind: expr.VerdictDrop}
	case "RETURN":
		return &expr.Verdict{Kind: expr.VerdictReturn}
	case "DNAT":
		info := &xt.NatRange2{}
		if i := slices.Index(words, "--to-destination"); i >= 0 && i+1 < len(words) {
			if ap, err := netip.ParseAddrPort(words[i+1]); err == nil {
				info.MinIP = ap.Addr().AsSlice()
			} else if a, err := netip.ParseAddr(words[i+1]); err == nil {
				info.MinIP = a.AsSlice()
			}
		}
		return &expr.Target{Name: name, Info: info}
	}
	if isGoto {
		return &expr.Verdict{Kind: expr.VerdictGoto, Chain: name}
	}
	t := &expr.Target{Name: name}
	info := func(b []byte) { u := xt.Unknown(b); t.Info = &u }
	switch {
	case name == "CT" && slices.Contains(words, "--notrack"):
		info(binary.NativeEndian.AppendUint16(nil, ctNotrack))
	case name == "MARK" && len(words) == 2 && words[0] == "--set-xmark":
		if b, ok := pair(words[1]); ok {
			info(b)
		}
	}
	return t
}

// pair reads a mark and its mask, such as 0x10000/0xf0000.
func pair(s string) (b []byte, ok bool) {
	value, mask, masked := strings.Cut(s, "/")
	v, err := strconv.ParseUint(value, 0, 32)
	m, errMask := uint64(0xffffffff), error(nil)
	if masked {
		m, errMask = strconv.ParseUint(mask, 0, 32)
	}
	b = binary.NativeEndian.AppendUint32(nil, uint32(v))
	return binary.NativeEndian.AppendUint32(b, uint32(m)), err == nil && errMask == nil
}
