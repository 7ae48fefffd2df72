package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/miekg/dns"
)

// startUpstream starts what has the names: nsd, or where it is not installed a server
// in this process. It is asked only while a cache is filled.
func (b *bench) startUpstream() (*server, error) {
	path, err := exec.LookPath("nsd")
	if err != nil {
		b.upstream = "a server of its own"
		return new(server), b.serveZone()
	}
	b.upstream = "nsd " + version(path, "-v")
	file, err := os.Create(filepath.Join(b.dir, "zone"))
	if err != nil {
		return nil, err
	}
	b.zone.write(file)
	if err := file.Close(); err != nil {
		return nil, err
	}
	config := fmt.Sprintf(`server:
 ip-address: %v
 port: %d
 server-count: 1
 username: ""
 zonesdir: "."
 database: ""
 pidfile: ""
 logfile: "/dev/stderr"
 zonelistfile: "zone.list"
 xfrdfile: "xfrd.state"
 xfrdir: "."
 minimal-responses: yes
 # Debian's would stop answering after 200 queries a second.
 rrl-ratelimit: 0
 rrl-whitelist-ratelimit: 0
remote-control:
 control-enable: no
zone:
 name: %s
 zonefile: zone
`, upstreamAddr.Addr(), upstreamAddr.Port(), zoneName)
	if err := os.WriteFile(filepath.Join(b.dir, "nsd.conf"), []byte(config), 0o644); err != nil {
		return nil, err
	}
	cmd := exec.Command(path, "-d", "-c", "nsd.conf")
	cmd.Dir = b.dir
	// Its processes end with the first one.
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	s, err := b.start(cmd, []int{b.cpus.load})
	if err != nil {
		return nil, err
	}
	if _, err := b.await(s, upstreamAddr); err != nil {
		return nil, errors.Join(err, s.stop())
	}
	return s, nil
}

// serveZone answers from the zone in this process.
func (b *bench) serveZone() error {
	index := make(map[string]int)
	for i, q := range b.zone.queries {
		index[string(q[12:])] = i
	}
	return b.ns.Do(func() error {
		packets, err := net.ListenPacket("udp", upstreamAddr.String())
		if err != nil {
			return err
		}
		go func() {
			buf := make([]byte, dns.MaxMsgSize)
			for {
				n, from, err := packets.ReadFrom(buf)
				if err != nil {
					return
				}
				m := new(dns.Msg)
				if m.Unpack(buf[:n]) != nil || len(m.Question) != 1 {
					continue
				}
				m.SetReply(m)
				m.Authoritative = true
				// The letter case of the question may be anything (0x20).
				key := new(dns.Msg)
				q := m.Question[0]
				key.SetQuestion(dns.CanonicalName(q.Name), q.Qtype)
				wire, err := key.Pack()
				if err != nil {
					continue
				}
				hdr := dns.RR_Header{Name: q.Name, Rrtype: q.Qtype, Class: dns.ClassINET, Ttl: ttl}
				i, known := index[string(wire[12:])]
				switch {
				case known && q.Qtype == dns.TypeA:
					m.Answer = []dns.RR{&dns.A{Hdr: hdr, A: b.zone.answers[i]}}
				case known && q.Qtype == dns.TypeAAAA:
					m.Answer = []dns.RR{&dns.AAAA{Hdr: hdr, AAAA: b.zone.answers[i]}}
				}
				if answer, err := m.Pack(); err == nil {
					packets.WriteTo(answer, from)
				}
			}
		}()
		return nil
	})
}
