package sockets

import (
	"math"
	"testing"
)

func TestLimitsOfWhatIsUnderWay(t *testing.T) {
	for _, x := range []struct {
		descriptors int
		memory      int64
		want        int
	}{
		{1024, math.MaxInt64, 256},
		{1 << 20, math.MaxInt64, mostUnderWay},
		{1 << 20, 144 << 20, 3510},
		{16, 1 << 20, leastUnderWay},
	} {
		if got := underWayWithin(x.descriptors, x.memory); got != x.want {
			t.Errorf("%d descriptors and %d bytes: %d may be under way, want %d", x.descriptors, x.memory, got, x.want)
		}
	}
	if got := UnderWayLimit(); got < leastUnderWay || got > DescriptorLimit() {
		t.Errorf("%d may be under way, of %d descriptors", got, DescriptorLimit())
	}
}
