package doctor

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
)

// addressElsewhere finds addresses of ours that another dummy link carries: those of
// an interface that somebody has made for a cache, and may remove.
func addressElsewhere(s Site) (found []string) {
	carriers, err := nodelinks.Carriers()
	if err != nil {
		return nil
	}
	for _, a := range slices.SortedFunc(maps.Keys(s.Addrs), netip.Addr.Compare) {
		if !s.Addrs[a].Foreign || s.Addrs[a].AsAsked {
			continue
		}
		for _, name := range carriers[a] {
			if l, err := nodelinks.ByName(name); err == nil && l != nil && !s.Links[name] && name != nodelinks.IPVS {
				if _, err := nodelinks.Kind(l); err == nil {
					found = append(found, fmt.Sprintf("%s is on the link %s, which is not this cache's, so that the address goes when somebody removes that link: name it as the interface of nodecache, or remove the link and reload", a, name))
				}
			}
		}
	}
	return found
}

// networkManagerState is where NetworkManager keeps what it does with each link (as of
// 1.42: devices/INDEX, and the profiles that it has made itself). Another mount
// namespace, such as a container's, has it only if it is mounted there.
var networkManagerState = "/run/NetworkManager"

// networkManager finds links of ours to which NetworkManager applies a profile, so that
// they have its addresses and lose ours. A link that it manages but has only noted
// as made by somebody else ("connected (externally)") it leaves as it is.
func networkManager(s Site) (found []string) {
	for name := range s.Links {
		l, err := nodelinks.ByName(name)
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

// networkdState is where systemd-networkd keeps what it does with each link, by index.
var networkdState = "/run/systemd/netif/links"

// networkd finds links of ours that systemd-networkd configures by a file of its own, such
// as one for links of all names. Each time that it configures a link, it removes the
// addresses there that it does not know.
func networkd(s Site) (found []string) {
	for _, name := range slices.Sorted(maps.Keys(s.Links)) {
		l, err := nodelinks.ByName(name)
		if err != nil || l == nil {
			continue
		}
		state, err := os.ReadFile(filepath.Join(networkdState, strconv.Itoa(l.Attrs().Index)))
		if err != nil || keyOf(state, "NETWORK_FILE") == "" {
			continue
		}
		switch keyOf(state, "ADMIN_STATE") {
		case "pending", "initialized", "configuring", "configured", "failed":
			found = append(found, fmt.Sprintf("systemd-networkd manages the link %s by %q, and removes its addresses whenever it configures it: write [Match], Name=%s, [Link] and Unmanaged=yes to /etc/systemd/network/05-nodecache.network, each on a line of its own, and run networkctl reload", name, keyOf(state, "NETWORK_FILE"), name))
		}
	}
	return found
}

// keyOf returns the value of a key in a file of keys and values, such as GLib's key files,
// whatever its group.
func keyOf(file []byte, key string) string {
	for line := range strings.Lines(string(file)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok && k == key {
			return v
		}
	}
	return ""
}
