// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache

import "sync/atomic"

// lock is a mutex that is held while handlers run, for as long as they like. Waiting for it is waiting on a channel,
// which a synctest bubble understands, as it does not sync.Mutex; taking it when it is free costs one atomic operation.
type lock struct {
	state atomic.Int32  // one of the constants below
	wake  chan struct{} // has room for one; holds a token after an unlock that found waiters
}

const (
	unlocked int32 = iota
	locked
	contended // locked, and somebody may wait
)

func newLock() lock { return lock{wake: make(chan struct{}, 1)} }

func (l *lock) Lock() {
	if l.state.CompareAndSwap(unlocked, locked) {
		return
	}
	// Whoever waits has first made the state contended, so that the next unlock leaves a token.
	for l.state.Swap(contended) != unlocked {
		<-l.wake
	}
}

func (l *lock) Unlock() {
	if l.state.Swap(unlocked) == contended {
		select {
		case l.wake <- struct{}{}:
		default:
		}
	}
}
