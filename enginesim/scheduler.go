// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package enginesim

import (
	"errors"
	"slices"

	"github.com/kvtap/kvtap/event"
)

// Result is what became of a submitted request.
type Result struct {
	// CachedTokens is how much of the prompt was reused when the request was first scheduled. vLLM reports it as
	// usage.prompt_tokens_details.cached_tokens.
	CachedTokens int

	// Err is ErrTooLong, ErrEmptyPrompt or ErrQueueFull for a request that was rejected, and ErrClosed for one that the
	// engine's end cut off.
	Err error
}

// Stats counts what an engine has done. The counters never go back, Reset included.
type Stats struct {
	Requests  uint64 // accepted into the queue
	Rejected  uint64 // too long, empty, or the queue was full
	Finished  uint64
	Preempted uint64 // times that a running request gave up its blocks to another

	PromptTokens uint64 // of requests, when first scheduled
	CachedTokens uint64 // of these, reused

	Running, Waiting int // requests, now
	UsedBlocks       int // blocks that running requests hold, now
	CachedBlocks     int // blocks that can be reused, copies counted, now

	Batches uint64 // published
	Replays uint64 // replay requests answered
	Dropped uint64 // replay messages that the high-water mark or a lost peer cost
}

// scheduler moves requests through a pool one step at a time, as vLLM's does: running requests first, and when there
// are no blocks left for one, the request that was started last gives up its own and waits again.
type scheduler struct {
	pool       *Pool
	maxRunning int
	maxWaiting int
	quantum    int // answer tokens per request and step

	waiting []*request
	running []*request
	stats   Stats // the counters of requests and tokens
}

type request struct {
	Request
	seq     *Sequence // nil while waiting
	done    int       // answer tokens computed
	started bool      // has been scheduled before
	result  Result
	finish  chan<- Result // nil if nobody asked
}

// left returns the number of answer tokens still to compute. The last one that a model samples is never computed.
func (r *request) left() int { return max(len(r.Answer)-1, 0) - r.done }

func (r *request) end(err error) {
	if r.finish != nil {
		r.result.Err = err
		r.finish <- r.result // has room for one
	}
}

func (s *scheduler) submit(r Request, finish chan<- Result) {
	q := &request{Request: r, finish: finish}
	var err error
	switch {
	case len(r.Prompt) == 0:
		err = ErrEmptyPrompt
	case s.pool.blocksFor(len(r.Prompt)+q.left()) > s.pool.Blocks():
		err = ErrTooLong
	case len(s.waiting) >= s.maxWaiting:
		err = ErrQueueFull
	}
	if err != nil {
		s.stats.Rejected++
		q.end(err)
		return
	}
	s.stats.Requests++
	s.waiting = append(s.waiting, q)
}

// step runs one scheduler step and returns what it did to the pool.
func (s *scheduler) step() []event.Event {
	preempted := s.decode()
	if !preempted {
		s.admit()
	}
	s.running = slices.DeleteFunc(s.running, func(r *request) bool {
		if r.left() > 0 {
			return false
		}
		s.pool.Release(r.seq)
		s.stats.Finished++
		r.end(nil)
		return true
	})
	return s.pool.Events()
}

// decode advances every running request and reports whether one had to give up its blocks.
func (s *scheduler) decode() (preempted bool) {
	for i := 0; i < len(s.running); i++ {
		r := s.running[i]
		n := min(s.quantum, r.left())
		for s.pool.Extend(r.seq, r.Answer[r.done:r.done+n]...) != nil {
			preempted = true
			last := len(s.running) - 1
			s.preempt(last)
			if last == i {
				return preempted
			}
		}
		r.done += n
	}
	return preempted
}

// preempt puts running request i, the last, back to the front of the queue.
func (s *scheduler) preempt(i int) {
	r := s.running[i]
	s.running = s.running[:i]
	s.pool.Release(r.seq)
	r.seq = nil
	s.waiting = slices.Insert(s.waiting, 0, r)
	s.stats.Preempted++
}

// admit starts waiting requests in order until one does not fit.
func (s *scheduler) admit() {
	n := 0
	for _, r := range s.waiting {
		if len(s.running) >= s.maxRunning {
			break
		}
		again := r.Request
		if r.done > 0 {
			// What was decoded before a preemption is computed anew, as part of the prompt.
			again.Prompt = slices.Concat(r.Prompt, r.Answer[:r.done])
			again.Answer = r.Answer[r.done:]
		}
		seq, err := s.pool.Admit(again)
		if errors.Is(err, ErrFull) {
			break
		}
		// No other error: submit has checked the request.
		n++
		r.seq = seq
		if !r.started {
			r.started = true
			r.result.CachedTokens = seq.Cached()
			s.stats.PromptTokens += uint64(len(r.Prompt))
			s.stats.CachedTokens += uint64(seq.Cached())
		}
		s.running = append(s.running, r)
	}
	s.waiting = slices.Delete(s.waiting, 0, n)
}

// reset sends all running requests back to the queue and drops the cache.
func (s *scheduler) reset() []event.Event {
	for i := len(s.running) - 1; i >= 0; i-- {
		s.preempt(i)
	}
	if err := s.pool.Reset(); err != nil {
		panic(err) // no request holds a block
	}
	return s.pool.Events()
}

// abort ends every request.
func (s *scheduler) abort(err error) {
	for _, r := range slices.Concat(s.running, s.waiting) {
		r.end(err)
	}
	s.running, s.waiting = nil, nil
}
