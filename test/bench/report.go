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

// at returns the figures of the i-th rate.
func at(i int) []figure {
	latency := func(head string, share float64) figure {
		return figure{head, 0, func(r *result) float64 { return r.points[i].latency(share) }}
	}
	cpu := figure{"CPU µs", 2, func(r *result) float64 { return r.points[i].each(r.points[i].cpu) }}
	machine := figure{"CPU µs, machine", 1, func(r *result) float64 { return r.points[i].each(r.points[i].machine) }}
	sleeps := figure{"switches", 2, func(r *result) float64 { return r.points[i].sleeps() }}
	if rates[i] == 0 {
		return []figure{{"kq/s", 0, func(r *result) float64 { return r.points[i].kqps() }}, cpu, machine, sleeps}
	}
	return []figure{latency("p50 µs", .5), latency("p99 µs", .99), latency("p99.9 µs", .999), cpu, machine, sleeps}
}

var others = []figure{
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
	for i, rate := range rates {
		fmt.Fprintf(&b, "At %s:\n\n", rateName(rate))
		t.write(&b, at(i))
	}
	b.WriteString("Otherwise:\n\n")
	t.write(&b, others)
	b.WriteString(t.ratios())
	b.WriteString(legend)
	b.WriteString(t.doubts())
	return b.String()
}

func row(b *strings.Builder, cells ...string) { fmt.Fprintf(b, "| %s |\n", strings.Join(cells, " | ")) }

func rule(b *strings.Builder, n int) { fmt.Fprintf(b, "|---|%s\n", strings.Repeat("--:|", n)) }

// write writes the figures of every server.
func (t *table) write(b *strings.Builder, figures []figure) {
	head := []string{"server"}
	for _, f := range figures {
		head = append(head, f.head)
	}
	row(b, head...)
	rule(b, len(figures))
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
		row(b, cells...)
	}
	b.WriteByte('\n')
}

// ratios compares each server with the best C cache: the best of each figure, whichever
// has it.
func (t *table) ratios() string {
	if !slices.ContainsFunc(t.chosen, func(s *subject) bool { return s.c }) {
		return ""
	}
	var b strings.Builder
	b.WriteString("CPU time, p50 and p99 divided by those of the best C cache in each:\n\n")
	head := []string{"server"}
	for _, rate := range rates {
		head = append(head, rateName(rate))
	}
	row(&b, head...)
	rule(&b, len(rates))
	for _, s := range t.chosen {
		cells := []string{s.label}
		for i := range rates {
			var of []string
			for _, f := range at(i) {
				if f.head == "CPU µs" || f.head == "p50 µs" || f.head == "p99 µs" {
					of = append(of, format(median(t.values(s, f))/t.best(f), 2))
				}
			}
			if n := len(of); n > 1 {
				of = append(of[n-1:], of[:n-1]...) // CPU time first
			}
			cells = append(cells, strings.Join(of, " · "))
		}
		row(&b, cells...)
	}
	return b.String()
}

// best returns the lowest median of a figure among the C caches.
func (t *table) best(f figure) float64 {
	best := math.Inf(1)
	for _, s := range t.chosen {
		if s.c {
			best = min(best, median(t.values(s, f)))
		}
	}
	return best
}

func format(v float64, digits int) string { return fmt.Sprintf("%.*f", digits, v) }

const legend = `
Medians over the rounds, and in brackets the lowest and the highest. p50, p99, p99.9: from when
the query was sent until its answer came; CPU: of the server for an answer, kernel included;
machine: of all that ran but the load, which never sleeps; switches: how often a thread of the
server went to sleep for an answer; RSS: resident memory a second after the first answer, and at the end;
start: until the first answer; binary: the program with its shared libraries; lost: queries
without an answer within a second. Every answer was checked. A measurement in which a server was
not busy, or the rate not held, was made again, up to three times.
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
