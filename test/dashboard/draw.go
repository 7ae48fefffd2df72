package dashboard

import (
	"encoding/xml"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// The picture's measures, in pixels.
const (
	column, row = 60, 30 // of the dashboard's grid
	gap         = 8
	header      = 46
)

var colours = []string{"#3b7dd8", "#e0873a", "#4ea35b", "#c9499b", "#8465c9", "#c7a42f", "#38a3a5", "#d1495b", "#7a8793", "#5c7f2e"}

// A Drawing is panels as an SVG.
type Drawing struct {
	b             strings.Builder
	from, to      time.Time
	width, height int
}

// Data is what a panel's targets have, with the name of each series.
type Data struct {
	Names  []string
	Series []lab.Series
}

// Draw returns the dashboard's picture, an SVG. data has the data by panel.
func Draw(d *Dashboard, data []Data, from, to time.Time) string {
	g := &Drawing{from: from, to: to, width: 24*column + gap}
	for _, p := range d.Panels {
		g.height = max(g.height, header+(p.GridPos.Y+p.GridPos.H)*row+gap)
	}
	fmt.Fprintf(&g.b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="Helvetica, Arial, sans-serif" font-size="12">`+"\n", g.width, g.height)
	fmt.Fprintf(&g.b, `<rect width="%d" height="%d" fill="#eef0f3"/>`+"\n", g.width, g.height)
	g.text(gap+4, 30, `font-size="20" font-weight="bold" fill="#222"`, d.Title)
	for i, p := range d.Panels {
		x, y := gap+p.GridPos.X*column, header+p.GridPos.Y*row
		w, h := p.GridPos.W*column-gap, p.GridPos.H*row-gap
		fmt.Fprintf(&g.b, `<rect x="%d" y="%d" width="%d" height="%d" rx="3" fill="#fff" stroke="#d8dbe0"/>`+"\n", x, y, w, h)
		g.text(x+10, y+18, `font-weight="bold" fill="#444"`, p.Title)
		switch {
		case len(data[i].Series) == 0:
			g.text(x+w/2, y+h/2+8, `text-anchor="middle" fill="#999"`, "nothing")
		case p.Type == "stat":
			g.stat(p, data[i], x, y, w, h)
		case p.Type == "table":
			g.table(data[i], x, y, w, h)
		default:
			g.graph(p, data[i], x, y, w, h)
		}
	}
	g.b.WriteString("</svg>\n")
	return g.b.String()
}

func (g *Drawing) text(x, y int, attributes, s string) {
	var e strings.Builder
	xml.EscapeText(&e, []byte(s))
	fmt.Fprintf(&g.b, `<text x="%d" y="%d" %s>%s</text>`+"\n", x, y, attributes, e.String())
}

func (g *Drawing) stat(p Panel, d Data, x, y, w, h int) {
	s := d.Series[0]
	last := s.Values[len(s.Values)-1]
	if path := g.line(s, 0, top(s.Values), x+1, y+h*2/3, w-2, h/3-6); path != "" {
		fmt.Fprintf(&g.b, `<path d="%s" fill="none" stroke="#b9d2f2" stroke-width="2"/>`+"\n", path)
	}
	g.text(x+w/2, y+h/2+8, `text-anchor="middle" font-size="28" font-weight="bold" fill="#2b5fa8"`, format(last, p.FieldConfig.Defaults.Unit))
}

// table shows the labels of each series, less those that all have.
func (g *Drawing) table(d Data, x, y, w, h int) {
	var names []string
	for _, s := range d.Series {
		for k := range s.Labels {
			if k != "__name__" && k != "job" && !slices.Contains(names, k) {
				names = append(names, k)
			}
		}
	}
	slices.Sort(names)
	for i, k := range names {
		at := x + 12 + i*(w-24)/len(names)
		g.text(at, y+42, `fill="#888"`, k)
		for j, s := range d.Series {
			if 62+j*20 < h {
				g.text(at, y+62+j*20, `fill="#222"`, s.Labels[k])
			}
		}
	}
}

func (g *Drawing) graph(p Panel, d Data, x, y, w, h int) {
	const left, right, above, axis, key = 58, 12, 30, 18, 20
	unit := p.FieldConfig.Defaults.Unit
	series := d.Series
	stacked := p.FieldConfig.Defaults.Custom.Stacking.Mode == "normal"
	if stacked {
		series = stack(series)
	}
	var all []float64
	for _, s := range series {
		all = append(all, s.Values...)
	}
	high := top(all)
	switch unit {
	case "percentunit":
		high = 1
	case "bytes":
		high = (1 << 20) * top([]float64{slices.Max(all) / (1 << 20)})
	}
	px, py, pw, ph := x+left, y+above, w-left-right, h-above-axis-key
	for i := range 5 {
		v := high * float64(i) / 4
		at := py + ph - ph*i/4
		fmt.Fprintf(&g.b, `<path d="M%d %dh%d" stroke="#e8eaee"/>`+"\n", px, at, pw)
		g.text(px-6, at+4, `text-anchor="end" fill="#777" font-size="11"`, format(v, unit))
	}
	for i := range 4 {
		t := g.to.Sub(g.from) * time.Duration(i) / 3
		g.text(min(px+pw*i/3, x+w-16), py+ph+14, `text-anchor="middle" fill="#777" font-size="11"`, fmt.Sprintf("%d:%02d", int(t.Minutes()), int(t.Seconds())%60))
	}
	for i := len(series) - 1; i >= 0; i-- {
		path := g.line(series[i], 0, high, px, py, pw, ph)
		if path == "" {
			continue
		}
		colour := colours[i%len(colours)]
		if stacked && !strings.Contains(path[1:], "M") {
			first, last := series[i].Times[0], series[i].Times[len(series[i].Times)-1]
			fmt.Fprintf(&g.b, `<path d="%s L%.1f %d L%.1f %d Z" fill="%s" fill-opacity=".3"/>`+"\n", path, g.x(last, px, pw), py+ph, g.x(first, px, pw), py+ph, colour)
		}
		fmt.Fprintf(&g.b, `<path d="%s" fill="none" stroke="%s" stroke-width="1.6"/>`+"\n", path, colour)
	}
	at, shown := px, 0
	for i, name := range d.Names {
		width := 22 + 7*len(name)
		if at+width > x+w-30 && i < len(d.Names)-1 || at+width > x+w {
			g.text(at, y+h-8, `fill="#777"`, fmt.Sprintf("+%d", len(d.Names)-shown))
			break
		}
		fmt.Fprintf(&g.b, `<path d="M%d %dh12" stroke="%s" stroke-width="3"/>`+"\n", at, y+h-12, colours[i%len(colours)])
		g.text(at+16, y+h-8, `fill="#444"`, name)
		at += width
		shown++
	}
}

// stack adds to each series those before it.
func stack(series []lab.Series) (out []lab.Series) {
	sum := map[float64]float64{}
	for _, s := range series {
		o := lab.Series{Labels: s.Labels, Times: s.Times}
		for i, t := range s.Times {
			if !math.IsNaN(s.Values[i]) {
				sum[t] += s.Values[i]
			}
			o.Values = append(o.Values, sum[t])
		}
		out = append(out, o)
	}
	return out
}

func (g *Drawing) x(t float64, px, pw int) float64 {
	return float64(px) + float64(pw)*(t-float64(g.from.Unix()))/g.to.Sub(g.from).Seconds()
}

// line is the path of a series, with a gap where it has none.
func (g *Drawing) line(s lab.Series, low, high float64, px, py, pw, ph int) string {
	var b strings.Builder
	pen, before := "M", 0.0
	for i, v := range s.Values {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			pen = "M"
			continue
		}
		if i > 1 && s.Times[i]-before > 3*(s.Times[1]-s.Times[0]) {
			pen = "M"
		}
		before = s.Times[i]
		v = min(max(v, low), high)
		fmt.Fprintf(&b, "%s%.1f %.1f", pen, g.x(s.Times[i], px, pw), float64(py)+float64(ph)*(1-(v-low)/(high-low)))
		pen = "L"
	}
	return b.String()
}

// top is the end of an axis for values: 1, 2 or 5 times a power of ten.
func top(values []float64) float64 {
	high := 0.0
	for _, v := range values {
		if !math.IsNaN(v) && !math.IsInf(v, 0) {
			high = max(high, v)
		}
	}
	if high == 0 {
		return 1
	}
	power := math.Pow(10, math.Floor(math.Log10(high)))
	for _, m := range []float64{1, 2, 4, 5, 8} {
		if high <= m*power*1.0001 {
			return m * power
		}
	}
	return 10 * power
}

func format(v float64, unit string) string {
	number := func(v float64) string { return strings.TrimSuffix(fmt.Sprintf("%.3g", v), ".0") }
	switch unit {
	case "percentunit":
		return fmt.Sprintf("%.3g %%", v*100)
	case "bytes":
		return fmt.Sprintf("%.3g MiB", v/(1<<20))
	case "s":
		switch {
		case v == 0:
			return "0 s"
		case v < 0.001:
			return number(v*1e6) + " µs"
		case v < 1:
			return number(v*1e3) + " ms"
		}
		return number(v) + " s"
	case "reqps":
		return fmt.Sprintf("%.4g/s", v)
	}
	return fmt.Sprintf("%.4g", v)
}
