// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp

import (
	"context"
	"encoding/binary"
	"net"
	"sync"
)

// Router is a ROUTER socket: it hears many peers and answers each by its id. All methods are safe for concurrent use.
type Router struct {
	server
	hwm      int
	requests chan request

	peersMu sync.RWMutex
	peers   map[string]*outbox
	nextID  uint32
}

type request struct {
	id     string
	frames [][]byte
}

// NewRouter makes a router without peers. hwm is the high-water mark: the most messages that wait for one peer, beside
// what its socket holds; beyond it answers are dropped, as by libzmq. Zero means 1000, negative means no bound. Close
// must be called in the end.
func NewRouter(o *Options, hwm int) *Router {
	// Requests have no queue: one of each peer waits to be received, the next is read only then, and TCP holds the rest.
	r := &Router{hwm: hwm, requests: make(chan request), peers: make(map[string]*outbox)}
	if hwm == 0 {
		r.hwm = defaultHWM
	}
	r.init(ROUTER, o, r.serve)
	return r
}

// Serve accepts peers from l until ctx ends or the router is closed, and then closes l and the connections that it
// accepted and returns nil. Otherwise it returns the listener's error, or ErrClosed if the router was closed before.
func (r *Router) Serve(ctx context.Context, l net.Listener) error { return r.accept(ctx, l) }

func (r *Router) serve(ctx context.Context, c *Conn) {
	out := newOutbox(c, r.hwm)
	id, ok := r.add(string(c.PeerIdentity()), out)
	if !ok {
		return
	}
	var writer sync.WaitGroup
	writer.Go(out.run)
	defer writer.Wait()
	defer c.Close()
	defer r.remove(id)
	for {
		frames, err := c.Recv()
		if err != nil {
			return
		}
		select {
		case r.requests <- request{id, cloneMessage(frames)}:
		case <-ctx.Done():
			return
		}
	}
}

// add registers a peer under its identity, or under one made up in libzmq's form: a zero byte and a number. As in
// libzmq the first of two peers with the same identity keeps it, and the other is turned away.
func (r *Router) add(identity string, out *outbox) (id string, ok bool) {
	r.peersMu.Lock()
	defer r.peersMu.Unlock()
	id = identity
	for id == "" {
		r.nextID++
		made := string(binary.BigEndian.AppendUint32([]byte{0}, r.nextID))
		if r.peers[made] == nil {
			id = made
		}
	}
	if r.peers[id] != nil {
		return "", false
	}
	r.peers[id] = out
	return id, true
}

func (r *Router) remove(id string) {
	r.peersMu.Lock()
	defer r.peersMu.Unlock()
	delete(r.peers, id)
}

// Recv waits for the next message of any peer. id names the peer for Send; the frames, without the id, are the
// caller's. The error is ErrClosed or that of ctx.
func (r *Router) Recv(ctx context.Context) (id string, frames [][]byte, err error) {
	select {
	case q := <-r.requests:
		return q.id, q.frames, nil
	case <-ctx.Done():
		return "", nil, context.Cause(ctx)
	case <-r.ctx.Done():
		return "", nil, ErrClosed
	}
}

// Send queues a message for the peer id. It never waits: it returns false if the peer is gone or its queue is full, and
// the message is dropped. The frames are the caller's again when it returns.
func (r *Router) Send(id string, frames ...[]byte) (sent bool) {
	if len(frames) == 0 {
		return false
	}
	r.peersMu.RLock()
	out := r.peers[id]
	r.peersMu.RUnlock()
	return out != nil && out.push(cloneMessage(frames))
}

// Close closes every connection and listener, drops what is still queued, and waits until every goroutine of Serve has
// ended. It may be called again.
func (r *Router) Close() { r.close() }
