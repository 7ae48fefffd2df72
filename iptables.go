package nodecache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	goiptables "github.com/coreos/go-iptables/iptables"
	"github.com/google/nftables"
)

// hooks are our chains, and where each is jumped to from.
var hooks = []hook{
	{"raw", "PREROUTING", "NODECACHE-PREROUTING"},
	{"raw", "OUTPUT", "NODECACHE-OUTPUT"},
	{"filter", "INPUT", "NODECACHE-INPUT"},
	{"filter", "OUTPUT", "NODECACHE-OUTPUT"},
}

type hook struct{ table, builtin, chain string }

// jump is the rule that leads from h's built-in chain to ours.
func (h hook) jump() string {
	return "-m comment --comment \"nodecache: DNS cache of this node\" -j " + h.chain
}

const (
	// lockWait is how long iptables may wait for the xtables lock before the
	// first rules stand; later, and so at an exit, it is lockWaitLater.
	lockWait      = 20 * time.Second
	lockWaitLater = 3 * time.Second
	// lockPatience is after how long of it the log says so.
	lockPatience = time.Second
	// beatEvery and beatSeconds: see heart.
	beatEvery   = time.Second
	beatSeconds = 3
)

// iptables is the firewall backend that runs the iptables programs. All rules
// stand in chains of our own and are written in one transaction per table.
//
// What keeps a rule from being in force when nobody listens: for queries from
// elsewhere the match socket, which finds no socket then. It can't be had in
// OUTPUT, so the rules for the node's own queries use the match recent, on a list
// that this process has to renew every few seconds (see heart).
type iptables struct {
	families map[family]*xtables
	heart    *heart
}

// xtables is one family's part.
type xtables struct {
	family  family
	found   bool       // the programs are there and answer
	version string     // "1.8.9 (nf_tables)"
	written bool       // by this process
	es      []endpoint // as written
	leaving []endpoint // of es, as written
	heeded  []endpoint // see firewall.heed
	first   []string   // rules of raw's PREROUTING at the last look, everybody's
	keep    bool
	// noRecent is set where the kernel has no match recent, or its list can't be
	// written: then only the address guards the rules for the node's own queries.
	noRecent bool
}

// newIPTables returns the backend. flushed is called when the kernel shows that
// somebody has removed our rules.
func newIPTables(flushed func()) *iptables {
	return &iptables{families: map[family]*xtables{ipv4: {family: ipv4}, ipv6: {family: ipv6}}, heart: newHeart(flushed)}
}

func (t *iptables) String() string {
	for _, f := range []family{ipv4, ipv6} {
		if v := t.families[f].version; v != "" {
			return "iptables " + v
		}
	}
	return "iptables"
}

func (t *iptables) ensure(es []endpoint) (missing int, err error) {
	for _, f := range []family{ipv4, ipv6} {
		x, own := t.families[f], ofFamily(es, f)
		if len(own) == 0 && !x.written {
			// Maybe a process before us had this family: look, where one can.
			if _, err := exec.LookPath(f.program() + "-save"); err != nil || len(es) == 0 {
				continue
			}
		}
		n, e := x.ensure(own)
		missing += n
		err = errors.Join(err, e)
	}
	return missing, err
}

// iptablesLeft tells, without running a program, whether there may be chains of
// ours: seen through nf_tables, or in the legacy variant's table raw, which most
// nodes do not have and nobody else can look into.
func iptablesLeft() bool {
	for _, names := range []string{"ip_tables_names", "ip6_tables_names"} {
		if b, err := os.ReadFile("/proc/thread-self/net/" + names); err == nil && slices.Contains(strings.Fields(string(b)), "raw") {
			return true
		}
	}
	conn, err := nftables.New()
	if err != nil {
		return false
	}
	chains, err := conn.ListChains()
	return err == nil && slices.ContainsFunc(chains, func(c *nftables.Chain) bool {
		return slices.ContainsFunc(hooks, func(h hook) bool { return h.chain == c.Name })
	})
}

// sweep removes what a killed process has left, where the programs are there.
func (t *iptables) sweep() (err error) {
	for _, f := range []family{ipv4, ipv6} {
		if _, missing := exec.LookPath(f.program() + "-save"); missing == nil {
			_, e := t.families[f].ensure(nil)
			err = errors.Join(err, e)
		}
	}
	return err
}

func ofFamily(es []endpoint, f family) []endpoint {
	var own []endpoint
	for _, e := range es {
		if familyOf(e.addr) == f {
			own = append(own, e)
		}
	}
	return own
}

func (t *iptables) serve(es []endpoint) {
	t.heart.only(es)
	for _, f := range []family{ipv4, ipv6} {
		if !t.families[f].noRecent {
			t.heart.beat(ofFamily(es, f))
		}
	}
}

func (t *iptables) leave(es, gone []endpoint) (err error) {
	for _, f := range []family{ipv4, ipv6} {
		x, own := t.families[f], ofFamily(gone, f)
		if len(own) > 0 && x.written {
			err = errors.Join(err, x.leave(ofFamily(es, f), own))
		}
	}
	return err
}

func (t *iptables) heed(leaving []endpoint, keep bool) {
	for f, x := range t.families {
		x.heeded, x.keep = ofFamily(leaving, f), keep
	}
}

// ensure is firewall.ensure for one family. It runs iptables once to know it,
// iptables-save twice and, only where something is missing, iptables-restore once.
func (x *xtables) ensure(es []endpoint) (missing int, err error) {
	if !x.found {
		// The version is not needed, but an iptables that can't say it can do nothing.
		proto := goiptables.ProtocolIPv4
		if x.family == ipv6 {
			proto = goiptables.ProtocolIPv6
		}
		if _, err := goiptables.New(goiptables.IPFamily(proto), goiptables.Timeout(int(lockWait.Seconds()))); err != nil {
			return 0, setupError(errFirewall, fmt.Errorf("running %s: %w", x.family.program(), err))
		}
		x.found = true
	}
	have := map[string]*table{}
	for _, name := range []string{"raw", "filter"} {
		if have[name], err = x.save(name); err != nil {
			return 0, err
		}
	}
	x.first = have["raw"].chains["PREROUTING"]
	es, leaving := x.kept(have, es)
	missing = x.missing(have, es, leaving)
	if missing == 0 && (x.written || len(es) == 0) && !x.surplus(have, es, leaving) {
		x.es, x.leaving = es, leaving // another process may have written them
		return 0, nil
	}
	err = x.restore(x.script(have, es, leaving))
	if err != nil && !x.noRecent && len(es) > 0 && !errors.As(err, new(lockError)) {
		// Try without the one match that a small kernel may lack.
		x.noRecent = true
		if x.restore(x.script(have, es, leaving)) != nil {
			x.noRecent = false
			return 0, err
		}
		log.Warningf("the kernel took the rules only without the match recent (module xt_recent): when this process dies, the node's own programs will not fall back to the cluster")
		err = nil
	}
	if err != nil {
		return 0, err
	}
	x.es, x.leaving, x.written = es, leaving, len(es) > 0
	if len(es) > 0 && !x.noRecent && !writable(recentPath(es[0].addr)) {
		x.noRecent = true
		log.Warningf("%s can't be written: when this process dies, the node's own programs will not fall back to the cluster", recentPath(es[0].addr))
		// The chains and jumps stand now, so there is nothing to look up.
		if err := x.restore(x.chains(nil, es, leaving)); err != nil {
			return 0, err
		}
	}
	return missing, nil
}

// leave rewrites the chains of the table raw without the rules for new UDP
// queries to gone.
func (x *xtables) leave(es, gone []endpoint) error {
	have := map[string]*table{"raw": {}}
	if x.keep {
		raw, err := x.save("raw")
		if err != nil {
			return err
		}
		have["raw"] = raw
	}
	es, leaving := x.kept(have, es)
	x.es, x.leaving = es, append(leaving, gone...)
	return x.restore(x.chains([]string{"raw"}, x.es, x.leaving))
}

// kept returns es and what else has to stand since nothing may go, and what of
// both is being left.
func (x *xtables) kept(have map[string]*table, es []endpoint) (all, leaving []endpoint) {
	all, leaving = slices.Clone(es), slices.Clone(x.heeded)
	if !x.keep {
		return all, leaving
	}
	lines := func(h hook) []string {
		if t := have[h.table]; t != nil {
			return t.chains[h.chain]
		}
		return nil
	}
	known := func(e endpoint) bool {
		return slices.ContainsFunc(all, func(o endpoint) bool { return compareEndpoints(o, e) == 0 })
	}
	for _, h := range hooks { // PREROUTING first: its rules alone tell all of an endpoint
		for _, line := range lines(h) {
			e, ok := ruleOf(line)
			if !ok || known(e) {
				continue
			}
			all = append(all, e)
			if h.builtin != "PREROUTING" {
				leaving = append(leaving, e)
			}
		}
	}
	return all, leaving
}

// ruleOf returns the endpoint that a rule of ours, as iptables-save prints it, is for.
func ruleOf(line string) (e endpoint, ok bool) {
	_, comment, _ := strings.Cut(line, "--comment \"nodecache: ")
	comment, _, _ = strings.Cut(comment, "\"")
	at, proto, ok := strings.Cut(comment[strings.LastIndexByte(comment, ' ')+1:], "/")
	ap, err := netip.ParseAddrPort(at)
	return endpoint{ap.Addr(), proto, ap.Port(), strings.HasPrefix(comment, "requests ")}, ok && err == nil
}

// nft tells whether the programs are those of the variant iptables-nft.
func (x *xtables) nft() bool { return strings.Contains(x.version, "nf_tables") }

// table is what iptables-save says of our chains in one table.
type table struct {
	chains map[string][]string // rules by chain; built-in chains too
}

// save runs iptables-save for one table.
func (x *xtables) save(name string) (*table, error) {
	out, err := x.run(x.family.program()+"-save", nil, "-t", name)
	if err != nil {
		return nil, err
	}
	t := &table{chains: map[string][]string{}}
	for line := range strings.Lines(out) {
		line = strings.TrimRight(line, "\n")
		switch f := strings.Fields(line); {
		case strings.HasPrefix(line, "#"):
			// # Generated by iptables-save v1.8.9 on Mon ...
			// # Generated by iptables-nft-save v1.8.9 (nf_tables) on Mon ...
			if i := slices.Index(f, "on"); i > 0 && slices.Contains(f, "Generated") {
				if v := f[slices.IndexFunc(f, isVersion)+1 : i]; len(v) > 0 {
					x.version = strings.TrimPrefix(f[i-2], "v") + " " + v[0]
				} else {
					x.version = strings.TrimPrefix(f[i-1], "v") + " (legacy)"
				}
			}
		case strings.HasPrefix(line, ":"):
			t.chains[strings.TrimPrefix(f[0], ":")] = nil
		case strings.HasPrefix(line, "-A "):
			t.chains[f[1]] = append(t.chains[f[1]], line)
		}
	}
	return t, nil
}

func isVersion(s string) bool { return len(s) > 1 && s[0] == 'v' && s[1] >= '0' && s[1] <= '9' }

// jumps returns the lines of t that jump to h's chain.
func (t *table) jumps(h hook) (lines []string) {
	for _, line := range t.chains[h.builtin] {
		if strings.HasSuffix(line, " -j "+h.chain) {
			lines = append(lines, line)
		}
	}
	return lines
}

// rule is one rule of one of our chains. Its comment is unique in the chain.
type rule struct{ comment, match, target string }

func (r rule) String() string {
	return fmt.Sprintf("%s -m comment --comment \"%s\" -j %s", r.match, r.comment, r.target)
}

// in tells whether lines, of iptables-save, have r. The programs print a match in
// more than one way, so it is known by its comment and its target.
func (r rule) in(lines []string) bool {
	return slices.ContainsFunc(lines, func(line string) bool {
		return strings.Contains(line, "--comment \""+r.comment+"\"") && strings.HasSuffix(line, " -j "+r.target)
	})
}

// missing counts the jumps and rules for es that are not in have.
func (x *xtables) missing(have map[string]*table, es, leaving []endpoint) (n int) {
	if len(es) == 0 {
		return 0
	}
	for _, h := range hooks {
		if len(have[h.table].jumps(h)) == 0 {
			n++
		}
		for _, r := range x.rules(h, es, leaving) {
			if !r.in(have[h.table].chains[h.chain]) {
				n++
			}
		}
	}
	return n
}

// surplus tells whether have holds more of ours than es wants.
func (x *xtables) surplus(have map[string]*table, es, leaving []endpoint) bool {
	for _, h := range hooks {
		lines, there := have[h.table].chains[h.chain]
		jumps := len(have[h.table].jumps(h))
		if len(es) == 0 && (there || jumps > 0) || len(es) > 0 && (jumps > 1 || len(lines) > len(x.rules(h, es, leaving))) {
			return true
		}
	}
	return false
}

// rules returns the rules of one of our chains for es; of those that are also in
// leaving, the rules for new UDP queries are left out.
func (x *xtables) rules(h hook, es, leaving []endpoint) (rs []rule) {
	for _, e := range es {
		to := fmt.Sprintf("-d %s -p %s -m %s --dport %d", e.addr, e.proto, e.proto, e.port)
		from := fmt.Sprintf("-s %s -p %s -m %s --sport %d", e.addr, e.proto, e.proto, e.port)
		add := func(what, match, target string) {
			rs = append(rs, rule{fmt.Sprintf("nodecache: %s %s", what, e), match, target})
		}
		stays := e.proto != "udp" || !slices.Contains(leaving, e)
		switch h {
		case hook{"raw", "PREROUTING", "NODECACHE-PREROUTING"}:
			switch {
			case !stays:
			case e.extra: // health and metrics may listen on the wildcard
				add("requests to", to+" -m socket --nowildcard", "NOTRACK")
			default:
				add("queries to", to+" -m socket", "NOTRACK")
			}
		case hook{"raw", "OUTPUT", "NODECACHE-OUTPUT"}:
			add("answers from", from, "NOTRACK")
			guard := fmt.Sprintf(" -m recent --rcheck --seconds %d --name %s --rdest", beatSeconds, recentName(e.addr))
			if x.noRecent {
				guard = " -m addrtype --dst-type LOCAL"
			}
			if stays {
				add("queries of this node to", to+guard, "NOTRACK")
			}
		case hook{"filter", "INPUT", "NODECACHE-INPUT"}:
			add("queries to", to, "ACCEPT")
			add("answers to this node from", from+" -i lo", "ACCEPT")
		case hook{"filter", "OUTPUT", "NODECACHE-OUTPUT"}:
			add("answers from", from, "ACCEPT")
			add("queries of this node to", to+" -o lo", "ACCEPT")
		}
	}
	return rs
}

// script returns the input of iptables-restore --noflush that leads from have
// to the rules for es.
func (x *xtables) script(have map[string]*table, es, leaving []endpoint) []byte {
	if len(es) > 0 {
		var jumps []string
		for _, h := range hooks {
			old := have[h.table].jumps(h)
			for _, line := range old[min(1, len(old)):] {
				jumps = append(jumps, h.table+" "+strings.Replace(line, "-A ", "-D ", 1))
			}
			if len(old) == 0 {
				jumps = append(jumps, fmt.Sprintf("%s -I %s 1 %s", h.table, h.builtin, h.jump()))
			}
		}
		return x.chains(nil, es, leaving, jumps...)
	}
	var b bytes.Buffer
	for _, name := range []string{"raw", "filter"} {
		fmt.Fprintf(&b, "*%s\n", name)
		for _, h := range hooks {
			if _, there := have[name].chains[h.chain]; h.table != name || !there {
				continue
			}
			fmt.Fprintf(&b, ":%s - [0:0]\n", h.chain)
			for _, line := range have[name].jumps(h) {
				fmt.Fprintln(&b, strings.Replace(line, "-A ", "-D ", 1))
			}
			fmt.Fprintf(&b, "-X %s\n", h.chain)
		}
		fmt.Fprintln(&b, "COMMIT")
	}
	return b.Bytes()
}

// chains returns the input of iptables-restore that writes our chains of these
// tables (nil: all) anew. more are further lines, each after its table's name.
func (x *xtables) chains(tables []string, es, leaving []endpoint, more ...string) []byte {
	var b bytes.Buffer
	for _, name := range []string{"raw", "filter"} {
		if tables != nil && !slices.Contains(tables, name) {
			continue
		}
		fmt.Fprintf(&b, "*%s\n", name)
		for _, h := range hooks {
			if h.table == name {
				fmt.Fprintf(&b, ":%s - [0:0]\n", h.chain) // made, or emptied
			}
		}
		for _, h := range hooks {
			if h.table == name {
				for _, r := range x.rules(h, es, leaving) {
					fmt.Fprintf(&b, "-A %s %s\n", h.chain, r)
				}
			}
		}
		for _, line := range more {
			if rest, ok := strings.CutPrefix(line, name+" "); ok {
				fmt.Fprintln(&b, rest)
			}
		}
		fmt.Fprintln(&b, "COMMIT")
	}
	return b.Bytes()
}

// restore runs iptables-restore, which commits each table as one transaction.
func (x *xtables) restore(script []byte) error {
	program := x.family.program() + "-restore"
	_, err := x.run(program, script, "--noflush", "--wait", strconv.Itoa(int(x.wait().Seconds())))
	// Exit status 4 (RESOURCE_PROBLEM in xshared.h) is also what a lock that is not had gives.
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 4 && strings.Contains(err.Error(), "lock") {
		return setupError(errFirewallLock, lockError{fmt.Errorf("another program has held the xtables lock (%s) for %s: %w", lockFile(), x.wait(), err)})
	}
	return err
}

func (x *xtables) wait() time.Duration {
	if x.written {
		return lockWaitLater
	}
	return lockWait
}

func lockFile() string {
	if f := os.Getenv("XTABLES_LOCKFILE"); f != "" {
		return f
	}
	return "/run/xtables.lock"
}

// lockError says that the xtables lock was not to be had in time.
type lockError struct{ error }

func (e lockError) Unwrap() error { return e.error }

// run runs one of the iptables programs, bounded in time.
func (x *xtables) run(program string, stdin []byte, args ...string) (stdout string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), lockWait+20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.WaitDelay = time.Second
	// A signal to CoreDNS's process group, as from a terminal, must not end it half way.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Stdin = bytes.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	slow := time.AfterFunc(lockPatience, func() {
		log.Warningf("%s is still running; it waits for the xtables lock (%s), at most %s, if another program holds it", program, lockFile(), x.wait())
	})
	defer slow.Stop()
	if err := cmd.Run(); err != nil {
		said := strings.Join(strings.Fields(errs.String()), " ")
		if strings.Contains(said, "ermission denied") || strings.Contains(said, "Operation not permitted") {
			said += " (iptables needs the capabilities NET_ADMIN and NET_RAW)"
		}
		if strings.Contains(said, "missing kernel module") || strings.Contains(said, "No chain/target/match by that name") {
			said += " (the kernel lacks a module that the rules need: load xt_socket, xt_recent, xt_CT, xt_comment and xt_addrtype on the host, or use firewall nftables)"
		}
		return "", setupError(errFirewall, fmt.Errorf("running %s %s: %w: %s", program, strings.Join(args, " "), err, said))
	}
	return out.String(), nil
}

// recentName is the name of an address's list of the match recent.
func recentName(a netip.Addr) string { return "nodecache_" + a.String() }

// recentPath is the file through which a list is written. The kernel makes it
// with the first rule that names the list and removes it with the last.
func recentPath(a netip.Addr) string { return "/proc/thread-self/net/xt_recent/" + recentName(a) }

func writable(path string) bool {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return false
	}
	f.Close()
	return true
}

// heart keeps the rules for the node's own queries in force: they match while
// the address has been written to its list in the last beatSeconds. So they go
// out of force by themselves when this process dies.
type heart struct {
	flushed func()
	mu      sync.Mutex
	addrs   map[netip.Addr]bool
	stop    chan struct{} // closes to end the goroutine; nil while none runs
}

func newHeart(flushed func()) *heart {
	return &heart{flushed: flushed, addrs: map[netip.Addr]bool{}}
}

// beat starts to keep the rules for the addresses of es in force.
func (h *heart) beat(es []endpoint) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, e := range es {
		h.addrs[e.addr] = true
	}
	h.write()
	if h.stop == nil && len(h.addrs) > 0 {
		h.stop = make(chan struct{})
		go h.run(h.stop)
	}
}

// only puts the rules for every address that is not in es out of force.
func (h *heart) only(es []endpoint) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for a := range h.addrs {
		if !slices.ContainsFunc(es, func(e endpoint) bool { return e.addr == a }) {
			tell('-', a) // where there is no list there is no rule
			delete(h.addrs, a)
		}
	}
	if len(h.addrs) == 0 && h.stop != nil {
		close(h.stop)
		h.stop = nil
	}
}

func (h *heart) run(stop <-chan struct{}) {
	tick := time.NewTicker(beatEvery)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
			h.mu.Lock()
			gone := h.write()
			h.mu.Unlock()
			if gone {
				h.flushed()
			}
		}
	}
}

// write renews every list and tells whether one is gone, and with it the rules.
func (h *heart) write() (gone bool) {
	for a := range h.addrs {
		if tell('+', a) != nil {
			gone = true
		}
	}
	return gone
}

// tell writes to an address's list that it has (+) the address or has it no more
// (-). The kernel takes one such line for each time that the file is opened.
func tell(sign byte, a netip.Addr) error {
	f, err := os.OpenFile(recentPath(a), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(f, "%c%s\n", sign, a)
	return errors.Join(err, f.Close())
}
