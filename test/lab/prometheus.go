package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netns"
)

// A Prometheus is a Prometheus server on the node, on 127.0.0.1:9090 there.
type Prometheus struct {
	client *http.Client
	pid    int
	exited chan struct{}
	output string // the path of what it says
}

// StartPrometheus starts a Prometheus that scrapes every second, and waits until it is
// ready. targets are addresses on the node by the name that each instance gets.
func (l *Lab) StartPrometheus(targets map[string]string) (*Prometheus, error) {
	dir, err := os.MkdirTemp(l.Dir, "prometheus")
	if err != nil {
		return nil, err
	}
	var config strings.Builder
	config.WriteString("global: {scrape_interval: 1s}\nscrape_configs:\n- job_name: nodecache\n  static_configs:\n")
	for name, at := range targets {
		fmt.Fprintf(&config, "  - targets: [%q]\n    labels: {instance: %q}\n", at, name)
	}
	file := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(file, []byte(config.String()), 0o644); err != nil {
		return nil, err
	}
	p := &Prometheus{exited: make(chan struct{}), output: filepath.Join(dir, "output"), client: l.Node.Client(Patience)}
	out, err := os.Create(p.output)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	cmd := l.Node.command("prometheus", "--config.file="+file, "--storage.tsdb.path="+filepath.Join(dir, "data"),
		"--web.listen-address=127.0.0.1:9090", "--log.level=warn")
	cmd.Stdout, cmd.Stderr = out, out
	started := make(chan error, 1)
	go func() {
		// It dies with this thread.
		runtime.LockOSThread()
		err := netns.Set(l.Node.handle)
		if err == nil {
			err = cmd.Start()
		}
		started <- err
		if err == nil {
			cmd.Wait()
			close(p.exited)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting prometheus: %w", err)
	}
	p.pid = cmd.Process.Pid
	for late := time.Now().Add(Patience); ; time.Sleep(50 * time.Millisecond) {
		if _, err = p.get("/-/ready", nil); err == nil {
			return p, nil
		}
		select {
		case <-p.exited:
			said, _ := os.ReadFile(p.output)
			return nil, fmt.Errorf("starting prometheus: %w: %s", ErrExited, said)
		default:
		}
		if time.Now().After(late) {
			return nil, errors.Join(fmt.Errorf("waiting for prometheus: %w", err), p.Close())
		}
	}
}

// Close ends the server.
func (p *Prometheus) Close() error {
	err := syscall.Kill(p.pid, syscall.SIGKILL)
	<-p.exited
	return err
}

func (p *Prometheus) get(path string, q url.Values) ([]byte, error) {
	r, err := p.client.Get("http://127.0.0.1:9090" + path + "?" + q.Encode())
	if err != nil {
		return nil, err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", path, r.Status, b)
	}
	return b, err
}

// A Series is what one time series of a result has.
type Series struct {
	Labels map[string]string
	Times  []float64 // Unix time in seconds
	Values []float64
}

// Query returns what an expression has now.
func (p *Prometheus) Query(expr string) ([]Series, error) {
	return p.query("/api/v1/query", url.Values{"query": {expr}})
}

// QueryRange returns what an expression has between two times.
func (p *Prometheus) QueryRange(expr string, from, to time.Time, step time.Duration) ([]Series, error) {
	return p.query("/api/v1/query_range", url.Values{"query": {expr}, "start": {from.Format(time.RFC3339)},
		"end": {to.Format(time.RFC3339)}, "step": {strconv.FormatFloat(step.Seconds(), 'f', -1, 64)}})
}

func (p *Prometheus) query(path string, q url.Values) ([]Series, error) {
	b, err := p.get(path, q)
	if err != nil {
		return nil, fmt.Errorf("asking prometheus for %s: %w", q.Get("query"), err)
	}
	var answer struct {
		Data struct {
			Result []struct {
				Metric map[string]string
				Value  [2]any
				Values [][2]any
			}
		}
	}
	if err := json.Unmarshal(b, &answer); err != nil {
		return nil, fmt.Errorf("reading what prometheus says of %s: %w", q.Get("query"), err)
	}
	var all []Series
	for _, r := range answer.Data.Result {
		s := Series{Labels: r.Metric}
		for _, v := range append(r.Values, r.Value) {
			t, ok := v[0].(float64)
			text, isText := v[1].(string)
			f, err := strconv.ParseFloat(text, 64)
			if ok && isText && err == nil {
				s.Times, s.Values = append(s.Times, t), append(s.Values, f)
			}
		}
		all = append(all, s)
	}
	return all, nil
}
