// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache

import (
	"context"
	"time"
)

// ReplayLimiter bounds how many replays run at once, so that a fleet that starts again does not drown its gateway. Its
// methods may be called from any goroutine.
type ReplayLimiter interface {
	// Acquire waits for a turn, or until ctx ends, which is the error.
	Acquire(ctx context.Context) error
	// Release ends a turn.
	Release()
}

// DefaultReplays is how many replays may run at once over all clients that were given no ReplayLimiter.
const DefaultReplays = 8

var sharedReplayLimiter = NewReplayLimiter(DefaultReplays)

// maxTurn is how long a client keeps its turn. A replay that takes longer goes on without one: an engine that drips, or
// a handler that hangs, must not keep the replays of all other engines waiting.
const maxTurn = 30 * time.Second

// NewReplayLimiter returns a limiter of n replays at once, at least 1.
func NewReplayLimiter(n int) ReplayLimiter { return make(turns, max(n, 1)) }

type turns chan struct{}

func (t turns) Acquire(ctx context.Context) error {
	select {
	case t <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (t turns) Release() { <-t }
