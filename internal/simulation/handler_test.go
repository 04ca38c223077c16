// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package simulation_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/kvtap/kvtap/event"
	"github.com/kvtap/kvtap/kvcache"
)

// handler folds what it gets, and writes down every call together with what it claimed then.
type handler struct {
	run   *run
	begun time.Time

	mu      sync.Mutex
	fold    event.Fold
	told    kvcache.Status
	calls   []call
	claims  []claim // of all calls, one after the other
	batches int
	hurried bool
	ended   bool
	gate    chan struct{} // not nil: batches wait until it is closed

	called chan struct{} // has room for one
}

// call is one call of the handler.
type call struct {
	kind     callKind
	at       time.Duration
	seq      uint64
	replayed bool
	unread   bool    // a payload that cannot be read
	life     int     // of such a payload, if it tells; else -1
	time     float64 // the batch's
	claims   []claim // after a batch
	status   kvcache.Status
	reason   kvcache.Reason
	late     bool // after Stop had returned
}

type callKind uint8

const (
	callPayload callKind = iota
	callBatch
	callReset
	callStatus
)

// claim is what a fold says of one block.
type claim struct {
	hash   event.Hash
	copies int
}

func (c *call) String() string {
	s := ""
	switch c.kind {
	case callPayload:
		s = fmt.Sprintf("payload %d", c.seq)
		if c.unread {
			s += ", unreadable"
		}
	case callBatch:
		s = fmt.Sprintf("batch %d, %d claims", c.seq, sum(c.claims))
	case callReset:
		s = "RESET " + string(c.reason)
	case callStatus:
		s = fmt.Sprintf("status %v/%v %s %s", c.status.State, c.status.Bound, c.status.Reason, c.status.Err)
	}
	if c.replayed {
		s += " (replayed)"
	}
	if c.late {
		s += " AFTER STOP"
	}
	return s
}

// add writes a call down; h.mu is held.
func (h *handler) add(c call) {
	c.at, c.late = time.Since(h.begun), h.ended
	h.calls = append(h.calls, c)
	if h.run.trace != nil && (c.kind != callPayload || c.unread) {
		h.run.note("    handler: %v", &c)
	}
	select {
	case h.called <- struct{}{}:
	default:
	}
}

func (h *handler) HandleEvent(kvcache.KVEvent) error { return errors.New("batches were asked for") }

func (h *handler) HandlePayload(info kvcache.BatchInfo) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := call{kind: callPayload, seq: info.Sequence, replayed: info.Replayed, life: -1}
	c.unread = len(info.Payload) == 0 || info.Payload[0] == 0xc1
	if len(info.Payload) > 0 && c.unread {
		var number int
		if _, err := fmt.Sscanf(string(info.Payload[1:]), " life %d batch", &number); err == nil {
			c.life = number
		}
	}
	h.add(c)
	return nil
}

func (h *handler) HandleBatch(b *event.Batch, info kvcache.BatchInfo) error {
	h.mu.Lock()
	h.fold.Apply(b)
	from := len(h.claims)
	h.appendClaims()
	h.add(call{
		kind: callBatch, seq: info.Sequence, replayed: info.Replayed, life: -1, time: b.Time.V,
		claims: h.claims[from:len(h.claims):len(h.claims)],
	})
	h.batches++
	n, hurried, gate := h.batches, h.hurried, h.gate
	h.mu.Unlock()

	if gate != nil {
		<-gate
	}
	every := func(k int) bool { return k > 0 && n%k == 0 }
	if every(h.run.slowEvery) && !hurried {
		time.Sleep(h.run.slow)
	}
	switch {
	case every(h.run.resetEvery) && !hurried:
		h.run.client.Reset("handler")
	case every(h.run.panicEvery):
		panic("the handler's own fault")
	case every(h.run.failEvery):
		return errors.New("the handler's own error")
	}
	return nil
}

// appendClaims adds what the fold holds to h.claims. An engine of the simulation has one group and one medium, so each
// block is at one place.
func (h *handler) appendClaims() {
	for p, c := range h.fold.All() {
		h.claims = append(h.claims, claim{p.Hash, int(c.Upper)})
	}
}

func (h *handler) HandleReset(r kvcache.Reset) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fold.Clear()
	h.add(call{kind: callReset, reason: r.Reason, life: -1})
	return nil
}

func (h *handler) HandleStatus(s kvcache.Status) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.told = s
	h.add(call{kind: callStatus, status: s, life: -1})
}

func (h *handler) hurry(hurried bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.hurried = hurried
}

func (h *handler) isHurried() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.hurried
}

// block makes calls with batches wait for release.
func (h *handler) block() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.gate == nil {
		h.gate = make(chan struct{})
	}
}

func (h *handler) release() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.gate != nil {
		close(h.gate)
		h.gate = nil
	}
}

// end tells that Stop has returned.
func (h *handler) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ended = true
}

func (h *handler) status() kvcache.Status {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.told
}

func (h *handler) held() map[event.Hash]int {
	h.mu.Lock()
	defer h.mu.Unlock()
	held := make(map[event.Hash]int, h.fold.Len())
	for p, c := range h.fold.All() {
		held[p.Hash] += int(c.Upper)
	}
	return held
}

// take returns the calls since the last take.
func (h *handler) take() []call {
	h.mu.Lock()
	defer h.mu.Unlock()
	calls := h.calls
	h.calls, h.claims = nil, nil
	return calls
}

// checker follows the handler's calls, and says what must not be. It runs behind: what the engine held at a number is
// known only after the number was sent.
type checker struct {
	told   kvcache.Status
	claims []claim
	// last is the highest number since a reset that allows lower ones.
	last    uint64
	hasLast bool
	life    int // no batch of an earlier one may come
	at      position
	// doubt says that what may have removed blocks could not be read, and the handler was not told so yet.
	doubt bool
}

// position is the last batch since a reset, unreadable ones included.
type position struct {
	any  bool
	life int // -1 if the batch did not tell
	seq  uint64
}

// examine checks the calls since the last time.
func (r *run) examine() error {
	c := &r.checker
	for _, call := range r.handler.take() {
		if err := c.check(r, &call); err != nil {
			return err
		}
	}
	return r.pace.err()
}

func (c *checker) check(r *run, call *call) error {
	if call.late {
		return failf("late_call", "after Stop: %v", call)
	}
	switch call.kind {
	case callReset:
		c.claims, c.doubt = nil, false
		if call.reason != kvcache.ReasonUnreadable {
			c.hasLast = false
			c.at = position{}
		}
	case callStatus:
		if call.status == c.told {
			return failf("status_twice", "%v was told twice", call)
		}
		rose := call.status.Bound == kvcache.BoundExact && c.told.Bound != kvcache.BoundExact
		c.told = call.status
		if rose {
			return c.compare(r, c.at, "when told so")
		}
	case callPayload:
		if c.doubt && c.told.Bound != kvcache.BoundUnknown {
			return failf("doubt", "number %d comes after an unreadable one, with bound %v and no reset", call.seq,
				c.told.Bound)
		}
		c.doubt = call.unread
		if c.hasLast && call.seq <= c.last {
			return failf("order", "number %d after %d without a reset", call.seq, c.last)
		}
		c.last, c.hasLast = call.seq, true
		if call.life >= 0 {
			if call.life < c.life {
				return failf("old_life", "number %d of life %d after a batch of life %d", call.seq, call.life, c.life)
			}
			c.life = call.life
		}
		c.at = position{any: true, life: c.life, seq: call.seq}
		if call.unread && call.life < 0 {
			c.at.life = -1
		}
	case callBatch:
		life := r.lifeOf(call.time)
		if life < c.life {
			return failf("old_life", "number %d of life %d after a batch of life %d", call.seq, life, c.life)
		}
		c.life = life
		c.claims = call.claims
		c.at = position{any: true, life: life, seq: call.seq}
		return c.compare(r, c.at, "at the batch")
	}
	return nil
}

// compare holds the claims against what the engine held at a position.
func (c *checker) compare(r *run, at position, when string) error {
	if c.told.Bound == kvcache.BoundUnknown {
		return nil
	}
	truth := map[event.Hash]int(nil)
	if at.any {
		known := false
		if at.life >= 0 && at.life < len(r.lives) {
			truth, known = r.lives[at.life].truth[at.seq]
		}
		if !known {
			r.tally.skipped++
			return nil
		}
	}
	r.tally.compared++
	if equal(c.claims, truth, c.told.Bound) {
		return nil
	}
	mine := make(map[event.Hash]int)
	for _, claim := range c.claims {
		mine[claim.hash] += claim.copies
	}
	return failf("claim", "bound %v, life %d, number %d, %s: %s", c.told.Bound, at.life, at.seq, when,
		diff(mine, truth, c.told.Bound))
}

// logger writes the client's log into the trace.
func (r *run) logger() *slog.Logger { return slog.New(&traceHandler{run: r}) }

type traceHandler struct{ run *run }

func (*traceHandler) Enabled(context.Context, slog.Level) bool { return true }

func (h *traceHandler) Handle(_ context.Context, record slog.Record) error {
	s := record.Message
	record.Attrs(func(a slog.Attr) bool {
		s += " " + a.String()
		return true
	})
	h.run.note("        client: %s", s)
	return nil
}

func (h *traceHandler) WithAttrs([]slog.Attr) slog.Handler { return h }
func (h *traceHandler) WithGroup(string) slog.Handler      { return h }
