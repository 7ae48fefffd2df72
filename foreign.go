package nodecache

import (
	"fmt"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/contentful-labs/coredns-nodecache/internal/nodelinks"
)

// linkAlias is on a link that some process of ours has made.
const linkAlias = "nodecache"

func mark(l netlink.Link) {
	if err := netlink.LinkSetAlias(l, linkAlias); err != nil {
		log.Debugf("marking %s as made by nodecache: %v", l.Attrs().Name, err)
	}
}

// checkLink says whether name is free, or already ours to use: what this or another
// process has (inUse), or what one has left: killed, or for want of being empty. Such a link
// has our mark, or, of release 0.1.0, no foreign address.
func checkLink(name string, inUse bool) error {
	l, err := nodelinks.ByName(name)
	if err != nil || l == nil {
		return err
	}
	if _, err = nodelinks.Kind(l); err != nil || inUse || l.Attrs().Alias == linkAlias {
		return err
	}
	others, err := nodelinks.Foreign(l)
	if err == nil && len(others) > 0 {
		err = fmt.Errorf("a link of this name exists and carries %s of somebody else: take that address off it, or name another interface", join(others))
	}
	return err
}

func join[T fmt.Stringer](vs []T) string {
	var ss []string
	for _, v := range vs {
		ss = append(ss, v.String())
	}
	return strings.Join(ss, ", ")
}
