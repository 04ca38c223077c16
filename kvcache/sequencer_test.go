// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// A rig drives a sequencer as the client does, beside a naive engine: lists and loops, nothing clever.
type rig struct {
	t   testing.TB
	seq sequencer

	// The engine. published holds all of the current life; kept are the numbers that its replay buffer still has.
	life      uint64
	published []batchID
	kept      []batchID
	room      int // how many it has room for, 0 for any number
	next      uint64
	first     uint64 // of every life
	burned    map[batchID]bool

	// The network.
	connected bool
	dead      bool      // the process at the other end is gone, and the end of the connection not yet read
	reading   bool      // what is delivered came by a replay
	wire      []batchID // sent live, not yet read
	answer    *answer   // the replay that runs
	lossy     bool      // the next answer loses messages
	failing   int       // so many answers fail

	// The client.
	held      []batchID
	newest    batchID // read live on this connection
	asked     bool
	askedFor  batchID   // the batch that the answer has to begin with
	delivered []batchID // since the last reset
	last      batchID   // delivered last, resets or not
	replayed  map[uint64]batchID
	resets    []Reason
	trace     []string
}

type batchID struct{ life, seq uint64 }

type answer struct {
	messages []batchID
	marker   bool
}

func newRig(t testing.TB, replayable bool) *rig {
	return &rig{t: t, seq: sequencer{replayable: replayable, bound: BoundAtLeast}, burned: map[batchID]bool{}}
}

// mode is a set of conditions under which a script runs.
type mode uint8

const (
	withReplay mode = 1 << iota
	withKeep
	fromOne // the engine's numbers begin with 1
	wanting // the caller wants numbers from 3 on
	modes
)

func (m mode) rig(t testing.TB) *rig {
	r := newRig(t, m&withReplay != 0)
	r.seq.keep = m&withKeep != 0
	if m&fromOne != 0 {
		r.first, r.next = 1, 1
	}
	if m&wanting != 0 {
		r.seq.want = 3
	}
	return r
}

func (r *rig) note(format string, args ...any) {
	r.trace = append(r.trace, fmt.Sprintf(format, args...))
}

func (r *rig) fatalf(format string, args ...any) {
	r.t.Helper()
	for _, line := range r.trace {
		r.t.Log(line)
	}
	r.t.Fatalf(format, args...)
}

// The engine's side.

func (r *rig) publish(reaches bool) {
	b := batchID{r.life, r.next}
	r.next++
	r.note("publish %v, arrives: %v", b, reaches)
	r.published = append(r.published, b)
	if r.kept = append(r.kept, b); r.room > 0 && len(r.kept) > r.room {
		r.kept = r.kept[1:]
	}
	if r.connected && reaches && !r.dead {
		r.wire = append(r.wire, b)
	}
}

func (r *rig) burn() {
	r.note("burn %d", r.next)
	r.burned[batchID{r.life, r.next}] = true
	r.next++
}

func (r *rig) restart() {
	r.disconnect()
	r.newProcess()
}

// newProcess is a restart that the client does not notice before it has read all that the old process sent.
func (r *rig) newProcess() {
	r.note("restart")
	r.dead = r.connected
	r.life++
	r.published, r.kept, r.room, r.next = nil, nil, 0, r.first
}

// trim makes the replay buffer forget its oldest batches, and from then on one with every new batch; it always has the
// newest.
func (r *rig) trim(n int) {
	if n = min(n, len(r.kept)-1); n <= 0 {
		return
	}
	r.note("trim %d", n)
	r.kept = r.kept[n:]
	r.room = len(r.kept)
}

// The client's side.

// proof knows, as the client does, the last delivered message and those that came by replay on this connection.
func (r *rig) proof(b batchID, replayed bool) proof {
	was, known := r.replayed[b.seq]
	switch {
	case b.seq == r.last.seq && r.seq.started:
		was, known = r.last, true
	case replayed && r.seq.ask.purpose == askMeet && slices.ContainsFunc(r.held, sameSeq(b)):
		was, known = r.held[slices.IndexFunc(r.held, sameSeq(b))], true
	case replayed && r.seq.hasNewest && b.seq == r.seq.newest:
		was, known = r.newest, true
	case replayed && r.seq.ask.verify && b.seq == r.seq.ask.from:
		was, known = r.askedFor, true
	}
	switch {
	case !known:
		return unproven
	case was == b:
		return same
	}
	return other
}

func sameSeq(b batchID) func(batchID) bool { return func(h batchID) bool { return h.seq == b.seq } }

func (r *rig) connect() {
	if r.connected {
		return
	}
	r.note("connect")
	r.connected, r.dead, r.replayed = true, false, map[uint64]batchID{}
	r.obey(r.seq.connect(), batchID{}, false)
}

func (r *rig) disconnect() {
	if !r.connected {
		return
	}
	r.note("disconnect")
	r.connected, r.dead, r.wire, r.held, r.answer, r.asked = false, false, nil, nil, nil, false
	r.seq.disconnect()
}

// cut is the caller's own reset, which ends the connection.
func (r *rig) cut() {
	r.note("cut")
	r.obey(r.seq.cut(ReasonCaller), batchID{}, false)
	r.disconnect()
}

// overflow drops what is held, for want of room.
func (r *rig) overflow() {
	if len(r.held) > 0 && r.asked {
		r.note("overflow")
		r.held = nil
		r.seq.overflowed()
	}
}

func (r *rig) readLive() bool {
	if len(r.wire) == 0 {
		if r.dead {
			r.disconnect()
			return true
		}
		return false
	}
	b := r.wire[0]
	r.wire = r.wire[1:]
	r.note("read %v", b)
	r.newest = b
	r.obey(r.seq.live(b.seq, r.proof(b, false)), b, false)
	return true
}

func (r *rig) readReplay() bool {
	if !r.asked {
		return false
	}
	if r.answer == nil {
		if r.failing > 0 {
			r.failing--
			r.note("replay fails")
			r.over(r.seq.replayFailed())
			return true
		}
		r.answer = &answer{marker: true}
		for _, b := range r.kept {
			if b.seq >= r.seq.ask.from {
				r.answer.messages = append(r.answer.messages, b)
			}
		}
		if r.lossy { // libzmq drops the middle or the end of a long answer, never its beginning
			r.lossy = false
			m := r.answer.messages
			if len(m) > 2 {
				r.answer.messages = slices.Delete(m, 2, 2+(len(m)-2+1)/2)
				r.answer.marker = len(m)%2 == 0
			}
		}
		r.note("replay from %d: %v, marker: %v", r.seq.ask.from, r.answer.messages, r.answer.marker)
	}
	if len(r.answer.messages) == 0 {
		marker := r.answer.marker
		r.answer = nil
		r.note("replay ends, marker: %v", marker)
		end := endSilent
		if marker {
			end = endMarked
		}
		r.over(r.seq.replayEnded(end))
		return true
	}
	b := r.answer.messages[0]
	r.answer.messages = r.answer.messages[1:]
	d := r.seq.replayed(b.seq, r.proof(b, true))
	r.reading = true
	r.obey(d, b, false)
	r.reading = false
	if d.foreign || d.invalid {
		r.answer = nil
		r.note("replay refused")
		r.over(r.seq.replayFailed())
		return true
	}
	if !d.replay && d.enough {
		r.answer = nil
		r.note("replay told enough")
		r.over(r.seq.replayEnded(endEnough))
	}
	return true
}

// over ends a replay: another one, or the held messages and then live ones.
func (r *rig) over(d decision) {
	r.asked = false
	r.obey(d, batchID{}, false)
	if d.replay {
		return
	}
	for len(r.held) > 0 {
		b := r.held[0]
		d := r.seq.held(b.seq, r.proof(b, false))
		r.obey(d, b, true)
		if d.replay {
			return
		}
		r.held = r.held[1:]
	}
	r.obey(r.seq.settle(), batchID{}, true)
}

func (r *rig) obey(d decision, b batchID, held bool) {
	if d.dropHeld {
		r.held = nil
	}
	if d.reset != "" {
		r.note("  reset: %s", d.reset)
		r.resets = append(r.resets, d.reset)
		r.delivered = nil
	}
	switch d.verdict {
	case deliver:
		r.note("  deliver %v", b)
		r.deliver(b)
		r.seq.delivered(b.seq, r.answer != nil && !held && r.reading)
		r.last = b
		if r.asked && !held {
			r.replayed[b.seq] = b
		}
	case hold:
		if !held {
			r.held = append(r.held, b)
		}
	}
	if d.replay {
		r.asked, r.answer = true, nil
		r.askedFor = r.last
	}
}

// deliver checks what a handler relies on.
func (r *rig) deliver(b batchID) {
	if n := len(r.delivered); n > 0 {
		last := r.delivered[n-1]
		if last.life != b.life && r.seq.bound != BoundUnknown {
			r.fatalf("delivered %v after %v without a reset", b, last)
		}
		if last.life == b.life && b.seq <= last.seq {
			r.fatalf("delivered %v after %v", b, last)
		}
		if last.life == b.life && r.seq.bound != BoundUnknown {
			for seq := last.seq + 1; seq < b.seq; seq++ {
				if !r.burned[batchID{b.life, seq}] {
					r.fatalf("delivered %v after %v: %d is missing and the bound is %v", b, last, seq, r.seq.bound)
				}
			}
		}
	}
	r.delivered = append(r.delivered, b)
}

// quiet heals the network and drains everything. Without replays the engine publishes once more.
func (r *rig) quiet() {
	r.lossy, r.failing = false, 0
	for range 2 { // the end of a connection may only be read now
		r.connect()
		r.drain()
	}
	if r.seq.replayable {
		// What was lost on its way is found, though the engine says nothing more. The first question may be another one:
		// whether replays work again, or what the first number was.
		for range 3 {
			r.check()
			r.drain()
		}
		if !r.seq.foreign {
			return
		}
		// A buffer of few batches was taken for another engine's.
		r.publish(true)
		for range 3 {
			r.drain()
			r.check()
		}
		r.drain()
		return
	}
	r.publish(true) // without it nothing shows that the newest batch was lost
	r.drain()
}

func (r *rig) check() {
	r.note("check")
	r.obey(r.seq.check(), batchID{}, false)
}

func (r *rig) drain() {
	for range 10_000 {
		if !r.readLive() && !r.readReplay() {
			return
		}
	}
	r.fatalf("it never comes to rest")
}

// verify compares what was delivered since the last reset with what the engine published in its life.
func (r *rig) verify() {
	if r.seq.state != StateLive {
		r.fatalf("state is %v", r.seq.state)
	}
	switch r.seq.bound {
	case BoundExact:
		if !slices.Equal(r.delivered, r.published) {
			r.fatalf("exact, and yet delivered\n%v of\n%v", r.delivered, r.published)
		}
	case BoundAtLeast:
		if n := len(r.published) - len(r.delivered); n < 0 || !slices.Equal(r.delivered, r.published[n:]) {
			r.fatalf("at_least, and delivered\n%v is no end of\n%v", r.delivered, r.published)
		}
	case BoundUnknown:
		// What came before may be missing, never what came last.
		if n := len(r.published); n > 0 && (len(r.delivered) == 0 || r.delivered[len(r.delivered)-1] != r.published[n-1]) {
			r.fatalf("unknown, and delivered\n%v, whose last is not that of\n%v", r.delivered, r.published)
		}
		if r.seq.replayable && !r.seq.keep {
			r.fatalf("unknown, though replays are answered")
		}
	}
	if len(r.held) > 0 || r.seq.givenUp || r.seq.holding {
		r.fatalf("at rest with %d messages held, given up: %v, holding: %v", len(r.held), r.seq.givenUp, r.seq.holding)
	}
}

// play runs a script, one operation a byte, and checks where it ends.
func play(t testing.TB, script []byte, m mode) *rig {
	r := m.rig(t)
	for _, op := range script {
		switch arg := int(op >> 4); op % 16 {
		case 0, 1, 2:
			r.publish(true)
		case 3:
			r.publish(false)
		case 4:
			switch {
			case arg < 11:
				r.burn()
			case arg < 13:
				r.cut()
			default:
				r.overflow()
			}
		case 5, 6, 7:
			r.readLive()
		case 8, 9, 10:
			r.readReplay()
		case 11:
			r.disconnect()
		case 12:
			r.connect()
		case 13:
			switch { // rarer than the rest, or no life would last
			case arg < 3:
				r.restart()
			case arg < 6:
				r.newProcess()
			}
		case 14:
			if arg < 12 {
				r.trim(arg % 4)
			} else {
				r.check()
			}
		case 15:
			if arg < 8 {
				r.lossy = true
			} else {
				r.failing = arg % 3
			}
		}
	}
	r.quiet()
	return r
}

func TestSequencerAgreesWithANaiveEngine(t *testing.T) {
	t.Parallel()
	for m := range modes {
		for seed := range uint64(700) {
			rnd := rand.New(rand.NewPCG(seed, 1))
			script := make([]byte, 5+rnd.IntN(120))
			for i := range script {
				script[i] = byte(rnd.Uint32())
			}
			play(t, script, m).verify()
		}
	}
}

func FuzzSequencer(f *testing.F) {
	f.Add([]byte{12, 0, 5, 8, 8, 3, 0, 5, 8, 8, 8}, uint8(withReplay))
	f.Add([]byte{12, 0, 0, 5, 13, 12, 0, 5}, uint8(0))
	f.Add([]byte{12, 0, 5, 8, 8, 0xf4, 0, 5, 0xc4, 8}, uint8(withReplay|withKeep|fromOne))
	f.Fuzz(func(t *testing.T, script []byte, m uint8) {
		if len(script) > 400 {
			return
		}
		play(t, script, mode(m)%modes).verify()
	})
}

func TestSequencer(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name       string
		replayable bool
		run        func(r *rig)
		delivered  []uint64 // numbers since the last reset
		resets     []Reason
		bound      Bound
		reason     Reason
		givenUp    bool
	}{
		{
			name: "what was published before the start comes first, and nothing twice", replayable: true,
			run: func(r *rig) {
				r.publish(true)
				r.publish(true)
				r.connect()
				r.publish(true)
				r.drain()
			},
			delivered: []uint64{0, 1, 2}, resets: []Reason{ReasonStart}, bound: BoundExact,
		},
		{
			name: "an engine that has said nothing is known exactly", replayable: true,
			run:    func(r *rig) { r.connect(); r.drain() },
			resets: []Reason{ReasonStart}, bound: BoundExact,
		},
		{
			name: "a gap is filled by a replay", replayable: true,
			run: func(r *rig) {
				r.connect()
				r.drain()
				r.publish(true)
				r.publish(false)
				r.publish(false)
				r.publish(true)
				r.drain()
			},
			delivered: []uint64{0, 1, 2, 3}, resets: []Reason{ReasonStart}, bound: BoundExact,
		},
		{
			name: "burned numbers in a row are settled", replayable: true,
			run: func(r *rig) {
				r.connect()
				r.publish(true)
				r.burn()
				r.burn()
				r.publish(true)
				r.drain()
			},
			delivered: []uint64{0, 3}, resets: []Reason{ReasonStart}, bound: BoundExact,
		},
		{
			name: "a restart that overtook the old number is noticed by the bytes", replayable: true,
			run: func(r *rig) {
				r.connect()
				r.publish(true)
				r.publish(true)
				r.drain()
				r.restart()
				for range 5 {
					r.publish(true)
				}
				r.connect()
				r.drain()
			},
			delivered: []uint64{0, 1, 2, 3, 4}, resets: []Reason{ReasonStart, ReasonRestart}, bound: BoundExact,
		},
		{
			name: "a restarted engine that has said nothing yet holds nothing", replayable: true,
			run: func(r *rig) {
				r.connect()
				r.publish(true)
				r.drain()
				r.restart()
				r.connect()
				r.drain()
			},
			resets: []Reason{ReasonStart, ReasonRestart}, bound: BoundExact,
		},
		{
			name: "an engine that forgot the last delivered batch may be another one", replayable: true,
			run: func(r *rig) {
				r.connect()
				r.publish(true)
				r.drain()
				r.disconnect()
				r.publish(true)
				r.publish(true)
				r.trim(2)
				r.connect()
				r.drain()
			},
			delivered: []uint64{2}, resets: []Reason{ReasonStart, ReasonHistoryLost},
			bound: BoundAtLeast, reason: ReasonHistoryLost,
		},
		{
			name: "a late start is at least what it saw", replayable: true,
			run: func(r *rig) {
				r.publish(true)
				r.publish(true)
				r.trim(1)
				r.connect()
				r.drain()
			},
			delivered: []uint64{1}, resets: []Reason{ReasonStart}, bound: BoundAtLeast, reason: ReasonLateStart,
		},
		{
			name: "replays that fail three times are given up for this connection", replayable: true,
			run: func(r *rig) {
				r.connect()
				r.publish(true)
				r.drain()
				r.disconnect()
				r.publish(true)
				r.failing = 3
				r.connect()
				r.publish(true)
				r.drain()
			},
			delivered: []uint64{0, 2}, resets: []Reason{ReasonStart}, bound: BoundUnknown, reason: ReasonReconnect,
			givenUp: true,
		},
		{
			name: "without a replay endpoint the first number tells what was seen",
			run: func(r *rig) {
				r.connect()
				r.publish(true)
				r.publish(true)
				r.drain()
			},
			delivered: []uint64{0, 1}, resets: []Reason{ReasonStart}, bound: BoundExact,
		},
		{
			name: "without a replay endpoint a gap is history lost",
			run: func(r *rig) {
				r.connect()
				r.publish(true)
				r.publish(false)
				r.publish(true)
				r.drain()
			},
			delivered: []uint64{2}, resets: []Reason{ReasonStart, ReasonHistoryLost},
			bound: BoundAtLeast, reason: ReasonHistoryLost,
		},
		{
			name: "by policy a gap without a replay endpoint makes the bound unknown instead",
			run: func(r *rig) {
				r.seq.keep = true
				r.connect()
				r.publish(true)
				r.publish(false)
				r.publish(true)
				r.drain()
			},
			delivered: []uint64{0, 2}, resets: []Reason{ReasonStart}, bound: BoundUnknown, reason: ReasonHistoryLost,
		},
		{
			name: "by policy history that the engine forgot makes the bound unknown, and it stays so", replayable: true,
			run: func(r *rig) {
				r.seq.keep = true
				r.connect()
				r.publish(true)
				r.drain()
				r.publish(false)
				r.publish(false)
				r.trim(2)
				r.publish(true)
				r.drain()
				r.disconnect()
				r.connect()
				r.drain()
			},
			delivered: []uint64{0, 3}, resets: []Reason{ReasonStart}, bound: BoundUnknown, reason: ReasonHistoryLost,
		},
		{
			name: "by policy a restart is a reset all the same", replayable: true,
			run: func(r *rig) {
				r.seq.keep = true
				r.connect()
				r.publish(true)
				r.drain()
				r.restart()
				r.publish(true)
				r.connect()
				r.drain()
			},
			delivered: []uint64{0}, resets: []Reason{ReasonStart, ReasonRestart}, bound: BoundExact,
		},
		{
			name: "an engine that counts from 1 is known exactly once a replay still begins with 1", replayable: true,
			run: func(r *rig) {
				r.first, r.next = 1, 1
				r.publish(true)
				r.connect()
				r.drain()
				if r.check(); r.seq.bound != BoundAtLeast {
					r.fatalf("a number 0 may have been there, and the bound is %v", r.seq.bound)
				}
				r.drain()
				r.publish(true)
				r.drain()
				r.check()
				r.drain()
			},
			delivered: []uint64{1, 2}, resets: []Reason{ReasonStart}, bound: BoundExact,
		},
		{
			name: "a buffer that rolled over number 0 does not look like an engine that counts from 1", replayable: true,
			run: func(r *rig) {
				r.publish(true)
				r.publish(true)
				r.trim(1)
				r.connect()
				r.drain()
				r.publish(true)
				r.drain()
				r.check()
				r.drain()
			},
			delivered: []uint64{1, 2}, resets: []Reason{ReasonStart}, bound: BoundAtLeast, reason: ReasonLateStart,
		},
		{
			name: "replays that work again bring what was in doubt", replayable: true,
			run: func(r *rig) {
				r.connect()
				r.publish(true)
				r.drain()
				r.publish(false)
				r.failing = 4
				r.publish(true)
				r.drain()
				if r.seq.bound != BoundAtLeast || !r.seq.givenUp {
					r.fatalf("bound %v, given up: %v", r.seq.bound, r.seq.givenUp)
				}
				r.check() // the fourth failure
				r.drain()
				r.check()
				r.drain()
			},
			delivered: []uint64{0, 1, 2}, resets: []Reason{ReasonStart, ReasonHistoryLost, ReasonResync}, bound: BoundExact,
		},
		{
			name: "a replay ends where it meets what is held", replayable: true,
			run: func(r *rig) {
				for range 3 {
					r.publish(true)
				}
				r.connect()
				r.publish(true)
				r.readLive()
				asked := 0
				for r.asked {
					if r.answer == nil {
						asked++
					}
					r.readReplay()
				}
				if asked != 1 {
					r.fatalf("%d replays, want 1", asked)
				}
			},
			delivered: []uint64{0, 1, 2, 3}, resets: []Reason{ReasonStart}, bound: BoundExact,
		},
		{
			name: "what the engine forgot is not missing if it came live meanwhile", replayable: true,
			run: func(r *rig) {
				r.connect()
				r.publish(true)
				r.drain()
				r.check()
				r.publish(true)
				r.publish(true)
				r.trim(2) // the buffer begins with 2, and what it has forgotten is on its way
				r.readReplay()
				for r.readLive() {
				}
				r.drain()
			},
			delivered: []uint64{0, 1, 2}, resets: []Reason{ReasonStart}, bound: BoundExact,
		},
		{
			name: "the caller's own reset starts afresh", replayable: true,
			run: func(r *rig) {
				r.connect()
				r.publish(true)
				r.drain()
				r.cut()
				r.publish(true)
				r.connect()
				r.drain()
			},
			delivered: []uint64{0, 1}, resets: []Reason{ReasonStart, ReasonCaller}, bound: BoundExact,
		},
		{
			name: "held messages that found no room are replayed", replayable: true,
			run: func(r *rig) {
				r.publish(true)
				r.connect()
				r.readReplay()
				r.publish(true)
				r.publish(true)
				r.readLive()
				r.overflow()
				r.drain()
			},
			delivered: []uint64{0, 1, 2}, resets: []Reason{ReasonStart}, bound: BoundExact,
		},
		{
			name: "without a replay endpoint a fitting number after a reconnect proves nothing",
			run: func(r *rig) {
				r.connect()
				r.publish(true)
				r.drain()
				r.disconnect()
				r.connect()
				r.publish(true)
				r.drain()
			},
			delivered: []uint64{0, 1}, resets: []Reason{ReasonStart}, bound: BoundUnknown, reason: ReasonReconnect,
		},
		{
			name: "without a replay endpoint a lower number after a reconnect is a restart",
			run: func(r *rig) {
				r.connect()
				r.publish(true)
				r.publish(true)
				r.drain()
				r.restart()
				r.connect()
				r.publish(true)
				r.drain()
			},
			delivered: []uint64{0}, resets: []Reason{ReasonStart, ReasonRestart}, bound: BoundExact,
		},
		{
			name: "a number that goes back on one connection is a restart",
			run: func(r *rig) {
				r.connect()
				r.publish(true)
				r.publish(true)
				r.drain()
				r.life, r.published, r.kept, r.next = 1, nil, nil, 0 // behind a proxy that kept the connection
				r.publish(true)
				r.drain()
			},
			delivered: []uint64{0}, resets: []Reason{ReasonStart, ReasonRestart}, bound: BoundExact,
		},
		{
			name: "numbers before the wanted one are left out", replayable: true,
			run: func(r *rig) {
				r.seq.want = 2
				r.publish(true)
				r.connect()
				r.publish(true)
				r.publish(true)
				r.publish(true)
				r.drain()
			},
			delivered: []uint64{2, 3}, resets: []Reason{ReasonStart}, bound: BoundAtLeast, reason: ReasonLateStart,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, test.replayable)
			test.run(r)
			var got []uint64
			for _, b := range r.delivered {
				got = append(got, b.seq)
			}
			if !slices.Equal(got, test.delivered) {
				r.fatalf("delivered %v, want %v", got, test.delivered)
			}
			if !slices.Equal(r.resets, test.resets) {
				r.fatalf("resets %v, want %v", r.resets, test.resets)
			}
			if r.seq.bound != test.bound || r.seq.reason != test.reason {
				r.fatalf("bound %v (%s), want %v (%s)", r.seq.bound, r.seq.reason, test.bound, test.reason)
			}
			if r.seq.state != StateLive || r.seq.givenUp != test.givenUp {
				r.fatalf("state %v, given up: %v", r.seq.state, r.seq.givenUp)
			}
		})
	}
}

func TestSequencerGivesUpOnWhatNoReplayBrings(t *testing.T) {
	t.Parallel()
	// The engine's replay answers, but its newest batches are never in it.
	r := newRig(t, true)
	r.connect()
	r.publish(true)
	r.drain()
	r.next = 5
	b := batchID{0, 5}
	r.published = append(r.published, b)
	r.wire = append(r.wire, b)
	r.drain()
	if want := []Reason{ReasonStart, ReasonHistoryLost}; !slices.Equal(r.resets, want) {
		r.fatalf("resets %v, want %v", r.resets, want)
	}
	r.verify()
	if r.seq.bound != BoundAtLeast || r.seq.missedTo != 0 {
		r.fatalf("bound %v, missed up to %d", r.seq.bound, r.seq.missedTo)
	}
}

func TestSequencerRefusesTheEndMarkersNumber(t *testing.T) {
	t.Parallel()
	r := newRig(t, true)
	r.connect()
	for _, d := range []decision{r.seq.replayed(endMarker, unproven), r.seq.live(endMarker, unproven)} {
		if !d.invalid || d.verdict != drop {
			t.Errorf("decision %+v, want an invalid message dropped", d)
		}
	}
}

func TestSequencerRefusesAReplayThatRepeatsItself(t *testing.T) {
	t.Parallel()
	r := newRig(t, true)
	r.connect()
	for seq := range uint64(2) {
		if d := r.seq.replayed(seq, unproven); d.verdict != deliver || !d.useful {
			t.Fatalf("number %d: %+v", seq, d)
		}
		r.seq.delivered(seq, true)
	}
	for _, seq := range []uint64{0, 1} {
		if d := r.seq.replayed(seq, same); !d.invalid || d.verdict != drop || d.useful {
			t.Errorf("number %d again: %+v, want it refused", seq, d)
		}
	}
}

func TestSequencerAtTheLargestNumbers(t *testing.T) {
	t.Parallel()
	const last = endMarker - 1 // the largest that a batch can have
	r := newRig(t, true)
	r.next = last - 3
	r.published = nil
	r.publish(true)
	r.connect()
	r.drain()
	r.publish(true)
	r.publish(false)
	r.publish(true)
	r.drain()
	if r.seq.last != last || len(r.delivered) != 4 || r.seq.bound != BoundAtLeast {
		r.fatalf("last %d, delivered %v, bound %v", r.seq.last, r.delivered, r.seq.bound)
	}
	r.check()
	r.drain()
	if d := r.seq.live(endMarker, unproven); !d.invalid || r.seq.last != last {
		r.fatalf("the end marker's number: %+v", d)
	}

	// A jump over all numbers is a hole that nothing fills; the numbers that follow show that it was nonsense.
	r = newRig(t, true)
	r.connect()
	r.publish(true)
	r.drain()
	r.wire = append(r.wire, batchID{9, last})
	r.drain()
	if want := []Reason{ReasonStart, ReasonHistoryLost}; !slices.Equal(r.resets, want) || r.seq.last != last {
		r.fatalf("resets %v, last %d", r.resets, r.seq.last)
	}
	r.publish(true)
	r.drain()
	r.verify()
	if r.seq.bound != BoundExact || r.seq.last != 1 {
		r.fatalf("bound %v, last %d", r.seq.bound, r.seq.last)
	}
}

func TestSequencerForgetsWhatAnUnreadableBatchMayHaveRemoved(t *testing.T) {
	t.Parallel()
	r := newRig(t, true)
	r.connect()
	r.publish(true)
	r.drain()
	if d := r.seq.unreadable(false); d.reset != "" || r.seq.bound != BoundAtLeast || r.seq.reason != ReasonUnreadable {
		t.Errorf("a skipped store: %+v, bound %v (%s)", d, r.seq.bound, r.seq.reason)
	}
	if d := r.seq.unreadable(true); d.reset != ReasonUnreadable || r.seq.bound != BoundAtLeast {
		t.Errorf("a skipped removal: %+v, bound %v", d, r.seq.bound)
	}
	r.publish(true)
	r.drain()
	if r.seq.last != 1 {
		t.Errorf("last %d, want 1: the numbers go on", r.seq.last)
	}
	r.seq.cleared()
	if r.seq.bound != BoundExact || r.seq.reason != "" {
		t.Errorf("after a clear: bound %v (%s)", r.seq.bound, r.seq.reason)
	}
}
