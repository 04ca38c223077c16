// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package simulation_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kvtap/kvtap/enginesim"
	"github.com/kvtap/kvtap/kvcache"
)

// settle is how long after the last fault everything must be right: two waits of the reconnect's backoff, which grows
// to 30 s, one of the retry of replays that were given up, and a look at the tail.
const settle = 2 * time.Minute

// failure is what went wrong in a run. Runs of one schedule that fail alike have the same class.
type failure struct{ class, text string }

func (f *failure) Error() string { return f.class + ": " + f.text }

func failf(class, format string, args ...any) error {
	return &failure{class: class, text: fmt.Sprintf(format, args...)}
}

// run is one schedule that is played. Its methods are called by one goroutine, but for those of its parts.
type run struct {
	*schedule
	network transport
	clock   clock
	engine  *enginesim.Engine
	client  *kvcache.ZMQClient
	handler handler
	held    *kvcache.HoldBudget
	turns   kvcache.ReplayLimiter
	sockets atomic.Int64 // of the client, open now
	pace    pace

	lives         []life
	present       int  // the life that record saw last
	unknownEvents bool // batches to come may hold an event of an unknown type
	disturbed     bool // something happened after which a client may not know, if it cannot ask
	checker       checker
	neighbour     *run // nil if there is none

	begun time.Time
	tally tally
	trace *trace // nil: nobody wants to know
}

// trace is what happened in a run and its neighbour, one line each.
type trace struct {
	mu    sync.Mutex
	lines []string
}

// play runs a schedule in a bubble of its own.
func play(t *testing.T, s *schedule, traced bool) (total tally, lines []string, err error) {
	t.Helper()
	// Nothing here takes a second, but a client that spins stops the bubble's clock.
	defer time.AfterFunc(2*time.Minute, func() { panic(fmt.Sprintf("this does not end:\n%v", s)) }).Stop()
	defer func() {
		if p := recover(); p != nil {
			// Goroutines that are left behind make the bubble panic.
			err = failf("panic", "%v\n%s", p, bubbleStacks())
		}
	}()
	synctest.Test(t, func(t *testing.T) {
		r := &run{schedule: s, begun: time.Now(), network: inMemory()}
		if traced {
			r.trace = new(trace)
		}
		err = r.play(t.Context())
		r.tally.schedules = 1
		total = r.tally
		if traced {
			lines = r.trace.lines
		}
	})
	return total, lines, err
}

// bubbleStacks returns what the goroutines of the latest bubble are doing.
func bubbleStacks() string {
	stacks := make([]byte, 1<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	latest, found := 0, ""
	for stack := range strings.SplitSeq(string(stacks), "\n\n") {
		var bubble int
		_, after, ok := strings.Cut(stack, "synctest bubble ")
		if !ok {
			continue
		}
		if n, err := fmt.Sscanf(after, "%d", &bubble); n != 1 || err != nil || bubble < latest {
			continue
		}
		if bubble > latest {
			latest, found = bubble, ""
		}
		found += stack + "\n\n"
	}
	return found
}

// note adds a line to the trace.
func (r *run) note(format string, args ...any) {
	if r.trace == nil {
		return
	}
	who := ""
	if r.ops == nil {
		who = "NEIGHBOUR "
	}
	r.trace.mu.Lock()
	defer r.trace.mu.Unlock()
	r.trace.lines = append(r.trace.lines,
		fmt.Sprintf("%14v  %s", time.Since(r.begun), who)+fmt.Sprintf(format, args...))
}

func (r *run) play(ctx context.Context) (err error) {
	if err := r.start(ctx, kvcache.NewHoldBudget(r.budget), kvcache.NewReplayLimiter(1)); err != nil {
		return err
	}
	if r.shared {
		n := *r.schedule
		n.seed, n.ops = ^r.seed, nil
		n.dialsIn, n.lateEngine, n.noReplay = false, false, false
		n.lagEvery, n.slowEvery, n.resetEvery = 0, 0, 0
		r.neighbour = &run{schedule: &n, begun: r.begun, trace: r.trace, network: r.network}
		r.neighbour.network.pub, r.neighbour.network.replay = "tcp://127.0.0.2:5557", "tcp://127.0.0.2:5558"
		if err := r.neighbour.start(ctx, r.held, r.turns); err != nil {
			return err
		}
	}
	defer func() {
		if stopErr := r.stop(err != nil); err == nil {
			err = stopErr
		}
	}()
	for i, o := range r.ops {
		r.note("op %d: %v", i, o)
		if err := r.do(o); err != nil {
			return err
		}
	}
	return nil
}

// traffic fills a pool of a few blocks within a few steps.
var traffic = enginesim.TrafficConfig{
	SystemPrompts: 3, SystemTokens: 12, QuestionTokens: 6, AnswerTokens: 8, Conversations: 5, MaxTokens: 60,
	Vocabulary: 300, LoRAShare: 0.3, SaltShare: 0.2, TwinShare: 0.4,
}

// start makes an engine and a client that follows it, with a budget and turns that it may share.
func (r *run) start(ctx context.Context, held *kvcache.HoldBudget, turns kvcache.ReplayLimiter) error {
	config := enginesim.Config{
		PubEndpoint: r.network.pub, ReplayEndpoint: r.network.replay, Connect: r.dialsIn, NoReplay: r.noReplay || r.deaf,
		Topic: r.topic, Rank: r.rank, Form: r.form, Framing: r.framing, BufferSteps: r.buffer, HWM: r.hwm,
		ReplayHWM: r.replayHWM, FirstSeq: r.firstSeq, Blocks: r.blocks, BlockSize: 4, GroupRemovals: r.grouped,
		Traffic: traffic, Seed: r.seed, Now: r.clock.now, Listen: r.network.listen, Dial: r.network.dial,
	}
	var err error
	if r.engine, err = enginesim.New(config); err != nil {
		return err
	}
	r.lives = []life{r.newLife()}
	if err := r.step(r.before); err != nil {
		return err
	}
	if !r.lateEngine {
		if err := r.engine.Start(ctx); err != nil {
			return err
		}
	}
	pub, replay := r.network.pub, r.network.replay
	if at, also := r.engine.Endpoints(); at != "" {
		pub, replay = at, also
	}
	r.held, r.turns = held, turns
	r.handler.run, r.handler.begun, r.handler.called = r, r.begun, make(chan struct{}, 1)
	r.disturbed = r.deaf || r.resetEvery > 0 || r.message > 0 || r.hwm > 0 || r.replayHWM > 0 || r.lagEvery > 0 ||
		r.slowEvery > 0
	c := kvcache.ZMQClientConfig{
		PodKey: "default/pod-0", ModelName: "tiny", PubEndpoint: pub, ReplayEndpoint: replay,
		NoReplay: r.noReplay, Listen: r.dialsIn, Topic: r.topic, Rank: max(r.rank, 0),
		PingInterval: r.ping, PingTimeout: r.pingTimeout, VerifyInterval: r.verify, ReplayTimeout: r.replayTimeout,
		ReconnectDelay: r.reconnect, MaxMemory: r.memory, MaxMessage: r.message, HoldBudget: r.held,
		FromSequence: r.from, ReplayLimiter: turns,
		Dial: r.dial, ListenFunc: r.listen,
	}
	if r.keep {
		c.HistoryLost = kvcache.PolicyKeep
	}
	if r.trace != nil {
		c.Logger = r.logger()
	}
	r.client = kvcache.NewZMQClient(&c, &r.handler)
	if err := r.client.Start(); err != nil {
		return err
	}
	if r.lateEngine {
		time.Sleep(2 * time.Second)
		if err := r.engine.Start(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (r *run) do(o op) error {
	switch o.kind {
	case opSleep, opWait, opQuiet:
		// While a handler blocks, other goroutines of the client wait for its mutex, and for them no bubble's time passes.
		r.handler.release()
	}
	switch o.kind {
	case opStep:
		if r.neighbour != nil {
			if err := r.neighbour.step(1); err != nil {
				return err
			}
		}
		return r.step(o.n)
	case opSleep:
		time.Sleep(o.d)
		r.record()
	case opWait:
		synctest.Wait()
	case opFault:
		return r.inject(o.fault)
	case opReset:
		r.client.Reset("")
		r.disturbed = true
	case opCut:
		r.disturbed = true
		// A connection that was closed already says so.
		_ = r.network.cut()
	case opBlock:
		r.handler.block()
	case opQuiet:
		return r.quiet(o)
	}
	return nil
}

// step lets the engine work.
func (r *run) step(n int) error {
	for range n {
		if _, err := r.engine.Step(); err != nil {
			return fmt.Errorf("step: %w", err)
		}
		r.record()
	}
	return nil
}

// publish lets the engine work until it has published n batches.
func (r *run) publish(n int) error {
	for tries := 0; n > 0; tries++ {
		published, err := r.engine.Step()
		if err != nil {
			return fmt.Errorf("step: %w", err)
		}
		r.record()
		if published {
			n--
		}
		if tries > 1000 {
			return errors.New("the engine has stopped publishing")
		}
	}
	return nil
}

func (r *run) inject(f enginesim.Fault) error {
	switch f.Kind {
	case enginesim.FaultUnknownEvent:
		r.unknownEvents = true
		r.lives[len(r.lives)-1].unsure = true
	case enginesim.FaultUnreadable:
		r.lives[len(r.lives)-1].unsure = true
	case enginesim.FaultRoll:
		r.lives[len(r.lives)-1].rolled = true
	}
	r.disturbed = true
	f = r.adapt(f)
	if err := r.engine.Inject(f); err != nil {
		return fmt.Errorf("inject: %w", err)
	}
	r.tally.faults[f.Kind]++
	r.record()
	return nil
}

// adapt keeps a buffer that has rolled from beginning with number 1 while it has room for more: no engine's does, and a
// client may conclude that there was no 0.
func (r *run) adapt(f enginesim.Fault) enginesim.Fault {
	numbers := r.lives[len(r.lives)-1].numbers
	if oldest := len(numbers) - f.N; f.Kind == enginesim.FaultRoll && oldest >= 0 && numbers[oldest] == 1 {
		f.N++
	}
	return f
}

// stop ends the client, as it may be in the midst of things, and then the engine.
func (r *run) stop(failed bool) error {
	if r.neighbour != nil {
		if err := r.neighbour.end(failed); err != nil {
			return err
		}
	}
	if err := r.end(failed); err != nil || failed {
		return err
	}
	if n := r.held.Used(); n != 0 {
		return failf("budget", "%d bytes of the hold budget are in use after Stop", n)
	}
	return nil
}

func (r *run) end(failed bool) error {
	r.handler.release()
	asked := time.Now()
	err := r.client.Stop()
	took := time.Since(asked)
	r.handler.end()
	if stopErr := (*kvcache.StopError)(nil); errors.As(err, &stopErr) && r.slowEvery > 0 {
		time.Sleep(time.Minute) // until the handler's call is over
		err = nil
	}
	synctest.Wait()
	r.record()
	err = errors.Join(err, r.engine.Close())
	synctest.Wait()
	stats := r.client.Stats()
	r.tally.batches += stats.Batches
	r.tally.replays += stats.Replays
	r.tally.resets += stats.Resets
	r.tally.connections += stats.Connections
	if failed {
		return nil
	}
	switch {
	case err != nil:
		return fmt.Errorf("stop: %w", err)
	case took > 100*time.Millisecond && r.slowEvery == 0:
		return failf("slow_stop", "Stop took %v", took)
	case stats.HeldBytes != 0:
		return failf("held", "%d bytes are held after Stop", stats.HeldBytes)
	case r.sockets.Load() != 0:
		return failf("sockets", "%d sockets of the client are open after Stop", r.sockets.Load())
	case r.client.State().State != kvcache.StateStopped:
		return failf("stopped", "the state after Stop is %v", r.client.State().State)
	}
	return r.examine()
}

// quiet ends all faults, lets time pass and checks that the client has recovered.
func (r *run) quiet(o op) error {
	r.engine.Heal()
	r.unknownEvents = false
	r.handler.hurry(true)
	defer r.handler.hurry(false)
	r.record()
	if err := r.publish(o.n); err != nil {
		return err
	}
	r.note("healed, %d published", o.n)
	time.Sleep(settle)
	synctest.Wait()
	r.record()
	if err := r.check(false); err != nil {
		return err
	}
	if r.neighbour != nil {
		if err := r.neighbour.check(false); err != nil {
			return err
		}
	}
	if o.more == 0 {
		return nil
	}
	for i := range o.more {
		// One after the other, so that no high-water mark drops them, and the last when those before it were looked at.
		if i == o.more-1 {
			time.Sleep(settle / 3)
		}
		if err := r.publish(1); err != nil {
			return err
		}
		time.Sleep(time.Second)
		synctest.Wait()
	}
	time.Sleep(settle)
	synctest.Wait()
	return r.check(true)
}
