// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

// Package enginesim is an LLM inference engine without the model: it schedules requests over a paged KV cache with
// prefix reuse as vLLM does, publishes the cache's events over ZeroMQ in the form of any vLLM release, and answers
// replay requests. Whatever listens to engines can be tested against it, and its Truth says what the listener should
// have found out.
//
// A test drives an Engine step by step: Submit a request, Step, compare. A demonstration lets it Run, on requests that
// a Traffic makes up. Recorded batches are published with Play.
//
// An engine also misbehaves as real ones do, with their hosts and networks: Inject a Fault, or let a Script inject many
// (Config.Faults, RandomScript). Processes die and come back with numbers that begin anew, networks part, replays lose
// messages, numbers are burned. The truth stays known: Truth is that of the present Life, and Heal ends what is wrong,
// so that a listener can then be held to it. A fault is a matter of the engine's own state and of its end of each
// connection, so all of them work over real sockets and over a network in memory (Config.Listen and Config.Dial), there
// also in a bubble of testing/synctest. One seed gives one script, one order of events and one truth; which queued
// messages a kill still lets out depends on the moment, as it does in life.
package enginesim

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net"
	"sync"
	"time"

	"github.com/kvtap/kvtap/event"
)

// Errors of an engine.
var (
	// ErrClosed says that the engine was closed.
	ErrClosed = errors.New("enginesim: engine is closed")

	// ErrNotStarted says that the engine has no sockets yet.
	ErrNotStarted = errors.New("enginesim: engine is not started")

	// ErrQueueFull says that too many requests wait already.
	ErrQueueFull = errors.New("enginesim: queue is full")

	// ErrDown says that the engine's process was killed (FaultKill) and is not started again yet.
	ErrDown = errors.New("enginesim: engine is down")
)

// Framing says how replayed batches are framed.
type Framing uint8

const (
	// FramingOfForm is what the vLLM release of the Form does: a topic frame from 0.26 on.
	FramingOfForm Framing = iota

	// FramingTopic has a topic frame: ["", topic, seq, payload], and the end ["", "", ff x 8, ""].
	FramingTopic

	// FramingNoTopic has none: ["", seq, payload], and the end ["", ff x 8, ""].
	FramingNoTopic
)

// Config sets up an Engine. Its zero value works.
type Config struct {
	// Model names the model, for logs only: engines do not say it in events. Empty means "sim".
	Model string

	// PubEndpoint is where batches are published. Empty means tcp://127.0.0.1:5557. Port 0 takes a free one.
	PubEndpoint string

	// Connect makes the publisher connect out to PubEndpoint, and again whenever the connection is lost, as vLLM does for
	// endpoints without a wildcard. Otherwise it binds.
	Connect bool

	// ReplayEndpoint is where replay requests are answered; it is always bound. Empty means tcp://127.0.0.1:5558.
	ReplayEndpoint string

	// NoReplay leaves the replay endpoint out.
	NoReplay bool

	// Topic is the first frame of every message. Empty is vLLM's default.
	Topic string

	// Rank is the data-parallel rank in the batches; a negative one is left out. Endpoints are used as they are given: no
	// rank is added to their ports.
	Rank int

	// Form is the form of batches and events. The zero value means that of vLLM 0.32.
	Form event.Form

	// Framing is that of replayed messages. Zero follows Form.
	Framing Framing

	// BufferSteps is how many of the last batches can be replayed. Zero means 10000, a negative number none.
	BufferSteps int

	// HWM is how many messages the publisher holds for a slow subscriber before it drops further ones. Zero means 100000.
	HWM int

	// ReplayHWM is the same for a peer that asked for a replay. Zero means 1000, as libzmq has it, which vLLM does not
	// change: longer replays lose messages. A negative number means no limit.
	ReplayHWM int

	// FirstSeq is the number of the first batch: 0 in vLLM, 1 in llm-d-inference-sim.
	FirstSeq uint64

	// Blocks is the number of physical blocks, BlockSize the tokens in each. Zero means 1024 and 16.
	Blocks, BlockSize int

	// HashSeed is the root of the block hashes. Engines with the same one name the same content by the same hash.
	HashSeed uint64

	// GroupRemovals puts the blocks that one allocation evicts into one event instead of one each.
	GroupRemovals bool

	// Quiet makes no requests up: only those that are submitted run.
	Quiet bool

	// Traffic is the kind of requests that are made up, one moment of it per step.
	Traffic TrafficConfig

	// Seed is the seed of Traffic, if that has none.
	Seed uint64

	// RequestsPerSecond is the number of steps that Run makes per second, each with one arrival unless Quiet is set.
	// Zero means 10.
	RequestsPerSecond float64

	// TokensPerStep is how many tokens of its answer each running request computes per step. Zero means 8.
	TokensPerStep int

	// MaxRunning and MaxWaiting bound the requests that run and that wait. Zero means 64 and 1024.
	MaxRunning, MaxWaiting int

	// Faults are injected by Step, and so by Run: each just before the work of the step with its number, counted from 0
	// over the engine's whole time, whether the process runs or not.
	Faults Script

	// Listen and Dial replace the operating system's network. Nil means the real one. They are called again after a
	// restart or a partition, and must not call Inject or Heal.
	Listen func(ctx context.Context, network, address string) (net.Listener, error)
	Dial   func(ctx context.Context, network, address string) (net.Conn, error)

	// Now is the clock of the batches' timestamps. Nil means time.Now.
	Now func() time.Time

	// Logger is told of starts, ends and lost peers. Nil means none.
	Logger *slog.Logger
}

// Engine is a simulated engine. Its methods are safe for concurrent use.
type Engine struct {
	config  Config
	framing Framing
	log     *slog.Logger

	// mu makes scheduling and publishing one, so that the order of numbers is the order of events, and Truth fits the last
	// number at any moment.
	mu       sync.Mutex
	life     int
	schedule scheduler
	traffic  *Traffic // nil if quiet
	batch    event.Batch
	scratch  []byte
	history  ring
	next     uint64
	last     uint64 // number of the last batch of this life, if there was one
	numbered bool   // there was one
	stamp    int64  // the latest timestamp of any life, in microseconds
	floor    int64  // the earliest that this life may use
	batches  uint64 // published
	replays  uint64 // replay requests answered
	dropped  uint64 // messages of replays that did not reach the peer's queue
	started  bool
	closed   bool

	// What is wrong, and until when. There is no process while the engine is down or not started.
	down, stopped, partitioned bool
	restartAt                  time.Time // zero: not by itself
	restartN                   int
	stoppedUntil, cutUntil     time.Time
	pending                    pending
	healed                     chan struct{} // closed and replaced by Heal
	injected                   [FaultClear + 1]int
	script                     Script // what is left of it
	steps                      int

	process             *process
	changed             chan struct{} // closed and replaced with every process
	pubAddr, replayAddr string

	turn   chan struct{}   // has room for one: see lock
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	tasks  sync.WaitGroup // of faults that run out
}

// New returns an engine that has no sockets yet. Steps before Start only fill the replay buffer.
func New(config Config) (*Engine, error) {
	defaultTo(&config.Model, "sim")
	defaultTo(&config.PubEndpoint, "tcp://127.0.0.1:5557")
	defaultTo(&config.ReplayEndpoint, "tcp://127.0.0.1:5558")
	defaultTo(&config.BufferSteps, 10_000)
	defaultTo(&config.HWM, 100_000)
	defaultTo(&config.ReplayHWM, 1000)
	defaultTo(&config.Blocks, 1024)
	defaultTo(&config.BlockSize, 16)
	defaultTo(&config.Traffic.Seed, config.Seed)
	defaultTo(&config.RequestsPerSecond, 10)
	defaultTo(&config.TokensPerStep, 8)
	defaultTo(&config.MaxRunning, 64)
	defaultTo(&config.MaxWaiting, 1024)
	defaultTo(&config.Form, event.VLLM032)
	if config.Now == nil {
		config.Now = time.Now
	}
	if config.Logger == nil {
		config.Logger = slog.New(slog.DiscardHandler)
	}
	switch {
	case config.Blocks < 0 || config.Blocks > 1<<30:
		return nil, fmt.Errorf("enginesim: Blocks is %d, not between 1 and 2^30", config.Blocks)
	case config.BlockSize < 0 || config.BlockSize > 1<<30:
		return nil, fmt.Errorf("enginesim: BlockSize is %d, not between 1 and 2^30", config.BlockSize)
	case config.HWM < 0:
		return nil, fmt.Errorf("enginesim: HWM is negative: %d", config.HWM)
	case config.TokensPerStep < 0:
		return nil, fmt.Errorf("enginesim: TokensPerStep is negative: %d", config.TokensPerStep)
	case config.MaxRunning < 0 || config.MaxWaiting < 0:
		return nil, errors.New("enginesim: MaxRunning or MaxWaiting is negative")
	case !(config.RequestsPerSecond > 0 && config.RequestsPerSecond <= 1e6):
		return nil, fmt.Errorf("enginesim: RequestsPerSecond is %v, not above 0 and up to a million",
			config.RequestsPerSecond)
	case config.Framing > FramingNoTopic:
		return nil, fmt.Errorf("enginesim: unknown Framing %d", config.Framing)
	}
	script, err := config.Faults.sorted()
	if err != nil {
		return nil, err
	}
	e := &Engine{
		config:   config,
		framing:  config.Framing,
		log:      config.Logger.With("model", config.Model, "rank", config.Rank),
		schedule: newScheduler(&config),
		history:  ring{limit: max(config.BufferSteps, 0)},
		next:     config.FirstSeq,
		floor:    math.MinInt64,
		stamp:    math.MinInt64,
		script:   script,
		healed:   make(chan struct{}),
		changed:  make(chan struct{}),
		turn:     make(chan struct{}, 1),
	}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	if e.framing == FramingOfForm {
		e.framing = FramingTopic
		if config.Form < event.VLLM026 {
			e.framing = FramingNoTopic
		}
	}
	if !config.Quiet {
		e.traffic = NewTraffic(config.Traffic)
	}
	// An unusable Form shows here rather than at the first step.
	if _, err := e.batch.Append(nil, config.Form); err != nil {
		return nil, fmt.Errorf("enginesim: %w", err)
	}
	return e, nil
}

func newScheduler(config *Config) scheduler {
	return scheduler{
		pool: NewPool(PoolConfig{
			Blocks:        config.Blocks,
			BlockSize:     config.BlockSize,
			HashSeed:      config.HashSeed,
			GroupRemovals: config.GroupRemovals,
		}),
		maxRunning: config.MaxRunning,
		maxWaiting: config.MaxWaiting,
		quantum:    config.TokensPerStep,
	}
}

// Submit queues a request. The channel has room for the one Result that it gets when the request ends, so it need not
// be read. The request's slices must not change until then.
func (e *Engine) Submit(r Request) <-chan Result {
	finish := make(chan Result, 1)
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.closed:
		finish <- Result{Err: ErrClosed}
		return finish
	case e.down:
		finish <- Result{Err: ErrDown}
		return finish
	}
	e.schedule.submit(r, finish)
	return finish
}

// Step runs one scheduler step: requests arrive (unless Quiet is set), running ones compute some tokens, waiting ones
// start. It reports whether anything happened to the cache; if so, one batch was published. Faults that Config.Faults
// has for this step come first. Nothing else happens, which is no error, while the process is down or stopped.
func (e *Engine) Step() (published bool, err error) {
	if err := e.playScript(); err != nil {
		return false, err
	}
	now := e.config.Now()
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.closed:
		return false, ErrClosed
	case e.down || e.stopped:
		return false, nil
	}
	return e.publishEvents(now, e.advance())
}

// advance is one scheduler step with its arrivals. e.mu is held.
func (e *Engine) advance() []event.Event {
	if e.traffic != nil {
		for _, r := range e.traffic.Next() {
			e.schedule.submit(r, nil)
		}
	}
	return e.schedule.step()
}

// Reset drops the cache and publishes an AllBlocksCleared; running requests wait again. A real engine sends it with its
// next step, so an idle one late. While the engine is down nothing happens, which is no error.
func (e *Engine) Reset() error {
	now := e.config.Now()
	e.mu.Lock()
	defer e.mu.Unlock()
	switch {
	case e.closed:
		return ErrClosed
	case e.down:
		return nil
	}
	_, err := e.publishEvents(now, e.schedule.reset())
	return err
}

// Run makes RequestsPerSecond steps a second until ctx ends, which is no error, or Close is called. Steps that were
// missed by more than a second are not made up for.
func (e *Engine) Run(ctx context.Context) error {
	interval := period(e.config.RequestsPerSecond)
	timer := time.NewTimer(interval)
	defer timer.Stop()
	due := time.Now().Add(interval)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-e.ctx.Done():
			return ErrClosed
		case <-timer.C:
		}
		if _, err := e.Step(); err != nil {
			return err
		}
		due = due.Add(interval)
		if late := time.Since(due); late > time.Second {
			due = due.Add(late)
		}
		timer.Reset(time.Until(due))
	}
}

// period returns the time between two events at a rate per second, which is above 0. A century bounds it: a slower rate
// would not fit a Duration.
func period(rate float64) time.Duration {
	const century = 100 * 365 * 24 * time.Hour
	return time.Duration(min(float64(time.Second)/rate, float64(century)))
}

// Publish sends a payload of the caller's making, which is copied, under the next number. It changes nothing in the
// cache: Truth does not know of it. While the engine is down nothing happens, which is no error; while it is stopped
// the message waits in its queue.
func (e *Engine) Publish(payload []byte) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.publish(e.next, bytes.Clone(payload))
}

// PublishAt does the same under a number of the caller's choice; numbers go on from there.
func (e *Engine) PublishAt(seq uint64, payload []byte) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.publish(seq, bytes.Clone(payload))
}

// PublishBatch encodes a batch in the configured Form, just as it is, and sends it as Publish does.
func (e *Engine) PublishBatch(b *event.Batch) error {
	payload, err := b.Append(nil, e.config.Form)
	if err != nil {
		return fmt.Errorf("enginesim: %w", err)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.publish(e.next, payload)
}

// Truth returns the hashes that the cache holds, each with the number of its copies, and the number that the next batch
// will have: it is what all batches of this life below next add up to, as far as the engine made them itself. While the
// engine is down, that is still the life that ended.
func (e *Engine) Truth() (held map[event.Hash]int, next uint64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	held = maps.Collect(e.schedule.pool.Held())
	return held, e.next
}

// Match returns how many tokens of a prompt the engine would reuse if it were scheduled now.
func (e *Engine) Match(r Request) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.schedule.pool.Match(r) * e.schedule.pool.BlockSize()
}

// LastSeq returns the number of the last batch of this life; ok is false if there was none.
func (e *Engine) LastSeq() (seq uint64, ok bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.last, e.numbered
}

// Stats returns what the engine has done so far.
func (e *Engine) Stats() Stats {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := e.schedule.stats
	s.Running, s.Waiting = len(e.schedule.running), len(e.schedule.waiting)
	s.UsedBlocks, s.CachedBlocks = e.schedule.pool.Used(), e.schedule.pool.Cached()
	s.Batches, s.Replays, s.Dropped = e.batches, e.replays, e.dropped
	return s
}

// publishEvents publishes the events of one step, if there are any. e.mu is held.
func (e *Engine) publishEvents(now time.Time, events []event.Event) (published bool, err error) {
	if len(events) == 0 {
		return false, nil
	}
	e.batch.Time = e.timestamp(now)
	e.batch.Events = events
	if e.config.Rank >= 0 {
		e.batch.Rank = event.Some(int64(e.config.Rank))
	}
	e.batch.Trim(e.config.Form)
	e.scratch, err = e.batch.Append(e.scratch[:0], e.config.Form)
	e.batch.Events = nil
	if err != nil {
		// As in vLLM, a batch that cannot be encoded has used up its number.
		e.next++
		return false, fmt.Errorf("enginesim: %w", err)
	}
	payload := bytes.Clone(e.scratch)
	if e.process != nil && e.pending.unknownEvents > 0 {
		e.pending.unknownEvents--
		payload = withUnknownEvent(payload, e.config.Form)
	}
	return true, e.publish(e.next, payload)
}

// timestamp returns the time of a batch in seconds. Time goes on from one life to the next, be it by a microsecond, as
// it does for real processes: no two lives send the same bytes. e.mu is held.
func (e *Engine) timestamp(now time.Time) event.Opt[float64] {
	micros := max(now.UnixMicro(), e.floor)
	e.stamp = max(e.stamp, micros)
	return event.Some(float64(micros) / 1e6)
}

// publish is the one way out: it numbers a payload, which must never change again, keeps it for replay and sends it to
// the subscribers. e.mu is held.
func (e *Engine) publish(seq uint64, payload []byte) error {
	switch {
	case e.closed:
		return ErrClosed
	case e.down:
		return nil
	}
	e.last, e.next, e.numbered = seq, seq+1, true
	e.batches++
	e.history.add(message{seq, payload})
	if e.process == nil {
		return nil
	}
	number := binary.BigEndian.AppendUint64(nil, seq)
	switch {
	case e.pending.dropLive > 0:
		e.pending.dropLive--
	case e.pending.twoFrames > 0:
		e.pending.twoFrames--
		e.process.pub.Send(number, payload)
	default:
		e.process.pub.Send([]byte(e.config.Topic), number, payload)
	}
	return nil
}
