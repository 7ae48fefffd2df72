package fastpath

import (
	"context"
	"testing"
	"time"

	"github.com/coredns/coredns/plugin"
	"github.com/coredns/coredns/plugin/cache"
	"github.com/coredns/coredns/plugin/test"
	"github.com/miekg/dns"
)

// known is what the cache plugin has stored, for tests.
func known(at int64, ttl uint32, answers int) *stored {
	s := &stored{lo: at, hi: at, ttl: ttl}
	s.answering, s.answer = answers > 0, answers
	if answers == 0 {
		s.soa, s.ns = true, 1
	}
	return s
}

func TestItems(t *testing.T) {
	const s = int64(time.Second)
	it := newItems(100, 0)
	const key = 5
	store := func(new *stored) { it.end(key, it.begin(key), new) }
	confirm := func(answers int, ttl uint32, now int64) bool {
		i, version := it.look(key)
		if i == nil {
			return false
		}
		sh := shape{answering: answers > 0, answer: answers}
		if answers == 0 {
			sh.ns = 1
		}
		_, _, ok := it.confirm(key, i, version, sh, ttl, false, now, now)
		return ok
	}
	if confirm(1, 30, 0) {
		t.Error("confirmed what was never stored")
	}
	store(known(0, 30, 1))
	if !confirm(1, 30, s/2) || !confirm(1, 29, s+s/2) {
		t.Error("not confirmed what was stored")
	}
	for what, ok := range map[string]bool{
		"another TTL": confirm(1, 30, s+s/2), "another number of records": confirm(2, 29, s+s/2), "a denial": confirm(0, 29, s+s/2), "what is over": confirm(1, 0, 30*s),
	} {
		if ok {
			t.Errorf("confirmed %s", what)
		}
	}
	// Answers that were made before a newer item are good no more.
	i, version := it.look(key)
	store(known(s, 30, 1))
	if _, _, ok := it.confirm(key, i, version, shape{answering: true, answer: 1}, 29, false, s, s); ok {
		t.Error("confirmed an answer from before")
	}
	// While one is being stored it is not known which is answered from.
	j := it.begin(key)
	if confirm(1, 29, 2*s) {
		t.Error("confirmed while another is being stored")
	}
	it.end(key, j, nil) // it was not: the old one is answered from
	if !confirm(1, 29, 2*s) {
		t.Error("not confirmed what an answer that was not stored has left in place")
	}
	// A denial beside an answer: either may be answered from.
	store(known(3*s, 5, 0))
	if confirm(0, 5, 3*s) || confirm(1, 27, 4*s) {
		t.Error("confirmed one of two different items")
	}
	store(known(40*s, 30, 1))
	if !confirm(1, 30, 40*s) {
		t.Error("not confirmed when both were over")
	}
	// Two at the same time: which has replaced which is not known.
	a, b := it.begin(key), it.begin(key)
	it.end(key, a, known(50*s, 30, 1))
	it.end(key, b, known(50*s+10, 30, 1))
	i, version = it.look(key)
	if got, _, ok := it.confirm(key, i, version, shape{answering: true, answer: 1}, 30, false, 51*s, 51*s); !ok || got.lo != 50*s || got.hi != 50*s+10 {
		t.Errorf("of two at the same time: %+v, %v", got, ok)
	}
	a, b = it.begin(key), it.begin(key)
	it.end(key, a, known(60*s, 30, 1))
	it.end(key, b, known(60*s+10, 29, 1))
	if confirm(1, 30, 60*s+20) || confirm(1, 29, 60*s+20) {
		t.Error("confirmed one of two that differ")
	}
}

// The items of names that are asked for once do not drive out those in use, and their
// number is bounded.
func TestItemsAreBounded(t *testing.T) {
	it := newItems(1600, 0)
	now := sinceEpoch()
	hour := func(n int) *stored { return known(now, 3600, n) }
	for key := range uint64(160) {
		it.end(key, it.begin(key), hour(1))
		i, version := it.look(key)
		it.confirm(key, i, version, shape{answering: true, answer: 1}, 3600, false, now, now)
	}
	for key := range uint64(100_000) {
		it.end(key+1000, it.begin(key+1000), hour(1))
	}
	total, kept := 0, 0
	for i := range it.shards {
		total += len(it.shards[i].m)
	}
	for key := range uint64(160) {
		if i, _ := it.look(key); i != nil {
			kept++
		}
	}
	if total > 1600 || kept < 150 {
		t.Errorf("%d items, want at most 1600; of 160 in use %d are left", total, kept)
	}
}

// The fields of CoreDNS that are read are where they are thought to be.
func TestLayout(t *testing.T) {
	if _, err := layout(); err != nil {
		t.Fatal(err)
	}
	if _, ok := lastItem(&cache.ResponseWriter{}); ok {
		t.Error("there is an item where none was stored")
	}
	s, err := readSettings(cache.New())
	if err != nil || s.percentage != 10 || s.duration != time.Minute {
		t.Errorf("the settings are %+v, %v", s, err)
	}
}

// What is read as the item is what the cache plugin has stored.
func TestLastItem(t *testing.T) {
	var got []stored
	c := cache.New()
	c.Next = plugin.HandlerFunc(func(_ context.Context, w dns.ResponseWriter, r *dns.Msg) (int, error) {
		m := new(dns.Msg).SetReply(r)
		m.Answer = []dns.RR{test.A(r.Question[0].Name + " 300 IN A 192.0.2.1"), test.A(r.Question[0].Name + " 77 IN A 192.0.2.2")}
		to := cacheWriter(w)
		if to == nil {
			t.Fatalf("%T does not lead to the cache plugin's writer", w)
		}
		w.WriteMsg(m)
		if s, ok := lastItem(to); ok {
			got = append(got, s)
		}
		return dns.RcodeSuccess, nil
	})
	before := sinceEpoch()
	_, err := c.ServeDNS(t.Context(), &test.ResponseWriter{}, question("example.org.", dns.TypeA))
	must(t, err)
	after := sinceEpoch()
	if len(got) != 1 || got[0].ttl != 77 || got[0].answer != 2 || !got[0].answering || got[0].rcode != 0 || got[0].lo < before || got[0].lo > after {
		t.Errorf("stored is %+v, between %d and %d", got, before, after)
	}
}
