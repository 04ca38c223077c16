// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package enginesim

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"

	"github.com/kvtap/kvtap/internal/zmtp"
)

// process is what dies with the process of one life: its sockets and the goroutines that serve them.
type process struct {
	line   *line
	pub    *zmtp.Publisher
	router *zmtp.Router // nil without replay
	ctx    context.Context
	cancel context.CancelFunc
	tasks  sync.WaitGroup

	// The bound sockets; nil where there is none.
	pubDoor, replayDoor *door
}

// end closes everything and waits for it. Nothing waits for e.mu or for time to pass meanwhile.
func (p *process) end() {
	p.cancel()
	p.line.die()
	p.pub.Close()
	if p.router != nil {
		p.router.Close()
	}
	p.tasks.Wait()
}

// lock takes the turn of those who open and close sockets: Start, Inject, Heal, and faults that run out. It is a
// channel and not a mutex because a listener of the caller's may block. It fails when the engine is closed.
func (e *Engine) lock() error {
	select {
	case e.turn <- struct{}{}:
	case <-e.ctx.Done():
		return ErrClosed
	}
	if e.ctx.Err() != nil {
		e.unlock()
		return ErrClosed
	}
	return nil
}

func (e *Engine) unlock() { <-e.turn }

// Start binds the sockets, or begins to connect out, and serves until Close. The context is for the binding alone.
// After an error the engine can be started again. An engine that was killed before it started cannot be: ErrDown.
func (e *Engine) Start(ctx context.Context) error {
	if err := e.lock(); err != nil {
		return err
	}
	defer e.unlock()
	e.mu.Lock()
	started, down := e.started, e.down
	e.mu.Unlock()
	switch {
	case started:
		return errors.New("enginesim: engine is started already")
	case down:
		return ErrDown
	}
	pub, replay, err := e.listen(ctx)
	if err == nil {
		err = e.open(pub, replay, false, func() error {
			e.started = true
			e.pubAddr = e.config.PubEndpoint
			if pub != nil {
				e.pubAddr = resolve(e.config.PubEndpoint, pub.Addr())
			}
			if replay != nil {
				e.replayAddr = resolve(e.config.ReplayEndpoint, replay.Addr())
			}
			return nil
		})
	}
	if err != nil {
		closeAll(pub, replay)
		return err
	}
	publishing, answering := e.Endpoints()
	e.log.Info("engine started", "pub_endpoint", publishing, "replay_endpoint", answering)
	return nil
}

// open makes a process with these listeners and lets it serve. With cut its network is partitioned, and there are no
// listeners. prepare is called first, under e.mu, so that it and the sockets come at once. The turn is held.
func (e *Engine) open(pub, replay net.Listener, cut bool, prepare func() error) error {
	p := &process{line: newLine(e.config.Dial)}
	p.line.refuse(cut)
	o := &zmtp.Options{
		Dial:              p.line.dialContext,
		HeartbeatInterval: -1, // libzmq sends no PINGs unless told to, which engines do not; it answers them
	}
	p.ctx, p.cancel = context.WithCancel(e.ctx)
	p.pub = zmtp.NewPublisher(o, e.config.HWM)
	if !e.config.Connect {
		p.pubDoor = newDoor(p.line)
	}
	if !e.config.NoReplay {
		p.replayDoor = newDoor(p.line)
		p.router = zmtp.NewRouter(o, e.config.ReplayHWM)
	}

	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		p.end()
		return ErrClosed
	}
	if err := prepare(); err != nil {
		p.end()
		return err
	}
	if e.stopped {
		p.line.stop()
	}
	if pub != nil {
		p.pubDoor.open(pub)
	}
	if replay != nil {
		p.replayDoor.open(replay)
	}
	if p.pubDoor != nil {
		p.tasks.Go(func() { e.ended(p, "publisher", p.pub.Serve(p.ctx, p.pubDoor)) })
	} else {
		p.tasks.Go(func() { e.ended(p, "publisher", p.pub.Connect(p.ctx, e.config.PubEndpoint)) })
	}
	if p.router != nil {
		p.tasks.Go(func() { e.ended(p, "replay", p.router.Serve(p.ctx, p.replayDoor)) })
		p.tasks.Go(func() { e.ended(p, "replay", e.answer(p)) })
	}
	e.process = p
	e.turned()
	return nil
}

// turned tells those who wait for subscribers that there is another process, or none. e.mu is held.
func (e *Engine) turned() {
	close(e.changed)
	e.changed = make(chan struct{})
}

// listen binds what is to be bound, where it was bound before if it was. Both may be non-nil even with an error.
func (e *Engine) listen(ctx context.Context) (pub, replay net.Listener, err error) {
	pubEndpoint, replayEndpoint := e.config.PubEndpoint, e.config.ReplayEndpoint
	if at, also := e.Endpoints(); at != "" {
		pubEndpoint, replayEndpoint = at, also
	}
	o := &zmtp.Options{ListenFunc: e.config.Listen}
	if e.config.Connect {
		network, address, err := zmtp.ParseEndpoint(pubEndpoint)
		if err != nil {
			return nil, nil, fmt.Errorf("enginesim: connecting the publisher: %w", err)
		}
		if network == "tcp" && (strings.HasPrefix(address, ":") || strings.HasSuffix(address, ":0")) {
			return nil, nil, fmt.Errorf("enginesim: the publisher cannot connect to %s: a wildcard is for binding",
				pubEndpoint)
		}
	} else {
		if pub, err = zmtp.Listen(ctx, pubEndpoint, o); err != nil {
			return nil, nil, fmt.Errorf("enginesim: binding the publisher to %s: %w", pubEndpoint, err)
		}
	}
	if !e.config.NoReplay {
		if replay, err = zmtp.Listen(ctx, replayEndpoint, o); err != nil {
			return pub, nil, fmt.Errorf("enginesim: binding replay to %s: %w", replayEndpoint, err)
		}
	}
	return pub, replay, nil
}

func closeAll(listeners ...net.Listener) {
	for _, l := range listeners {
		if l != nil {
			l.Close()
		}
	}
}

// resolve returns endpoint with the port that was really bound, where it left the port open (0, or * as libzmq has it).
// The host stays as it was given.
func resolve(endpoint string, addr net.Addr) string {
	_, port, err := net.SplitHostPort(addr.String())
	if err != nil {
		return endpoint
	}
	for _, open := range []string{":0", ":*"} {
		if head, ok := strings.CutSuffix(endpoint, open); ok {
			return head + ":" + port
		}
	}
	return endpoint
}

// Endpoints returns where the engine publishes and where it answers replay requests, with the ports that were bound
// where port 0 was asked for; restarts keep them. Both are empty before Start, and replay without a replay endpoint.
func (e *Engine) Endpoints() (pub, replay string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.pubAddr, e.replayAddr
}

// WaitSubscribers returns once n subscribers want the engine's topic. What is published before is lost to them, unless
// they ask for a replay. While the engine is down it waits for the next process. A half-open connection counts until
// its peer hangs up.
func (e *Engine) WaitSubscribers(ctx context.Context, n int) error {
	for {
		e.mu.Lock()
		p, started, closed, changed := e.process, e.started, e.closed, e.changed
		e.mu.Unlock()
		switch {
		case !started:
			return ErrNotStarted
		case closed:
			return ErrClosed
		case p != nil:
			if err := p.pub.WaitSubscribers(ctx, n); !errors.Is(err, zmtp.ErrClosed) {
				return err
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-e.ctx.Done():
		}
	}
}

// Close ends all connections and requests, and waits for its goroutines. It is safe to call twice. What was published a
// moment ago may not have reached the subscribers, as with an engine that is killed.
func (e *Engine) Close() error {
	e.mu.Lock()
	first := !e.closed
	e.closed = true
	p := e.process
	if first {
		e.cancel()
		e.schedule.abort(ErrClosed)
	}
	e.mu.Unlock()

	if p != nil {
		p.end()
	}
	e.tasks.Wait()
	if p != nil && first {
		e.log.Info("engine closed")
	}
	return nil
}

// ended logs why a part of a running process stopped.
func (e *Engine) ended(p *process, part string, err error) {
	if err != nil && p.ctx.Err() == nil {
		e.log.Error("engine part ended", "part", part, "error", err)
	}
}
