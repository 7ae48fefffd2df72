// Command picture draws the dashboard of k8s/monitoring from real data: a pair of
// caches on a node of network namespaces, queries, things that happen to them, and a
// Prometheus that scrapes them. It prints an SVG.
package main

import (
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/contentful-labs/coredns-nodecache/test/dashboard"
	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

const (
	inPlace = "plugin/nodecache: in place"
	step    = time.Second
	window  = "6s" // of rates
)

// corefile is for one of the pair, with its metrics' port.
const corefile = `.:53 {
    bind 169.254.20.10 10.96.0.10
    nodecache {
        firewall nftables
        sync 2s
        fastpath
    }
    prometheus 127.0.0.1:%d
    cache 20
    forward . 10.0.2.2
}
`

func main() {
	binary := flag.String("coredns", "coredns", "the binary that make builds")
	file := flag.String("dashboard", "k8s/monitoring/dashboard.json", "the dashboard")
	act := flag.Duration("act", 15*time.Second, "how long each thing that happens is watched")
	flag.Parse()
	svg, err := picture(*binary, *file, *act)
	if err != nil {
		fmt.Fprintf(os.Stderr, "drawing the dashboard: %v\n", err)
		os.Exit(1)
	}
	fmt.Print(svg)
}

func picture(binary, file string, act time.Duration) (_ string, err error) {
	d, err := dashboard.Read(file)
	if err != nil {
		return "", err
	}
	if binary, err = filepath.Abs(binary); err != nil {
		return "", err
	}
	l, err := lab.New(lab.NFT)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	start := func(port int) (*lab.CoreDNS, error) {
		p, err := l.Start(binary, fmt.Sprintf(corefile, port), lab.Options{})
		if err != nil {
			return nil, err
		}
		return p, p.WaitLog(0, inPlace)
	}
	if _, err = start(9253); err != nil {
		return "", err
	}
	twin, err := start(9353)
	if err != nil {
		return "", err
	}
	p, err := l.StartPrometheus(map[string]string{"node-1:9253": "127.0.0.1:9253", "node-1:9353": "127.0.0.1:9353"})
	if err != nil {
		return "", err
	}
	defer p.Close()
	flow, err := lab.Flow{From: l.Pod, To: []netip.Addr{lab.ClusterIP, lab.LinkLocal}, Rate: 800, Misses: 8}.Start()
	if err != nil {
		return "", err
	}
	defer flow.Stop()
	from := time.Now()
	for _, happens := range []func() error{
		func() error { return nil },
		// An update of one of the two.
		func() error {
			if _, err := twin.Stop(syscall.SIGTERM); err != nil {
				return err
			}
			time.Sleep(act / 2) // as a pod takes to come back; it is only a picture
			twin, err = start(9353)
			return err
		},
		// Somebody removes what is ours.
		func() error {
			for range 3 {
				if _, err := l.Node.Run("ip", "addr", "del", "10.96.0.10/32", "dev", "nodelocaldns"); err != nil {
					return err
				}
				time.Sleep(act / 8)
			}
			return nil
		},
		// A crash.
		func() error {
			twin.Kill()
			time.Sleep(act / 2)
			twin, err = start(9353)
			return err
		},
		func() error { return nil },
	} {
		if err := happens(); err != nil {
			return "", err
		}
		time.Sleep(act)
	}
	to := time.Now()

	var data []dashboard.Data
	for _, panel := range d.Panels {
		var all dashboard.Data
		for _, t := range panel.Targets {
			series, err := p.QueryRange(t.Query(window), from, to, step)
			if err != nil {
				return "", err
			}
			for _, s := range series {
				name := t.Legend(s.Labels)
				if zero(s) && len(all.Series) > 0 && len(series) > 3 && !strings.Contains(panel.Title, "place") {
					continue // so that the names of the others fit
				}
				all.Names, all.Series = append(all.Names, name), append(all.Series, s)
			}
		}
		data = append(data, all)
	}
	return dashboard.Draw(d, data, from, to), nil
}

func zero(s lab.Series) bool {
	for _, v := range s.Values {
		if v != 0 {
			return false
		}
	}
	return true
}
