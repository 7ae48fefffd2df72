package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/contentful-labs/coredns-nodecache/internal/outlive"
)

const (
	// lookEvery is how often files are read, and lookSooner while one of them names no server.
	lookEvery  = time.Second
	lookSooner = 200 * time.Millisecond
	// settles is how long a file that has changed has to stay as it is.
	settles = 100 * time.Millisecond
	// mostServers are asked at most, as with forward.
	mostServers = 15
)

// A target is where to send queries, as the Corefile has it: a server, or a file that names some.
type target struct {
	file string
	address
}

// An address is that of a server.
type address struct {
	at         netip.AddrPort
	way        way
	serverName string // of TLS
}

func (a address) String() string {
	name := a.at.String()
	if a.way == overTLS {
		name = "tls://" + name
	}
	if a.serverName != "" {
		name += "%" + a.serverName
	}
	return name
}

// servers are those of a stanza. One goroutine follows its files.
type servers struct {
	targets []target
	opts    *options
	tell    *teller
	ours    func(netip.AddrPort) bool // whether this process itself would be asked there

	list  atomic.Pointer[listing]
	known map[string]*server
	files map[string]*followed
	stop  context.CancelFunc
	ended sync.WaitGroup
}

// A followed file, as it was last taken over.
type followed struct {
	text    string
	missing error
	named   []netip.AddrPort
}

// A listing is the servers, as long as these are the ones.
type listing struct {
	all  []*server
	over chan struct{} // closed when there is another one
}

var errNoServer = errors.New("there is no upstream to ask")

// now are the servers to be asked at this moment.
func (s *servers) now() *listing {
	if list := s.list.Load(); list != nil {
		return list
	}
	return &listing{}
}

// start begins to ask. It reads the files once before it returns.
func (s *servers) start() {
	s.known, s.files = map[string]*server{}, map[string]*followed{}
	for _, t := range s.targets {
		if t.file != "" && s.files[t.file] == nil {
			fileServers.follow(t.file)
			f := &followed{}
			f.text, f.missing = read(t.file)
			s.files[t.file] = f
			s.adopt(t.file, f)
		}
	}
	s.choose()
	ctx, cancel := context.WithCancel(context.Background())
	s.stop = cancel
	s.ended.Go(func() { s.follow(ctx) })
}

// close ends what start has begun. Queries under way are still answered.
func (s *servers) close() {
	if s.stop == nil {
		return // never started
	}
	s.stop()
	s.ended.Wait()
	for _, one := range s.known {
		one.close()
	}
	for file := range s.files {
		fileServers.forget(file)
	}
}

// follow reads the files again and again, and closes what has been idle.
func (s *servers) follow(ctx context.Context) {
	for {
		pause := lookEvery
		for _, f := range s.files {
			if len(f.named) == 0 {
				pause = lookSooner
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		s.look()
	}
}

func (s *servers) look() {
	defer outlive.Panic("following the files of upstreams")
	changed := false
	for name, f := range s.files {
		text, missing := read(name)
		if text == f.text && same(missing, f.missing) {
			continue
		}
		// Whoever writes it may not have finished.
		time.Sleep(settles)
		if again, err := read(name); again != text || !same(err, missing) {
			continue
		}
		f.text, f.missing = text, missing
		s.adopt(name, f)
		changed = true
	}
	if changed {
		s.choose()
	}
	for _, one := range s.known {
		one.pool.sweep()
	}
}

func same(a, b error) bool {
	return a == nil && b == nil || a != nil && b != nil && a.Error() == b.Error()
}

// adopt takes over what a file says now, and tells of it.
func (s *servers) adopt(name string, f *followed) {
	named, odd := nameservers(f.text)
	f.named = nil
	for _, at := range named {
		if s.ours != nil && s.ours(at) {
			odd = append(odd, fmt.Sprintf("%s is this very process, which would ask itself", at.Addr()))
			continue
		}
		f.named = append(f.named, at)
	}
	fileServers.set(name, len(f.named))
	if len(odd) > 0 {
		s.tell.warn("%s: not asked: %s", name, strings.Join(odd, "; "))
	}
	switch {
	case f.missing != nil:
		s.tell.error("%s can't be read: %v; until it can, and names a server that can be asked, queries get SERVFAIL: write it, or name servers in the Corefile", name, f.missing)
	case len(f.named) == 0:
		s.tell.error("%s names no server that can be asked; until it does queries get SERVFAIL: write lines `nameserver ADDRESS` into it, or name servers in the Corefile", name)
	default:
		s.tell.info("asking %s, as %s says", join(f.named), name)
	}
}

func join(all []netip.AddrPort) string {
	var words []string
	for _, at := range all {
		words = append(words, at.Addr().String())
	}
	return strings.Join(words, ", ")
}

// choose makes the list of the servers anew. What is known of those that stay is kept.
func (s *servers) choose() {
	var list []*server
	kept := map[string]*server{}
	add := func(a address) {
		name := a.String()
		if kept[name] != nil || len(list) == mostServers {
			return
		}
		one := s.known[name]
		if one == nil {
			one = newServer(a, s.opts, s.tell)
		}
		kept[name] = one
		list = append(list, one)
	}
	for _, t := range s.targets {
		if t.file == "" {
			add(t.address)
			continue
		}
		for _, at := range s.files[t.file].named {
			add(address{at: at, way: overUDP})
		}
	}
	if old := s.list.Swap(&listing{list, make(chan struct{})}); old != nil {
		close(old.over)
	}
	for name, one := range s.known {
		if kept[name] == nil {
			one.close()
		}
	}
	s.known = kept
}

// why says why there is no server.
func (s *servers) why() error {
	var files []string
	for _, t := range s.targets {
		if t.file != "" && !slices.Contains(files, t.file) {
			files = append(files, t.file)
		}
	}
	return fmt.Errorf("%w: %s names none", errNoServer, strings.Join(files, " "))
}

// tlsFor is the configuration of TLS for a server.
func tlsFor(o *options, serverName string) *tls.Config {
	c := o.tls.Clone()
	switch {
	case serverName != "":
		c.ServerName = serverName
	case o.tlsServerName != "":
		c.ServerName = o.tlsServerName
	}
	return c
}
