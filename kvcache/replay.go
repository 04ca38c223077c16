// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kvtap/kvtap/internal/zmtp"
)

// message is one batch on its way, in memory that belongs to somebody else.
type message struct {
	seq            uint64
	topic, payload []byte
	at             time.Time
	replayed       bool
	held           bool // it comes from the hold
}

// end reports whether the message is the marker that ends a replay.
func (m *message) end() bool { return m.seq == endMarker && len(m.payload) == 0 }

// parseMessage reads the frames of a batch from their tail: the payload is last and the number before it, in live
// messages ([topic, seq, payload]) and in both forms of a replay's (["", seq, payload], ["", topic, seq, payload]).
func parseMessage(frames [][]byte) (m message, ok bool) {
	n := len(frames)
	if n < 2 || len(frames[n-2]) != 8 {
		return m, false
	}
	m.seq = binary.BigEndian.Uint64(frames[n-2])
	m.payload = frames[n-1]
	if n > 2 {
		m.topic = frames[n-3]
	}
	return m, true
}

// replayRetry is the upper limit of the first wait after a replay that failed. It is short, since live messages are
// held meanwhile, and the replays that fail in a row are few.
const replayRetry = 200 * time.Millisecond

// runReplays asks for replays until none is wanted or ctx ends. Then live messages flow again.
func (c *ZMQClient) runReplays(ctx context.Context, wg *sync.WaitGroup) {
	pace := newBackoff(replayRetry)
	for {
		c.mu.Lock()
		asked, from := c.replayAsked, c.seq.ask.from
		c.mu.Unlock()
		c.metrics.IncrementReplayCount()
		end, err := c.replayOnce(ctx, wg, asked, from)
		if c.endReplay(ctx, wg, asked, end, err) {
			return
		}
		if err == nil {
			continue
		}
		select {
		case <-ctx.Done():
		case <-time.After(pace.next(true)):
		}
	}
}

// endReplay draws the conclusion from a replay that is over, and reports whether there is nothing more to ask for. It
// holds mu throughout: a live message between the end of the replay and the last held one would be lost.
func (c *ZMQClient) endReplay(ctx context.Context, wg *sync.WaitGroup, asked uint64, end replayEnd, err error) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.tellStatus()
	if ctx.Err() != nil {
		c.replays = false
		return true
	}
	var d decision
	switch {
	case err != nil:
		c.metrics.IncrementReplayFailure()
		c.metrics.IncrementErrorCount(errorReplay)
		c.log.Warn("replay_failed", "endpoint", c.replay, "from", c.seq.ask.from, "error", err)
		if c.replayAsked == asked {
			d = c.seq.replayFailed()
		}
	default:
		c.metrics.IncrementReplaySuccess()
		if c.replayAsked == asked {
			d = c.seq.replayEnded(end == endMarked, c.hold.takeDropped())
		}
	}
	c.obey(ctx, wg, d, message{})
	if c.replayAsked != asked || !c.placeHeld(ctx, wg) {
		return false
	}
	d = c.seq.settle()
	c.obey(ctx, wg, d, message{})
	if d.replay {
		return false
	}
	c.observed.Store(time.Now().UnixNano())
	c.replays = false
	return true
}

// placeHeld passes the held messages on, in order, and reports whether all were placed. If not, another replay is
// wanted first. Callers hold mu.
func (c *ZMQClient) placeHeld(ctx context.Context, wg *sync.WaitGroup) bool {
	for {
		h, topic, payload, ok := c.hold.peek()
		if !ok {
			c.hold.clear()
			return true
		}
		d := c.seq.held(h.seq)
		c.obey(ctx, wg, d, message{seq: h.seq, topic: topic, payload: payload, at: h.at, held: true})
		if d.replay {
			return false
		}
		c.hold.take()
		c.tellStatus()
	}
}

// The ways in which a replay fails.
var (
	errReplaySilent   = errors.New("no answer")
	errReplayNonsense = errors.New("the answer is not a replay: want frames of topic, 8-byte sequence number and payload")
)

// replayEnd says how a replay with a valid answer ended.
type replayEnd uint8

const (
	endUnwanted replayEnd = iota // another replay is wanted instead
	endMarked                    // by the end marker
	endSilent                    // after some messages nothing more came
)

// replayOnce asks for one replay and hands on what it brings. Callers do not hold mu.
func (c *ZMQClient) replayOnce(ctx context.Context, wg *sync.WaitGroup, asked, from uint64) (replayEnd, error) {
	// A socket of its own for each replay: what an earlier one still brings cannot reach this one.
	conn, err := zmtp.Dial(ctx, c.replay, zmtp.DEALER, c.options())
	if err != nil {
		return 0, err
	}
	defer func() { _ = conn.Close() }()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	if err := conn.Send(nil, binary.BigEndian.AppendUint64(nil, from)); err != nil {
		return 0, fmt.Errorf("cannot send the request: %w", err)
	}
	// The timer runs only while we wait for the engine, never while the handler does its work.
	timeout := orDefault(c.config.ReplayTimeout, DefaultReplayTimeout)
	var silent atomic.Bool
	timer := time.AfterFunc(timeout, func() {
		silent.Store(true)
		_ = conn.Close()
	})
	defer timer.Stop()
	for messages := 0; ; messages++ {
		frames, err := conn.Recv()
		timer.Stop()
		switch {
		case err != nil && !silent.Load():
			return 0, fmt.Errorf("lost the connection: %w", err)
		case err != nil && messages == 0:
			return 0, fmt.Errorf("%w for %v", errReplaySilent, timeout)
		case err != nil:
			return endSilent, nil
		}
		m, ok := parseMessage(frames)
		if !ok {
			return 0, errReplayNonsense
		}
		if m.end() {
			return endMarked, nil
		}
		m.at, m.replayed = conn.LastReceived(), true
		c.mu.Lock()
		// A restart seen live meanwhile makes this answer one of the past: it must not bring removed blocks back.
		wanted := c.replayAsked == asked && ctx.Err() == nil
		if wanted {
			c.obey(ctx, wg, c.seq.replayed(m.seq, c.isLast(m)), m)
			wanted = c.replayAsked == asked
			c.tellStatus()
		}
		c.mu.Unlock()
		if !wanted {
			return endUnwanted, nil
		}
		timer.Reset(timeout)
	}
}
