package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// configure writes the configuration of the node's programs.
func (n *node) configure() error {
	spec := ""
	if !n.Dummy {
		if err := n.writeSpec(); err != nil {
			return err
		}
		spec = fmt.Sprintf("\n      base_runtime_spec = %q", filepath.Join(n.State, "spec.json"))
	}
	state, root, setup := n.State, filepath.Join(n.Kit, "root"), setups[n.Setup]
	for name, text := range map[string]string{
		// The world outside has every name but those that Kubernetes' specs want to miss, and the
		// one that they know of it. The TTL tells its answers from a cache's.
		"outside.conf": `.:53 {
	bind ` + each(setup.families, " ", func(f family) string { return f.Outside }) + `
	template ANY ANY acme.local {
		rcode NXDOMAIN
	}
	template IN PTR 8.8.8.8.in-addr.arpa {
		answer "{{ .Name }} 86400 IN PTR dns.google."
	}
	template IN A {
		answer "{{ .Name }} 86400 IN A 192.0.2.1"
	}
	template IN AAAA {
		answer "{{ .Name }} 86400 IN AAAA 2001:db8::1"
	}
	template ANY ANY {
		rcode NOERROR
	}
}
`,
		"resolv.conf":          each(setup.families, "", func(f family) string { return "nameserver " + f.Outside + "\n" }),
		"cni/cluster.conflist": setup.cni(),
		// In a container there may be no CAP_SYS_RESOURCE to lower a process's oom_score_adj.
		"containerd.toml": fmt.Sprintf(`version = 2
root = %q
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = %q
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = %q
    conf_dir = %q
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"%s
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        BinaryName = %q
`, state+"/containerd", state+"/opt", PauseImage, root+"/usr/lib/cni", state+"/cni", spec, root+"/usr/sbin/runc"),
		// What is full on this machine is not the cluster's business.
		"kubelet.yaml": fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: "::"
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: cgroupfs
cgroupRoot: %s
failCgroupV1: false
failSwapOn: false
resolvConf: %s/resolv.conf
volumePluginDir: %s/plugins
clusterDNS: [%q]
clusterDomain: cluster.local
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
evictionHard: {memory.available: 1Mi, nodefs.available: 0%%, imagefs.available: 0%%, nodefs.inodesFree: 0%%}
imageGCHighThresholdPercent: 100
`, n.Cgroup, state, state, setup.families[0].DNS),
		// Zero: leave the machine's own limits of connection tracking.
		"kube-proxy.yaml": fmt.Sprintf(`apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: %s
clusterCIDR: %q
hostnameOverride: %s
clientConnection: {kubeconfig: %s/kube-proxy.kubeconfig}
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
`, setup.proxy, setup.podNets(), nodeName, state),
	} {
		if err := os.WriteFile(filepath.Join(state, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// writeSpec writes what every container is made from: containerd's own, with /dev/net/tun, so
// that manifests can be applied as they stand on a kernel without the dummy driver.
func (n *node) writeSpec() error {
	text, err := output(exec.Command(filepath.Join(n.Kit, "root/usr/bin/ctr"), "oci", "spec"))
	if err != nil {
		return err
	}
	var spec object
	if err := json.Unmarshal([]byte(text), &spec); err != nil {
		return fmt.Errorf("reading containerd's spec: %w", err)
	}
	linux, ok := spec["linux"].(object)
	if !ok {
		return errors.New("containerd's spec has no part for Linux")
	}
	linux["devices"] = []object{{"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "fileMode": 0o666, "uid": 0, "gid": 0}}
	resources, ok := linux["resources"].(object)
	if !ok {
		return errors.New("containerd's spec has no resources")
	}
	devices, _ := resources["devices"].([]any)
	resources["devices"] = append(devices, object{"allow": true, "type": "c", "major": 10, "minor": 200, "access": "rwm"})
	b, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(n.State, "spec.json"), b, 0o644)
}

// HasDummy says whether the kernel has the dummy driver.
func HasDummy() bool {
	made := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and its namespace ends with the thread
		made <- func() error {
			ns, err := netns.New()
			if err != nil {
				return err
			}
			defer ns.Close()
			return netlink.LinkAdd(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "probe"}})
		}()
	}()
	return !errors.Is(<-made, unix.EOPNOTSUPP)
}
