package nodecache

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"github.com/vishvananda/netlink"
)

// faults are what commonly goes wrong on a node although everything of ours stands.
// Each one is looked for after a start and a reload and then from time to time, and told
// with its remedy in the log when it comes up. A look changes nothing, and one that
// fails finds nothing.
var faults = []fault{
	{"rules_of_node_cache", rulesOfNodeCache},
	{"shared_port", sharedPort},
	{"address_elsewhere", addressElsewhere},
	{"firewall_drops", firewallDrops},
	{"conntrack_full", conntrackFull},
	{"bridge_netfilter_off", bridgeNetfilterOff},
	{"networkmanager", networkManager},
}

// fault is one of them. find returns a sentence for each place where it is.
type fault struct {
	name string
	find func(site) []string
}

// site is what a look has to know of this process.
type site struct {
	links     map[string]bool // ours, by name
	placed    map[netip.Addr]*placed
	listeners []endpoint
	backends  map[string]bool
	// raw is, by family, what a look of the backend iptables at the rules of the table
	// raw has seen; nil where it has not looked.
	raw map[family][]string
	ask func() (others, error)
}

func (n *node) site(cfg *config) site {
	s := site{links: map[string]bool{}, placed: cfg.addrs, listeners: cfg.listeners(), backends: map[string]bool{}, ask: func() (others, error) { return n.member.ask(askLimit) }}
	for name := range n.netifs {
		s.links[name] = true
	}
	for name := range n.want.rules {
		s.backends[name] = true
	}
	if t, ok := n.firewalls[backendIPT].(*iptables); ok {
		s.raw = map[family][]string{}
		for f, x := range t.families {
			s.raw[f] = x.first
		}
	}
	return s
}

// examined begins the line that ends an examination.
const examined = "looked for what commonly goes wrong on a node: "

// examineEvery is how long after an examination the next check brings another.
const examineEvery = 5 * time.Minute

// examination is the last one. Its lock keeps two from running at once.
var examination struct {
	sync.Mutex
	found map[string]int // by fault
}

// examine looks for faults and tells of each; again says that it has done so before for
// this configuration, and that only news count.
func (n *node) examine(s site, again bool) {
	defer outlive("looking for faults of the node")
	examination.Lock()
	defer examination.Unlock()
	total, found := 0, map[string]int{}
	for _, f := range faults {
		texts := f.find(s)
		if !again || len(texts) > examination.found[f.name] {
			for _, text := range texts {
				log.Warningf("%s", text)
			}
		}
		total += len(texts)
		found[f.name] = len(texts)
		nodeFaults.WithLabelValues(f.name).Set(float64(len(texts)))
	}
	if !again || !maps.Equal(found, examination.found) {
		log.Infof("%s%d found", examined, total)
	}
	examination.found = found
}

// examineAgain has the node examined if the last time is a while ago.
func (n *node) examineAgain() {
	if n.running == nil || n.exited || time.Since(n.examinedAt) < examineEvery {
		return
	}
	n.examinedAt = time.Now()
	go n.examine(n.site(n.running), true)
}

// addrs returns the addresses that the configuration binds.
func (s site) addrs() []netip.Addr { return slices.SortedFunc(maps.Keys(s.placed), netip.Addr.Compare) }

func join[T fmt.Stringer](vs []T) string {
	var ss []string
	for _, v := range vs {
		ss = append(ss, v.String())
	}
	return strings.Join(ss, ", ")
}

// nodeCacheComment begins the comments of the rules that node-cache of kubernetes/dns
// writes (since 1.22.6).
const nodeCacheComment = "NodeLocal DNS Cache"

// rulesOfNodeCache finds NOTRACK rules of node-cache for our addresses. They match
// whether somebody listens or not.
func rulesOfNodeCache(s site) []string {
	var found []netip.Addr
	for _, f := range []family{ipv4, ipv6} {
		own := slices.DeleteFunc(s.addrs(), func(a netip.Addr) bool { return familyOf(a) != f })
		if len(own) == 0 {
			continue
		}
		lines := s.raw[f]
		if s.raw == nil {
			lines = rulesInRaw(f)
		}
		for _, a := range own {
			if slices.ContainsFunc(lines, func(l string) bool {
				return strings.Contains(l, nodeCacheComment) && strings.Contains(l, " -d "+a.String()+"/")
			}) {
				found = append(found, a)
			}
		}
	}
	if len(found) == 0 {
		return nil
	}
	return []string{fmt.Sprintf("node-cache's rules (%q) for %s stand in the table raw, and take queries out of connection tracking even when nobody listens, so that the cluster can't answer in this cache's place: when node-cache has left this node for good, remove them with: for t in raw filter; do iptables-save -t $t | sed -n \"/%s/s/^-A/iptables -t $t -D/p\"; done | sh (and the same with ip6tables)",
		nodeCacheComment, join(found), nodeCacheComment)}
}

// rulesInRaw returns the rules of a family's table raw, as iptables-save prints them
// as far as their destination and comment go: what nf_tables has of it, where
// iptables-nft writes, and what the legacy program says if its table is in use, as to
// look would load it.
func rulesInRaw(f family) (lines []string) {
	names := map[family]string{ipv4: "ip_tables_names", ipv6: "ip6_tables_names"}
	legacy, _ := os.ReadFile("/proc/thread-self/net/" + names[f])
	if slices.Contains(strings.Fields(string(legacy)), "raw") {
		ctx, cancel := context.WithTimeout(context.Background(), lockWait)
		defer cancel()
		if out, err := exec.CommandContext(ctx, f.program()+"-save", "-t", "raw").Output(); err == nil {
			lines = slices.AppendSeq(lines, strings.Lines(string(out)))
		}
	}
	table := &nftables.Table{Name: "raw", Family: nftables.TableFamilyIPv4}
	if f == ipv6 {
		table.Family = nftables.TableFamilyIPv6
	}
	rules, err := nfLook.GetRules(table, &nftables.Chain{Name: "PREROUTING"})
	if err != nil {
		return lines
	}
	for _, r := range rules {
		line := ""
		for _, e := range r.Exprs {
			switch e := e.(type) {
			case *expr.Cmp:
				if a, ok := netip.AddrFromSlice(e.Data); ok && e.Op == expr.CmpOpEq {
					line += " -d " + a.String() + "/"
				}
			case *expr.Match:
				if c, ok := e.Info.(*xt.Comment); ok {
					line += " " + string(*c)
				} else if u, ok := e.Info.(*xt.Unknown); ok && e.Name == "comment" {
					line += " " + string(bytes.TrimRight(*u, "\x00"))
				}
			}
		}
		lines = append(lines, line+" "+string(r.UserData))
	}
	return lines
}

// sharedPort finds programs that are not nodecache on an address and port of ours.
// With SO_REUSEPORT and the same user the kernel lets them, and gives them a share of
// the queries.
func sharedPort(s site) (found []string) {
	for _, e := range s.listeners {
		if e.proto != "udp" {
			continue
		}
		by := stranger(e)
		if by == "" {
			continue
		}
		// Asked after the look, so that it is known of all that the look can have seen.
		o, err := s.ask()
		if err == nil && !o.serves[e] && !o.unknown && o.states[processIdle]+o.states[processSilent] == 0 {
			found = append(found, fmt.Sprintf("%s is served%s too, which takes a share of its queries and loses them when it ends: stop that program, unless this is a change from it to this cache", e, by))
		}
	}
	return found
}

// addressElsewhere finds addresses of ours that another dummy link carries: those of
// an interface that somebody has made for a cache, and may remove.
func addressElsewhere(s site) (found []string) {
	carriers, err := addressCarriers()
	if err != nil {
		return nil
	}
	for _, a := range s.addrs() {
		if !s.placed[a].foreign {
			continue
		}
		for _, name := range carriers[a] {
			if l, err := linkByName(name); err == nil && l != nil && !s.links[name] && name != ipvsLink {
				if _, err := linkKind(l); err == nil {
					found = append(found, fmt.Sprintf("%s is on the link %s, which is not this cache's, so that the address goes when somebody removes that link: name it as the interface of nodecache, or remove the link and reload", a, name))
				}
			}
		}
	}
	return found
}

// firewallDrops finds chains of nf_tables that drop what comes in unless a rule of
// their own accepts it. Our ACCEPT rules, which the backend iptables has in its own
// tables, have no effect there.
func firewallDrops(s site) (found []string) {
	if len(s.backends) == 0 {
		return nil
	}
	chains, err := nfLook.ListChains()
	if err != nil {
		return nil
	}
	for _, c := range chains {
		if c.Hooknum == nil || *c.Hooknum != *nftables.ChainHookInput || c.Policy == nil || *c.Policy != nftables.ChainPolicyDrop {
			continue
		}
		ip := c.Table.Family == nftables.TableFamilyIPv4 || c.Table.Family == nftables.TableFamilyIPv6
		if ip && c.Table.Name == "filter" && s.backends[backendIPT] {
			continue // of iptables-nft: our ACCEPT is in there
		}
		if !ip && c.Table.Family != nftables.TableFamilyINet || mentionsDNS(c.Table) {
			continue
		}
		found = append(found, fmt.Sprintf("the firewall drops what comes in and no rule of its accepts (chain %s of the nftables table %s), and none of its rules names port 53: have it accept UDP and TCP to port 53 of %s, whatever the connection state, or pods get no answer",
			c.Name, c.Table.Name, join(s.addrs())))
	}
	return found
}

// mentionsDNS tells whether a rule or a set of the table has the port 53.
func mentionsDNS(t *nftables.Table) bool {
	port := binary.BigEndian.AppendUint16(nil, 53)
	chains, err := nfLook.ListChains()
	if err != nil {
		return true
	}
	for _, c := range chains {
		if c.Table.Name != t.Name || c.Table.Family != t.Family {
			continue
		}
		rules, err := nfLook.GetRules(t, c)
		if err != nil {
			return true
		}
		for _, r := range rules {
			for _, e := range r.Exprs {
				switch e := e.(type) {
				case *expr.Cmp:
					if bytes.Equal(e.Data, port) {
						return true
					}
				case *expr.Range:
					if len(e.FromData) == 2 && bytes.Compare(e.FromData, port) <= 0 && bytes.Compare(port, e.ToData) <= 0 {
						return true
					}
				case *expr.Match:
					if slices.Contains([]string{"tcp", "udp", "multiport", "set"}, e.Name) {
						return true // of older iptables, and not read here
					}
				}
			}
		}
	}
	sets, err := nfLook.GetSets(t)
	if err != nil {
		return true
	}
	for _, set := range sets {
		elements, err := nfLook.GetSetElements(set)
		if err != nil {
			return true
		}
		for _, e := range elements {
			// Alone, or the last part of a concatenation, padded to four bytes.
			if bytes.Equal(e.Key, port) || len(e.Key) >= 4 && bytes.Contains(e.Key, append(port, 0, 0)) {
				return true
			}
		}
	}
	return false
}

// conntrackNearlyFull is at which share of its limit the table counts as full.
const conntrackNearlyFull = 0.9

// conntrackFull finds a connection tracking table with hardly any room. Queries to
// the cache need none, but its own to the cluster and the outside do.
func conntrackFull(site) []string {
	count, max := sysctlValue("net/netfilter/nf_conntrack_count"), sysctlValue("net/netfilter/nf_conntrack_max")
	if max == 0 || float64(count) < conntrackNearlyFull*float64(max) {
		return nil
	}
	return []string{fmt.Sprintf("the connection tracking table is nearly full (%d of %d entries): answers from the cache do not need it, but this cache's own queries to its upstreams are dropped when it is full, and so are the pods' other connections: raise net.netfilter.nf_conntrack_max, or find who opens so many connections", count, max)}
}

// sysctlValue returns 0 where there is no such setting.
func sysctlValue(path string) int {
	b, err := os.ReadFile("/proc/sys/" + path)
	if err != nil {
		return 0
	}
	v, _ := strconv.Atoi(strings.TrimSpace(string(b)))
	return v
}

// bridgeNetfilterOff finds bridges whose frames pass by iptables and nf_tables. It
// matters when a pod's query falls through to a DNS pod on the same bridge: the answer
// goes straight back over the bridge, with the DNS pod's address on it, which the
// asking pod does not know.
func bridgeNetfilterOff(s site) (found []string) {
	links, err := dumped(netlink.LinkList)
	if err != nil {
		return nil
	}
	pods := map[int]int{} // veth links by their bridge's index
	for _, l := range links {
		if l.Type() == "veth" && l.Attrs().MasterIndex != 0 {
			pods[l.Attrs().MasterIndex]++
		}
	}
	for _, f := range []family{ipv4, ipv6} {
		name := map[family]string{ipv4: "bridge-nf-call-iptables", ipv6: "bridge-nf-call-ip6tables"}[f]
		// A ClusterIP can't be told from other addresses, but a link-local one is none.
		if sysctlValue("net/bridge/"+name) != 0 || !slices.ContainsFunc(s.addrs(), func(a netip.Addr) bool {
			return familyOf(a) == f && !a.IsLinkLocalUnicast() && !a.IsLoopback() && !s.placed[a].foreign
		}) {
			continue
		}
		for _, l := range links {
			// One pod alone has no other to ask.
			if l.Type() != "bridge" || pods[l.Attrs().Index] < 2 || !routes(l, f) {
				continue
			}
			found = append(found, fmt.Sprintf("pods on the bridge %s get no answer from a DNS pod on the same bridge when this cache is down, since net.bridge.%s is off: load the module br_netfilter and set net.bridge.%s=1, as kube-proxy asks for too", l.Attrs().Name, name, name))
		}
	}
	return found
}

// routes tells whether a link has an address of the family, as the bridge that is its
// pods' gateway has.
func routes(l netlink.Link, f family) bool {
	addrs, err := dumped(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_ALL) })
	return err == nil && slices.ContainsFunc(addrs, func(a netlink.Addr) bool {
		ip, ok := netip.AddrFromSlice(a.IP)
		return ok && familyOf(ip.Unmap()) == f && !ip.IsLinkLocalUnicast()
	})
}

// networkManagerState is where NetworkManager keeps what it does with each link (as of
// 1.42: devices/INDEX, and the profiles that it has made itself). Another mount
// namespace, such as a container's, has it only if it is mounted there.
var networkManagerState = "/run/NetworkManager"

// networkManager finds links of ours to which NetworkManager applies a profile, so that
// they have its addresses and lose ours. A link that it manages but has only noted
// as made by somebody else ("connected (externally)") it leaves as it is.
func networkManager(s site) (found []string) {
	for name := range s.links {
		l, err := linkByName(name)
		if err != nil || l == nil {
			continue
		}
		state, err := os.ReadFile(filepath.Join(networkManagerState, "devices", strconv.Itoa(l.Attrs().Index)))
		if err != nil || keyOf(state, "managed") != "true" || keyOf(state, "connection-uuid") == "" {
			continue
		}
		external := false
		made, _ := filepath.Glob(filepath.Join(networkManagerState, "system-connections", "*"))
		for _, file := range made {
			profile, err := os.ReadFile(file)
			external = external || err == nil && keyOf(profile, "uuid") == keyOf(state, "connection-uuid") && keyOf(profile, "external") == "true"
		}
		if !external {
			found = append(found, fmt.Sprintf("NetworkManager manages the link %s by a profile of its own, and takes other addresses from it: write [keyfile] and unmanaged-devices=interface-name:%s to /etc/NetworkManager/conf.d/nodecache.conf, and run nmcli general reload", name, name))
		}
	}
	return found
}

// keyOf returns the value of a key in a file of GLib's key file format, whatever its
// group.
func keyOf(file []byte, key string) string {
	for line := range strings.Lines(string(file)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok && k == key {
			return v
		}
	}
	return ""
}
