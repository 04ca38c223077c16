// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/kvtap/kvtap/event"
	"github.com/kvtap/kvtap/internal/zmtp"
)

// ZMQClient follows one engine. Make it with NewZMQClient; all methods may be called from any goroutine.
//
// One goroutine reads the subscription, and while a replay runs a second one reads the replay. Both hand messages to
// the sequencer under mu, so that the handler sees one order.
type ZMQClient struct {
	config  ZMQClientConfig
	log     *slog.Logger
	handler EventHandler
	// The richer interfaces of handler; nil where it does not have them.
	batches  BatchHandler
	resyncs  ResyncHandler
	statuses StatusHandler
	payloads PayloadHandler

	pub, replay string // endpoints; replay is "" if there is none

	// life guards the life cycle: Start, Stop.
	life     sync.Mutex
	started  bool
	cancel   context.CancelFunc
	done     chan struct{} // closed when the client's goroutines have ended
	stopOnce sync.Once
	stopErr  error

	stopped   atomic.Bool // no handler call may begin any more
	connected atomic.Bool
	lastSeq   atomic.Int64
	observed  atomic.Int64           // nanoseconds since the epoch, 0 if never
	inHandler atomic.Pointer[string] // the call that began last

	// mu is held for each message, handler calls included.
	mu    lock
	seq   sequencer
	hold  holdQueue
	batch event.Batch
	// lastCall is what inHandler points to, and lastObserved what observed holds.
	lastCall     string
	lastObserved time.Time
	// lastPayload is that of the last delivered message, lastOmitted what was left out of it.
	lastPayload []byte
	lastOmitted omission
	told        Status // the last status that tellStatus told, State, Bound and Reason only; at first none
	overlap     overlap
	warned      map[string]bool // what was warned of on this connection
	metrics     *ZMQClientMetrics
	// replays runs while a replay is wanted; replayAsked changes with every replay that is asked for, so that the one
	// that runs knows when it is no longer the one wanted. askedDigest is of the batch that its answer has to begin with.
	replays     bool
	replayAsked uint64
	askedDigest uint64
	limiter     ReplayLimiter
	// newestDigest is of the newest live message, if newestKnown.
	newestDigest uint64
	newestKnown  bool
	// conn is the present connection, nil if there is none. nudge wakes the goroutine that asks questions on it; paused
	// says that a handler kept the socket from being read.
	conn   *zmtp.Conn
	nudge  chan struct{}
	paused bool
	// crowded says that held messages were dropped during the last replay.
	crowded bool
	// failure is the last one that was logged, since there was a connection.
	failure string

	stats counters

	wasReset   atomic.Bool // the connection was closed by Reset
	resetMu    sync.Mutex
	resetAsked Reason // of a Reset that is under way
	tasks      sync.WaitGroup

	statusMu sync.Mutex
	status   Status
}

// NewZMQClient returns a client that is not yet started. It keeps a copy of config. If the handler also implements
// BatchHandler, ResyncHandler, StatusHandler or PayloadHandler, it gets those calls.
func NewZMQClient(config *ZMQClientConfig, handler EventHandler) *ZMQClient {
	c := &ZMQClient{handler: handler, done: make(chan struct{}), mu: newLock()}
	if config != nil {
		c.config = *config
	}
	c.batches, _ = handler.(BatchHandler)
	c.resyncs, _ = handler.(ResyncHandler)
	c.statuses, _ = handler.(StatusHandler)
	c.payloads, _ = handler.(PayloadHandler)
	c.lastSeq.Store(-1)
	c.log = c.config.Logger
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	c.log = c.log.With("pod", c.config.PodKey, "model", c.config.ModelName, "rank", c.config.Rank)
	c.hold.max, c.hold.budget = c.config.maxHold(), c.config.HoldBudget
	if c.hold.budget == nil {
		c.hold.budget = sharedHoldBudget
	}
	if c.limiter = c.config.ReplayLimiter; c.limiter == nil {
		c.limiter = sharedReplayLimiter
	}
	c.seq.keep = c.config.HistoryLost == PolicyKeep
	c.status = Status{State: StateConnecting, Bound: BoundAtLeast, Reason: ReasonStart}
	c.seq.bound, c.seq.reason = BoundAtLeast, ReasonStart
	return c
}

func orDefault[T int | time.Duration](v, def T) T {
	if v == 0 {
		return def
	}
	return v
}

// ErrStarted and ErrStopped say that Start came too late.
var (
	ErrStarted = errors.New("kvcache: the client was started before")
	ErrStopped = errors.New("kvcache: the client was stopped")
)

// Start begins to follow the engine, in the background, and returns without waiting for the network: an engine that is
// down is retried. The error says what is wrong with the configuration (ErrInvalidConfig), that a client for the same
// pod key and rank runs with the same Registerer (ErrDuplicateClient), or that this client cannot be started again.
func (c *ZMQClient) Start() error {
	c.life.Lock()
	defer c.life.Unlock()
	switch {
	case c.stopped.Load():
		return ErrStopped
	case c.started:
		return ErrStarted
	case c.handler == nil:
		return fmt.Errorf("%w: the handler is nil", ErrInvalidConfig)
	}
	if err := ValidateConfig(&c.config); err != nil {
		return err
	}
	// ValidateConfig has seen both.
	c.pub, _ = c.config.pubEndpoint()
	c.replay, _ = c.config.replayEndpoint()
	c.seq.replayable = c.replay != ""
	c.seq.want = c.config.FromSequence

	metrics, err := collectorsOf(c.config.Registerer, c.config.MetricsNamespace)
	if err != nil {
		return err
	}
	key := metricsKey{pod: c.config.PodKey, rank: c.config.Rank}
	if err := metrics.claim(key, c.config.NoEngineMetrics); err != nil {
		return err
	}
	var listener net.Listener
	if c.config.Listen {
		if listener, err = zmtp.Listen(context.Background(), c.pub, c.options()); err != nil {
			metrics.release(key)
			return fmt.Errorf("kvcache: cannot listen for the engine: %w", err)
		}
	}
	c.metrics = metrics.metrics(key, c.config.NoEngineMetrics)
	c.hold.metrics = c.metrics

	ctx, cancel := context.WithCancel(context.Background())
	c.started, c.cancel = true, cancel
	go func() {
		defer close(c.done)
		defer metrics.release(key)
		defer c.metrics.Delete()
		defer c.tasks.Wait()
		c.mu.Lock()
		c.tellStatus() // that it is connecting
		c.mu.Unlock()
		if listener != nil {
			c.runListening(ctx, listener)
		} else {
			c.runDialling(ctx)
		}
	}()
	return nil
}

// Run follows the engine until ctx ends or the client is stopped: Start, wait, Stop. It returns Start's or Stop's
// error.
func (c *ZMQClient) Run(ctx context.Context) error {
	if err := c.Start(); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
	case <-c.done: // stopped elsewhere
	}
	return c.Stop()
}

// StopError says that a handler call went on for longer than StopTimeout after Stop. The call goes on; none follows it.
// Until it returns, its pod key and rank stay taken (ErrDuplicateClient), for calls of two clients must not overlap.
type StopError struct {
	Pod     string
	Call    string // what runs: HandleEvent, HandleBatch, ...
	Waited  time.Duration
	Handler string // the handler's type
}

func (e *StopError) Error() string {
	return fmt.Sprintf("kvcache: %s: %s of %s was still running %v after Stop", e.Pod, e.Call, e.Handler, e.Waited)
}

// Stop ends the client: it closes its connections at once, and waits for a handler call that is running for at most
// StopTimeout, after which it returns a *StopError. No handler call begins after Stop has returned. Stopping again, or
// a client that was never started, is harmless and returns what the first Stop returned. A handler that stops its own
// client must do so from another goroutine, since Stop waits for the handler.
func (c *ZMQClient) Stop() error {
	c.stopOnce.Do(func() {
		c.life.Lock()
		c.stopped.Store(true)
		started := c.started
		c.life.Unlock()
		if !started {
			c.setStopped()
			return
		}
		c.cancel()
		timeout := orDefault(c.config.StopTimeout, DefaultStopTimeout)
		timer := time.NewTimer(timeout)
		defer timer.Stop()
		select {
		case <-c.done:
		case <-timer.C:
			e := &StopError{Pod: c.config.PodKey, Call: "the handler", Waited: timeout, Handler: fmt.Sprintf("%T", c.handler)}
			if call := c.inHandler.Load(); call != nil {
				e.Call = *call
			}
			c.stopErr = e
			c.metrics.Delete() // what still runs makes none anew
		}
		c.setStopped()
	})
	return c.stopErr
}

func (c *ZMQClient) setStopped() {
	c.connected.Store(false)
	c.statusMu.Lock()
	defer c.statusMu.Unlock()
	c.status.State = StateStopped
}

// Reset makes the client forget what it knows of the engine, as its handler is told by a Reset with the given reason,
// and connect anew and fetch everything that the engine still has. It is for callers who know what the stream does not
// say: that the engine's container was restarted, for instance. An empty reason means ReasonCaller; others become
// values of a metric's label, so there should be few.
//
// Reset returns at once, also within a handler; the call of HandleReset follows when the handler is done. A second
// Reset before that is the same one.
func (c *ZMQClient) Reset(reason Reason) {
	if reason == "" {
		reason = ReasonCaller
	}
	c.life.Lock()
	defer c.life.Unlock()
	c.resetMu.Lock()
	defer c.resetMu.Unlock()
	if !c.started || c.stopped.Load() || c.resetAsked != "" {
		return
	}
	c.resetAsked = reason
	c.tasks.Go(c.carryOutReset)
}

func (c *ZMQClient) carryOutReset() {
	c.mu.Lock()
	c.resetMu.Lock()
	reason := c.resetAsked
	c.resetAsked = ""
	c.resetMu.Unlock()
	conn := c.conn
	if conn != nil {
		c.wasReset.Store(true)
	}
	func() {
		defer c.mu.Unlock()
		c.replayAsked++ // what a replay still brings belongs to the past
		c.obey(context.Background(), nil, c.seq.cut(reason), &message{})
		c.tellStatus()
	}()
	if conn != nil {
		_ = conn.Close()
	}
}

// IsConnected reports whether the subscription is established.
func (c *ZMQClient) IsConnected() bool { return c.connected.Load() }

// GetLastSequence returns the number of the last batch handed on, or -1 if there was none. Numbers above the largest
// int64 wrap.
func (c *ZMQClient) GetLastSequence() int64 { return c.lastSeq.Load() }

// State returns what the client is doing and what its history is worth.
func (c *ZMQClient) State() Status {
	c.statusMu.Lock()
	defer c.statusMu.Unlock()
	s := c.status
	if at := c.observed.Load(); at != 0 {
		s.ObservedAt = time.Unix(0, at)
	}
	return s
}

func (c *ZMQClient) options() *zmtp.Options {
	return &zmtp.Options{
		MaxMessage:        c.config.maxMessage(),
		SkipTooLarge:      true,
		HeartbeatInterval: c.config.PingInterval,
		HeartbeatTimeout:  c.config.PingTimeout,
		Dial:              c.config.Dial,
		ListenFunc:        c.config.ListenFunc,
	}
}

// subscriber returns the options of a connection that events come by.
func (c *ZMQClient) subscriber() *zmtp.Options {
	o := c.options()
	o.Away = func(time.Duration) {
		// While a handler kept the socket from being read, the engine may have dropped its newest messages.
		c.mu.Lock()
		defer c.mu.Unlock()
		c.paused = true
		if c.nudge != nil {
			c.wake()
		}
	}
	return o
}

// runDialling connects to the engine, follows it, and connects again, until ctx ends.
func (c *ZMQClient) runDialling(ctx context.Context) {
	pace := newBackoff(orDefault(c.config.ReconnectDelay, DefaultReconnectInterval))
	for attempt := 0; ; attempt++ {
		if attempt > 0 {
			c.metrics.IncrementReconnectAttempts()
		}
		conn, err := zmtp.Dial(ctx, c.pub, zmtp.SUB, c.subscriber())
		kind := errorOfAttempt(attempt)
		if err == nil {
			kind = errorConnection
			connected := time.Now()
			err = c.follow(ctx, conn)
			if time.Since(connected) >= healthyAfter {
				pace.reset()
			}
		}
		if ctx.Err() != nil {
			return
		}
		var wait time.Duration
		if c.wasReset.Swap(false) {
			wait = newBackoff(pace.initial).next(false) // no failure, and yet a handler may ask for it again and again
		} else {
			wait = pace.next(errors.Is(err, syscall.ECONNREFUSED))
			c.fail(err, kind, wait)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// silentAfter is how long a connection may say nothing before another from the same host takes its place: longer than
// a PING and its answer take.
const silentAfter = 10 * time.Second

// runListening follows the engine that connects to l, until ctx ends. While its connection lives, others are refused:
// two engines that shared the client would push each other out for ever.
func (c *ZMQClient) runListening(ctx context.Context, l net.Listener) {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	defer func() { _ = l.Close() }()

	var mu sync.Mutex
	var current *zmtp.Conn           // the engine's connection; guarded by mu
	refused := make(map[string]bool) // hosts that were told of; guarded by mu
	turn := make(chan struct{}, 1)   // held by the goroutine that follows

	// admit makes conn the engine's connection, unless that of another engine, or a living one, is there.
	admit := func(conn *zmtp.Conn) bool {
		mu.Lock()
		defer mu.Unlock()
		if current != nil {
			host := hostOf(conn.RemoteAddr())
			connected := hostOf(current.RemoteAddr())
			if host != connected || time.Since(current.LastReceived()) < silentAfter {
				if !refused[host] && len(refused) < maxWarned {
					c.log.Warn("engine_refused", "host", host, "connected", connected,
						"hint", "one client follows one engine; give each engine an endpoint of its own")
					refused[host] = true
				}
				return false
			}
			_ = current.Close()
		}
		current = conn
		clear(refused)
		return true
	}
	serve := func(nc net.Conn) {
		conn, err := zmtp.NewConn(ctx, nc, zmtp.SUB, c.subscriber())
		if err != nil {
			// Ports are probed and scanned; that says nothing of the engine.
			c.metrics.IncrementErrorCount(errorConnection)
			c.log.Debug("handshake_failed", "remote", addrString(nc.RemoteAddr()), "error", err)
			return
		}
		if !admit(conn) {
			_ = conn.Close()
			return
		}
		select {
		case turn <- struct{}{}: // the one that was replaced is on its way out
			defer func() { <-turn }()
		case <-ctx.Done():
			_ = conn.Close()
			return
		}
		err = c.follow(ctx, conn)
		mu.Lock()
		replaced := current != conn
		if !replaced {
			current = nil
		}
		mu.Unlock()
		switch {
		case ctx.Err() != nil:
		case c.wasReset.Swap(false):
		case replaced:
			c.log.Info("engine_replaced", "host", hostOf(conn.RemoteAddr()))
		default:
			c.fail(err, errorConnection, 0)
		}
	}
	// Connections that have not yet shown that they speak ZMTP are few at a time, whoever knocks.
	slots := make(chan struct{}, maxHandshakes)
	pace := newBackoff(orDefault(c.config.ReconnectDelay, DefaultReconnectInterval))
	for {
		nc, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				_ = nc.Close()
			}
			return
		case err != nil:
			// A process that is short of descriptors has more of them later.
			wait := pace.next(true)
			c.fail(fmt.Errorf("kvcache: cannot accept connections: %w", err), errorConnection, wait)
			select {
			case <-ctx.Done():
			case <-time.After(wait):
			}
			continue
		}
		pace.reset()
		select {
		case slots <- struct{}{}:
			wg.Go(func() {
				defer func() { <-slots }()
				serve(nc)
			})
		default:
			_ = nc.Close()
		}
	}
}

// maxHandshakes is how many connections a listening client looks at at once.
const maxHandshakes = 8

func hostOf(addr net.Addr) string {
	if tcp, ok := addr.(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap().String()
	}
	return addr.Network()
}

// follow reads one connection until it ends, which it always does with an error.
func (c *ZMQClient) follow(ctx context.Context, conn *zmtp.Conn) (err error) {
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	defer func() { _ = conn.Close() }()
	if err := conn.Subscribe([]byte(c.config.Topic)); err != nil {
		return fmt.Errorf("kvcache: cannot subscribe: %w", err)
	}
	// Replays belong to this connection and end with it.
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()

	c.connected.Store(true)
	c.stats.connections.Add(1)
	c.metrics.IncrementConnectionCount()
	c.log.Info("connected", "endpoint", c.pub, "remote", addrString(conn.RemoteAddr()))
	nudge := make(chan struct{}, 1)
	c.opened(ctx, &wg, conn, nudge)
	wg.Go(func() { c.askQuestions(ctx, &wg, nudge) })
	defer func() {
		cancel() // first, so that no replay goes on behind a lost connection
		c.connected.Store(false)
		c.stats.disconnections.Add(1)
		c.metrics.IncrementDisconnectionCount()
		c.mu.Lock()
		defer c.mu.Unlock()
		c.conn, c.nudge = nil, nil
		c.seq.disconnect()
		c.hold.clear()
		c.overlap.clear()
		if err != nil && !c.wasReset.Load() && !c.stopped.Load() { // nil if a handler has ended its goroutine
			c.setError(err.Error())
		}
		c.tellStatus()
	}()
	for {
		frames, err := conn.Recv()
		if err != nil {
			return fmt.Errorf("kvcache: lost the connection to %s: %w", c.pub, err)
		}
		c.received(ctx, &wg, frames, conn)
	}
}

// opened tells of a new connection that is subscribed.
func (c *ZMQClient) opened(ctx context.Context, wg *sync.WaitGroup, conn *zmtp.Conn, nudge chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conn, c.nudge, c.paused = conn, nudge, false
	c.setError("")
	c.failure = ""
	clear(c.warned)
	c.obey(ctx, wg, c.seq.connect(), &message{})
	c.tellStatus()
}

// received takes one live message. It unlocks by a defer, as whatever calls the handler does: a test's handler may end
// its goroutine.
func (c *ZMQClient) received(ctx context.Context, wg *sync.WaitGroup, frames [][]byte, conn *zmtp.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	m, ok := parseMessage(frames)
	if !ok || m.end() {
		c.metrics.IncrementErrorCount(errorConsumeEvents)
		c.warn("message_ignored", "", "frames", len(frames), "want", "topic, 8-byte sequence number, payload")
		return
	}
	m.at = conn.LastReceived()
	m.omitted.bytes, m.omitted.digest = conn.Omitted()
	d := c.seq.live(m.seq, c.proofOf(&m))
	// Until the connection has met the replay endpoint, its newest message is remembered, whether there is room to hold
	// it or not.
	if c.newestKnown = d.verdict == hold && !c.seq.met; c.newestKnown {
		c.newestDigest = digestOf(&m)
	}
	c.obey(ctx, wg, d, &m)
	if d.verdict == deliver && d.missed == 0 && !c.seq.holding {
		c.observe(m.at)
		c.overlap.clear() // the live stream has caught up with the replay
	}
	c.tellStatus()
}

// observe records that the stream was continuous at a time. Messages that were read together share it. Callers hold mu.
func (c *ZMQClient) observe(at time.Time) {
	if at != c.lastObserved {
		c.lastObserved = at
		c.observed.Store(at.UnixNano())
	}
}

// warn logs what may happen with every message: the first time on a connection, and then only for those who want to
// know everything. Counters tell how often.
func (c *ZMQClient) warn(msg, kind string, args ...any) {
	level := slog.LevelDebug
	if key := msg + " " + kind[:min(len(kind), maxKind)]; !c.warned[key] && len(c.warned) < maxWarned {
		if c.warned == nil {
			c.warned = make(map[string]bool)
		}
		c.warned[key] = true
		level = slog.LevelWarn
	}
	c.log.Log(context.Background(), level, msg, args...) //nolint:sloglint // callers give constants
}

// maxWarned and maxKind, in bytes, bound the warnings of one connection: kinds of events are named by the peer.
const maxWarned, maxKind = 64, 128

func addrString(a net.Addr) string {
	if a == nil {
		return ""
	}
	return a.String()
}

// obey carries out a decision about message m; callers hold mu. A decision to replay belongs to a connection, of which
// ctx and wg are.
func (c *ZMQClient) obey(ctx context.Context, wg *sync.WaitGroup, d decision, m *message) {
	c.countNumbers(&d)
	if d.missed > 0 {
		c.log.Warn("batches_missing", "count", d.missed, "before", m.seq, "replay", d.replay)
	}
	if d.burned > 0 {
		c.log.Info("sequences_burned", "count", d.burned, "before", m.seq)
	}
	if d.invalid {
		c.metrics.IncrementErrorCount(errorConsumeEvents)
	}
	if d.foreign {
		c.warn("replay_of_another_engine", "", "endpoint", c.replay, "events", c.pub,
			"hint", "the replay endpoint answers with other batches than the connection brings; is the port another rank's?")
	}
	if d.dropHeld {
		c.hold.clear()
	}
	if d.reset != "" {
		c.reset(d.reset)
	}
	c.tellFall()
	switch d.verdict {
	case deliver:
		c.deliver(m)
	case hold:
		if !m.held && !c.hold.push(m) {
			c.seq.overflowed()
			c.crowded = true
		}
	}
	if d.replay {
		c.replayAsked++
		if c.seq.ask.verify {
			c.askedDigest = digestBytes(c.lastPayload, c.lastOmitted)
		}
		if !c.replays {
			c.replays = true
			wg.Go(func() { c.runReplays(ctx, wg) })
		}
	}
}

// reset tells the handler to forget.
func (c *ZMQClient) reset(reason Reason) {
	c.stats.resets.Add(1)
	c.metrics.countReset(reason)
	switch reason {
	case ReasonStart:
	case ReasonUnreadable:
		c.warn("reset", string(reason), "reason", string(reason))
	default:
		c.log.Warn("reset", "reason", string(reason))
	}
	if c.resyncs == nil {
		return
	}
	r := Reset{
		PodName: c.config.PodKey, ModelName: c.config.ModelName, Rank: c.config.Rank, Reason: reason, At: time.Now(),
	}
	c.call("HandleReset", func() error { return c.resyncs.HandleReset(r) })
}

// proofOf compares m with what was delivered under its number, as far as that is known.
func (c *ZMQClient) proofOf(m *message) proof {
	is := func(equal bool) proof {
		if equal {
			return same
		}
		return other
	}
	switch {
	case m.seq == c.seq.last && c.seq.started:
		return is(m.omitted == c.lastOmitted && bytes.Equal(m.payload, c.lastPayload))
	case m.replayed && c.seq.ask.purpose == askMeet && c.seq.ask.count < maxSought:
		if h, ok := c.hold.find(m.seq); ok {
			return is(m.omitted == h.omitted && bytes.Equal(m.payload, h.payload))
		}
	case m.replayed && c.seq.ask.verify && m.seq == c.seq.ask.from:
		// Live messages have come since it was asked for.
		return is(digestOf(m) == c.askedDigest)
	case m.replayed && c.seq.hasNewest && m.seq == c.seq.newest && c.newestKnown:
		return is(digestOf(m) == c.newestDigest)
	}
	return c.overlap.proof(m)
}

// maxSought is how many messages of a replay are looked for among those that are held. The first will do, unless the
// engine's buffer is short.
const maxSought = 64

// maxKeptPayload is the size in bytes above which the memory of lastPayload is given back when it is no longer needed.
const maxKeptPayload = 1 << 20

// deliver hands one message on and remembers it. After Stop nothing is handed on, so nothing is remembered either.
func (c *ZMQClient) deliver(m *message) {
	c.hand(m)
	if c.stopped.Load() {
		return
	}
	if cap(c.lastPayload) > maxKeptPayload && len(m.payload) <= maxKeptPayload {
		c.lastPayload = nil
	}
	// A copy costs less than a digest, and cannot take one batch for another.
	c.lastPayload = append(c.lastPayload[:0], m.payload...)
	c.lastOmitted = m.omitted
	if m.replayed {
		c.overlap.add(m)
	}
	c.seq.delivered(m.seq, m.replayed)
	c.stats.batches.Add(1)
	if m.replayed {
		c.stats.replayed.Add(1)
	}
	c.lastSeq.Store(int64(m.seq))
	c.metrics.UpdateLastSequenceID(int64(m.seq))
}

// hand passes one message to the handler.
func (c *ZMQClient) hand(m *message) {
	info := BatchInfo{
		PodName: c.config.PodKey, ModelName: c.config.ModelName, Rank: c.config.Rank,
		Sequence: m.seq, Replayed: m.replayed, ReceivedAt: m.at, Topic: m.topic, Payload: m.payload,
	}
	if c.payloads != nil {
		c.call("HandlePayload", func() error { return c.payloads.HandlePayload(info) })
	}
	if err := c.decode(m); err != nil {
		c.stats.unreadable.Add(1)
		c.metrics.IncrementErrorCount(errorDecode)
		c.warn("batch_unreadable", "", "sequence", m.seq, "error", err)
		c.doubt()
		return
	}
	if len(c.batch.Skipped) > 0 {
		c.skipped(m.seq)
		c.tellFall()
	}
	if rank, ok := rankOf(&c.batch); ok {
		info.Rank = rank
	}
	c.countReceived(m)
	c.handle(&info)
	if len(c.batch.Skipped) == 0 && endsCleared(&c.batch) {
		c.seq.cleared()
	}
}

// decode reads the payload into c.batch.
func (c *ZMQClient) decode(m *message) error {
	if m.omitted.bytes > 0 {
		return fmt.Errorf("kvcache: a message of more than %d bytes (MaxMessage): %d were left out",
			c.config.maxMessage(), m.omitted.bytes)
	}
	return c.batch.Decode(m.payload)
}

// skipped judges the events of the batch that could not be read. One that may have removed blocks puts in doubt
// everything before it, so that the handler forgets, and gets what follows it.
func (c *ZMQClient) skipped(seq uint64) {
	b := &c.batch
	c.stats.unreadable.Add(uint64(len(b.Skipped)))
	for _, s := range b.Skipped {
		c.metrics.countSkipped(s.Reason)
		tag := string(s.Tag[:min(len(s.Tag), maxKind)])
		c.warn("event_unreadable", s.Reason+" "+tag, "sequence", seq, "index", s.Index, "type", tag, "why", s.Reason)
	}
	cut, doubt := b.Doubt()
	if !doubt {
		c.seq.unreadable(false)
		return
	}
	if c.doubt() {
		b.Events = b.Events[cut:]
	}
}

// doubt judges what may have removed blocks and could not be read. It reports whether the handler was told to forget.
func (c *ZMQClient) doubt() (forgot bool) {
	d := c.seq.unreadable(true)
	if d.reset == "" {
		c.tellFall()
		return false
	}
	c.reset(d.reset)
	return true
}

// endsCleared reports whether the batch empties the cache.
func endsCleared(b *event.Batch) bool {
	for i := range b.Events {
		if b.Events[i].Type == event.AllBlocksCleared {
			return true
		}
	}
	return false
}

func (c *ZMQClient) countReceived(m *message) {
	c.stats.events.Add(uint64(len(c.batch.Events)))
	if c.metrics == nil {
		return
	}
	for i := range c.batch.Events {
		c.metrics.received[c.batch.Events[i].Type].Inc()
	}
	if m.replayed {
		c.metrics.replayed.Add(float64(len(c.batch.Events)))
	} else if at := timestamp(c.batch.Time); !at.IsZero() {
		c.metrics.observeLag(m.at.Sub(at))
	}
}

// handle passes the batch to the handler.
func (c *ZMQClient) handle(info *BatchInfo) {
	if c.batches != nil {
		if c.callBatch(info) && c.metrics != nil {
			for i := range c.batch.Events {
				c.metrics.processed[c.batch.Events[i].Type].Inc()
			}
		}
		return
	}
	o := origin{at: timestamp(c.batch.Time), model: info.ModelName, pod: info.PodName, rank: info.Rank}
	for i := range c.batch.Events {
		if c.stopped.Load() {
			return
		}
		e := newEvent(&c.batch.Events[i])
		e.stamp(o)
		if c.call(callEvent, func() error { return c.handler.HandleEvent(e) }) && c.metrics != nil {
			c.metrics.processed[c.batch.Events[i].Type].Inc()
		}
	}
}

// callEvent and callBatchName are the calls whose time is measured. The latter is a variable so that inHandler can
// point to it.
const callEvent = "HandleEvent"

var callBatchName = "HandleBatch"

// callBatch is call for HandleBatch, which must not allocate: no closure.
func (c *ZMQClient) callBatch(info *BatchInfo) (ok bool) {
	if c.stopped.Load() {
		return false
	}
	begin := c.enter(&callBatchName)
	defer func() { ok = c.leave(callBatchName, begin, recover()) && ok }()
	return c.failed(callBatchName, c.batches.HandleBatch(&c.batch, *info))
}

// call runs one call of the handler and reports whether it succeeded. After Stop none begins.
func (c *ZMQClient) call(name string, f func() error) (ok bool) {
	if c.stopped.Load() {
		return false
	}
	begin := c.enter(&name)
	defer func() { ok = c.leave(name, begin, recover()) && ok }()
	return c.failed(name, f())
}

func (c *ZMQClient) enter(name *string) (begin time.Time) {
	if *name != c.lastCall {
		// Most calls are the same as the one before; an atomic store each would be felt.
		c.lastCall = *name
		c.inHandler.Store(name)
	}
	if c.metrics != nil && (*name == callBatchName || *name == callEvent) {
		begin = time.Now()
	}
	return begin
}

// leave ends a call. A panic costs a counted error and nothing else: the stream outlives its handler's faults.
func (c *ZMQClient) leave(name string, begin time.Time, panicked any) bool {
	if !begin.IsZero() {
		c.metrics.RecordEventProcessingLatency(time.Since(begin))
	}
	if panicked == nil {
		return true
	}
	c.stats.handlerErrors.Add(1)
	c.metrics.IncrementErrorCount(errorHandleEvent)
	c.warn("handler_panicked", name, "call", name, "panic", panicked)
	return false
}

// failed logs and counts an error of the handler, and reports whether there was none.
func (c *ZMQClient) failed(name string, err error) bool {
	if err == nil {
		return true
	}
	c.stats.handlerErrors.Add(1)
	c.metrics.IncrementErrorCount(errorHandleEvent)
	c.warn("handler_failed", name, "call", name, "error", err)
	return false
}

// fail records why there is no connection.
func (c *ZMQClient) fail(err error, kind string, retry time.Duration) {
	c.metrics.IncrementErrorCount(kind)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.setError(err.Error())
	if c.failure != err.Error() { // the same again is no news
		c.failure = err.Error()
		c.log.Warn("connection_failed", "endpoint", c.pub, "error", err, "retry_in", retry)
	}
	c.tellStatus()
}

// setError sets the error that State shows.
func (c *ZMQClient) setError(text string) {
	c.statusMu.Lock()
	defer c.statusMu.Unlock()
	c.status.Err = text
}

// wake makes the goroutine that asks questions look whether there is one; callers hold mu.
func (c *ZMQClient) wake() {
	select {
	case c.nudge <- struct{}{}:
	default:
	}
}

// tellFall tells of a bound that fell: what the handler is about to see is worth less than what it was told. Callers
// hold mu.
func (c *ZMQClient) tellFall() {
	if c.seq.bound < c.told.Bound {
		c.tellStatus()
	}
}

// tellStatus publishes the sequencer's state, and tells the handler if it changed; callers hold mu.
func (c *ZMQClient) tellStatus() {
	now := Status{State: c.seq.state, Bound: c.seq.bound, Reason: c.seq.reason}
	if now == c.told || c.stopped.Load() {
		return
	}
	if _, due := c.seq.due(); due && c.nudge != nil {
		c.wake()
	}
	c.told = now
	c.metrics.setStream(now.State, now.Bound)
	c.statusMu.Lock()
	c.status.State, c.status.Bound, c.status.Reason = now.State, now.Bound, now.Reason
	c.statusMu.Unlock()
	status := c.State()
	c.log.Info("status", "state", status.State.String(), "bound", status.Bound.String(), "reason", string(status.Reason))
	if c.statuses != nil {
		c.call("HandleStatus", func() error { c.statuses.HandleStatus(status); return nil })
	}
}
