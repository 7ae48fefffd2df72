package nodecache

import (
	"strings"
	"testing"
)

// An exit goes before every repair that is due, however many reports there are.
func TestExitGoesBeforeRepairs(t *testing.T) {
	for range 8 { // what is chosen at random is often right
		n, fw := newTestNode(t)
		up(t, n, demand(t, "", "", "169.254.20.10"))
		fw.heard()
		entered, release := make(chan bool, 1), make(chan bool)
		fw.say(func() {
			fw.during = func(what string) {
				if what == "apply" {
					select {
					case entered <- true:
						<-release
					default:
					}
				}
			}
		})
		poke(n.poked)
		<-entered
		left := make(chan bool)
		go func() { n.exit(); close(left) }()
		eventually(t, "the exit waits", func() bool { return n.exiting.Err() != nil && running("do") > 0 })
		poke(n.poked)
		poke(n.reported)
		poke(n.ruleset)
		close(release)
		<-left
		for _, call := range fw.heard()[1:] { // after that of the repair under way
			if strings.HasPrefix(call, "withdraw") {
				break
			}
			if strings.HasPrefix(call, "apply") {
				t.Errorf("before it leaves the firewall hears %q", call)
			}
		}
		removeLink(t, testLink)
	}
}
