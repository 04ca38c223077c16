// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package enginesim

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/kvtap/kvtap/internal/zmtp"
)

// Start binds the sockets, or begins to connect out, and serves until Close. The context is for the binding alone.
// After an error the engine can be started again.
func (e *Engine) Start(ctx context.Context) error {
	e.mu.Lock()
	switch {
	case e.closed:
		e.mu.Unlock()
		return ErrClosed
	case e.started:
		e.mu.Unlock()
		return errors.New("enginesim: engine is started already")
	}
	e.started = true
	e.mu.Unlock()

	pub, replay, err := e.listen(ctx)

	e.mu.Lock()
	defer e.mu.Unlock()
	if err == nil && e.closed {
		err = ErrClosed
	}
	if err != nil {
		e.started = false
		closeAll(pub, replay)
		return err
	}
	ctx, e.cancel = context.WithCancel(context.WithoutCancel(ctx))
	e.pub = zmtp.NewPublisher(e.options(), e.config.HWM)
	e.pubAddr = e.config.PubEndpoint
	if pub != nil {
		e.pubAddr = resolve(e.config.PubEndpoint, pub.Addr())
		e.tasks.Go(func() { e.ended("publisher", e.pub.Serve(ctx, pub)) })
	} else {
		e.tasks.Go(func() { e.ended("publisher", e.pub.Connect(ctx, e.config.PubEndpoint)) })
	}
	if replay != nil {
		e.router = zmtp.NewRouter(e.options(), e.config.ReplayHWM)
		e.replayAddr = resolve(e.config.ReplayEndpoint, replay.Addr())
		e.tasks.Go(func() { e.ended("replay", e.router.Serve(ctx, replay)) })
		e.tasks.Go(func() { e.answer(ctx) })
	}
	e.log.Info("engine started", "pub_endpoint", e.pubAddr, "replay_endpoint", e.replayAddr)
	return nil
}

// listen binds what is to be bound. Both may be non-nil even with an error.
func (e *Engine) listen(ctx context.Context) (pub, replay net.Listener, err error) {
	if e.config.Connect {
		network, address, err := zmtp.ParseEndpoint(e.config.PubEndpoint)
		if err != nil {
			return nil, nil, fmt.Errorf("enginesim: connecting the publisher: %w", err)
		}
		if network == "tcp" && (strings.HasPrefix(address, ":") || strings.HasSuffix(address, ":0")) {
			return nil, nil, fmt.Errorf("enginesim: the publisher cannot connect to %s: a wildcard is for binding",
				e.config.PubEndpoint)
		}
	} else {
		if pub, err = zmtp.Listen(ctx, e.config.PubEndpoint, e.options()); err != nil {
			return nil, nil, fmt.Errorf("enginesim: binding the publisher to %s: %w", e.config.PubEndpoint, err)
		}
	}
	if !e.config.NoReplay {
		if replay, err = zmtp.Listen(ctx, e.config.ReplayEndpoint, e.options()); err != nil {
			return pub, nil, fmt.Errorf("enginesim: binding replay to %s: %w", e.config.ReplayEndpoint, err)
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

func (e *Engine) options() *zmtp.Options {
	return &zmtp.Options{
		ListenFunc:        e.config.Listen,
		Dial:              e.config.Dial,
		HeartbeatInterval: -1, // libzmq sends no PINGs unless told to, which engines do not; it answers them
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
// where port 0 was asked for. Both are empty before Start, and replay without a replay endpoint.
func (e *Engine) Endpoints() (pub, replay string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.pubAddr, e.replayAddr
}

// WaitSubscribers returns once n subscribers want the engine's topic. What is published before is lost to them, unless
// they ask for a replay.
func (e *Engine) WaitSubscribers(ctx context.Context, n int) error {
	e.mu.Lock()
	pub := e.pub
	e.mu.Unlock()
	if pub == nil {
		return ErrNotStarted
	}
	return pub.WaitSubscribers(ctx, n)
}

// Close ends all connections and requests, and waits for its goroutines. It is safe to call twice. What was published a
// moment ago may not have reached the subscribers, as with an engine that is killed.
func (e *Engine) Close() error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		e.tasks.Wait()
		return nil
	}
	e.closed = true
	close(e.done)
	e.schedule.abort(ErrClosed)
	pub, router, cancel := e.pub, e.router, e.cancel
	e.mu.Unlock()

	if cancel == nil {
		return nil
	}
	cancel()
	pub.Close()
	if router != nil {
		router.Close()
	}
	e.tasks.Wait()
	e.log.Info("engine closed")
	return nil
}

// answer serves replay requests, one after the other.
func (e *Engine) answer(ctx context.Context) {
	for {
		id, frames, err := e.router.Recv(ctx)
		if err != nil {
			e.ended("replay", err)
			return
		}
		// vLLM answers requests of three frames, the identity included, and ignores all others.
		if len(frames) != 2 || len(frames[0]) != 0 || len(frames[1]) != 8 {
			continue
		}
		e.replay(id, binary.BigEndian.Uint64(frames[1]))
	}
}

// endMarker is the number -1, which ends a replay.
var endMarker = []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// replay sends what is held from start on, and the end marker. Nothing published meanwhile is part of it: in vLLM one
// thread does both.
func (e *Engine) replay(id string, start uint64) {
	e.mu.Lock()
	messages := e.history.from(start)
	e.mu.Unlock()

	frames := [][]byte{nil, []byte(e.config.Topic), nil, nil}
	if e.framing == FramingNoTopic {
		frames = [][]byte{nil, nil, nil}
	}
	number, payload := &frames[len(frames)-2], &frames[len(frames)-1]
	dropped := uint64(0)
	for _, m := range messages {
		*number, *payload = binary.BigEndian.AppendUint64(nil, m.seq), m.payload
		if !e.router.Send(id, frames...) {
			dropped++
		}
	}
	*number, *payload = endMarker, nil
	if e.framing == FramingTopic {
		frames[1] = nil
	}
	if !e.router.Send(id, frames...) {
		dropped++
	}
	e.mu.Lock()
	e.replays++
	e.dropped += dropped
	e.mu.Unlock()
}

// ended logs why a part of a running engine stopped.
func (e *Engine) ended(part string, err error) {
	select {
	case <-e.done:
	default:
		if err != nil {
			e.log.Error("engine part ended", "part", part, "error", err)
		}
	}
}
