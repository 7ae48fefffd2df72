package nodecache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	goiptables "github.com/coreos/go-iptables/iptables"
)

const (
	// lockWait is how long iptables may wait for the xtables lock before the first
	// rules stand, lockWaitLater once they do. A caller's deadline replaces both.
	lockWait      = 20 * time.Second
	lockWaitLater = 3 * time.Second
	// lockPatience is after how long of it the log says so.
	lockPatience = time.Second
)

// The variants of iptables, as the programs call themselves.
const (
	variantLegacy = "legacy"
	variantNFT    = "nf_tables"
)

// program returns the name of one of the family's programs: "", save or restore.
func (x *xtables) program(what string) string {
	name := x.family.program() + x.kind
	if what != "" {
		name += "-" + what
	}
	return name
}

// installed tells whether the programs are there.
func (x *xtables) installed() bool {
	_, err := exec.LookPath(x.program("save"))
	return err == nil
}

// know asks the programs, once, for their version and their variant.
func (x *xtables) know(ctx context.Context) error {
	if x.variant != "" {
		return nil
	}
	proto := goiptables.ProtocolIPv4
	if x.family == ipv6 {
		proto = goiptables.ProtocolIPv6
	}
	ipt, err := goiptables.New(goiptables.IPFamily(proto), goiptables.Path(x.program("")))
	if err != nil {
		// It does not say what the program has said.
		if _, e := x.run(ctx, x.program(""), nil, "--version"); e != nil {
			return e
		}
		return setupError(errFirewall, fmt.Errorf("running %s: %w", x.program(""), err))
	}
	variant, err := x.mode(ctx, ipt)
	if err != nil {
		return err
	}
	major, minor, patch := ipt.GetIptablesVersion()
	x.version = fmt.Sprintf("%d.%d.%d", major, minor, patch)
	// What came with them: the option --wait of iptables-restore; iptables-nft-save of a
	// table that nobody has made yet.
	oldest := map[string][]int{variantLegacy: {1, 6, 2}, variantNFT: {1, 8, 3}}[variant]
	if slices.Compare([]int{major, minor, patch}, oldest) < 0 {
		return setupError(errFirewall, fmt.Errorf("%s %s (%s) is too old; %d.%d.%d or newer is needed, or firewall nftables", x.program(""), x.version, variant, oldest[0], oldest[1], oldest[2]))
	}
	x.variant = variant
	return nil
}

// mode returns the variant of the programs. iptables-save names it at the head of what it
// prints only from 1.8.8 on, and before 1.8 there was but one. go-iptables has read it from
// what the program says of its version, and keeps it to itself; to ask the program again
// would be one process more at each start.
func (x *xtables) mode(ctx context.Context, ipt *goiptables.IPTables) (string, error) {
	if mode := reflect.ValueOf(ipt).Elem().FieldByName("mode"); mode.Kind() == reflect.String && mode.Len() > 0 {
		return mode.String(), nil
	}
	said, err := x.run(ctx, x.program(""), nil, "--version")
	if err != nil {
		return "", err
	}
	if strings.Contains(said, "("+variantNFT+")") {
		return variantNFT, nil
	}
	return variantLegacy, nil
}

// nft tells whether the programs are those of the variant iptables-nft.
func (x *xtables) nft() bool { return x.variant == variantNFT }

// look runs iptables-save for some tables.
func (x *xtables) look(ctx context.Context, names ...string) (map[string]*table, error) {
	have := map[string]*table{}
	for _, name := range names {
		out, err := x.run(ctx, x.program("save"), nil, "-t", name)
		if err != nil {
			return nil, err
		}
		if have[name], err = readTable(name, out); err != nil {
			return nil, setupError(errFirewall, fmt.Errorf("running %s -t %s: %w", x.program("save"), name, err))
		}
	}
	return have, nil
}

// restore runs iptables-restore.
func (x *xtables) restore(ctx context.Context, script []byte) error {
	wait := x.wait(ctx)
	_, err := x.run(ctx, x.program("restore"), script, "--noflush", "--wait", strconv.Itoa(int(wait.Seconds())))
	// Exit status 4 (RESOURCE_PROBLEM in xshared.h) is also what a lock that is not had gives.
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 4 && strings.Contains(err.Error(), "lock") {
		return setupError(errFirewallLock, lockError{fmt.Errorf("another program has held the xtables lock (%s) for %s: %w", lockFile(), wait, err)})
	}
	return err
}

// wait returns how long iptables-restore may wait for the lock, in whole seconds: what
// ctx leaves of them, at least one.
func (x *xtables) wait(ctx context.Context) time.Duration {
	wait := lockWait
	if x.written {
		wait = lockWaitLater
	}
	if deadline, ok := ctx.Deadline(); ok {
		wait = time.Until(deadline)
	}
	return max(time.Second, wait.Truncate(time.Second))
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

// run runs one of the iptables programs, at most until ctx ends.
func (x *xtables) run(ctx context.Context, program string, stdin []byte, args ...string) (stdout string, err error) {
	wait := x.wait(ctx)
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, lockWait+20*time.Second)
		defer cancel()
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.WaitDelay = time.Second
	// A signal to CoreDNS's process group, as from a terminal, must not end it half way.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Stdin = bytes.NewReader(stdin)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	slow := time.AfterFunc(lockPatience, func() {
		log.Warningf("%s is still running; it waits for the xtables lock (%s), at most %s, if another program holds it", program, lockFile(), wait)
	})
	defer slow.Stop()
	began := time.Now()
	if err := cmd.Run(); err != nil {
		said := strings.Join(strings.Fields(errs.String()), " ")
		if ctx.Err() != nil {
			err = ctx.Err()
			said = fmt.Sprintf("it was ended after %s, as there was no more time %s", time.Since(began).Round(time.Millisecond), said)
		}
		if strings.Contains(said, "ermission denied") || strings.Contains(said, "Operation not permitted") {
			said += " (iptables needs the capabilities NET_ADMIN and NET_RAW)"
		}
		if strings.Contains(said, "missing kernel module") || strings.Contains(said, "No chain/target/match by that name") {
			said += " (the kernel lacks a module that the rules need: load xt_socket, xt_recent, xt_CT, xt_comment and xt_addrtype on the host, or use firewall nftables)"
		}
		if said != "" {
			err = fmt.Errorf("%w: %s", err, said)
		}
		return "", setupError(errFirewall, fmt.Errorf("running %s %s: %w", program, strings.Join(args, " "), err))
	}
	return out.String(), nil
}
