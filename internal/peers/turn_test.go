package peers

import (
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestTurnsDoNotOverlap(t *testing.T) {
	needRoot(t)
	end, err := Turn(t.Context(), TurnLimit)
	must(t, err)
	second := make(chan func(), 1)
	asked := make(chan bool)
	go func() {
		close(asked)
		end, err := Turn(t.Context(), TurnLimit)
		if err != nil {
			t.Error(err)
		}
		second <- end
	}()
	<-asked
	if l, err := net.Listen("unix", lockNames[0]); err == nil {
		l.Close()
		t.Error("the turn is nobody's")
	}
	select {
	case <-second:
		t.Error("two have a turn at once")
	default:
	}
	end()
	(<-second)()
	end, err = Turn(t.Context(), TurnLimit)
	must(t, err)
	end()
}

// Whatever other users have of the lock's names, it costs nobody a wait.
func TestOtherUsersDoNotHoldTheTurn(t *testing.T) {
	for name, hold := range map[string]func(t *testing.T){
		"listening": func(t *testing.T) { bindAs(t, 65534, unix.SOCK_STREAM, lockNames[0], 0) },
		"bound":     func(t *testing.T) { bindAs(t, 65534, unix.SOCK_STREAM, lockNames[0], -1) },
		"connected": func(t *testing.T) {
			bindAs(t, 65534, unix.SOCK_STREAM, "@elsewhere", 1)
			must(t, unix.Connect(bindAs(t, 65534, unix.SOCK_STREAM, lockNames[0], -1), &unix.SockaddrUnix{Name: "@elsewhere"}))
		},
		"all": func(t *testing.T) {
			for i, name := range lockNames {
				bindAs(t, 65534, unix.SOCK_STREAM, name, i%2-1)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			eitherWay(t, func(t *testing.T) {
				hold(t)
				// Far longer than a test may take.
				end, err := Turn(t.Context(), time.Hour)
				must(t, err)
				held, err := heldLocks(-1)
				must(t, err)
				if want := name != "all"; (len(held) == 1 && held[0] == 1) != want {
					t.Errorf("held for this process are %v", held)
				}
				end()
			})
		})
	}
}

// One of ours keeps the others waiting whichever name it has, and for a time only.
func TestTurnIsWaitedFor(t *testing.T) {
	for _, name := range []string{lockNames[0], lockNames[3]} {
		eitherWay(t, func(t *testing.T) {
			fd := bindAs(t, 0, unix.SOCK_STREAM, name, 4096)
			end, err := Turn(t.Context(), 50*time.Millisecond)
			must(t, err)
			if held, err := heldLocks(-1); err != nil || len(held) != 1 || lockNames[held[0]] != name {
				t.Errorf("held are %v, error %v", held, err)
			}
			end()
			taken := make(chan bool)
			go func() {
				end, err := Turn(t.Context(), time.Hour)
				if err != nil {
					t.Error(err)
				}
				end()
				close(taken)
			}()
			select {
			case <-taken:
				t.Error("did not wait")
			case <-time.After(20 * time.Millisecond):
			}
			unix.Close(fd)
			<-taken
		})
	}
}

// Never have two a turn at once, and everybody's turn comes, while strangers take and leave
// the lock's names.
func TestTurnsDoNotOverlapWhileStrangersComeAndGo(t *testing.T) {
	needRoot(t)
	stop := make(chan bool)
	var strangers, turns sync.WaitGroup
	for range 2 {
		strangers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				as(t, 65534, func() {
					if l, err := net.Listen("unix", lockNames[rand.IntN(3)]); err == nil {
						time.Sleep(time.Duration(rand.IntN(2000)) * time.Microsecond)
						l.Close()
					}
				})
			}
		})
	}
	var within atomic.Int32
	for range 6 {
		turns.Go(func() {
			for range 50 {
				end, err := Turn(t.Context(), time.Hour)
				if err != nil {
					t.Error(err)
					return
				}
				if n := within.Add(1); n != 1 {
					t.Errorf("%d have a turn at once", n)
				}
				time.Sleep(time.Duration(rand.IntN(1000)) * time.Microsecond)
				within.Add(-1)
				end()
			}
		})
	}
	turns.Wait()
	close(stop)
	strangers.Wait()
}
