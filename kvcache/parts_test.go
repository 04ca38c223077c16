// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache

import (
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

func TestHoldQueueKeepsOrderAndItsBound(t *testing.T) {
	t.Parallel()
	q := holdQueue{max: 3 * (heldOverhead + 4)}
	for i := range uint64(3) {
		q.push(i, time.Time{}, []byte{'t'}, []byte{byte(i), 1, 2})
	}
	for i := range uint64(3) {
		m, topic, payload, ok := q.peek()
		if !ok || m.seq != i || string(topic) != "t" || payload[0] != byte(i) || len(payload) != 3 {
			t.Fatalf("message %d: %+v %q %v %v", i, m, topic, payload, ok)
		}
		q.take()
	}
	if _, _, _, ok := q.peek(); ok {
		t.Error("a fourth message")
	}
	q.clear()
	for i := range uint64(4) {
		q.push(i, time.Time{}, nil, make([]byte, 4))
	}
	if q.size() != 0 {
		t.Errorf("%d bytes held after an overflow", q.size())
	}
	if !q.takeDropped() || q.takeDropped() {
		t.Error("an overflow is reported once")
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
