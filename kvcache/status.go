// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache

import "time"

// State says what the client is doing.
type State uint8

// The states of a client.
const (
	StateConnecting State = iota // no connection, and never yet been live
	StateSyncing                 // connected, fetching what was published before
	StateLive                    // every batch is handed on as it comes
	StateRecovering              // had been live; the connection or some batches are missing
	StateStopped
)

// String returns the state in lower case.
func (s State) String() string {
	switch s {
	case StateConnecting:
		return "connecting"
	case StateSyncing:
		return "syncing"
	case StateLive:
		return "live"
	case StateRecovering:
		return "recovering"
	case StateStopped:
		return "stopped"
	}
	return "invalid"
}

// Bound says what the events handed on so far are worth.
type Bound uint8

// The bounds, best last.
const (
	// BoundUnknown: removals may be missing, so that what was stored may be gone.
	BoundUnknown Bound = iota
	// BoundAtLeast: older history is missing. Nothing claimed is gone; the engine may hold more.
	BoundAtLeast
	// BoundExact: every batch since the engine's start or its last AllBlocksCleared was handed on.
	BoundExact
)

// String returns the bound in lower case.
func (b Bound) String() string {
	switch b {
	case BoundUnknown:
		return "unknown"
	case BoundAtLeast:
		return "at_least"
	case BoundExact:
		return "exact"
	}
	return "invalid"
}

// Reason says why an engine's state was reset, or why a bound is not exact.
type Reason string

// The reasons. The empty Reason means that there is nothing to explain.
const (
	ReasonStart       Reason = "start"        // the client's first synchronisation
	ReasonRestart     Reason = "restart"      // another process of the engine answers
	ReasonHistoryLost Reason = "history_lost" // batches are missing, and no replay could bring them
	ReasonLateStart   Reason = "late_start"   // the engine's first batches could not be had when the client came
	ReasonUnreadable  Reason = "unreadable"   // something was sent that could not be read
	ReasonGap         Reason = "gap"          // batches are missing and nothing can replay them
	ReasonReconnect   Reason = "reconnect"    // a lost connection that no replay made good
	ReasonCaller      Reason = "caller"       // the caller asked for it, by ZMQClient.Reset
	ReasonResync      Reason = "resync"       // what was in doubt is fetched anew, now that it can be
)

// Policy says what becomes of an engine's state when history is lost on an unbroken connection: batches are missing
// that the engine no longer has, or one cannot be read that may have removed blocks.
type Policy uint8

// The policies.
const (
	// PolicyClear forgets the engine's state and builds it anew: nothing claimed is gone.
	PolicyClear Policy = iota
	// PolicyKeep keeps the state, with a bound of BoundUnknown until the engine clears its cache or restarts.
	PolicyKeep
)

// String returns the policy in lower case.
func (p Policy) String() string {
	switch p {
	case PolicyClear:
		return "clear"
	case PolicyKeep:
		return "keep"
	}
	return "invalid"
}

// Status is a client's condition at one moment.
type Status struct {
	State  State
	Bound  Bound
	Reason Reason // why Bound is not exact; empty if it is
	// ObservedAt is the last moment at which the stream was known to be continuous: a batch in order, or the end of a
	// replay. An open gap or a lost connection leaves it behind. Zero if that never was.
	ObservedAt time.Time
	// Err is what keeps the client from being live, as text; empty if nothing does.
	Err string
}
