// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package simulation_test

import (
	"fmt"
	"maps"
	"math"
	"strings"
	"sync"
	"time"

	"github.com/kvtap/kvtap/event"
	"github.com/kvtap/kvtap/kvcache"
)

// clock is the engine's: no two of its readings are the same, so that a batch's time tells which life it is of.
type clock struct {
	mu   sync.Mutex
	last time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := time.Now(); t.After(c.last) {
		c.last = t
	} else {
		c.last = c.last.Add(time.Microsecond)
	}
	return c.last
}

func (c *clock) read() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.last.UnixMicro()
}

// life is what is known of one life of the engine.
type life struct {
	ends  int64                         // no batch of it has a later time, as far as it has come
	truth map[uint64]map[event.Hash]int // by number, what the engine held when it had published that batch
	first uint64                        // number of its first batch, if any
	last  uint64
	any   bool
	next  uint64 // number of the batch that comes next
	// numbers lists those of its batches, unsure says that one of them cannot be read whole.
	numbers []uint64
	unsure  bool
	rolled  bool
}

func (r *run) newLife() life {
	return life{truth: make(map[uint64]map[event.Hash]int), next: r.firstSeq}
}

// record notes what the engine holds. No two batches that change it come between two calls, but for those with which a
// restart begins.
func (r *run) record() {
	var held map[event.Hash]int
	var next, last uint64
	var any bool
	number := r.engine.Life()
	for {
		held, next = r.engine.Truth()
		last, any = r.engine.LastSeq()
		again := r.engine.Life()
		if again == number {
			break
		}
		number = again
	}
	r.present = number
	begins := len(r.lives) <= number
	for len(r.lives) <= number {
		l := r.newLife()
		l.ends = r.lives[len(r.lives)-1].ends
		l.unsure = r.unknownEvents
		r.lives = append(r.lives, l)
	}
	l := &r.lives[number]
	l.ends = r.clock.read()
	from := l.next
	l.next = next
	if !any || l.any && l.last == last {
		return
	}
	if !l.any {
		l.any, l.first = true, from
	}
	for seq := from; seq <= last; seq++ {
		l.numbers = append(l.numbers, seq)
	}
	l.last = last
	if begins {
		from = last // the batches with which a life begins come together
	}
	for seq := from; seq <= last; seq++ {
		l.truth[seq] = held
	}
}

// lifeOf returns which life a batch of this time is of.
func (r *run) lifeOf(seconds float64) int {
	t := int64(math.Round(seconds * 1e6))
	for i := range r.lives {
		if t <= r.lives[i].ends {
			return i
		}
	}
	return len(r.lives)
}

// check is what must hold at a quiet point. With flowing, batches were published while the client was well.
func (r *run) check(flowing bool) error {
	if err := r.examine(); err != nil {
		return err
	}
	r.tally.quiet++
	state := r.client.State()
	told := r.handler.status()
	r.note("quiet: %v/%v %s %q", state.State, state.Bound, state.Reason, state.Err)
	switch {
	case state.State != kvcache.StateLive:
		return failf("not_live", "the state is %v (%s)", state.State, state.Err)
	case state.Err != "" && !r.deaf:
		return failf("error_left", "live with an error: %s", state.Err)
	case told.State != state.State || told.Bound != state.Bound || told.Reason != state.Reason:
		return failf("not_told", "the state is %v/%v %s, and the handler was told %v/%v %s", state.State, state.Bound,
			state.Reason, told.State, told.Bound, told.Reason)
	case (state.Bound == kvcache.BoundExact) != (state.Reason == ""):
		return failf("reason", "bound %v with reason %q", state.Bound, state.Reason)
	case r.client.Stats().HeldBytes != 0:
		return failf("held_live", "live, and %d bytes are held", r.client.Stats().HeldBytes)
	}
	interval := r.verify
	if interval == 0 {
		interval = kvcache.DefaultVerifyInterval
	}
	replayable := !r.noReplay && !r.deaf
	if behind := time.Since(state.ObservedAt); replayable && interval > 0 && behind > interval+interval/10+time.Second {
		return failf("observed", "the tail was not looked at for %v", behind)
	}
	held, next := r.engine.Truth()
	number := r.present
	l, at := &r.lives[number], r.checker.at
	complete := r.complete()
	if replayable && interval > 0 || flowing {
		if !complete {
			return failf("behind", "delivered life %d number %d, the engine is in life %d with next %d", at.life, at.seq,
				number, next)
		}
	}
	mine := r.handler.held()
	if complete {
		if d := diff(mine, held, state.Bound); d != "" {
			return failf("differs", "bound %v at number %d: %s", state.Bound, at.seq, d)
		}
	}
	switch state.Bound {
	case kvcache.BoundExact:
		r.tally.exact++
	case kvcache.BoundAtLeast:
		r.tally.atLeast++
	case kvcache.BoundUnknown:
		r.tally.unknown++
		switch {
		case replayable && !r.keep:
			return failf("unknown", "the bound is unknown (%s), with a replay endpoint and policy clear", state.Reason)
		case !r.disturbed && len(l.numbers) <= r.buffer:
			return failf("unknown_for_no_reason", "the bound is unknown (%s), and nothing went wrong", state.Reason)
		}
	}
	if r.mustBeExact(l, flowing) {
		r.tally.mustExact++
		if state.Bound != kvcache.BoundExact {
			return failf("not_exact", "the bound is %v (%s), and yet nothing was lost: first number %d, buffer %d, %d "+
				"published", state.Bound, state.Reason, l.first, r.buffer, len(l.numbers))
		}
	}
	return nil
}

// complete reports whether the last batch of the engine's present life was delivered, if there is one that is wanted.
func (r *run) complete() bool {
	number := r.present
	l, at := &r.lives[number], r.checker.at
	if at.any && (at.life == number || at.life < 0) {
		return at.seq == l.last
	}
	return !l.any || l.last < r.from && !at.any
}

// mustBeExact reports whether everything that the present life has published can be had and read.
func (r *run) mustBeExact(l *life, flowing bool) bool {
	switch {
	case r.noReplay || r.deaf || r.keep || r.from > 0 || r.message != 0:
		return false
	case l.unsure || l.rolled || len(l.numbers) > r.buffer:
		return false
	case !l.any || l.first == 0:
		return true
	default:
		// A history that begins with 1 may be whole, which shows when more was published.
		return l.first == 1 && flowing
	}
}

// diff says how what the handler holds contradicts the engine's truth under a bound.
func diff(mine, truth map[event.Hash]int, bound kvcache.Bound) string {
	if bound == kvcache.BoundUnknown {
		return ""
	}
	var wrong []string
	for h, n := range mine {
		if n > truth[h] {
			wrong = append(wrong, fmt.Sprintf("%v is claimed %d times and held %d times", h, n, truth[h]))
		}
	}
	if bound == kvcache.BoundExact {
		for h, n := range truth {
			if mine[h] < n {
				wrong = append(wrong, fmt.Sprintf("%v is held %d times and claimed %d times", h, n, mine[h]))
			}
		}
	}
	if len(wrong) > 4 {
		wrong = append(wrong[:4], fmt.Sprintf("and %d more", len(wrong)-4))
	}
	return strings.Join(wrong, "; ")
}

// equal is diff without the words, for the many cases in which nothing is wrong.
func equal(claims []claim, truth map[event.Hash]int, bound kvcache.Bound) bool {
	for _, c := range claims {
		if truth[c.hash] < c.copies {
			return false
		}
	}
	return bound != kvcache.BoundExact || len(claims) == len(truth) && sum(claims) == total(truth)
}

func sum(claims []claim) (n int) {
	for _, c := range claims {
		n += c.copies
	}
	return n
}

func total(truth map[event.Hash]int) (n int) {
	for v := range maps.Values(truth) {
		n += v
	}
	return n
}
