// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
)

// defaultHWM is libzmq's default high-water mark, in messages.
const defaultHWM = 1000

// Publisher is a PUB socket. Each subscriber has its subscriptions and a bounded queue; when the queue is full,
// messages to that subscriber are dropped and counted, as by libzmq. All methods are safe for concurrent use.
type Publisher struct {
	server
	hwm     int
	dropped atomic.Uint64

	peersMu sync.RWMutex
	peers   map[*outbox]struct{}
	grown   chan struct{} // closed and replaced when a peer gets its first subscription
	active  int           // peers with a subscription
}

// NewPublisher makes a publisher without peers. hwm is the high-water mark: the most messages that wait for one
// subscriber, beside what its socket holds. Zero means 1000, negative means no bound. Close must be called in the end.
func NewPublisher(o *Options, hwm int) *Publisher {
	p := &Publisher{hwm: hwm, peers: make(map[*outbox]struct{}), grown: make(chan struct{})}
	if hwm == 0 {
		p.hwm = defaultHWM
	}
	p.init(PUB, o, p.serve)
	return p
}

// Serve accepts subscribers from l until ctx ends or the publisher is closed, and then closes l and the connections
// that it accepted and returns nil. Otherwise it returns the listener's error, or ErrClosed if the publisher was closed
// before.
func (p *Publisher) Serve(ctx context.Context, l net.Listener) error { return p.accept(ctx, l) }

// Connect dials a subscriber that listens, and again whenever the connection ends or cannot be made, until ctx ends or
// the publisher is closed; then it returns nil. An endpoint that cannot be dialled is an error at once.
func (p *Publisher) Connect(ctx context.Context, endpoint string) error {
	return p.connect(ctx, endpoint)
}

func (p *Publisher) serve(_ context.Context, c *Conn) {
	out := newOutbox(c, p.hwm)
	subscribed := false
	c.subs.changed = func(n int) {
		p.peersMu.Lock()
		defer p.peersMu.Unlock()
		switch {
		case n > 0 && !subscribed:
			p.active++
			close(p.grown)
			p.grown = make(chan struct{})
		case n == 0 && subscribed:
			p.active--
		}
		subscribed = n > 0
	}
	p.peersMu.Lock()
	p.peers[out] = struct{}{}
	p.peersMu.Unlock()

	var writer sync.WaitGroup
	writer.Go(out.run)
	_, _ = c.Recv() // handles subscriptions; returns when the connection ends
	c.Close()
	writer.Wait()

	p.peersMu.Lock()
	defer p.peersMu.Unlock()
	delete(p.peers, out)
	if subscribed {
		p.active--
	}
}

// Send queues a message for every peer that subscribed to it, which its first frame decides, and returns how many peers
// will get it. It never waits. The frames are the caller's again when it returns.
func (p *Publisher) Send(frames ...[]byte) (reached int) {
	if len(frames) == 0 {
		return 0
	}
	p.peersMu.RLock()
	defer p.peersMu.RUnlock()
	var shared [][]byte
	for out := range p.peers {
		if !out.conn.subs.match(frames[0]) {
			continue
		}
		if shared == nil {
			shared = cloneMessage(frames)
		}
		if out.push(shared) {
			reached++
		} else {
			p.dropped.Add(1)
		}
	}
	return reached
}

// Subscribers is how many connected peers have at least one subscription.
func (p *Publisher) Subscribers() int {
	p.peersMu.RLock()
	defer p.peersMu.RUnlock()
	return p.active
}

// Dropped is how many messages were dropped at a high-water mark, counted once for each subscriber that missed one.
func (p *Publisher) Dropped() uint64 { return p.dropped.Load() }

// WaitSubscribers waits until at least n peers have a subscription. Its error is ErrClosed or that of ctx.
func (p *Publisher) WaitSubscribers(ctx context.Context, n int) error {
	for {
		p.peersMu.RLock()
		active, grown := p.active, p.grown
		p.peersMu.RUnlock()
		if active >= n {
			return nil
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-p.ctx.Done():
			return ErrClosed
		}
	}
}

// Close closes every connection and listener, drops what is still queued, and waits until every goroutine of Serve and
// Connect has ended. It may be called again.
func (p *Publisher) Close() { p.close() }
