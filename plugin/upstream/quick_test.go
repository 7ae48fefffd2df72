package upstream

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"
)

// A connection in the quick form does what one of the package net does: it carries more than
// the kernel takes at once, keeps deadlines, tells of the end and of errors.
func TestQuickConn(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	d, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c := quick(d, true)
	defer c.Close()
	if _, ok := c.(*quickConn); !ok {
		t.Fatalf("%T", c)
	}
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	sent := bytes.Repeat([]byte("0123456789abcdef"), 1<<20) // 16 MiB
	echoed := make(chan error, 1)
	go func() {
		_, err := io.CopyN(far, far, int64(len(sent)))
		echoed <- err
	}()
	got := make([]byte, len(sent))
	read := make(chan error, 1)
	go func() {
		_, err := io.ReadFull(c, got)
		read <- err
	}()
	if n, err := c.Write(sent); n != len(sent) || err != nil {
		t.Fatal(n, err)
	}
	if err := errors.Join(<-echoed, <-read); err != nil || !bytes.Equal(got, sent) {
		t.Fatal("what came back differs:", err)
	}

	c.SetDeadline(time.Now().Add(time.Millisecond))
	var timeout net.Error
	if _, err := c.Read(got); !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("after the deadline: %v", err)
	}
	c.SetDeadline(time.Time{})
	far.Close()
	if _, err := c.Read(got); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
	c.Close()
	if _, err := c.Write(sent); !errors.Is(err, net.ErrClosed) {
		t.Errorf("when closed: %v", err)
	}

	// Nobody listens there any more.
	p, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d, err = net.Dial("udp", p.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	p.Close()
	u := quick(d, false)
	defer u.Close()
	if n, err := u.Write(sent[:100]); n != 100 || err != nil {
		t.Fatal(n, err)
	}
	_, err = u.Read(got)
	var o *net.OpError
	if !errors.Is(err, syscall.ECONNREFUSED) || !errors.As(err, &o) || o.Addr.String() != p.LocalAddr().String() {
		t.Errorf("where nobody listens: %v", err)
	}
}
