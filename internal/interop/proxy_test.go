// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package interop_test

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/kvtap/kvtap/internal/interop"
)

// pair returns both ends of a new connection through the proxy.
func pair(t *testing.T, p *interop.Proxy, server net.Listener) (near, far net.Conn) {
	t.Helper()
	near = dial(t, p)
	return near, accept(t, server)
}

func dial(t *testing.T, p *interop.Proxy) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", strings.TrimPrefix(p.Endpoint(), "tcp://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func accept(t *testing.T, l net.Listener) net.Conn {
	t.Helper()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// passes checks that text goes from one end to the other.
func passes(t *testing.T, from, to net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(from, text); err != nil {
		t.Fatal(err)
	}
	arrives(t, to, text)
}

func arrives(t *testing.T, c net.Conn, want string) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(time.Minute)) // ends a hang
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != want {
		t.Fatalf("got %q, %v; want %q", got, err, want)
	}
}

// silent checks that nothing is there to be read.
func silent(t *testing.T, c net.Conn) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("read %d bytes, %v; want silence", n, err)
	}
	c.SetReadDeadline(time.Time{})
}

// ended checks that the connection is over.
func ended(t *testing.T, c net.Conn) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(time.Minute)) // ends a hang
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the connection lives: %v", err)
	}
}

func TestProxyCutsConnectionsAndRefusesNewOnesUntilItIsOpened(t *testing.T) {
	t.Parallel()
	server := listen(t)
	p := interop.StartProxy(t, "tcp://"+server.Addr().String())
	endpoint := p.Endpoint()
	near, far := pair(t, p, server)
	passes(t, near, far, "there")
	passes(t, far, near, "and back")

	p.Cut()
	p.Cut() // is harmless
	ended(t, near)
	ended(t, far)
	if c, err := net.Dial("tcp", strings.TrimPrefix(endpoint, "tcp://")); err == nil {
		c.Close()
		t.Error("a proxy that is cut accepts connections")
	}

	p.Open()
	if p.Endpoint() != endpoint {
		t.Errorf("it moved from %s to %s", endpoint, p.Endpoint())
	}
	near, far = pair(t, p, server)
	passes(t, near, far, "again")
	far.Close()
	ended(t, near)
}

func TestProxyThatIsSilentTellsNobody(t *testing.T) {
	t.Parallel()
	server := listen(t)
	p := interop.StartProxy(t, "tcp://"+server.Addr().String())
	near, far := pair(t, p, server)
	passes(t, near, far, "before")
	left, behind := pair(t, p, server)
	passes(t, left, behind, "before")

	p.Silence()
	p.Silence()
	io.WriteString(near, "mean")
	io.WriteString(near, "while")
	io.WriteString(far, "back")
	left.Close()
	later := dial(t, p) // is accepted
	io.WriteString(later, "hello")
	silent(t, near)
	silent(t, far)
	silent(t, behind)
	silent(t, later)

	p.Open()
	arrives(t, far, "meanwhile")
	arrives(t, near, "back")
	ended(t, behind)
	arrives(t, accept(t, server), "hello")
}

func TestProxyOfNobodyEndsConnections(t *testing.T) {
	t.Parallel()
	server := listen(t)
	p := interop.StartProxy(t, "tcp://"+server.Addr().String())
	server.Close()
	ended(t, dial(t, p))
	p.Silence()
	waiting := dial(t, p)
	p.Cut()
	ended(t, waiting)
}
