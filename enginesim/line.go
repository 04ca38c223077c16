// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package enginesim

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// line lies between the sockets of one process and the network. What a process cannot see of its network, or of its own
// standing still, happens here: the sockets above it just find that nothing comes, nothing goes, or a connection broke.
type line struct {
	dial func(ctx context.Context, network, address string) (net.Conn, error)

	mu       sync.Mutex
	running  chan struct{} // closed while the process runs, open while it is stopped
	stopped  bool
	refusing bool // partitioned
	conns    map[*conn]struct{}
	drains   sync.WaitGroup

	dead     chan struct{} // closed, under mu, when the process dies
	deadOnce sync.Once
}

func newLine(dial func(ctx context.Context, network, address string) (net.Conn, error)) *line {
	if dial == nil {
		dial = new(net.Dialer).DialContext
	}
	l := &line{dial: dial, running: make(chan struct{}), dead: make(chan struct{}), conns: make(map[*conn]struct{})}
	close(l.running)
	return l
}

// wait returns when the process runs. It gives up, returning false, when gone closes or the process dies.
func (l *line) wait(gone <-chan struct{}) bool {
	for {
		l.mu.Lock()
		stopped, running := l.stopped, l.running
		l.mu.Unlock()
		select {
		case <-gone:
			return false
		case <-l.dead:
			return false
		default:
		}
		if !stopped {
			return true
		}
		select {
		case <-running: // and perhaps stopped again
		case <-gone:
		case <-l.dead:
		}
	}
}

// stop lets nothing through until resume.
func (l *line) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.stopped {
		l.stopped, l.running = true, make(chan struct{})
	}
}

func (l *line) resume() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.stopped {
		return
	}
	l.stopped = false
	close(l.running)
	for c := range l.conns {
		select {
		case <-c.gone: // closed meanwhile, by a process that could not have done it
			c.hangUp()
		default:
		}
	}
}

// refuse breaks all connections and lets none come about, or lets them come about again.
func (l *line) refuse(refusing bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refusing = refusing
	if refusing {
		for c := range l.conns {
			c.hangUp()
		}
	}
}

// muteAll makes the present connections half-open: nothing comes or goes any more, and neither side is told.
func (l *line) muteAll() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.conns {
		c.mute.Store(true)
	}
}

// cutMuted breaks the half-open connections.
func (l *line) cutMuted() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.conns {
		if c.mute.Load() {
			c.hangUp()
		}
	}
}

// die breaks everything for good and ends every wait.
func (l *line) die() {
	l.mu.Lock()
	l.deadOnce.Do(func() { close(l.dead) })
	for c := range l.conns {
		c.hangUp()
	}
	l.mu.Unlock()
	l.drains.Wait()
}

// add makes a connection of the transport one of the line's. It is closed at once if nothing may come about.
func (l *line) add(nc net.Conn) *conn {
	c := &conn{Conn: nc, line: l, gone: make(chan struct{})}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns[c] = struct{}{}
	select {
	case <-l.dead:
		c.hangUp()
	default:
		if l.refusing {
			c.hangUp()
		}
	}
	return c
}

// dialContext is the Dial of the process's sockets.
func (l *line) dialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if !l.wait(ctx.Done()) {
		return nil, net.ErrClosed
	}
	l.mu.Lock()
	refusing := l.refusing
	l.mu.Unlock()
	if refusing {
		return nil, fmt.Errorf("enginesim: dial %s: %w", address, syscall.ECONNREFUSED)
	}
	nc, err := l.dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return l.add(nc), nil
}

// conn is one connection of a process.
type conn struct {
	net.Conn // the transport
	line     *line
	mute     atomic.Bool // half-open
	once     sync.Once
	gone     chan struct{} // closed by Close
}

// hangUp ends the transport, which the peer sees. line.mu is held.
func (c *conn) hangUp() {
	delete(c.line.conns, c)
	c.Conn.Close()
}

func (c *conn) Read(b []byte) (int, error) {
	for {
		if !c.line.wait(c.gone) {
			return 0, net.ErrClosed
		}
		n, err := c.Conn.Read(b)
		if c.mute.Load() && err == nil {
			continue // the peer spoke to a host that is gone
		}
		// What came during a stop lay in the kernel.
		if !c.line.wait(c.gone) && err == nil {
			n, err = 0, net.ErrClosed
		}
		return n, err
	}
}

func (c *conn) Write(b []byte) (int, error) {
	switch {
	case !c.line.wait(c.gone):
		return 0, net.ErrClosed
	case c.mute.Load():
		return len(b), nil
	}
	return c.Conn.Write(b)
}

// Close is the process's. The peer must not learn of it from a process that is stopped or from a host that is gone:
// then the transport stays open until the line says otherwise or the peer hangs up.
func (c *conn) Close() error {
	c.once.Do(func() {
		l := c.line
		l.mu.Lock()
		defer l.mu.Unlock()
		close(c.gone)
		if _, up := l.conns[c]; !up {
			return
		}
		switch {
		case c.mute.Load():
			l.drains.Go(c.drain)
		case !l.stopped:
			c.hangUp()
		}
	})
	return nil
}

// drain reads what the peer says to a half-open connection that the process has given up.
func (c *conn) drain() {
	_ = c.SetDeadline(time.Time{})
	_, _ = io.Copy(io.Discard, c.Conn)
	c.line.mu.Lock()
	defer c.line.mu.Unlock()
	c.hangUp()
}

// backlog is how many connections wait for a stopped process to accept them. The kernel's own is of this order.
const backlog = 128

// door is the listener of a process's socket. It lives as long as the process does, while the transport's listener
// below it may be shut and opened anew. It accepts for the kernel, so also while the process is stopped.
type door struct {
	line     *line
	addr     net.Addr
	accepted chan net.Conn
	broken   chan error // has room for one
	closed   chan struct{}
	once     sync.Once

	mu        sync.Mutex
	transport net.Listener // nil while shut
	tasks     sync.WaitGroup
}

func newDoor(l *line) *door {
	return &door{
		line: l, accepted: make(chan net.Conn, backlog), broken: make(chan error, 1), closed: make(chan struct{}),
	}
}

// open begins to accept from a listener of the transport, which is the door's from now on.
func (d *door) open(transport net.Listener) {
	d.mu.Lock()
	defer d.mu.Unlock()
	select {
	case <-d.closed:
		transport.Close()
		return
	default:
	}
	d.transport, d.addr = transport, transport.Addr()
	d.tasks.Go(func() { d.serve(transport) })
}

// shut refuses new connections until the next open. The address is free when it returns, whoever else shuts the door.
func (d *door) shut() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.transport != nil {
		d.transport.Close()
		d.transport = nil
	}
}

func (d *door) serve(transport net.Listener) {
	for {
		nc, err := transport.Accept()
		if err == nil {
			c := d.line.add(nc)
			select {
			case d.accepted <- c:
				continue
			case <-d.closed:
				_ = c.Close()
				return
			}
		}
		d.mu.Lock()
		shut := d.transport != transport
		d.mu.Unlock()
		if shut {
			return
		}
		if t, ok := err.(interface{ Temporary() bool }); !ok || !t.Temporary() {
			select {
			case d.broken <- err:
			default:
			}
			return
		}
		// Too few descriptors, say.
		timer := time.NewTimer(50 * time.Millisecond)
		select {
		case <-timer.C:
		case <-d.closed:
			timer.Stop()
		}
	}
}

func (d *door) Accept() (net.Conn, error) {
	select {
	case nc := <-d.accepted:
		if d.line.wait(d.closed) {
			return nc, nil
		}
		nc.Close()
	case err := <-d.broken:
		return nil, err
	case <-d.closed:
	}
	return nil, net.ErrClosed
}

// Close also waits for the door's goroutine.
func (d *door) Close() error {
	d.once.Do(func() { close(d.closed) })
	d.shut()
	d.tasks.Wait()
	return nil
}

func (d *door) Addr() net.Addr { return d.addr }
