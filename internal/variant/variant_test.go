package variant

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
)

// chooseIn marks the process that chooses, in a namespace where a test has put rules.
const chooseIn = "NODECACHE_TEST_CHOOSE_IN"

func TestMain(m *testing.M) {
	if dir := os.Getenv(chooseIn); dir != "" {
		os.Exit(chosen(dir))
	}
	os.Exit(testkit.Main(m))
}

// chosen prints the choice, which variant the commands are of that this process then finds,
// and the legacy tables of its namespace.
func chosen(dir string) int {
	choice, err := Use(dir)
	fmt.Println("choice:", choice)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	for _, c := range []string{"iptables", "ip6tables", "iptables-save", "ip6tables-restore"} {
		out, err := exec.Command(c, "--version").CombinedOutput()
		fmt.Print(string(out))
		if err != nil {
			fmt.Println(err)
		}
	}
	for _, list := range []string{"/proc/thread-self/net/ip_tables_names", "/proc/thread-self/net/ip6_tables_names"} {
		text, _ := os.ReadFile(list)
		fmt.Printf("tables: %s\n", text)
	}
	return 0
}

// run chooses in a network namespace of its own, after a script has put rules there.
func run(t *testing.T, rules string, env ...string) (string, error) {
	t.Helper()
	testkit.NeedRoot(t)
	for _, variant := range []string{legacy, nft} {
		if _, err := os.Stat("/usr/sbin/xtables-" + variant + "-multi"); err != nil {
			t.Skipf("needs both variants of iptables: %v", err)
		}
	}
	dir := t.TempDir()
	if out, err := exec.Command("../../image/layout", dir).CombinedOutput(); err != nil {
		t.Fatalf("layout: %v\n%s", err, out)
	}
	// The table's list in /proc/net is that of the main thread, as it is in a container.
	cmd := exec.Command("unshare", "--net", "sh", "-ec", rules+"\nexec /proc/"+fmt.Sprint(os.Getpid())+"/exe")
	cmd.Env = append(os.Environ(), chooseIn+"="+dir, "PATH=/usr/sbin:/usr/bin:/sbin:/bin", Env+"=")
	cmd.Env = append(cmd.Env, env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestUse(t *testing.T) {
	const legacyRules = `
		iptables-legacy -A INPUT -p udp --dport 1 -j ACCEPT
		iptables-legacy -A INPUT -p udp --dport 2 -j ACCEPT`
	const nftRules = `
		iptables-nft -A INPUT -p udp --dport 1 -j ACCEPT
		iptables-nft -A INPUT -p udp --dport 2 -j ACCEPT
		iptables-nft -A INPUT -p udp --dport 3 -j ACCEPT`

	for name, tt := range map[string]struct {
		rules string
		env   []string
		want  string
	}{
		"nothing":           {"", nil, "nft (0 rules, legacy has 0)"},
		"nft hint":          {legacyRules + "\niptables-nft -t mangle -N KUBE-IPTABLES-HINT", nil, "nft (kubelet's chains are there)"},
		"nft canary, IPv6":  {legacyRules + "\nip6tables-nft -t mangle -N KUBE-KUBELET-CANARY", nil, "nft (kubelet's chains are there)"},
		"legacy hint":       {nftRules + "\niptables-legacy -t mangle -N KUBE-IPTABLES-HINT", nil, "legacy (kubelet's chains are there)"},
		"legacy canary, v6": {nftRules + "\nip6tables-legacy -t mangle -N KUBE-KUBELET-CANARY", nil, "legacy (kubelet's chains are there)"},
		"both hint":         {"for v in legacy nft; do iptables-$v -t mangle -N KUBE-IPTABLES-HINT; done", nil, "nft (kubelet's chains are there)"},
		"another's chain":   {"iptables-legacy -t mangle -N KUBE-IPTABLES-HINTS", nil, "nft (0 rules, legacy has 0)"},
		"legacy rules":      {legacyRules, nil, "legacy (2 rules, nft has 0)"},
		"legacy IPv6 rules": {strings.ReplaceAll(legacyRules, "iptables", "ip6tables"), nil, "legacy (2 rules, nft has 0)"},
		"more nft rules":    {legacyRules + nftRules, nil, "nft (3 rules, legacy has 2)"},
		"forced legacy":     {nftRules, []string{Env + "=legacy"}, "legacy (IPTABLES_VARIANT)"},
		"forced nft":        {legacyRules, []string{Env + "=nft"}, "nft (IPTABLES_VARIANT)"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out, err := run(t, tt.rules, tt.env...)
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			if !strings.HasPrefix(out, "choice: "+tt.want+"\n") {
				t.Errorf("it does not choose %s:\n%s", tt.want, out)
			}
			version := map[string]string{nft: "(nf_tables)\n", legacy: "(legacy)\n"}[strings.Fields(tt.want)[0]]
			if strings.Count(out, version) != 4 {
				t.Errorf("the commands are of another variant:\n%s", out)
			}
		})
	}
}

// A look at the legacy tables must not create them: every packet would pass through
// them from then on.
func TestUseLoadsNoLegacyTable(t *testing.T) {
	out, err := run(t, "")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if strings.Count(out, "tables: \n") != 2 {
		t.Errorf("legacy tables are there:\n%s", out)
	}
}

func TestUseRefusesAnUnknownVariant(t *testing.T) {
	out, err := run(t, "", Env+"=ipfw")
	if err == nil || !strings.Contains(out, `IPTABLES_VARIANT is "ipfw"`) || strings.Contains(out, "nf_tables") {
		t.Errorf("it takes an unknown variant (%v):\n%s", err, out)
	}
}

func TestUseWithoutAnImage(t *testing.T) {
	t.Setenv(Env, "ipfw") // which concerns the image alone
	path := os.Getenv("PATH")
	choice, err := Use(t.TempDir() + "/none")
	if choice != "" || err != nil || os.Getenv("PATH") != path {
		t.Errorf("it chooses %q, %v, and the PATH is %s", choice, err, os.Getenv("PATH"))
	}
}
