package nodecachemode

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
)

// Settings are what the ConfigMap kube-dns says.
type Settings struct {
	StubDomains map[string][]string // a zone's name servers
	Upstreams   []string            // to ask in place of /etc/resolv.conf
}

// maxSettings bounds a key of the ConfigMap, which Kubernetes keeps below 1 MiB altogether.
const maxSettings = 1 << 20

// readSettings reads the folder in which the ConfigMap is mounted. Keys that are missing say
// nothing; both of them have to be right for either to be taken.
func readSettings(dir string) (s Settings, err error) {
	if _, err := os.Stat(dir); err != nil {
		return s, err
	}
	for key, to := range map[string]any{"stubDomains": &s.StubDomains, "upstreamNameservers": &s.Upstreams} {
		text, err := readFile(filepath.Join(dir, key), maxSettings)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return Settings{}, err
		}
		if err := json.Unmarshal(text, to); err != nil {
			return Settings{}, fmt.Errorf("reading %s: %w", key, err)
		}
	}
	if err := s.check(); err != nil {
		return Settings{}, err
	}
	return s, nil
}

// dns1123 is a name as Kubernetes has it, of up to 253 letters.
var dns1123 = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)

// check refuses what node-cache refuses, and what it makes a Corefile of that CoreDNS refuses.
func (s Settings) check() error {
	for _, domain := range slices.Sorted(maps.Keys(s.StubDomains)) {
		servers := s.StubDomains[domain]
		if len(domain) > 253 || !dns1123.MatchString(domain) {
			return fmt.Errorf("stubDomains: %q is no domain", domain)
		}
		if len(servers) == 0 {
			return fmt.Errorf("stubDomains: %s has no name server", domain)
		}
		for _, server := range servers {
			if !nameServer(server) {
				return fmt.Errorf("stubDomains: %s: %q is no address, such as 10.1.2.3 or 10.1.2.3:5353", domain, server)
			}
		}
	}
	if len(s.Upstreams) > 3 {
		return fmt.Errorf("upstreamNameservers has %d entries, and may have 3", len(s.Upstreams))
	}
	for _, server := range s.Upstreams {
		if !nameServer(server) {
			return fmt.Errorf("upstreamNameservers: %q is no address, such as 10.1.0.1 or 10.1.0.1:5353", server)
		}
	}
	return nil
}

// nameServer says whether s is an address, with a port or without.
func nameServer(s string) bool {
	host, port, err := net.SplitHostPort(s)
	if err != nil {
		host, port = s, "53"
	}
	a, err := netip.ParseAddr(host)
	n, bad := strconv.ParseUint(port, 10, 16)
	return err == nil && a.Zone() == "" && bad == nil && n > 0
}

// readFile is os.ReadFile for what has a bound.
func readFile(path string, most int64) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > most {
		return nil, fmt.Errorf("%s is no file of at most %d bytes", path, most)
	}
	return os.ReadFile(path)
}
