package e2e

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// What docs/answers.md has: `make answers`.

// A comparison gathers how the answers of two of those who are asked differ.
type comparison struct {
	first, second int
	kinds         []kindOfDifference
	questions     int
	answers       int
	different     int // answers
	counts        []int
	examples      []string
	others        map[string]int // of no kind
}

func newComparison(first, second int, kinds []kindOfDifference) *comparison {
	return &comparison{first: first, second: second, kinds: kinds, counts: make([]int, len(kinds)), examples: make([]string, len(kinds)), others: map[string]int{}}
}

func (c *comparison) take(a askedQuestion) {
	if len(a.answers[c.second]) == 0 {
		return // it was not asked
	}
	c.questions++
	for i := range a.answers[c.first] {
		x, y := a.answers[c.first][i], a.answers[c.second][i]
		c.answers++
		if sameButTTLs(x, y) {
			continue
		}
		counted := map[int]bool{}
		for _, d := range differencesOf(x, y) {
			k := slices.IndexFunc(c.kinds, func(k kindOfDifference) bool { return k.is(a.corpusQuestion, d) })
			if k < 0 {
				c.others[fmt.Sprintf("%s: %s, %s: %v, time %d:\n\t%x\n\t%s\n\t%s", d.in, d.first, d.second, a.corpusQuestion, i+1, a.packet, briefly(x), briefly(y))]++
				continue
			}
			if !counted[k] {
				c.counts[k]++
			}
			counted[k] = true
			if c.examples[k] == "" {
				c.examples[k] = fmt.Sprintf("%v: %s / %s", a.corpusQuestion, briefly(x), briefly(y))
			}
		}
		if len(counted) > 0 {
			c.different++
		}
	}
}

func (c *comparison) table(name string) string {
	t := fmt.Sprintf("%s: %d answers to %d questions, of which %d differ in more than bytes.\n\n| What | Ours | %[1]s | Answers | Judged |\n|-|-|-|-:|-|\n",
		name, c.answers, c.questions, c.different)
	order := make([]int, len(c.kinds))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return c.counts[b] - c.counts[a] })
	for _, i := range order {
		if k := c.kinds[i]; c.counts[i] > 0 {
			t += fmt.Sprintf("| %s | %s | %s | %d | %s |\n", k.what, k.first, k.second, c.counts[i], k.judge)
		}
	}
	return t
}

// Every answer is CoreDNS's, and each difference to node-cache's plugins and to unbound is of a kind
// that is known. The seed is always the same.
func TestAnswersTable(t *testing.T) {
	s := os.Getenv("LAB_ANSWERS")
	if s == "" {
		t.Skip("for make answers: set LAB_ANSWERS to how many questions are asked")
	}
	count, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	n := newNode(t, backend{lab.NFT, "nftables"})
	n.answersSite(true)
	compliance := n.complianceTable()
	plain, unbound := newComparison(answersOurs, answersPlain, againstPlain), newComparison(answersOurs, answersUnbound, againstUnbound)
	same := n.sameAsCoreDNS(count, []int{answersOurs, answersFast, answersSame, answersPlain, answersUnbound}, func(a askedQuestion) {
		plain.take(a)
		unbound.take(a)
	})
	if t.Failed() {
		return
	}
	for _, c := range []*comparison{plain, unbound} {
		for i, other := range slices.Sorted(maps.Keys(c.others)) {
			if i == 30 {
				break
			}
			n.Errorf("not judged, %d and %d: %s", c.first, c.second, other)
		}
		if os.Getenv("LAB_EXAMPLES") != "" {
			for i, k := range c.kinds {
				n.Logf("%s:\n\t%s", k.what, strings.ReplaceAll(c.examples[i], " / ", "\n\t"))
			}
		}
	}
	fmt.Printf("%d types, %d kinds of names, %d usual and %d odd shapes of queries, %d malformed records and messages.\n\n",
		len(corpusTypes), len(corpusKinds), len(fastShapes), len(oddShapes), len(brokenNames))
	fmt.Printf("%s\n\n%s\n%s\n%s", same, plain.table("CoreDNS"), unbound.table("unbound"), compliance)
}
