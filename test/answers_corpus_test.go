package e2e

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/miekg/dns"
)

// What is asked in the comparison: questions of names, types and shapes, drawn by a seed.

// A corpusQuestion is one that all are asked.
type corpusQuestion struct {
	dns.Question
	kind    string // of the name
	arg     string
	shape   string
	packet  []byte
	tcp     bool
	odd     bool // of oddShapes
	unbound bool // unbound is asked too
}

func (q *corpusQuestion) String() string {
	by := "udp"
	if q.tcp {
		by = "tcp"
	}
	return fmt.Sprintf("%s %s %s, %s, %s", q.Name, dns.Class(q.Qclass), dns.Type(q.Qtype), q.shape, by)
}

// A corpusKind is names of one kind.
type corpusKind struct {
	name   string
	weight int
	args   []string
	types  []uint16 // of the records that are there
}

var usualTypes = []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeTXT}

func argsTo(letter string, n int) (args []string) {
	for i := range n {
		args = append(args, fmt.Sprint(letter, i))
	}
	return args
}

var corpusKinds = []corpusKind{
	{"types", 20, argsTo("t", 4), corpusTypes},
	{"svcb", 8, argsTo("s", len(serviceParams)), []uint16{dns.TypeSVCB, dns.TypeHTTPS}},
	{"chain", 10, append(append(argsTo("n", 12), "d1", "d3", "e1", "e3", "o1", "o4", "l0", "l2"), "n16"), append(usualTypes, dns.TypeCNAME)},
	{"dname", 4, []string{"a", "b"}, usualTypes},
	{"wild", 6, argsTo("w", 3), usualTypes},
	{"empty", 5, argsTo("x", 3), usualTypes}, {"nowhere", 5, argsTo("x", 3), usualTypes},
	{"empty0", 2, argsTo("x", 3), usualTypes}, {"nowhere0", 2, argsTo("x", 3), usualTypes},
	{"big", 4, []string{"b400", "b600", "b1100", "b1300", "b4200", "b9000"}, []uint16{dns.TypeTXT}},
	{"many", 4, []string{"m2", "m20", "m60"}, []uint16{dns.TypeA, dns.TypeAAAA}},
	{"signed", 8, argsTo("s", 3), usualTypes},
	{"glue", 3, argsTo("g", 3), []uint16{dns.TypeMX, dns.TypeSRV, dns.TypeNS}},
	{"referral", 1, argsTo("r", 2), usualTypes},
	{"ttl", 3, argsTo("t", 6), []uint16{dns.TypeA}},
	{"rcode", 3, []string{"c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8", "c9", "c10", "c11", "c15", "c16", "c17", "c18", "c23", "c4095"}, usualTypes},
	{"option", 6, argsTo("o", len(optionTexts)), usualTypes},
	{"flags", 4, argsTo("f", 6), usualTypes},
	{"odd", 4, oddLabels, usualTypes},
	{"broken", 6, brokenNames, nil},
	{"outside", 1, []string{".", "example.", "com.", "corpus.example.", "nothing.corpus.example.", "1.2.0.192.in-addr.arpa.", "xn--bcher-kva.example."}, []uint16{dns.TypeA, dns.TypeNS, dns.TypeSOA, dns.TypeDS, dns.TypePTR}},
}

// oddLabels are first labels as no host has them.
var oddLabels = []string{`\000`, `a\.b`, `\032`, `\"`, `\;\(\)\@\$`, `\200\255`, `_sip._tcp`, `*`, `-`, `a\\b`, `\095\095`, strings.Repeat("x", 63), strings.TrimSuffix(strings.Repeat("y.", 90), "."), "UPPER"}

var brokenNames = func() (names []string) {
	for n := range brokenData {
		names = append(names, n)
	}
	for n := range brokenMessages {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}()

// A corpus draws questions for one worker. No two questions of a batch have a name in common, and
// no other worker asks for the same names, so that all servers go through the same states.
type corpus struct {
	r      *rand.Rand
	worker int
	seq    int
	total  int // of the weights
}

func newCorpus(seed uint64, worker int) *corpus {
	c := &corpus{r: rand.New(rand.NewPCG(seed, uint64(worker))), worker: worker}
	for _, k := range corpusKinds {
		c.total += k.weight
	}
	return c
}

// batch draws questions that are asked at once.
func (c *corpus) batch(size int) (all []*corpusQuestion) {
	names := map[string]bool{}
	for len(all) < size {
		q := c.draw()
		if name := strings.ToLower(q.Name); !names[name] {
			names[name] = true
			all = append(all, q)
		}
	}
	return all
}

func (c *corpus) draw() *corpusQuestion {
	at := c.r.IntN(c.total)
	i := 0
	for ; at >= corpusKinds[i].weight; i++ {
		at -= corpusKinds[i].weight
	}
	k := corpusKinds[i]
	q := &corpusQuestion{kind: k.name, arg: k.args[c.r.IntN(len(k.args))]}
	q.Qclass = dns.ClassINET
	c.seq++
	switch {
	case k.name == "outside":
		q.Name = q.arg
	case k.name == "odd":
		q.Name = fmt.Sprintf("%s.w%d.odd.%s", q.arg, c.worker, corpusZone)
	case k.name == "broken":
		q.Name = fmt.Sprintf("q%d.w%d.%s.%s", c.seq, c.worker, q.arg, brokenZone)
	case k.name == "rcode" || c.r.IntN(4) == 0: // a name that nobody has asked for
		q.Name = fmt.Sprintf("%s-w%d-q%d.%s.%s", q.arg, c.worker, c.seq, k.name, corpusZone)
	default:
		q.Name = fmt.Sprintf("%s-w%d.%s.%s", q.arg, c.worker, k.name, corpusZone)
	}
	switch {
	case k.name == "broken":
		q.Qtype = dns.TypeA
		if d, ok := brokenData[q.arg]; ok {
			q.Qtype = d.typ
		}
	case c.r.IntN(4) == 0:
		q.Qtype = corpusTypes[c.r.IntN(len(corpusTypes))]
	default:
		q.Qtype = k.types[c.r.IntN(len(k.types))]
	}
	shapes := fastShapes
	if c.r.IntN(4) == 0 {
		shapes, q.odd = oddShapes, true
	}
	s := shapes[c.r.IntN(len(shapes))]
	q.shape, q.packet = s.name, s.query(q.Question)
	q.tcp = c.r.IntN(20) == 0
	// unbound says no more than 100 times a second that it does not like a query.
	q.unbound = c.seq%20 == 0 || !q.odd && !strings.HasPrefix(q.shape, "no-rd") && !strings.HasPrefix(q.shape, "aa-tc")
	return q
}
