package nodecache

import (
	"testing"
	"time"

	"github.com/contentful-labs/coredns-nodecache/internal/doctor"
	"github.com/contentful-labs/coredns-nodecache/internal/life"
)

// The node is looked at every so often, however rarely it is checked.
func TestExaminesWhateverSync(t *testing.T) {
	defer func(d time.Duration) { examineEvery = d }(examineEvery)
	examineEvery = 5 * time.Millisecond
	looks := make(chan struct{}, 100)
	n := newNode()
	n.doctor = doctor.New([]doctor.Fault{{Name: "counted", Find: func(doctor.Site) []string {
		select {
		case looks <- struct{}{}:
		default:
		}
		return nil
	}}})
	must(t, n.do(func() error {
		n.life = life.Phase[config]{Kind: life.Serving, InForce: newConfig()}
		n.tick(maxSync)
		n.examineFirst(n.life.InForce)
		return nil
	}))
	for i := range 3 {
		select {
		case <-looks:
		case <-time.After(30 * time.Second):
			t.Fatalf("%d looks", i)
		}
	}
	must(t, n.do(func() error { n.on(life.Exits, nil); n.examineTick.Stop(); return nil }))
}
