package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/contentful-labs/coredns-nodecache/test/manifest"
)

// shipped writes into dir what kubelet makes of the manifest, but for the addresses, the rules
// of a firewall, the room of the caches, and UDP to the cluster's DNS, which the others use too.
// It returns the environment.
func shipped(dir string, room int, fastpath bool) (env []string, err error) {
	m, err := manifest.Read("k8s/node-local.yaml")
	if err != nil {
		return nil, fmt.Errorf("reading the manifest, which is looked for from the repository's root: %w", err)
	}
	spec := m.DaemonSets[0].Spec.Template.Spec
	c := spec.Containers[0]
	listen, up := serverAddr.Addr().String(), upstreamAddr.Addr().String()
	vars, err := manifest.Env(c, map[string]string{"KUBE_DNS_SERVICE_HOST": listen, "KUBE_DNS_UPSTREAM_SERVICE_HOST": up},
		map[string]string{"status.hostIP": listen})
	if err != nil {
		return nil, err
	}
	vars["CLUSTER_PROTOCOL"], vars["PROBE_HOST"] = "prefer_udp", listen
	vars["GOMAXPROCS"] = "1" // as the others' threads
	if *gogc != "" {
		vars["GOGC"] = *gogc
	}
	for name, value := range vars {
		env = append(env, name+"="+value)
	}
	files, err := m.Files(spec, c, "/etc/coredns")
	if err != nil {
		return nil, err
	}
	files["bind.conf"] = "bind " + listen
	more := ""
	if fastpath {
		more = "fastpath\n" // with its own default, which has room for the names of a run
	}
	files["nodecache.conf"] = "nodecache {\n interface none\n firewall none\n" + more + "}\n"
	for name, text := range files {
		text = strings.ReplaceAll(text, "success 9984", fmt.Sprint("success ", room))
		text = strings.ReplaceAll(text, "/etc/resolv.conf", up)
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, err
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	return env, nil
}
