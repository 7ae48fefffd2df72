package peers

import (
	"fmt"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
)

// Only what root says, or this process's own user, is counted.
func TestLastWordsOfOtherUsersAreIgnored(t *testing.T) {
	needRoot(t)
	const listener = "0000000000000004"
	c, err := (&Member{name: memberPrefix + listener}).HearLastWords()
	must(t, err)
	defer c.Close()
	const givenUp = "coredns_nodecache_drain_queries_given_up_total"
	before := testkit.Counted(t, givenUp)
	as(t, 65534, func() { LastWords{GivenUp: 1000}.send(lastWordsPrefix + listener) })
	as(t, 0, func() { LastWords{GivenUp: 1}.send(lastWordsPrefix + listener) })
	eventually(t, "root's are counted", func() bool { return testkit.Counted(t, givenUp) != before })
	if got := testkit.Counted(t, givenUp) - before; got != 1 {
		t.Errorf("counted %v queries, want 1", got)
	}
}

// A datagram leaves its receiver in another state than it has found it (unix_dgram_connect,
// Linux 6.18).
func TestLastWordsAreHeardMoreThanOnce(t *testing.T) {
	needRoot(t)
	c, err := (&Member{name: memberPrefix + "0000000000000005"}).HearLastWords()
	must(t, err)
	defer c.Close()
	const givenUp = "coredns_nodecache_drain_queries_given_up_total"
	before := testkit.Counted(t, givenUp)
	for k := range 3 {
		(&Member{name: memberPrefix + "0000000000000006"}).SayLastWords(LastWords{GivenUp: 1}) // which counts them too
		eventually(t, fmt.Sprintf("exit %d is counted twice", k), func() bool { return testkit.Counted(t, givenUp) == before+2*float64(k+1) })
	}
}
