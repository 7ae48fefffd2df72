package serverblocks

import (
	"strings"
	"testing"

	"github.com/contentful-labs/coredns-nodecache/internal/testkit"
)

func TestParseKey(t *testing.T) {
	for _, test := range []struct {
		input     string
		shouldErr string
		protos    string
		port      uint16
	}{
		{"dns://.:53", "", "udp tcp", 53},
		{"dns://cluster.local.:65535", "", "udp tcp", 65535},
		{".:1053", "", "udp tcp", 1053},
		{"dns://cluster.local.", "", "udp tcp", 53},
		{"tls://.:853", "", "tcp", 853},
		{"grpc://.:443", "", "tcp", 443},
		{"https://.:443", "", "tcp", 443},
		{"quic://.:853", "", "udp", 853},
		{"https3://.:443", "", "udp", 443},
		{"unix://.:53", "does not know the transport unix", "", 0},
		{"dns://.:0", `"0" is no port`, "", 0},
		{"dns://.:65536", "is no port", "", 0},
		{"dns://.:dns", "is no port", "", 0},
		{"dns://.:", "is no port", "", 0},
	} {
		protos, port, err := ParseKey(test.input)
		testkit.WantError(t, err, test.shouldErr)
		if got := strings.Join(protos, " "); err == nil && (got != test.protos || port != test.port) {
			t.Errorf("%q: got %s %d, want %s %d", test.input, got, port, test.protos, test.port)
		}
	}
}
