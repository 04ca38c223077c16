// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package interop

import (
	"context"
	"net"
	"strings"
	"sync"
	"testing"
)

// Proxy passes TCP connections on to one endpoint, and fails as networks do when it is told to. Its methods belong to
// the test's goroutine.
type Proxy struct {
	tb      testing.TB
	target  string // host:port
	address string // host:port, of its own
	running sync.WaitGroup
	close   func() // closes the listener and all connections; nil while that is so

	mu   sync.Mutex
	open chan struct{} // closed while bytes pass
}

// StartProxy starts a proxy for an endpoint such as tcp://127.0.0.1:5557. It ends with the test.
func StartProxy(tb testing.TB, endpoint string) *Proxy {
	tb.Helper()
	p := &Proxy{tb: tb, target: strings.TrimPrefix(endpoint, "tcp://"), address: "127.0.0.1:0"}
	p.open = make(chan struct{})
	close(p.open)
	p.listen()
	tb.Cleanup(func() {
		p.Cut()
		p.running.Wait()
	})
	return p
}

// Endpoint returns where the proxy listens, always the same.
func (p *Proxy) Endpoint() string { return "tcp://" + p.address }

// Cut breaks all connections and refuses new ones until Open.
func (p *Proxy) Cut() {
	if p.close != nil {
		p.close()
		p.close = nil
	}
}

// Silence passes no more bytes until Open, in neither direction, and tells neither side: connections live on, new ones
// are accepted, and one that a side closes looks alive to the other. What is sent meanwhile waits, as far as the kernel
// has room for it.
func (p *Proxy) Silence() {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.open:
		p.open = make(chan struct{})
	default:
	}
}

// Open ends Cut and Silence. After Silence what waited goes on its way.
func (p *Proxy) Open() {
	p.tb.Helper()
	p.mu.Lock()
	select {
	case <-p.open:
	default:
		close(p.open)
	}
	p.mu.Unlock()
	if p.close == nil {
		p.listen()
	}
}

func (p *Proxy) listen() {
	p.tb.Helper()
	l, err := net.Listen("tcp", p.address)
	if err != nil {
		p.tb.Fatalf("a proxy cannot listen: %v", err)
	}
	p.address = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	p.close = func() {
		cancel()
		_ = l.Close()
	}
	p.running.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return // closed
			}
			p.running.Go(func() { p.serve(ctx, client) })
		}
	})
}

// serve passes one connection on until either side ends it or ctx ends.
func (p *Proxy) serve(ctx context.Context, client net.Conn) {
	defer func() { _ = client.Close() }()
	defer context.AfterFunc(ctx, func() { _ = client.Close() })()
	if !p.passable(ctx) {
		return
	}
	server, err := new(net.Dialer).DialContext(ctx, "tcp", p.target)
	if err != nil {
		return
	}
	defer func() { _ = server.Close() }()
	defer context.AfterFunc(ctx, func() { _ = server.Close() })()
	var there sync.WaitGroup
	there.Go(func() { p.pass(ctx, server, client) })
	p.pass(ctx, client, server)
	there.Wait()
}

// pass copies one direction, and closes both ends when that is over: in ZMTP no connection is half closed.
func (p *Proxy) pass(ctx context.Context, to, from net.Conn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		// What is read after Silence has returned stays here.
		if !p.passable(ctx) {
			return
		}
		if _, writeErr := to.Write(buf[:n]); err != nil || writeErr != nil {
			_, _ = to.Close(), from.Close()
			return
		}
	}
}

// passable waits until bytes pass, and reports whether ctx lives.
func (p *Proxy) passable(ctx context.Context) bool {
	p.mu.Lock()
	open := p.open
	p.mu.Unlock()
	select {
	case <-open:
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}
