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
	omitted        omission
	at             time.Time
	replayed       bool
	held           bool // it comes from the hold
}

// omission says what of a message was too large to be read: how many bytes, and their digest. With it the payload is
// empty.
type omission struct{ bytes, digest uint64 }

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
		asked, end, err := c.takeTurn(ctx, wg)
		if c.endReplay(ctx, wg, asked, end, err) {
			return
		}
		if err == nil && !c.stalls() {
			continue
		}
		select {
		case <-ctx.Done():
		case <-time.After(pace.next(true)):
		}
	}
}

// stalls reports whether the next replay had better wait a little, though the last one had a valid answer: it was
// without what is wanted, or the next one might not find room for what comes meanwhile either.
func (c *ZMQClient) stalls() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	crowded := c.crowded
	c.crowded = false
	return crowded || c.seq.stalls > 1 || c.seq.contradictions > 0
}

// takeTurn runs the replay that is wanted when its turn has come.
func (c *ZMQClient) takeTurn(ctx context.Context, wg *sync.WaitGroup) (asked uint64, end replayEnd, err error) {
	if err = c.limiter.Acquire(ctx); err != nil {
		asked, _ = c.wantedReplay(ctx)
		return asked, 0, fmt.Errorf("no turn: %w", err)
	}
	release := sync.OnceFunc(c.limiter.Release)
	defer release()
	defer time.AfterFunc(maxTurn, release).Stop()
	asked, from := c.wantedReplay(ctx)
	end, err = c.replayOnce(ctx, wg, asked, from)
	return asked, end, err
}

// wantedReplay returns which replay is wanted now, and its first number.
func (c *ZMQClient) wantedReplay(ctx context.Context) (asked, from uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if ctx.Err() == nil {
		c.stats.replays.Add(1)
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
	asking := c.seq.ask
	if err == nil && end == endSilent && c.replayAsked == asked && asking.purpose <= askTail && !asking.progress &&
		!c.seq.dropped {
		err = errReplayUnended
	}
	switch {
	case err != nil:
		c.stats.replayFailures.Add(1)
		c.metrics.IncrementReplayFailure()
		c.metrics.IncrementErrorCount(errorReplay)
		c.warn("replay_failed", err.Error(), "endpoint", c.replay, "from", c.seq.ask.from, "error", err)
		c.setError("replay from " + c.replay + ": " + err.Error())
		if c.replayAsked == asked {
			d = c.seq.replayFailed()
		}
	default:
		c.metrics.IncrementReplaySuccess()
		c.setError("")
		if c.replayAsked == asked {
			d = c.seq.replayEnded(end)
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
	if err == nil && end != endSilent && asking.purpose <= askTail && !denied && !c.seq.givenUp {
		c.observe(time.Now())
	}
	c.replays = false
	return true
}

// placeHeld passes the held messages on, in order, and reports whether all were placed. If not, another replay is
// wanted first. Callers hold mu.
func (c *ZMQClient) placeHeld(ctx context.Context, wg *sync.WaitGroup) bool {
	for ctx.Err() == nil {
		h, ok := c.hold.peek()
		if !ok {
			c.hold.clear()
			return true
		}
		m := message{seq: h.seq, topic: h.topic, payload: h.payload, omitted: h.omitted, at: h.at, held: true}
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
	errReplayUnended  = errors.New("the answer has no end marker")
	errReplayTopic    = errors.New("the answer is of another topic than the one asked for")
	errReplayForeign  = errors.New("the answer is not of the engine that the connection is of")
	errReplayNonsense = errors.New("the answer is not a replay: want frames of topic, 8-byte sequence number and payload")
)

// firstCheck is how long after the subscription its tail is looked at for the first time: a batch that was published
// between subscribing and the replay may have reached neither.
const firstCheck = time.Second

// askQuestions looks at the tail of the stream until ctx ends: once soon, then whenever nothing came for a while, and
// soon after reading was paused. Other questions that the sequencer has are asked in between, at a growing distance.
func (c *ZMQClient) askQuestions(ctx context.Context, wg *sync.WaitGroup, nudge <-chan struct{}) {
	if c.replay == "" {
		return
	}
	interval := orDefault(c.config.VerifyInterval, DefaultVerifyInterval)
	pace := newBackoff(orDefault(c.config.ReconnectDelay, DefaultReconnectInterval))
	timer := time.NewTimer(firstCheck)
	defer timer.Stop()
	idle := time.Duration(0) // how long nothing must have come
	var lastDue time.Time
	armed := false // the timer is set to ask what is due
	for {
		select {
		case <-ctx.Done():
			return
		case <-nudge:
			due, paused := c.questions()
			if paused {
				idle = 0
			}
			switch {
			case due && !armed:
				armed = true
				timer.Reset(pace.next(false))
			case paused && !due && interval > 0:
				timer.Reset(firstCheck)
			}
			continue
		case <-timer.C:
		}
		due, paused := c.questions()
		if paused {
			idle = 0
		}
		if armed = due; due {
			c.check(ctx, wg)
			timer.Reset(pace.next(false))
			lastDue = time.Now()
			continue
		}
		if time.Since(lastDue) > MaxReconnectInterval {
			pace.reset() // an endpoint that answers now and then is asked less and less often
		}
		if interval < 0 {
			timer.Reset(DefaultVerifyInterval) // another question may come up
			continue
		}
		if since := time.Since(time.Unix(0, c.observed.Load())); since < idle {
			timer.Reset(idle - since)
			continue
		}
		c.check(ctx, wg)
		// Clients that started together should not ask together.
		idle = interval - interval/10 + rand.N(interval/5+1)
		timer.Reset(idle)
	}
}

// questions reports whether the sequencer has a question though messages come, and whether reading was paused since the
// last call.
func (c *ZMQClient) questions() (due, paused bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, due = c.seq.due()
	paused, c.paused = c.paused, false
	return due, paused
}

func (c *ZMQClient) check(ctx context.Context, wg *sync.WaitGroup) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if ctx.Err() == nil {
		c.obey(ctx, wg, c.seq.check(), &message{})
	}
}

// midAnswer is how long a replay that has brought something may pause. Engines send an answer in one go, so what does
// not come soon was lost on the way, the end marker for one, and is to be asked for again.
const midAnswer = time.Second

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
	// The timer runs only while we wait for the engine, never while the handler does its work. It begins anew with each
	// message that brings the replay forward; others do not keep it going.
	timeout := orDefault(c.config.ReplayTimeout, DefaultReplayTimeout)
	var silent atomic.Bool
	left, since := timeout, time.Now()
	timer := time.AfterFunc(left, func() {
		silent.Store(true)
		_ = conn.Close()
	})
	defer timer.Stop()
	for messages := 0; ; messages++ {
		frames, err := conn.Recv()
		timer.Stop()
		left -= time.Since(since)
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
		m.omitted.bytes, m.omitted.digest = conn.Omitted()
		d, wanted := c.replayed(ctx, wg, asked, &m)
		switch {
		case d.foreign:
			return 0, errReplayForeign
		case d.invalid:
			return 0, errReplayNonsense
		case !wanted:
			return endUnwanted, nil
		case d.enough:
			return endEnough, nil
		case d.verdict == deliver:
			left = min(timeout, midAnswer)
		case d.useful:
			left = timeout
		}
		since = time.Now()
		timer.Reset(max(left, 0))
	}
}

// replayed takes one message of a replay, and reports whether this replay is still the one that is wanted.
func (c *ZMQClient) replayed(
	ctx context.Context, wg *sync.WaitGroup, asked uint64, m *message,
) (d decision, wanted bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// A restart seen live meanwhile makes this answer one of the past: it must not bring removed blocks back.
	if c.replayAsked != asked || ctx.Err() != nil {
		return d, false
	}
	d = c.seq.replayed(m.seq, c.proofOf(m))
	c.obey(ctx, wg, d, m)
	c.tellStatus()
	return d, c.replayAsked == asked
}

// overlap remembers the digests of what a replay brought until the live stream has caught up, so that a live message
// under the number of a replayed one can be told from the same message.
type overlap struct {
	first   uint64
	digests []uint32 // of first, first+1, ...; 0 for unknown
}

// maxOverlap bounds the numbers that are remembered. Engines keep 10,000 batches unless told otherwise.
const maxOverlap = 1 << 17

var digestSeed = maphash.MakeSeed()

// digestOf tells one message from another under the same number.
func digestOf(m *message) uint64 {
	return digestBytes(m.payload, m.omitted)
}

func digestBytes(payload []byte, o omission) uint64 {
	return maphash.Bytes(digestSeed, payload) ^ o.bytes ^ o.digest
}

func (o *overlap) digestOf(m *message) uint32 { return max(uint32(digestOf(m)), 1) }

// add takes a message of a replay. Numbers rise by one but for those that were burned.
func (o *overlap) add(m *message) {
	if len(o.digests) == 0 || m.seq < o.first+uint64(len(o.digests)) || m.seq-o.first >= maxOverlap {
		o.first, o.digests = m.seq, o.digests[:0]
	}
	for o.first+uint64(len(o.digests)) < m.seq {
		o.digests = append(o.digests, 0)
	}
	o.digests = append(o.digests, o.digestOf(m))
}

// proof compares m with the message of the replay under its number.
func (o *overlap) proof(m *message) proof {
	if m.seq < o.first || m.seq-o.first >= uint64(len(o.digests)) {
		return unproven
	}
	switch o.digests[m.seq-o.first] {
	case 0:
		return unproven
	case o.digestOf(m):
		return same
	}
	return other
}

// clear forgets everything and gives the memory back.
func (o *overlap) clear() { o.digests = nil }
