// Package cluster runs Kubernetes on this machine, for tests that apply manifests: one node in
// namespaces of its own, on which all of Kubernetes' programs run, with Debian's etcd, containerd
// and runc. Nothing of the machine's own network, file systems and settings is touched but a
// cgroup. No registry is asked: images are files that are imported.
//
//	pods 10.244.0.0/24 ---- node 10.245.0.2 ---- 10.245.0.1 the DNS server of the world outside
//
// or the same with IPv6, alone or beside (setup.go).
//
// It takes root, overlayfs, and what `make test-cluster` fetches and builds.
package cluster

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// ClusterIP is the address of the cluster's DNS Service, where the cluster has IPv4.
const ClusterIP = "10.96.0.10"

const nodeName = "node1"

// PauseImage is the image of every pod's sandbox, which has to be among the kit's.
const PauseImage = "cluster.test/pause:1"

// patience is how long to wait for what must come. It is not a measure of how fast it has to
// come.
const patience = 3 * time.Minute

// errEnded is what there is no patience with.
var errEnded = errors.New("the node's first process has ended")

// A Cluster is one node, and what runs on it.
type Cluster struct {
	setup   setup
	node    *exec.Cmd
	ended   chan struct{} // closed when the node has
	kit     string
	state   string
	cgroups []string
}

// New starts a cluster of one of the setups. The kit is a directory
// with kube and coredns in bin, Debian's programs in root, and images/*.tar. Files of the cluster
// are in kit/NAME, the logs of its programs among them, and are replaced by its next.
func New(kit, name string) (_ *Cluster, err error) {
	setup, ok := setups[name]
	if !ok {
		return nil, fmt.Errorf("starting a cluster: there is no setup %s", name)
	}
	c := &Cluster{setup: setup, kit: kit, state: filepath.Join(kit, name), ended: make(chan struct{})}
	defer func() {
		if err != nil {
			err = fmt.Errorf("starting a cluster: %w", err)
			if c.node != nil {
				err = errors.Join(err, c.Close())
			}
		}
	}()
	// The cgroup is the whole machine's, where others may run such a cluster too.
	n := node{Kit: kit, State: c.state, Setup: name, Cgroup: fmt.Sprintf("/nodecache-test-%s-%d", name, os.Getpid()), Dummy: HasDummy()}
	if err := os.RemoveAll(c.state); err != nil {
		return nil, err
	}
	for _, dir := range []string{"bin", "cgroup", "lib/kubelet", "log", "logs", "cni", "containerd"} {
		if err := os.MkdirAll(filepath.Join(c.state, dir), 0o755); err != nil {
			return nil, err
		}
	}
	for _, program := range []string{"kube-apiserver", "kube-controller-manager", "kube-proxy", "kube-scheduler", "kubectl", "kubelet"} {
		if err := os.Symlink(filepath.Join(kit, "bin/kube"), filepath.Join(c.state, "bin", program)); err != nil {
			return nil, err
		}
	}
	if c.cgroups, err = makeCgroups(n.Cgroup); err != nil {
		return nil, fmt.Errorf("making the cgroup of the pods: %w", err)
	}
	if err := writeCredentials(c.state, setup); err != nil {
		return nil, fmt.Errorf("making certificates and tokens: %w", err)
	}
	if err := n.configure(); err != nil {
		return nil, fmt.Errorf("writing the configuration: %w", err)
	}
	if err := c.start(n); err != nil {
		return nil, err
	}
	err = poll("the node has started", func() error {
		select {
		case <-c.ended:
			text, _ := os.ReadFile(filepath.Join(c.state, "logs/node.log"))
			return fmt.Errorf("%w: %s", errEnded, text)
		default:
		}
		_, err := os.Stat(filepath.Join(c.state, "started"))
		return err
	})
	if err != nil {
		return nil, err
	}
	return c, poll("the node is ready", func() error {
		_, err := c.Kubectl("wait", "--for=condition=Ready", "--timeout=1s", "node/"+nodeName)
		return err
	})
}

// start starts the node's first process: this program again.
func (c *Cluster) start(n node) error {
	what, err := json.Marshal(n)
	if err != nil {
		return err
	}
	out, err := os.Create(filepath.Join(c.state, "logs/node.log"))
	if err != nil {
		return err
	}
	defer out.Close()
	path := []string{
		filepath.Join(n.State, "bin"), filepath.Join(n.Kit, "root/usr/bin"), filepath.Join(n.Kit, "root/usr/sbin"),
		"/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin",
	}
	cmd := &exec.Cmd{
		Path: "/proc/self/exe", Args: []string{nodeProcess, string(what)},
		Env:    []string{"HOME=" + c.state, "PATH=" + strings.Join(path, ":")},
		Stdout: out, Stderr: out,
		SysProcAttr: &syscall.SysProcAttr{
			Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS,
			Pdeathsig:  syscall.SIGKILL,
			Setsid:     true,
		},
	}
	started := make(chan error, 1)
	go func() {
		// The node ends with the thread that has started it, and so with this program.
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait() // its log says why it has ended
			close(c.ended)
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("starting the node's first process: %w", err)
	}
	c.node = cmd
	return nil
}

// Close ends every process of the cluster, and removes everything but the logs.
func (c *Cluster) Close() error {
	// All others of its pid namespace go with it.
	err := c.node.Process.Kill()
	if err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("ending the node: %w", err)
	}
	<-c.ended
	err = poll("the pods' cgroup is gone", func() error { return removeCgroups(c.cgroups) })
	entries, failed := os.ReadDir(c.state)
	err = errors.Join(err, failed)
	for _, e := range entries {
		if e.Name() != "logs" {
			err = errors.Join(err, os.RemoveAll(filepath.Join(c.state, e.Name())))
		}
	}
	if err != nil {
		return fmt.Errorf("removing the cluster: %w", err)
	}
	return nil
}

// Logs is where the programs of the cluster write to.
func (c *Cluster) Logs() string { return filepath.Join(c.state, "logs") }

// Kubectl runs kubectl as the cluster's administrator, and returns what it writes to stdout.
func (c *Cluster) Kubectl(args ...string) (string, error) {
	return output(c.KubectlCommand(args...))
}

// KubectlCommand is kubectl as the cluster's administrator.
func (c *Cluster) KubectlCommand(args ...string) *exec.Cmd {
	return c.command([]string{"-n"}, append([]string{filepath.Join(c.state, "bin/kubectl"), "--kubeconfig=" + filepath.Join(c.state, "admin.kubeconfig")}, args...)...)
}

// Helm runs Helm as the cluster's administrator, and returns what it writes to stdout.
func (c *Cluster) Helm(args ...string) (string, error) {
	return output(c.command([]string{"-n"}, append([]string{filepath.Join(c.kit, "bin/helm"), "--kubeconfig=" + filepath.Join(c.state, "admin.kubeconfig")}, args...)...))
}

// OnNode runs a program on the node, and returns what it writes to stdout.
func (c *Cluster) OnNode(args ...string) (string, error) {
	return output(c.command([]string{"-n", "-m", "-p"}, args...))
}

// Kill sends SIGKILL to all processes of a container, by the id that the runtime gave it.
func (c *Cluster) Kill(container string) error {
	_, err := c.OnNode(filepath.Join(c.kit, "root/usr/bin/ctr"), "--address=/run/containerd/containerd.sock", "--namespace=k8s.io",
		"tasks", "kill", "--all", "--signal=SIGKILL", container)
	return err
}

func (c *Cluster) command(namespaces []string, args ...string) *exec.Cmd {
	words := append([]string{"-t", fmt.Sprint(c.node.Process.Pid)}, namespaces...)
	cmd := exec.Command("nsenter", append(words, args...)...)
	cmd.Env = c.node.Env
	return cmd
}

func output(cmd *exec.Cmd) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("running %s: %w: %s", strings.Join(cmd.Args, " "), err, stderr.String())
	}
	return stdout.String(), nil
}

// makeCgroups makes a cgroup, with cgroups of version 1 one in each hierarchy, and returns
// their directories.
func makeCgroups(name string) ([]string, error) {
	const root = "/sys/fs/cgroup"
	if controllers, err := os.ReadFile(filepath.Join(root, "cgroup.controllers")); err == nil {
		dir := filepath.Join(root, name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		for _, controller := range strings.Fields(string(controllers)) {
			for _, parent := range []string{root, dir} {
				err := os.WriteFile(filepath.Join(parent, "cgroup.subtree_control"), []byte("+"+controller), 0)
				if err != nil {
					return nil, err
				}
			}
		}
		return []string{dir}, nil
	}
	var dirs []string
	for _, controller := range []string{"cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "systemd", "unified"} {
		parent := filepath.Join(root, controller)
		if _, err := os.Stat(parent); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		dir := filepath.Join(parent, name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		dirs = append(dirs, dir)
		if controller != "cpuset" {
			continue
		}
		// Without these no process can be in it.
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			value, err := os.ReadFile(filepath.Join(parent, file))
			if err != nil {
				return nil, err
			}
			if err := os.WriteFile(filepath.Join(dir, file), value, 0o644); err != nil {
				return nil, err
			}
		}
	}
	return dirs, nil
}

// removeCgroups removes cgroups with all below them.
func removeCgroups(dirs []string) error {
	var errs []error
	for _, dir := range dirs {
		var all []string
		filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				all = append(all, path)
			}
			return nil // those that go meanwhile are of no interest
		})
		for i := range all {
			if err := syscall.Rmdir(all[len(all)-1-i]); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, fmt.Errorf("removing %s: %w", all[len(all)-1-i], err))
			}
		}
	}
	return errors.Join(errs...)
}
