// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp

import (
	"context"
	"net"
	"sync"
	"time"
)

// server is what Publisher and Router have in common: it accepts and dials, runs the handshakes, and gives each
// connection to serve, which returns when the connection has ended.
type server struct {
	local SocketType
	o     Options
	serve func(ctx context.Context, c *Conn)

	ctx  context.Context // ends with Close
	stop context.CancelFunc

	mu     sync.Mutex
	closed bool
	calls  sync.WaitGroup // of accept and connect; none begins after closed
}

func (s *server) init(t SocketType, o *Options, serve func(ctx context.Context, c *Conn)) {
	s.local, s.o, s.serve = t, o.withDefaults(), serve
	s.o.WriteTimeout = -1
	s.ctx, s.stop = context.WithCancel(context.Background())
}

// begin registers a call of accept or connect, which calls.Done ends, and joins its ctx with the server's.
func (s *server) begin(ctx context.Context) (context.Context, context.CancelFunc, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, nil, ErrClosed
	}
	s.calls.Add(1)
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.ctx, cancel)
	return ctx, func() { stop(); cancel() }, nil
}

// run serves one raw connection from handshake to end, at the latest that of ctx.
func (s *server) run(ctx context.Context, nc net.Conn) {
	c, err := NewConn(ctx, nc, s.local, &s.o)
	if err != nil {
		return // the peer's own affair: it is told by the closed connection
	}
	s.runConn(ctx, c)
}

func (s *server) runConn(ctx context.Context, c *Conn) {
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer c.Close()
	defer stop()
	s.serve(ctx, c)
}

func (s *server) accept(ctx context.Context, l net.Listener) error {
	defer l.Close()
	ctx, cancel, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer s.calls.Done()
	var peers sync.WaitGroup
	defer peers.Wait()
	defer cancel() // cuts the peers when the listener failed
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for wait := time.Duration(0); ; {
		nc, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				nc.Close()
			}
			return nil
		case err == nil:
			wait = 0
			peers.Go(func() { s.run(ctx, nc) })
		case isTemporary(err):
			wait = min(max(2*wait, 5*time.Millisecond), time.Second)
			if !sleep(ctx, wait) {
				return nil
			}
		default:
			return err
		}
	}
}

// isTemporary tells a lack of descriptors or memory from a broken listener, as net/http does.
func isTemporary(err error) bool {
	t, ok := err.(interface{ Temporary() bool })
	return ok && t.Temporary()
}

// redialAfter is how long a connecting socket waits between attempts: libzmq's default ZMQ_RECONNECT_IVL.
const redialAfter = 100 * time.Millisecond

func (s *server) connect(ctx context.Context, endpoint string) error {
	if _, _, err := parseDial(endpoint); err != nil {
		return err
	}
	ctx, cancel, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer s.calls.Done()
	defer cancel()
	for {
		if c, err := Dial(ctx, endpoint, s.local, &s.o); err == nil {
			s.runConn(ctx, c)
		}
		if !sleep(ctx, redialAfter) {
			return nil
		}
	}
}

// close ends every accept and connect, and waits for them.
func (s *server) close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.stop()
	s.calls.Wait()
}

// sleep waits and reports whether ctx was still good at the end.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
