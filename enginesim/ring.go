// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package enginesim

// message is a published batch: its number and its bytes, neither ever changed afterwards.
type message struct {
	seq     uint64
	payload []byte
}

// ring keeps the last messages for replay, in the order of publishing (their numbers need not rise: custom messages
// choose their own).
type ring struct {
	messages []message // grows up to limit, then the oldest is overwritten
	limit    int
	oldest   int // index, once messages has reached the limit
}

func (r *ring) add(m message) {
	if len(r.messages) < r.limit {
		r.messages = append(r.messages, m)
		return
	}
	if r.limit > 0 {
		r.messages[r.oldest] = m
		r.oldest = (r.oldest + 1) % r.limit
	}
}

// from returns all messages with a number of start or more, oldest first.
func (r *ring) from(start uint64) []message {
	var found []message
	for i := range r.messages {
		if m := r.messages[(r.oldest+i)%len(r.messages)]; m.seq >= start {
			found = append(found, m)
		}
	}
	return found
}

// keep forgets all but the newest n messages, of which there is at least 1, and from then on has room for no more: a
// buffer that forgot and then grew would be none that an engine has.
func (r *ring) keep(n int) {
	if n >= len(r.messages) {
		return
	}
	newest := make([]message, 0, n)
	for i := len(r.messages) - n; i < len(r.messages); i++ {
		newest = append(newest, r.messages[(r.oldest+i)%len(r.messages)])
	}
	r.messages, r.oldest, r.limit = newest, 0, n
}
