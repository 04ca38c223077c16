// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache

import "time"

// heldMessage is a live message that waits for a replay to catch up.
type heldMessage struct {
	seq uint64
	at  time.Time
	// Offsets in holdQueue.buf: where the topic begins, where the payload does, and where that ends.
	topic, payload, end int
}

// holdQueue keeps live messages during a replay: copies, since the socket's buffer is reused. Its memory is bounded; a
// message that does not fit empties it, for what is missing has to be replayed anyway.
type holdQueue struct {
	max      int // bytes, of payloads, topics and book-keeping
	buf      []byte
	messages []heldMessage
	next     int  // the first message not yet taken
	dropped  bool // messages were dropped since take last reported it
}

// heldOverhead is what book-keeping costs per message, in bytes; without it a flood of empty messages would be free.
const heldOverhead = 64

// size returns the bytes in use.
func (q *holdQueue) size() int { return len(q.buf) + len(q.messages)*heldOverhead }

func (q *holdQueue) push(seq uint64, at time.Time, topic, payload []byte) {
	if q.size()+len(topic)+len(payload)+heldOverhead > q.max {
		q.clear()
		q.dropped = true
		return
	}
	m := heldMessage{seq: seq, at: at, topic: len(q.buf)}
	q.buf = append(q.buf, topic...)
	m.payload = len(q.buf)
	q.buf = append(q.buf, payload...)
	m.end = len(q.buf)
	q.messages = append(q.messages, m)
}

// peek returns the oldest message that was not taken.
func (q *holdQueue) peek() (m heldMessage, topic, payload []byte, ok bool) {
	if q.next == len(q.messages) {
		return m, nil, nil, false
	}
	m = q.messages[q.next]
	return m, q.buf[m.topic:m.payload], q.buf[m.payload:m.end], true
}

// take removes the message that peek returned, unless it went with a clear meanwhile.
func (q *holdQueue) take() { q.next = min(q.next+1, len(q.messages)) }

// clear forgets all messages, and that some were dropped, and gives their memory back.
func (q *holdQueue) clear() { q.buf, q.messages, q.next, q.dropped = nil, nil, 0, false }

// takeDropped reports whether messages were dropped since the last call.
func (q *holdQueue) takeDropped() bool {
	dropped := q.dropped
	q.dropped = false
	return dropped
}
