// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache

import (
	"bytes"
	"testing"
	"time"
)

func TestBackoffDoublesUpToItsLimitAndSparesARestartingHostTheLongWaits(t *testing.T) {
	t.Parallel()
	b := newBackoff(time.Second)
	b.jitter = func(n int64) int64 { return n - 1 } // the longest wait
	var got []time.Duration
	for range 7 {
		got = append(got, b.next(false)/time.Second)
	}
	for i, want := range []time.Duration{1, 2, 4, 8, 16, 30, 30} {
		if got[i] != want {
			t.Errorf("waits of %v s, want 1 2 4 8 16 30 30", got)
			break
		}
	}
	if d := b.next(true); d != refusedMax {
		t.Errorf("a host that refuses is tried after %v, want %v", d, refusedMax)
	}
	b.reset()
	if d := b.next(true); d != time.Second {
		t.Errorf("after a healthy period the wait is %v", d)
	}
	slow := newBackoff(time.Minute)
	slow.jitter = b.jitter
	if d := slow.next(true); d != time.Minute {
		t.Errorf("a configured wait is never shortened: %v", d)
	}
}

func TestBackoffSpreadsOverItsWholeLimit(t *testing.T) {
	t.Parallel()
	low, high := false, false
	for range 1000 {
		switch d := newBackoff(time.Second).next(false); {
		case d < 0 || d > time.Second:
			t.Fatalf("a wait of %v", d)
		case d < 300*time.Millisecond:
			low = true
		case d > 700*time.Millisecond:
			high = true
		}
	}
	if !low || !high {
		t.Error("1000 waits keep to one end")
	}
}

func TestHoldQueueKeepsOrderAndItsBounds(t *testing.T) {
	t.Parallel()
	budget := NewHoldBudget(1 << 20)
	q := holdQueue{max: 256 << 10, budget: budget}
	push := func(i uint64, payload []byte) bool {
		return q.push(&message{seq: i, at: time.Unix(int64(i), 5), topic: []byte{'t'}, payload: payload,
			omitted: omission{bytes: i, digest: 2 * i}})
	}
	for i := range uint64(1000) { // over several chunks, some messages longer than one
		size := 3
		if i%100 == 7 {
			size = 5000
		}
		if !push(i, bytes.Repeat([]byte{byte(i)}, size)) {
			t.Fatalf("no room for message %d", i)
		}
	}
	if used := budget.Used(); used != q.size || used > 2*(1000*(heldHeader+4)+10*5000) {
		t.Errorf("%d bytes of the budget are used, %d of the queue", used, q.size)
	}
	for i := range uint64(1000) {
		m, ok := q.peek()
		if !ok || m.seq != i || string(m.topic) != "t" || m.payload[0] != byte(i) || !m.at.Equal(time.Unix(int64(i), 5)) ||
			m.omitted != (omission{bytes: i, digest: 2 * i}) {
			t.Fatalf("message %d: %+v %v", i, m, ok)
		}
		q.take()
	}
	if _, ok := q.peek(); ok || budget.Used() != 0 || q.size != 0 || q.held.Load() != 0 {
		t.Errorf("taken to the last, %d bytes are in use", budget.Used())
	}
	q.take() // of nothing

	for i := range uint64(1000) {
		if !push(i, make([]byte, 2000)) {
			if q.size != 0 || q.count != 0 || budget.Used() != 0 {
				t.Errorf("%d bytes held after an overflow", q.size)
			}
			if i < 20 {
				t.Errorf("it overflowed after %d messages", i)
			}
			return
		}
		if q.size > q.max {
			t.Fatalf("%d bytes in use, %d allowed", q.size, q.max)
		}
	}
	t.Error("it never overflowed")
}

func TestHoldQueueBoundsTheNumberOfMessages(t *testing.T) {
	t.Parallel()
	q := holdQueue{max: 1 << 30, budget: NewHoldBudget(1 << 30)}
	m := &message{}
	for range maxHeldMessages {
		if !q.push(m) {
			t.Fatalf("no room after %d messages", q.count)
		}
	}
	if q.push(m) || q.count != 0 || q.size != 0 {
		t.Errorf("%d messages, %d bytes", q.count, q.size)
	}
}

func TestHoldQueueFindsAMessageByItsNumber(t *testing.T) {
	t.Parallel()
	q := holdQueue{max: 1 << 20, budget: NewHoldBudget(1 << 20)}
	for i := range uint64(500) {
		q.push(&message{seq: 2 * i, payload: []byte{byte(i), byte(i >> 8)}})
	}
	for range 10 {
		q.take()
	}
	for seq, want := range map[uint64]bool{0: false, 18: false, 20: true, 21: false, 998: true, 1000: false} {
		m, ok := q.find(seq)
		if ok != want || ok && (m.seq != seq || m.payload[0] != byte(seq/2)) {
			t.Errorf("number %d: found %v, %+v", seq, ok, m)
		}
	}
}

func TestHoldQueuesShareTheirBudget(t *testing.T) {
	t.Parallel()
	budget := NewHoldBudget(10 * minHoldChunk)
	one, two := holdQueue{max: 1 << 20, budget: budget}, holdQueue{max: 1 << 20, budget: budget}
	m := &message{payload: make([]byte, 100)}
	for one.push(m) && one.size < 8*minHoldChunk {
	}
	if one.count == 0 {
		t.Fatal("one queue alone overflowed within the budget")
	}
	two.push(m)
	pushed := 0
	for two.push(m) {
		if pushed++; pushed > 1000 {
			t.Fatal("the second queue grows beyond the budget")
		}
	}
	if two.size != 0 || one.count == 0 || budget.Used() != one.size {
		t.Errorf("%d bytes of the second, %d of the first, %d used", two.size, one.size, budget.Used())
	}
	one.clear()
	one.clear()
	if budget.Used() != 0 {
		t.Errorf("%d bytes used by nobody", budget.Used())
	}
	if !two.push(m) {
		t.Error("no room in a budget that is free again")
	}
}

func TestNamesOfStatesAndBounds(t *testing.T) {
	t.Parallel()
	for got, want := range map[string]string{
		StateConnecting.String(): "connecting", StateSyncing.String(): "syncing", StateLive.String(): "live",
		StateRecovering.String(): "recovering", StateStopped.String(): "stopped", State(99).String(): "invalid",
		BoundExact.String(): "exact", BoundAtLeast.String(): "at_least", BoundUnknown.String(): "unknown",
		Bound(99).String() + " ": "invalid ",
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
