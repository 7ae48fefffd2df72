package footprint

import (
	"os"
	"regexp"
	"slices"
	"strconv"
	"testing"
)

// Less of the program's file is mapped afterwards, and the program goes on.
func TestTrimGivesBack(t *testing.T) {
	mapped := func() int {
		t.Helper()
		text, err := os.ReadFile("/proc/self/status")
		if err != nil {
			t.Fatal(err)
		}
		n, err := strconv.Atoi(string(regexp.MustCompile(`RssFile:\s+(\d+)`).FindSubmatch(text)[1]))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := mapped()
	if err := Trim(); err != nil {
		t.Fatal(err)
	}
	if after := mapped(); after >= before {
		t.Errorf("%d KiB of files are mapped, before it were %d", after, before)
	}
}

func TestOnlyWhatIsAsInTheFileGoes(t *testing.T) {
	const smaps = `00400000-014c0000 r-xp 00000000 fe:00 1201                               /coredns
Rss:               14116 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
014c0000-02700000 r--p 010c0000 fe:00 1201                               /coredns
Anonymous:             4 kB
02700000-027c0000 rw-p 02300000 fe:00 1201                               /coredns
Anonymous:             0 kB
7f0000000000-7f0000001000 r--p 00000000 fe:00 1207                       /lib/other
Anonymous:             0 kB
7f0000002000-7f0000003000 r--p 00000000 00:00 0
Anonymous:             0 kB
7f0000004000-7f0000005000 r--s 00000000 fe:00 1201                       /coredns
Anonymous:             0 kB
`
	if got, want := unchanged(smaps, "/coredns"), []mapping{{0x400000, 0x14c0000}}; !slices.Equal(got, want) {
		t.Errorf("%x go, want %x", got, want)
	}
}
