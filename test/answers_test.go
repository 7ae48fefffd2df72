package e2e

import (
	"bytes"
	enc "encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

// Answers compared: the same questions to this cache with and without fastpath, to CoreDNS with
// the same plugins but nodecache, to CoreDNS with node-cache's plugins, and to unbound. All ask the same
// upstream (answers_upstream_test.go).

// Those who are asked.
const (
	answersOurs = iota
	answersFast
	answersSame
	answersPlain
	answersUnbound
)

var answersAddrs = []netip.Addr{lab.ClusterIP, lab.LinkLocal, netip.MustParseAddr("169.254.20.21"), netip.MustParseAddr("169.254.20.22"), netip.MustParseAddr("169.254.20.23")}

// answersCorefiles are those of this cache and of plain CoreDNS. The plugins are those that are
// shipped, but that answers stay for as long as the test lasts, and that loadbalance turns nothing.
func answersCorefiles(t *testing.T) (ours, plain string) {
	lines := shippedLines(t)
	for _, change := range [][2]string{
		{"success 9984 30 0", "success 400000 3600 0"}, {"denial 9984 5 0", "denial 400000 3600 0"},
		{"shield\n", "shield {\n failures 5m 5m\n}\n"}, {"loadbalance", ""},
	} {
		if !strings.Contains(lines, change[0]) {
			t.Fatalf("the manifests have no %q", change[0])
		}
		lines = strings.Replace(lines, change[0], change[1], 1)
	}
	asks := "\n    upstream . " + corpusAt + " {\n        prefer_udp\n    }\n"
	block := func(at netip.Addr, lines string) string {
		return ".:53 {\n    bind " + at.String() + "\n    errors {\n consolidate 1m \".*\"\n }\n    " + lines + "\n}\n"
	}
	nodecache := "nodecache {\n        firewall nftables\n        "
	ours = block(answersAddrs[answersOurs], nodecache+"\n    }"+lines+asks) + block(answersAddrs[answersFast], nodecache+"fastpath 100000\n    }"+lines+asks+"    prometheus 169.254.20.10:9253\n")
	plain = block(answersAddrs[answersSame], lines+asks) +
		block(answersAddrs[answersPlain], "cache 3600 {\n success 400000\n denial 400000\n }\n    forward . "+corpusAt+" {\n max_fails 0\n }")
	return ours, plain
}

// unbound starts Debian's unbound, with its defaults but for what makes it ask the same upstream.
func (n *node) unbound() {
	n.Helper()
	conf := filepath.Join(n.Dir, "unbound.conf")
	n.must(os.WriteFile(conf, []byte(fmt.Sprintf(`server:
	interface: %s
	access-control: 0.0.0.0/0 allow
	do-daemonize: no
	use-syslog: no
	username: ""
	chroot: ""
	directory: %q
	pidfile: ""
	module-config: "iterator"
	do-not-query-localhost: no
	minimal-responses: no
	rrset-roundrobin: no
	so-rcvbuf: 4m
	so-sndbuf: 4m
	msg-cache-size: 200m
	rrset-cache-size: 400m
	local-zone: "2.0.192.in-addr.arpa." nodefault
remote-control:
	control-enable: no
forward-zone:
	name: "."
	forward-addr: %s
forward-zone:
	name: "%s"
	forward-addr: %s
`, answersAddrs[answersUnbound], n.Dir, strings.Replace(corpusAt, ":", "@", 1), brokenZone, strings.Replace(brokenAt, ":", "@", 1))), 0o644))
	p, err := n.StartProgram("unbound", "-d", "-c", conf)
	n.must(err)
	n.Cleanup(func() {
		if n.Failed() {
			n.Logf("unbound's log:\n%s", p.Log())
		}
	})
	n.must(p.WaitLog(0, "start of service"))
}

// answersSite starts all that are asked.
func (n *node) answersSite(unbound bool) {
	n.Helper()
	n.corpusUpstream()
	n.must(n.Node.Do(func() error {
		for _, a := range answersAddrs[answersSame:] {
			if err := lab.AddAddrs("lo", a.String()+"/32"); err != nil {
				return err
			}
		}
		return nil
	}))
	ours, plain := answersCorefiles(n.T)
	n.serve(ours)
	p := n.launch(plain, lab.Options{})
	n.must(p.WaitServing())
	if unbound {
		n.unbound()
	}
}

// An asked question has what each has answered, each time.
type askedQuestion struct {
	*corpusQuestion
	answers [][][]byte // by who was asked, then by the time
}

// quiet tells whether a question of this shape may get no answer at all.
func quietShape(name string) bool {
	return slices.Contains([]string{"response", "half a header", "one byte", "empty"}, name) || strings.HasPrefix(name, "garbage")
}

// answersWorker asks, and hands on what was answered.
func (n *node) answersWorker(c *corpus, whom []int, count int, take func(askedQuestion)) error {
	const together, apart, times = 16, 48, 3
	askers := make([]*asker, len(answersAddrs))
	for _, i := range whom {
		a, err := n.asker(on(answersAddrs[i])[0])
		if err != nil {
			return err
		}
		defer a.conn.Close()
		a.conn.SetReadBuffer(4 << 20)
		askers[i] = a
	}
	// What is waited for longer is asked apart, more of it at once: what may get no answer, and what
	// unbound asks the upstream several times for.
	var silent, slow []*corpusQuestion
	for count > 0 || len(silent) > 0 || len(slow) > 0 {
		var batch []*corpusQuestion
		patience, again := 10*time.Second, times
		switch {
		case len(silent) >= apart || count <= 0 && len(silent) > 0:
			batch, silent = silent, nil
			patience, again = time.Second, 1
		case len(slow) >= apart || count <= 0:
			batch, slow = slow, nil
		default:
			for _, q := range c.batch(min(together, count)) {
				count--
				switch {
				case quietShape(q.shape):
					silent = append(silent, q)
				case q.kind == "broken":
					slow = append(slow, q)
				default:
					batch = append(batch, q)
				}
			}
		}
		all := make([]askedQuestion, len(batch))
		for i, q := range batch {
			all[i] = askedQuestion{q, make([][][]byte, len(answersAddrs))}
		}
		for range again {
			if err := n.askAll(askers, whom, all, patience); err != nil {
				return err
			}
		}
		for _, a := range all {
			take(a)
		}
	}
	return nil
}

// askAll asks everybody once.
func (n *node) askAll(askers []*asker, whom []int, all []askedQuestion, patience time.Duration) error {
	errs := make([]error, len(askers))
	var wg sync.WaitGroup
	for _, i := range whom {
		wg.Go(func() {
			var packets [][]byte
			var at []int
			for j, q := range all {
				if i == answersUnbound && !q.unbound {
					continue
				}
				if !q.tcp {
					packets, at = append(packets, q.packet), append(at, j)
				}
			}
			wait := patience
			if i == answersUnbound {
				wait = min(wait, 3*time.Second)
			}
			answers, err := askers[i].ask(wait, packets...)
			if err != nil {
				errs[i] = err
				return
			}
			for k := range answers {
				// It is not unbound's losses that are tested.
				if i == answersUnbound && answers[k] == nil && !quietShape(all[at[k]].shape) {
					again, err := askers[i].ask(patience, packets[k])
					if err != nil {
						errs[i] = err
						return
					}
					answers[k] = again[0]
				}
			}
			for k, j := range at {
				all[j].answers[i] = append(all[j].answers[i], answers[k])
			}
			for j, q := range all {
				if q.tcp && (i != answersUnbound || q.unbound) {
					b, err := n.askTCP(on(answersAddrs[i])[0], q.packet, patience)
					if err != nil {
						errs[i] = err
						return
					}
					all[j].answers[i] = append(all[j].answers[i], b)
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// askTCP asks over a connection of its own. The answer lacks its id, and is nil where there is none.
func (n *node) askTCP(to netip.AddrPort, q []byte, patience time.Duration) ([]byte, error) {
	var c net.Conn
	err := n.Pod.Do(func() (err error) {
		c, err = net.DialTimeout("tcp", to.String(), lab.Patience)
		return err
	})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	framed := append(enc.BigEndian.AppendUint16(nil, uint16(len(q))), q...)
	if _, err := c.Write(framed); err != nil {
		return nil, nil // it does not want it
	}
	var size [2]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return nil, nil
	}
	b := make([]byte, enc.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(c, b); err != nil || len(b) < 2 {
		return nil, nil
	}
	return b[2:], nil
}

// answersFrom asks so many questions.
func (n *node) answersFrom(seed uint64, whom []int, count int, take func(askedQuestion)) {
	n.Helper()
	const workers = 8 // with 16 questions each under way no socket overflows
	var mu sync.Mutex
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			share := count / workers
			if err := n.answersWorker(newCorpus(seed, w), whom, share, func(a askedQuestion) {
				mu.Lock()
				defer mu.Unlock()
				take(a)
			}); err != nil {
				n.Error(err)
			}
		})
	}
	wg.Wait()
}

// What nodecache answers, with fastpath and without, is byte for byte what CoreDNS answers with the
// same plugins.
func TestAnswersAreCoreDNSs(t *testing.T) {
	n := newNode(t, backend{lab.NFT, "nftables"})
	n.answersSite(false)
	n.Log(n.sameAsCoreDNS(scale(2000), []int{answersOurs, answersFast, answersSame}, func(askedQuestion) {}))
}

// sameAsCoreDNS asks, and compares. What was answered goes to take too.
func (n *node) sameAsCoreDNS(count int, whom []int, take func(askedQuestion)) string {
	n.Helper()
	questions, compared, wrong := 0, 0, 0
	n.answersFrom(1, whom, count, func(a askedQuestion) {
		questions++
		take(a)
		for i, want := range a.answers[answersSame] {
			for _, who := range []int{answersOurs, answersFast} {
				compared++
				got := a.answers[who][i]
				if !sameButTTLs(got, want) {
					if wrong++; wrong <= 10 {
						n.Errorf("%v, time %d, %v:\n\tsent %x\n\tgot  %x\n\twant %x", a.corpusQuestion, i+1, answersAddrs[who], a.packet, got, want)
					}
				}
				if why := a.hurts(got); why != "" {
					if wrong++; wrong <= 10 {
						n.Errorf("%v, time %d, %v: %s:\n\tsent %x\n\tgot  %x", a.corpusQuestion, i+1, answersAddrs[who], why, a.packet, got)
					}
				}
			}
		}
	})
	ready := n.fastNumber("coredns_nodecache_fastpath_hits_total")
	if ready < float64(questions)/4 {
		n.Errorf("only %.0f of %d answers were ready ones", ready, questions)
	}
	return fmt.Sprintf("%d questions, each three times: %d answers compared with CoreDNS's, %d different; %.0f were ready answers.", questions, compared, wrong, ready)
}

// hurts tells what of an answer a client could not live with, whoever else answers so.
func (q *corpusQuestion) hurts(answer []byte) string {
	if answer == nil {
		if quietShape(q.shape) {
			return ""
		}
		return "no answer"
	}
	a, err := readAnswer(answer)
	if err != nil {
		return err.Error()
	}
	var m dns.Msg
	if m.Unpack(q.packet) != nil || len(m.Question) != 1 || m.Response {
		return ""
	}
	size, o := dns.MinMsgSize, m.IsEdns0()
	if o != nil {
		size = max(size, int(o.UDPSize()))
	}
	_, end, err := readName(q.packet, 12)
	if err != nil {
		return ""
	}
	end += 4
	switch {
	case !q.tcp && a.size > size:
		return "larger than the client takes"
	case a.opts > 1 || a.opts == 1 && o == nil:
		return "OPT records that the client can't have"
	case a.opts == 0 && o != nil && a.rcode != dns.RcodeFormatError && a.rcode != dns.RcodeNotImplemented:
		return "no OPT record"
	case len(a.question) > 0 && !bytes.Equal(a.question, q.packet[12:end]):
		return "not the question as it was asked"
	case len(a.question) == 0 && a.rcode != dns.RcodeFormatError && a.rcode != dns.RcodeNotImplemented:
		return "no question"
	case a.end != a.size:
		return "bytes behind the end"
	case a.flags>>15 != 1 || int(a.flags>>11&15) != m.Opcode && a.rcode != dns.RcodeFormatError:
		return "not the answer to this opcode"
	}
	return ""
}
