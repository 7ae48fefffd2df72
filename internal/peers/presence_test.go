package peers

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/internal/desired"
)

// What release 0.1.0 says is understood as it is.
func TestPresenceOfOldRelease(t *testing.T) {
	p, err := parsePresence([]byte(`{"links":{"nodelocaldns":["169.254.20.10","fd00:20::10"]},`+
		`"rules":[{"addr":"169.254.20.10","proto":"udp","port":53},{"addr":"fd00:20::10","proto":"tcp","port":8080,"extra":true}],`+
		`"serves":null,"leaving_links":{"nodelocaldns":["fd00:20::10"]},"leaving_rules":[{"addr":"169.254.20.10","proto":"udp","port":53}]}`), badLink)
	must(t, err)
	got := fmt.Sprint(p.Version, p.Variant, p.Links, shown(p.Rules), p.Rules[1].Extra, p.Serves, p.LeavingLinks, shown(p.LeavingRules))
	const want = "0map[nodelocaldns:[169.254.20.10 fd00:20::10]] [169.254.20.10:53/udp [fd00:20::10]:8080/tcp] true [] map[nodelocaldns:[fd00:20::10]] [169.254.20.10:53/udp]"
	if got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// A release to come may say more, and have variants that this one does not know.
func TestPresenceOfReleaseToCome(t *testing.T) {
	p, err := parsePresence([]byte(`{"version":2,"variant":"iptables-ng","links":{"a":["10.0.0.9"]},"more":{"of":["this"]}}`), badLink)
	must(t, err)
	if p.Version != 2 || p.Variant != "" || len(p.Links) != 1 {
		t.Errorf("understood is %+v", p)
	}
}

// many is what a cache with so many addresses shows at most: DNS over UDP, TCP, TLS and
// HTTPS on each of the longest addresses, all of them on their way out.
func many(addresses int) presence {
	p := presence{Version: presenceVersion, Variant: "nf_tables", Links: map[string][]netip.Addr{}}
	for i := range addresses {
		a := addr(fmt.Sprintf("fd00:1234:5678:9abc:def0:1234:5678:%04x", 0xa000+i))
		p.Links["nodelocaldns12"] = append(p.Links["nodelocaldns12"], a)
		for _, e := range []desired.Endpoint{{Addr: a, Proto: "udp", Port: 53}, {Addr: a, Proto: "tcp", Port: 53}, {Addr: a, Proto: "tcp", Port: 853}, {Addr: a, Proto: "tcp", Port: 8443, Extra: true}} {
			p.Rules = append(p.Rules, toShow([]desired.Endpoint{e})...)
		}
	}
	p.Serves, p.LeavingLinks, p.LeavingRules = p.Rules, p.Links, p.Rules
	return p
}

func TestPresenceBounds(t *testing.T) {
	b, err := json.Marshal(many(1000))
	must(t, err)
	if _, err := parsePresence(b, badLink); err != nil {
		t.Errorf("1,000 addresses, %d bytes: %v", len(b), err)
	}
	for name, p := range map[string]presence{
		"addresses": {Links: map[string][]netip.Addr{"a": many(addressLimit + 1).Links["nodelocaldns12"]}},
		"endpoints": {Rules: many(endpointLimit/4 + 1).Rules},
		"leaving":   {LeavingRules: many(endpointLimit/4 + 1).Rules},
	} {
		b, err := json.Marshal(p)
		must(t, err)
		_, err = parsePresence(b, badLink)
		wantError(t, err, "can be shared with other processes")
		// One's own too: the others would not understand it.
		m := newMember()
		wantError(t, m.publish(p), "can be shared with other processes")
		if m.listener != nil {
			t.Errorf("too many %s are shown all the same", name)
			m.Hide()
		}
	}
	links := map[string][]netip.Addr{}
	for i := range linkLimit + 1 {
		links[fmt.Sprint("a", i)] = nil
	}
	wantError(t, presence{Links: links}.check(badLink), "can be shared with other processes")
	_, err = parsePresence([]byte("{}"+strings.Repeat(" ", answerLimit)), badLink)
	wantError(t, err, "bytes")
}

func FuzzPresence(f *testing.F) {
	b, err := json.Marshal(many(2))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	for _, seed := range []string{
		"", "null", "{}", "[]", "{]", `{"version":-1}`, `{"version":1,"variant":"legacy"}`, `{"links":{"":["10.0.0.1"]}}`, `{"links":{"a":[""]}}`,
		`{"rules":[{"addr":"fe80::1%a\nb","proto":"udp","port":53}]}`, `{"rules":[{"addr":"10.0.0.9","proto":"udp\nCOMMIT","port":53}]}`,
		`{"rules":[{"addr":"::ffff:1.2.3.4","proto":"tcp","port":65536}]}`, `{"serves":[null]}`, `{"leaving_links":{"a":null}}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := readPresence(bytes.NewReader(b), badLink)
		if err != nil {
			if len(err.Error()) > 1000 || strings.ContainsAny(err.Error(), "\n\r\x00\x1b") {
				t.Errorf("the error %q", err)
			}
			return
		}
		if p.Version < 0 || p.Variant != "" && p.Variant != "legacy" && p.Variant != "nf_tables" {
			t.Errorf("version %d, variant %q", p.Version, p.Variant)
		}
		words := func(s string) {
			if strings.ContainsAny(s, " \n\r\t\x00%\"'") {
				t.Errorf("%q would be more than one word", s)
			}
		}
		for _, links := range []map[string][]netip.Addr{p.Links, p.LeavingLinks} {
			for name, as := range links {
				words(name)
				if len(as) > addressLimit {
					t.Errorf("%d addresses", len(as))
				}
				for _, a := range as {
					words(a.String())
				}
			}
		}
		for _, es := range [][]shownEndpoint{p.Rules, p.Serves, p.LeavingRules} {
			if len(es) > endpointLimit {
				t.Errorf("%d endpoints", len(es))
			}
			for _, e := range shown(es) {
				words(e.String())
			}
		}
		once, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		q, err := parsePresence(once, badLink)
		if err != nil {
			t.Fatalf("can't be read again: %v", err)
		}
		if twice, err := json.Marshal(q); err != nil || !bytes.Equal(once, twice) {
			t.Errorf("read again it is %s, error %v; it was %s", twice, err, once)
		}
	})
}
