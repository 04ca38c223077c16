// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache

import (
	"encoding/binary"
	"sync/atomic"
	"time"
)

// HoldBudget is the memory that clients share for live messages that wait for a replay. A client that finds it spent
// drops what it holds, and fetches that by another replay.
type HoldBudget struct {
	max  int64
	used atomic.Int64
}

// DefaultHoldBudget is the size in bytes of the budget of clients that were given none.
const DefaultHoldBudget = 256 << 20

var sharedHoldBudget = NewHoldBudget(DefaultHoldBudget)

// NewHoldBudget returns a budget of so many bytes.
func NewHoldBudget(bytes int) *HoldBudget { return &HoldBudget{max: int64(bytes)} }

// Used returns the bytes that are in use now.
func (b *HoldBudget) Used() int { return int(b.used.Load()) }

// take reports whether n more bytes could be had.
func (b *HoldBudget) take(n int) bool {
	if b.used.Add(int64(n)) <= b.max {
		return true
	}
	b.give(n)
	return false
}

func (b *HoldBudget) give(n int) { b.used.Add(-int64(n)) }

// holdQueue keeps live messages during a replay: copies, since the socket's buffer is reused. It takes memory in
// chunks, each from the budget, and gives them back as soon as their messages were taken. A message that finds no room
// empties it, for what is missing has to be replayed anyway.
type holdQueue struct {
	max    int // bytes, of chunks
	budget *HoldBudget

	// chunks hold records one after the other: a header, the topic, the payload. The first is read from at, the last
	// appended to.
	chunks [][]byte
	at     int
	count  int // messages
	size   int // bytes of all chunks' capacity
	// held is size for other goroutines, metrics show it.
	held    atomic.Int64
	metrics *ZMQClientMetrics
}

// heldMessage is a live message that waits for a replay to catch up. Its bytes are valid until take or clear.
type heldMessage struct {
	seq            uint64
	at             time.Time
	topic, payload []byte
	omitted        omission
}

const (
	// heldHeader is the size of a record's header: number, time, omission (bytes and digest), and two lengths.
	heldHeader = 8 + 8 + 8 + 8 + 4 + 4

	// Chunks double in size as the queue grows: most replays are over before much has come.
	minHoldChunk, maxHoldChunk = 4 << 10, 256 << 10

	// maxHeldMessages bounds the queue's length, whatever their size.
	maxHeldMessages = 1 << 20
)

// push keeps a copy of a message and reports whether there was room. If not, everything is dropped.
func (q *holdQueue) push(m *message) bool {
	need := heldHeader + len(m.topic) + len(m.payload)
	n := len(q.chunks)
	if q.count == maxHeldMessages {
		q.clear()
		return false
	}
	if n == 0 || cap(q.chunks[n-1])-len(q.chunks[n-1]) < need {
		chunk := max(need, min(max(minHoldChunk, q.size), maxHoldChunk))
		if chunk > q.max-q.size || !q.budget.take(chunk) {
			q.clear()
			return false
		}
		q.chunks = append(q.chunks, make([]byte, 0, chunk))
		q.resize(chunk)
		n++
	}
	c := q.chunks[n-1]
	c = binary.BigEndian.AppendUint64(c, m.seq)
	c = binary.BigEndian.AppendUint64(c, uint64(m.at.UnixNano()))
	c = binary.BigEndian.AppendUint64(c, m.omitted.bytes)
	c = binary.BigEndian.AppendUint64(c, m.omitted.digest)
	c = binary.BigEndian.AppendUint32(c, uint32(len(m.topic)))
	c = binary.BigEndian.AppendUint32(c, uint32(len(m.payload)))
	c = append(c, m.topic...)
	q.chunks[n-1] = append(c, m.payload...)
	q.count++
	return true
}

// peek returns the oldest message that was not taken.
func (q *holdQueue) peek() (m heldMessage, ok bool) {
	if q.count == 0 {
		return m, false
	}
	m, _ = record(q.chunks[0][q.at:])
	return m, true
}

// find returns the message with a number, if it is held.
func (q *holdQueue) find(seq uint64) (m heldMessage, ok bool) {
	from := q.at
	for _, chunk := range q.chunks {
		for rest := chunk[from:]; len(rest) > 0; {
			if m, rest = record(rest); m.seq == seq {
				return m, true
			}
		}
		from = 0
	}
	return heldMessage{}, false
}

// record reads the message that r begins with, and returns what follows it.
func record(r []byte) (m heldMessage, rest []byte) {
	m.seq = binary.BigEndian.Uint64(r)
	m.at = time.Unix(0, int64(binary.BigEndian.Uint64(r[8:])))
	m.omitted = omission{bytes: binary.BigEndian.Uint64(r[16:]), digest: binary.BigEndian.Uint64(r[24:])}
	topic := heldHeader + int(binary.BigEndian.Uint32(r[32:]))
	end := topic + int(binary.BigEndian.Uint32(r[36:]))
	m.topic, m.payload = r[heldHeader:topic:topic], r[topic:end:end]
	return m, r[end:]
}

// take removes the message that peek returned, unless it went with a clear meanwhile.
func (q *holdQueue) take() {
	m, ok := q.peek()
	if !ok {
		return
	}
	q.count--
	if q.at += heldHeader + len(m.topic) + len(m.payload); q.at < len(q.chunks[0]) {
		return
	}
	size := cap(q.chunks[0])
	q.chunks[0] = nil
	q.chunks, q.at = q.chunks[1:], 0
	q.budget.give(size)
	q.resize(-size)
}

// clear forgets all messages and gives their memory back.
func (q *holdQueue) clear() {
	if q.size > 0 {
		q.budget.give(q.size)
		q.resize(-q.size)
	}
	q.chunks, q.at, q.count = nil, 0, 0
}

func (q *holdQueue) resize(by int) {
	q.size += by
	q.held.Store(int64(q.size))
	q.metrics.setPending(q.size)
}
