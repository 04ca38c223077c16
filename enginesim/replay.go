// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package enginesim

import (
	"encoding/binary"
	"time"
)

// answer serves replay requests, one after the other.
func (e *Engine) answer(p *process) error {
	for {
		id, frames, err := p.router.Recv(p.ctx)
		if err != nil {
			return err
		}
		// vLLM answers requests of three frames, the identity included, and ignores all others.
		if len(frames) != 2 || len(frames[0]) != 0 || len(frames[1]) != 8 {
			continue
		}
		e.replay(p, id, binary.BigEndian.Uint64(frames[1]))
	}
}

// plan is what goes wrong with one replay.
type plan struct {
	mute     bool
	nonsense int // which one, from 1 on; 0: none

	dropFrom, dropTo int // messages that are lost: those from dropFrom up to below dropTo
	noEnd            bool
	pause            time.Duration // before each message but the first
	again            time.Duration // endless: between two messages, once all have been sent; 0: it ends
}

// take uses up what is to go wrong with a replay of n messages.
func (w *pending) take(n int) plan {
	next := func(list *[]int) int {
		first := (*list)[0]
		*list = (*list)[1:]
		return first
	}
	var p plan
	switch {
	case w.mute > 0:
		w.mute--
		p.mute = true
		return p
	case w.nonsense > 0:
		w.nonsense--
		w.nonsenseTurn++
		p.nonsense = w.nonsenseTurn
		return p
	case len(w.endless) > 0 && n > 0:
		p.again = w.endless[0]
		w.endless = w.endless[1:]
		return p
	}
	switch {
	case len(w.cutReplay) > 0:
		p.dropFrom, p.dropTo, p.noEnd = n-min(n, next(&w.cutReplay)), n, true
	case len(w.dropReplay) > 0 && n >= 4:
		lost := min(next(&w.dropReplay), n-3)
		p.dropFrom = max(2, (n-lost)/2)
		p.dropTo = p.dropFrom + lost
	}
	if !p.noEnd && w.loseEnd > 0 {
		w.loseEnd--
		p.noEnd = true
	}
	if len(w.slow) > 0 && n > 0 {
		p.pause = w.slow[0]
		w.slow = w.slow[1:]
	}
	return p
}

// reply is the answer to one request, on its way.
type reply struct {
	e       *Engine
	p       *process
	id      string
	healed  <-chan struct{}
	dropped uint64
}

// replay sends what is held from start on, and the end marker. Nothing published meanwhile is part of it: in vLLM one
// thread does both.
func (e *Engine) replay(p *process, id string, start uint64) {
	e.mu.Lock()
	if e.process != p {
		e.mu.Unlock()
		return // dead: what is held is its successor's
	}
	messages := e.history.from(start)
	plan := e.pending.take(len(messages))
	r := reply{e: e, p: p, id: id, healed: e.healed}
	e.mu.Unlock()

	switch {
	case plan.mute:
		return
	case plan.nonsense > 0:
		r.nonsense(plan.nonsense)
	default:
		r.all(messages, plan)
	}
	e.mu.Lock()
	e.replays++
	e.dropped += r.dropped
	e.mu.Unlock()
}

func (r *reply) all(messages []message, plan plan) {
	for i, m := range messages {
		if i > 0 && !r.pause(plan.pause) {
			return
		}
		if i >= plan.dropFrom && i < plan.dropTo {
			r.dropped++
			continue
		}
		r.send(m)
	}
	switch {
	case plan.again > 0:
		endless := *r // what it drops is not counted: nobody would miss it
		r.p.tasks.Go(func() { endless.again(messages, plan.again) })
	case plan.noEnd:
		r.dropped++
	case len(messages) == 0 || r.pause(plan.pause):
		r.end()
	}
}

// again sends the same messages over and over. A peer that takes none of them for a while ends it.
func (r *reply) again(messages []message, interval time.Duration) {
	for i := 0; ; i++ {
		if !r.pause(interval) {
			return
		}
		select {
		case <-r.healed:
			r.end()
			return
		default:
		}
		if !r.send(messages[i%len(messages)]) {
			return
		}
	}
}

// pause waits, unless faults are healed, and returns false if the process died.
func (r *reply) pause(d time.Duration) bool {
	if d > 0 {
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-r.healed:
		case <-r.p.ctx.Done():
		}
	}
	return r.p.ctx.Err() == nil
}

// send sends one message, and reports whether it has reached the peer's queue.
func (r *reply) send(m message) bool {
	return r.put([]byte(r.e.config.Topic), binary.BigEndian.AppendUint64(nil, m.seq), m.payload)
}

// endMarker is the number -1, which ends a replay.
var endMarker = []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

func (r *reply) end() { r.put(nil, endMarker, nil) }

func (r *reply) put(topic, number, payload []byte) bool {
	frames := [][]byte{nil, topic, number, payload}
	if r.e.framing == FramingNoTopic {
		frames = [][]byte{nil, number, payload}
	}
	sent := r.p.router.Send(r.id, frames...)
	if !sent {
		r.dropped++
	}
	return sent
}

// nonsense sends one message that is no part of a replay.
func (r *reply) nonsense(which int) {
	switch which % 3 {
	case 1:
		r.p.router.Send(r.id, []byte("error: no such method"))
	case 2:
		r.put([]byte(r.e.config.Topic), []byte("1234567"), []byte{0x93})
	case 0:
		r.p.router.Send(r.id, []byte{0, 0xc1}, []byte("\xff\xfe garbage"), nil, []byte{0xc1})
	}
}
