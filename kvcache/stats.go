// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache

import "sync/atomic"

// Stats is what a client has done since it was started. The figures are read one by one, so that they may differ by
// what happened meanwhile.
type Stats struct {
	Connections, Disconnections uint64

	Batches  uint64 // handed on, unreadable ones included
	Replayed uint64 // of these batches, by replay
	Events   uint64 // decoded

	Missed     uint64 // sequence numbers found missing in the live stream; replays may have brought them
	Burned     uint64 // sequence numbers that the engine took and never sent
	Duplicates uint64 // batches that came more than once
	Unreadable uint64 // batches and events that could not be read

	Replays        uint64 // asked for
	ReplayFailures uint64 // without a valid answer
	Resets         uint64 // told to the handler, the first one included
	HandlerErrors  uint64 // errors and panics of the handler

	// HeldBytes is the memory that live messages take now, while they wait for a replay.
	HeldBytes int
}

// counters are the figures of Stats.
type counters struct {
	connections, disconnections atomic.Uint64
	batches, replayed, events   atomic.Uint64
	missed, burned, duplicates  atomic.Uint64
	unreadable                  atomic.Uint64
	replays, replayFailures     atomic.Uint64
	resets, handlerErrors       atomic.Uint64
}

// Stats returns what the client has done so far. It never waits for the handler.
func (c *ZMQClient) Stats() Stats {
	s := &c.stats
	return Stats{
		Connections: s.connections.Load(), Disconnections: s.disconnections.Load(),
		Batches: s.batches.Load(), Replayed: s.replayed.Load(), Events: s.events.Load(),
		Missed: s.missed.Load(), Burned: s.burned.Load(), Duplicates: s.duplicates.Load(),
		Unreadable: s.unreadable.Load(),
		Replays:    s.replays.Load(), ReplayFailures: s.replayFailures.Load(),
		Resets: s.resets.Load(), HandlerErrors: s.handlerErrors.Load(),
		HeldBytes: int(c.hold.held.Load()),
	}
}

// countNumbers counts what a decision found out about sequence numbers; callers hold mu.
func (c *ZMQClient) countNumbers(d *decision) {
	if d.missed > 0 {
		c.stats.missed.Add(d.missed)
	}
	if d.burned > 0 {
		c.stats.burned.Add(d.burned)
	}
	if d.duplicate {
		c.stats.duplicates.Add(1)
	}
	c.metrics.countNumbers(d)
}
