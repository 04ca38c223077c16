// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache

import (
	"time"

	"github.com/kvtap/kvtap/event"
)

// EventHandler receives the events of one engine, one at a time and in the engine's order. Calls for one engine never
// overlap. While a call runs the engine's socket is not read, so a slow handler slows the engine's stream and nothing
// else. An error is counted and logged; the stream goes on.
//
// The event and everything it points to belong to the handler.
type EventHandler interface {
	HandleEvent(event KVEvent) error
}

// BatchHandler is an EventHandler that takes whole batches instead of events: no event is built, and nothing allocated.
type BatchHandler interface {
	EventHandler
	// HandleBatch gets one batch. The batch, info.Topic and info.Payload are valid until it returns.
	HandleBatch(batch *event.Batch, info BatchInfo) error
}

// ResyncHandler is an EventHandler that is told of resets: what it knows of this engine no longer holds, and the
// engine's state is built anew from the events that follow. Without it a handler cannot tell a restart from a pause.
type ResyncHandler interface {
	EventHandler
	HandleReset(reset Reset) error
}

// StatusHandler is an EventHandler that is told of every change of state, bound or reason, in order with the events: a
// bound that falls before the batch that made it fall, one that rises behind the batch that made it rise. StateStopped
// is not told, since no call follows Stop; the first call says StateConnecting.
type StatusHandler interface {
	EventHandler
	HandleStatus(status Status)
}

// PayloadHandler is an EventHandler that also gets the bytes of every message in order, before they are decoded, so
// that it sees unreadable ones too. They are valid until it returns.
type PayloadHandler interface {
	EventHandler
	HandlePayload(info BatchInfo) error
}

// BatchInfo says where a batch came from.
type BatchInfo struct {
	PodName   string
	ModelName string
	// Rank is the batch's data-parallel rank if it says so, else the configured one. In HandlePayload, before anything
	// is decoded, it is the configured one.
	Rank     int
	Sequence uint64
	// Replayed is true if the batch came from a replay, false if it came live.
	Replayed bool
	// ReceivedAt is when the message was read from the socket.
	ReceivedAt time.Time
	Topic      []byte
	Payload    []byte // MessagePack, as the engine sent it
}

// Reset says that an engine's state starts anew.
type Reset struct {
	PodName   string
	ModelName string
	Rank      int
	Reason    Reason
	At        time.Time
}
