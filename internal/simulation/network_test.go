// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package simulation_test

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/kvtap/kvtap/internal/memnet"
)

// transport is what connects an engine and a client.
type transport struct {
	pub, replay string // endpoints of the engine
	dial        func(ctx context.Context, network, address string) (net.Conn, error)
	listen      func(ctx context.Context, network, address string) (net.Listener, error)
	cut         func() error // breaks all connections
}

func inMemory() transport {
	var n memnet.Network
	return transport{"tcp://127.0.0.1:5557", "tcp://127.0.0.1:5558", n.Dial, n.Listen, n.Cut}
}

// socket counts the client's open connections and listeners.
type socket struct {
	net.Conn
	run    *run
	once   sync.Once
	closed chan struct{}
	reads  int
}

func (r *run) socket(c net.Conn) *socket {
	r.sockets.Add(1)
	return &socket{Conn: c, run: r, closed: make(chan struct{})}
}

func (s *socket) Read(b []byte) (int, error) {
	s.reads++
	if every := s.run.lagEvery; every > 0 && s.reads%every == 0 && !s.run.handler.isHurried() {
		timer := time.NewTimer(s.run.lag)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-s.closed:
		}
	}
	return s.Conn.Read(b)
}

func (s *socket) Close() error {
	s.once.Do(func() {
		s.run.sockets.Add(-1)
		close(s.closed)
	})
	return s.Conn.Close()
}

// storm is how many connections a second a client may make. Progress that costs one each is a few dozen at most.
const storm = 500

// pace counts the connections of one second.
type pace struct {
	mu       sync.Mutex
	begun    time.Time
	n        int
	exceeded bool
}

func (p *pace) next() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if now := time.Now(); now.Sub(p.begun) >= time.Second {
		p.begun, p.n = now, 0
	}
	if p.n++; p.n > storm {
		p.exceeded = true
		return errors.New("too many connections")
	}
	return nil
}

func (p *pace) err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.exceeded {
		return failf("storm", "the client made more than %d connections within a second", storm)
	}
	return nil
}

func (r *run) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if err := r.pace.next(); err != nil {
		return nil, err
	}
	c, err := r.network.dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return r.socket(c), nil
}

type listener struct {
	net.Listener
	run  *run
	once sync.Once
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.run.socket(c), nil
}

func (l *listener) Close() error {
	l.once.Do(func() { l.run.sockets.Add(-1) })
	return l.Listener.Close()
}

func (r *run) listen(ctx context.Context, network, address string) (net.Listener, error) {
	l, err := r.network.listen(ctx, network, address)
	if err != nil {
		return nil, err
	}
	r.sockets.Add(1)
	return &listener{Listener: l, run: r}, nil
}
