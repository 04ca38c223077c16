// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
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
		asked, from := c.wantedReplay(ctx)
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

// wantedReplay returns which replay is wanted now, and its first number.
func (c *ZMQClient) wantedReplay(ctx context.Context) (asked, from uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if ctx.Err() == nil {
		c.metrics.IncrementReplayCount()
	}
	return c.replayAsked, c.seq.ask.from
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
		c.setError("replay from " + c.replay + ": " + err.Error())
		if c.replayAsked == asked {
			d = c.seq.replayFailed()
		}
	default:
		c.metrics.IncrementReplaySuccess()
		c.setError("")
		if c.replayAsked == asked {
			d = c.seq.replayEnded(end == endMarked, c.hold.takeDropped())
		}
	}
	c.obey(ctx, wg, d, &message{})
	denied := d.foreign
	if c.replayAsked != asked || !c.placeHeld(ctx, wg) {
		return false
	}
	d = c.seq.settle()
	c.obey(ctx, wg, d, &message{})
	if d.replay {
		return false
	}
	if err == nil && !denied && !c.seq.givenUp {
		c.observe(time.Now())
	}
	c.replays = false
	return true
}

// placeHeld passes the held messages on, in order, and reports whether all were placed. If not, another replay is
// wanted first. Callers hold mu.
func (c *ZMQClient) placeHeld(ctx context.Context, wg *sync.WaitGroup) bool {
	for ctx.Err() == nil {
		h, topic, payload, ok := c.hold.peek()
		if !ok {
			c.hold.clear()
			return true
		}
		m := message{seq: h.seq, topic: topic, payload: payload, at: h.at, held: true}
		d := c.seq.held(h.seq, c.proofOf(&m))
		c.obey(ctx, wg, d, &m)
		if d.replay {
			return false
		}
		c.hold.take()
		c.tellStatus()
	}
	return false
}

// The ways in which a replay fails.
var (
	errReplaySilent   = errors.New("no answer")
	errReplayTopic    = errors.New("the answer is of another topic than the one asked for")
	errReplayForeign  = errors.New("the answer is not of the engine that the connection is of")
	errReplayNonsense = errors.New("the answer is not a replay: want frames of topic, 8-byte sequence number and payload")
)

// firstCheck is how long after the subscription its tail is looked at for the first time: a batch that was published
// between subscribing and the replay may have reached neither.
const firstCheck = time.Second

// verifyTail looks at the tail of the stream until ctx ends: once soon, then whenever nothing came for a while.
func (c *ZMQClient) verifyTail(ctx context.Context, wg *sync.WaitGroup) {
	interval := orDefault(c.config.VerifyInterval, DefaultVerifyInterval)
	if interval < 0 || c.replay == "" {
		return
	}
	for wait, idle := firstCheck, time.Duration(0); ; {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		if since := time.Since(time.Unix(0, c.observed.Load())); since < idle {
			wait = idle - since
			continue
		}
		c.checkTail(ctx, wg)
		// Clients that started together should not ask together.
		idle = interval - interval/10 + rand.N(interval/5+1)
		wait = idle
	}
}

func (c *ZMQClient) checkTail(ctx context.Context, wg *sync.WaitGroup) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if ctx.Err() == nil {
		c.obey(ctx, wg, c.seq.check(), &message{})
	}
}

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
		// Replies without a topic frame have an empty frame there, as has the default topic.
		if len(frames) > 3 && !bytes.HasPrefix(m.topic, []byte(c.config.Topic)) {
			return 0, fmt.Errorf("%w: %.64q", errReplayTopic, m.topic)
		}
		m.at, m.replayed = conn.LastReceived(), true
		if wanted, err := c.replayed(ctx, wg, asked, &m); !wanted {
			return endUnwanted, err
		}
		timer.Reset(timeout)
	}
}

// replayed takes one message of a replay, and reports whether more of it is wanted.
func (c *ZMQClient) replayed(
	ctx context.Context, wg *sync.WaitGroup, asked uint64, m *message,
) (wanted bool, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// A restart seen live meanwhile makes this answer one of the past: it must not bring removed blocks back.
	if c.replayAsked != asked || ctx.Err() != nil {
		return false, nil
	}
	d := c.seq.replayed(m.seq, c.proofOf(m))
	c.obey(ctx, wg, d, m)
	c.tellStatus()
	if d.foreign {
		return false, errReplayForeign
	}
	return c.replayAsked == asked, nil
}

// overlap remembers the digests of what a replay brought until the live stream has caught up, so that a live message
// under the number of a replayed one can be told from the same message.
type overlap struct {
	first   uint64
	digests []uint32 // of first, first+1, ...; 0 for unknown
}

// maxOverlap bounds the numbers that are remembered. Engines keep 10,000 batches unless told otherwise.
const maxOverlap = 1 << 17

var overlapSeed = maphash.MakeSeed()

func digestOf(m *message) uint32 {
	return max(uint32(maphash.Bytes(overlapSeed, m.payload)), 1)
}

// add takes a message of a replay. Numbers rise by one but for those that were burned.
func (o *overlap) add(m *message) {
	if len(o.digests) == 0 || m.seq < o.first+uint64(len(o.digests)) || m.seq-o.first >= maxOverlap {
		o.first, o.digests = m.seq, o.digests[:0]
	}
	for o.first+uint64(len(o.digests)) < m.seq {
		o.digests = append(o.digests, 0)
	}
	o.digests = append(o.digests, digestOf(m))
}

// proof compares m with the message of the replay under its number.
func (o *overlap) proof(m *message) proof {
	if m.seq < o.first || m.seq-o.first >= uint64(len(o.digests)) {
		return unproven
	}
	switch o.digests[m.seq-o.first] {
	case 0:
		return unproven
	case digestOf(m):
		return same
	}
	return other
}

// clear forgets everything and gives the memory back.
func (o *overlap) clear() { o.digests = nil }
