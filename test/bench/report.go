package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// A table is what has been measured of each server, by round.
type table struct {
	chosen  []*subject
	results map[*subject][]*result
}

func newTable(chosen []*subject) *table {
	return &table{chosen: chosen, results: make(map[*subject][]*result)}
}

func (t *table) add(s *subject, r *result) { t.results[s] = append(t.results[s], r) }

// A figure is something of a result.
type figure struct {
	head   string
	digits int
	of     func(r *result) float64
}

var figures = []figure{
	{"CPU s/M saturated", 2, func(r *result) float64 { return r.points[0].perMillion() }},
	{"CPU s/M at 20k q/s", 2, func(r *result) float64 { return r.points[1].perMillion() }},
	{"CPU s/M at 5k q/s", 2, func(r *result) float64 { return r.points[2].perMillion() }},
	{"kq/s saturated", 0, func(r *result) float64 { return r.points[0].kqps() }},
	{"p50 µs", 0, func(r *result) float64 { return r.points[1].latency(.5) }},
	{"p99 µs", 0, func(r *result) float64 { return r.points[1].latency(.99) }},
	{"RSS idle MiB", 1, func(r *result) float64 { return r.idle / (1 << 20) }},
	{"RSS loaded MiB", 1, func(r *result) float64 { return r.loaded / (1 << 20) }},
	{"start ms", 0, func(r *result) float64 { return r.start.Seconds() * 1e3 }},
	{"binary MiB", 1, func(r *result) float64 { return r.exe / (1 << 20) }},
	{"lost", 0, func(r *result) (n float64) {
		for _, p := range r.points {
			n += float64(p.lost)
		}
		return n
	}},
}

// compared is how many of the figures, from the first, are compared.
const compared = 4

// values returns a figure of every round, in order.
func (t *table) values(s *subject, f figure) (v []float64) {
	for _, r := range t.results[s] {
		v = append(v, f.of(r))
	}
	slices.Sort(v)
	return v
}

func median(sorted []float64) float64 {
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

func (t *table) String() string {
	var b strings.Builder
	row := func(cells ...string) { fmt.Fprintf(&b, "| %s |\n", strings.Join(cells, " | ")) }
	rule := func(n int) { fmt.Fprintf(&b, "|---|%s\n", strings.Repeat("--:|", n)) }

	head := []string{"server"}
	for _, f := range figures {
		head = append(head, f.head)
	}
	row(head...)
	rule(len(figures))
	for _, s := range t.chosen {
		cells := []string{s.label}
		for _, f := range figures {
			v := t.values(s, f)
			lo, mid, hi := format(v[0], f.digits), format(median(v), f.digits), format(v[len(v)-1], f.digits)
			if lo != hi {
				mid += fmt.Sprintf(" (%s-%s)", lo, hi)
			}
			cells = append(cells, mid)
		}
		row(cells...)
	}

	if comparisons := t.comparisons(); len(comparisons) > 0 {
		b.WriteString("\nThe same as a ratio:\n\n")
		head = []string{"server"}
		for _, c := range comparisons {
			for _, f := range figures[:compared] {
				head = append(head, fmt.Sprintf("%s / %s", f.head, c.name))
			}
		}
		row(head...)
		rule(len(head) - 1)
		for _, s := range t.chosen {
			cells := []string{s.label}
			for _, c := range comparisons {
				for i, f := range figures[:compared] {
					cells = append(cells, format(median(t.values(s, f))/c.to[i], 2))
				}
			}
			row(cells...)
		}
	}
	b.WriteString(legend)
	b.WriteString(t.doubts())
	return b.String()
}

// A comparison is what to compare with, by figure.
type comparison struct {
	name string
	to   [compared]float64
}

func (t *table) comparisons() (all []comparison) {
	best := comparison{name: "best C cache"}
	found := false
	for i, f := range figures[:compared] {
		best.to[i] = math.Inf(1)
		if i == compared-1 {
			best.to[i] = 0 // of answers more are better
		}
		for _, s := range t.chosen {
			if !s.c {
				continue
			}
			found = true
			m := median(t.values(s, f))
			if i == compared-1 {
				best.to[i] = max(best.to[i], m)
			} else {
				best.to[i] = min(best.to[i], m)
			}
		}
	}
	if found {
		all = append(all, best)
	}
	for _, s := range t.chosen {
		if s.name == "coredns" {
			c := comparison{name: s.label}
			for i, f := range figures[:compared] {
				c.to[i] = median(t.values(s, f))
			}
			all = append(all, c)
		}
	}
	return all
}

func format(v float64, digits int) string { return fmt.Sprintf("%.*f", digits, v) }

const legend = `
Medians over the rounds, and in brackets the lowest and the highest. CPU s/M: CPU seconds
of the server for a million answers, kernel included; p50, p99: until the answer came, at
20k q/s; RSS: resident memory at the first answer and at the end; start: until the first
answer; binary: the program with its shared libraries; lost: queries without an answer
within a second. Every answer was checked. A measurement in which a server was not busy, or
the rate not held, was made again, up to three times.
`

// doubts names measurements that are not what they should be, which on a machine with
// other work is most of them.
func (t *table) doubts() string {
	var idle, slow, missed []string
	for _, s := range t.chosen {
		for i, rate := range rates {
			note := func(to *[]string, is func(p point) bool, show func(p point) string) {
				var rounds []string
				for _, r := range t.results[s] {
					if p := r.points[i]; is(p) {
						rounds = append(rounds, show(p))
					}
				}
				if len(rounds) > 0 {
					*to = append(*to, fmt.Sprintf("%s at %s (%s)", s.label, rateName(rate), strings.Join(rounds, ", ")))
				}
			}
			note(&idle, point.idle, func(p point) string { return fmt.Sprintf("%.0f %%", 100*p.share()) })
			note(&slow, point.slow, func(p point) string { return fmt.Sprintf("%.1fk", p.kqps()) })
			note(&missed, func(p point) bool { return 1000*p.missed > p.sent },
				func(p point) string { return fmt.Sprintf("%d of %d", p.missed, p.sent) })
		}
	}
	var b strings.Builder
	for _, d := range []struct {
		what string
		of   []string
	}{
		{"Was not busy all of the time, as other processes had a CPU or the load was too slow, so that it could answer more", idle},
		{"Was not asked, or did not answer, as often as wanted", slow},
		{"Did not answer all from its cache", missed},
	} {
		if len(d.of) > 0 {
			fmt.Fprintf(&b, "* %s: %s.\n", d.what, strings.Join(d.of, "; "))
		}
	}
	if b.Len() == 0 {
		return ""
	}
	return "\nTo be read with care:\n\n" + b.String()
}
