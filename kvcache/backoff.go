// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache

import (
	"math/rand/v2"
	"time"
)

// The pace of reconnects.
const (
	// refusedMax is the longest wait for a host that answers "connection refused": its engine is starting again.
	refusedMax = 5 * time.Second
	// healthyAfter is how long a connection must have lasted for the next wait to be short again. A bare connect is not
	// enough: an engine that accepts and dies would be hammered.
	healthyAfter = 10 * time.Second
)

// backoff paces reconnects: exponential with full jitter, so that many clients of a fleet that restarts spread out.
type backoff struct {
	initial time.Duration
	limit   time.Duration // of the wait that comes next, before jitter
	jitter  func(n int64) int64
}

func newBackoff(initial time.Duration) *backoff {
	return &backoff{initial: initial, limit: initial, jitter: rand.Int64N}
}

// next returns how long to wait, and makes the following wait longer.
func (b *backoff) next(refused bool) time.Duration {
	limit := b.limit
	b.limit = min(time.Duration(float64(b.limit)*ReconnectBackoffFactor), max(MaxReconnectInterval, b.initial))
	if refused {
		limit = min(limit, max(refusedMax, b.initial))
	}
	return time.Duration(b.jitter(int64(limit) + 1))
}

// reset makes the next wait short again.
func (b *backoff) reset() { b.limit = b.initial }
