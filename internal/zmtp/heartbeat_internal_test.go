// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp

import (
	"testing"
	"time"
)

// A keeper that is woken long after its time was itself stopped, and what the peer sent may lie unread. synctest's
// clock is never late, so that the decision is tested alone.
func TestAStoppedProcessDoesNotBlameItsPeer(t *testing.T) {
	t.Parallel()
	const s = int64(time.Second)
	h := heartbeat{interval: 5 * s, timeout: 4 * s, nextPing: 5 * s}
	step := func(now, last, since int64, wantPing, wantSilent bool, wantNext int64) {
		t.Helper()
		h.woke(now)
		ping, silent, next := h.step(now, last, since, 0)
		if ping {
			next = h.pinged(now, now)
		}
		if ping != wantPing || silent != wantSilent || next != wantNext {
			t.Errorf("at %ds: ping %v, silent %v, next %ds; want %v, %v, %ds", now/s, ping, silent, next/s, wantPing,
				wantSilent, wantNext/s)
		}
	}
	step(1*s, 1*s, 1*s, false, false, 5*s)
	step(5*s, 1*s, 1*s, true, false, 9*s)
	step(100*s, 1*s, 1*s, true, false, 104*s)          // 91s late: the count begins again
	step(104*s, 1*s, 1*s, false, true, 104*s+1)        // and ends as ever
	step(104*s, 100*s+1, 100*s+1, false, false, 105*s) // had a byte come, it would not
	step(105*s, 100*s+1, 0, true, false, 109*s)
	step(109*s, 100*s+1, 0, false, false, 110*s) // nobody reads: no count
	step(110*s, 100*s+1, 109*s+1, true, false, 113*s+1)
	step(113*s+1, 100*s+1, 109*s+1, false, true, 113*s+2)
}
