package cluster

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// machineSettings are the sysctls of the whole machine that kubelet sets. On the node they are
// plain files.
var machineSettings = []string{
	"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
	"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
}

// RunNode does not return if this process was started to be a node's first process. Programs
// that call New have to call it first.
func RunNode() {
	if os.Args[0] != nodeProcess {
		return
	}
	log.SetFlags(log.Ltime | log.Lmicroseconds)
	var n node
	if err := json.Unmarshal([]byte(os.Args[1]), &n); err != nil {
		log.Fatal(err)
	}
	log.Fatal(n.run())
}

// nodeProcess is what the first process of a node is called.
const nodeProcess = "cluster-node"

// A node is the process 1 of a machine that is made of namespaces: network, mount, pid, uts.
type node struct {
	Kit, State, Setup, Cgroup string
	Dummy                     bool              // the kernel has the driver
	programs                  map[string]string // by process id
}

// run brings the node up, and returns only if it can't.
func (n *node) run() error {
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"mounting file systems", n.mount},
		{"setting the network up", n.network},
		{"starting Kubernetes", n.start},
	} {
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.what, err)
		}
	}
	if err := os.WriteFile(filepath.Join(n.State, "started"), nil, 0o644); err != nil {
		return err
	}
	// Whoever loses its parent becomes a child of this process.
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return fmt.Errorf("waiting for the node's processes: %w", err)
		case n.programs[fmt.Sprint(pid)] != "":
			log.Printf("%s has ended: %#x", n.programs[fmt.Sprint(pid)], status)
		}
	}
}

// mount gives the node a /proc, /sys, /run, /var/lib and /var/log of its own.
func (n *node) mount() error {
	under := func(name string) string { return filepath.Join(n.State, name) }
	for _, m := range []struct {
		what, where, fs string
		flags           uintptr
		data            string
	}{
		{"", "/", "", unix.MS_REC | unix.MS_PRIVATE, ""},
		{"", "/", "", unix.MS_REC | unix.MS_SHARED, ""}, // containers see what is mounted later
		{"proc", "/proc", "proc", 0, ""},
		{"/sys/fs/cgroup", under("cgroup"), "", unix.MS_BIND | unix.MS_REC, ""},
		{"sysfs", "/sys", "sysfs", 0, ""},
		{under("cgroup"), "/sys/fs/cgroup", "", unix.MS_BIND | unix.MS_REC, ""},
		{"tmpfs", "/run", "tmpfs", 0, "mode=755"},
		{under("lib"), "/var/lib", "", unix.MS_BIND, ""},
		{under("log"), "/var/log", "", unix.MS_BIND, ""},
	} {
		if err := unix.Mount(m.what, m.where, m.fs, m.flags, m.data); err != nil {
			return fmt.Errorf("mounting %s: %w", m.where, err)
		}
	}
	for _, name := range machineSettings {
		path := filepath.Join("/proc/sys", name)
		value, err := os.ReadFile(path)
		if err != nil {
			continue // the kernel has no such setting
		}
		own := under(strings.ReplaceAll(name, "/", "."))
		if err := os.WriteFile(own, value, 0o644); err != nil {
			return err
		}
		if err := unix.Mount(own, path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mounting %s: %w", path, err)
		}
	}
	return unix.Sethostname([]byte(nodeName))
}

// network makes eth0, which leads to a namespace where nothing is but the DNS server of the
// world outside.
func (n *node) network() error {
	commands := []string{
		"ip link set lo up",
		"ip netns add outside",
		"ip link add eth0 type veth peer name eth0 netns outside",
		"ip link set eth0 up",
		"ip -n outside link set lo up",
		"ip -n outside link set eth0 up",
	}
	for _, f := range setups[n.Setup].families {
		flag := "" // of IPv6: an address can be used at once
		if f.Bits == ipv6.Bits {
			flag = " nodad"
		}
		commands = append(commands,
			fmt.Sprintf("ip addr add %s/%d dev eth0%s", f.Node, f.Bits, flag),
			fmt.Sprintf("ip -n outside addr add %s/%d dev eth0%s", f.Outside, f.Bits, flag),
			fmt.Sprintf("ip route add %s via %s", f.Default, f.Outside),
			fmt.Sprintf("ip -n outside route add %s via %s", f.Default, f.Node))
	}
	for _, command := range commands {
		if err := run(strings.Fields(command)...); err != nil {
			return err
		}
	}
	for _, setting := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		if err := os.WriteFile("/proc/sys/net/"+setting, []byte("1"), 0); err != nil {
			return err
		}
	}
	return nil
}

func run(words ...string) error {
	out, err := exec.Command(words[0], words[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("running %s: %w: %s", strings.Join(words, " "), err, out)
	}
	return nil
}

// start starts the programs, each when those that it needs answer.
func (n *node) start() error {
	setup := setups[n.Setup]
	nodeAddrs := each(setup.families, ",", func(f family) string { return f.Node })
	serviceNets := each(setup.families, ",", func(f family) string { return f.ServiceNet })
	conf := func(name string) string { return filepath.Join(n.State, name) }
	kubeconfig := func(name string) string { return "--kubeconfig=" + conf(name+".kubeconfig") }
	n.programs = map[string]string{}
	if err := n.launch("outside", "ip", "netns", "exec", "outside", filepath.Join(n.Kit, "bin/coredns"), "-conf", conf("outside.conf")); err != nil {
		return err
	}
	if err := n.launch("etcd", "etcd", "--data-dir="+conf("etcd"),
		"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
		"--listen-peer-urls=http://127.0.0.1:2380", "--logger=zap"); err != nil {
		return err
	}
	if err := n.launch("containerd", "containerd", "--config="+conf("containerd.toml")); err != nil {
		return err
	}
	if err := n.launch("kube-apiserver", "kube-apiserver",
		"--etcd-servers=http://127.0.0.1:2379", "--bind-address=::", "--advertise-address="+setup.families[0].Node, "--secure-port=6443",
		"--service-cluster-ip-range="+serviceNets, "--cert-dir="+n.State,
		"--tls-cert-file="+conf("server.crt"), "--tls-private-key-file="+conf("server.key"), "--client-ca-file="+conf("ca.crt"),
		"--token-auth-file="+conf("tokens.csv"), "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+conf("accounts.pub"),
		"--service-account-signing-key-file="+conf("accounts.key"), "--kubelet-preferred-address-types=InternalIP"); err != nil {
		return err
	}
	if err := poll("containerd answers", func() error { return ctr(n.Kit, "version") }); err != nil {
		return err
	}
	archives, err := filepath.Glob(filepath.Join(n.Kit, "images/*.tar"))
	if err != nil {
		return err
	}
	for _, archive := range archives {
		if err := ctr(n.Kit, "images", "import", archive); err != nil {
			return err
		}
	}
	if err := poll("the API server is ready", func() error { return ready(setup.apiURL()) }); err != nil {
		return err
	}
	for _, program := range [][]string{
		{"kube-controller-manager", kubeconfig("kube-controller-manager"), "--leader-elect=false",
			"--use-service-account-credentials=true", "--service-account-private-key-file=" + conf("accounts.key"),
			"--root-ca-file=" + conf("ca.crt"), "--cluster-cidr=" + setup.podNets(), "--service-cluster-ip-range=" + serviceNets},
		{"kube-scheduler", kubeconfig("kube-scheduler"), "--leader-elect=false"},
		{"kubelet", kubeconfig("kubelet"), "--config=" + conf("kubelet.yaml"), "--hostname-override=" + nodeName, "--node-ip=" + nodeAddrs, "--v=2"},
		{"kube-proxy", "--config=" + conf("kube-proxy.yaml"), "--v=2"},
	} {
		if err := n.launch(program[0], program...); err != nil {
			return err
		}
	}
	return nil
}

// launch starts a program, which writes to logs/NAME.log.
func (n *node) launch(name string, words ...string) error {
	path, err := exec.LookPath(words[0])
	if err != nil {
		return err
	}
	out, err := os.Create(filepath.Join(n.State, "logs", name+".log"))
	if err != nil {
		return err
	}
	defer out.Close()
	p, err := os.StartProcess(path, words, &os.ProcAttr{
		Dir: "/", Env: os.Environ(), Files: []*os.File{nil, out, out},
		Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("starting %s: %w", name, err)
	}
	n.programs[fmt.Sprint(p.Pid)] = name
	log.Printf("%s is process %d", name, p.Pid)
	return p.Release()
}

// ctr runs containerd's client.
func ctr(kit string, args ...string) error {
	return run(append([]string{filepath.Join(kit, "root/usr/bin/ctr"), "--address=/run/containerd/containerd.sock", "--namespace=k8s.io"}, args...)...)
}

// ready asks an API server whether it is.
func ready(url string) error {
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, // it is not told anything
	}}
	defer client.CloseIdleConnections()
	answer, err := client.Get(url + "/readyz")
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", answer.Status, text)
	}
	return err
}

// poll repeats a check until it succeeds, or for as long as patience lasts.
func poll(what string, check func() error) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return nil
		}
		if errors.Is(err, errEnded) {
			return fmt.Errorf("waiting until %s: %w", what, err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting until %s: not within %v: %w", what, patience, err)
		}
	}
}
