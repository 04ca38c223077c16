// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package enginesim

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/tinylib/msgp/msgp"

	"github.com/kvtap/kvtap/event"
)

// Fault is one way to misbehave, once. The zero values of N and For mean the smallest sensible dose, which each kind
// names.
type Fault struct {
	Kind FaultKind
	N    int           // how many batches, numbers or messages: see the kinds. Zero is 1 unless they say otherwise.
	For  time.Duration // how long: see the kinds
}

// FaultKind is a way to misbehave. The zero kind is none of them.
type FaultKind uint8

// What an engine, its host and its network can do wrong. Where a kind speaks of what comes next, that is what comes
// while there are sockets: before Start and while the engine is down no dose is used up.
const (
	// FaultKill ends the process as SIGKILL does: sockets die at once and what was queued is lost. It stays down until
	// FaultRestart or Heal, or for For if that is set; then it starts again by itself as FaultRestart with this N does, an
	// N of zero meaning none.
	FaultKill FaultKind = iota + 1

	// FaultRestart makes a new process, after a kill if there was none: the cache is empty, numbers begin with
	// Config.FirstSeq again, endpoints are the same. N batches, none by default, are published before its sockets open, so
	// that it can overtake the old number; where the traffic gives too few, they come from made-up requests.
	FaultRestart

	// FaultStop stops the process for For, 1s by default, as SIGSTOP does: it makes no steps, accepts nothing, reads
	// nothing and writes nothing. Connecting still succeeds, which the kernel does, and then nobody says a word.
	// Afterwards everything goes on, and what was queued goes out.
	FaultStop

	// FaultHalfOpen makes the present connections go dead without a word, as when a host or a NAT's memory vanished:
	// what is said on them reaches nobody, and nobody hangs up. New connections work.
	FaultHalfOpen

	// FaultPartition is a network that is down for For, 1s by default, as at a closed proxy: present connections break and
	// new ones are refused. The engine itself runs on. Without sockets there is no network to lose.
	FaultPartition

	// FaultDropLive keeps the next N batches from the subscribers, as the high-water mark does. They can be replayed.
	FaultDropLive

	// FaultDropReplay loses N messages in the middle of the next replay that has a middle: never the first two, never the
	// last, so it waits for one of at least four.
	FaultDropReplay

	// FaultCutReplay loses the last N messages of the next replay and its end marker.
	FaultCutReplay

	// FaultLoseEnd loses the end markers of the next N replays.
	FaultLoseEnd

	// FaultBurn takes N numbers and sends nothing under them, as an engine does whose batch cannot be encoded.
	FaultBurn

	// FaultRoll makes the replay buffer forget all but its newest N batches, and keep no more than these until a restart.
	FaultRoll

	// FaultSlowReplay pauses the next replay that is not empty for For, 100ms by default, before each message but the
	// first. Other requests wait meanwhile, as in vLLM.
	FaultSlowReplay

	// FaultEndlessReplay makes the next replay that is not empty begin anew again and again, without an end marker: old
	// numbers for ever, one each For, 10ms by default, once all have been sent. It ends when the peer does not take them.
	FaultEndlessReplay

	// FaultMuteReplay leaves the next N replay requests without an answer.
	FaultMuteReplay

	// FaultNonsenseReplay answers the next N replay requests with one message that is none: one of a single frame, one
	// with a number of the wrong length, or garbage, in turn.
	FaultNonsenseReplay

	// FaultTwoFrames sends the next N batches as two frames without a topic, [seq, payload], as old publishers did. To a
	// subscriber the number then is the topic.
	FaultTwoFrames

	// FaultWrongLength sends, at once, N messages whose number does not have 8 bytes. They take no number and cannot be
	// replayed. Their payload is a well-formed batch that clears the cache: woe to who believes it.
	FaultWrongLength

	// FaultUnknownEvent puts an event of an unknown type into the next N batches, beside their own.
	FaultUnknownEvent

	// FaultUnreadable publishes, at once, N batches that are not msgpack. Each takes a number and is replayed as it was
	// sent.
	FaultUnreadable

	// FaultClear drops the cache, as Engine.Reset does.
	FaultClear
)

var faultNames = [...]string{
	FaultKill:           "kill",
	FaultRestart:        "restart",
	FaultStop:           "stop",
	FaultHalfOpen:       "half_open",
	FaultPartition:      "partition",
	FaultDropLive:       "drop_live",
	FaultDropReplay:     "drop_replay",
	FaultCutReplay:      "cut_replay",
	FaultLoseEnd:        "lose_end",
	FaultBurn:           "burn",
	FaultRoll:           "roll",
	FaultSlowReplay:     "slow_replay",
	FaultEndlessReplay:  "endless_replay",
	FaultMuteReplay:     "mute_replay",
	FaultNonsenseReplay: "nonsense_replay",
	FaultTwoFrames:      "two_frames",
	FaultWrongLength:    "wrong_length",
	FaultUnknownEvent:   "unknown_event",
	FaultUnreadable:     "unreadable",
	FaultClear:          "clear",
}

// FaultKinds returns all kinds.
func FaultKinds() []FaultKind {
	var kinds []FaultKind
	for k := FaultKill; k <= FaultClear; k++ {
		kinds = append(kinds, k)
	}
	return kinds
}

// String returns the name that ParseFaultKind takes, such as half_open.
func (k FaultKind) String() string {
	if !k.valid() {
		return "unknown"
	}
	return faultNames[k]
}

func (k FaultKind) valid() bool { return k >= FaultKill && k <= FaultClear }

// ParseFaultKind returns the kind of this name.
func ParseFaultKind(name string) (FaultKind, error) {
	for _, k := range FaultKinds() {
		if faultNames[k] == name {
			return k, nil
		}
	}
	return 0, fmt.Errorf("enginesim: unknown kind of fault %q", name)
}

// maxDose bounds N: a mistyped one should not eat all memory.
const maxDose = 1 << 20

func (f Fault) check() error {
	switch {
	case !f.Kind.valid():
		return fmt.Errorf("enginesim: unknown kind of fault %d", f.Kind)
	case f.N < 0 || f.N > maxDose:
		return fmt.Errorf("enginesim: fault %v: N is %d, not between 0 and %d", f.Kind, f.N, maxDose)
	case f.For < 0:
		return fmt.Errorf("enginesim: fault %v: For is negative: %v", f.Kind, f.For)
	}
	return nil
}

// dosed returns f with the smallest dose where none was given.
func (f Fault) dosed() Fault {
	switch f.Kind {
	case FaultKill, FaultRestart:
	case FaultStop, FaultPartition:
		defaultTo(&f.For, time.Second)
	case FaultSlowReplay:
		defaultTo(&f.For, 100*time.Millisecond)
	case FaultEndlessReplay:
		defaultTo(&f.For, 10*time.Millisecond)
	default:
		defaultTo(&f.N, 1)
	}
	return f
}

// pending is the misbehaviour that waits for its occasion.
type pending struct {
	dropLive, twoFrames, unknownEvents int // batches
	loseEnd, mute, nonsense            int // replays

	// One replay each, in the order of injection.
	dropReplay, cutReplay []int
	slow, endless         []time.Duration

	nonsenseTurn int // which nonsense comes next
}

// Inject makes the engine misbehave: at once, or on what comes next, as the kind says. An error says that the fault
// makes no sense, that the engine is closed (ErrClosed), or that a new process could not bind its endpoints: then it
// is down, and another FaultRestart may be tried.
func (e *Engine) Inject(f Fault) error {
	if err := f.check(); err != nil {
		return err
	}
	if err := e.lock(); err != nil {
		return err
	}
	f = f.dosed()
	err := e.inject(f)
	e.unlock()
	if err != nil {
		return err
	}
	e.mu.Lock()
	e.injected[f.Kind]++
	e.mu.Unlock()
	e.log.Info("fault injected", "kind", f.Kind.String(), "n", f.N, "for", f.For)
	return nil
}

// inject has the turn.
func (e *Engine) inject(f Fault) error {
	now := e.config.Now()
	switch f.Kind {
	case FaultKill:
		e.kill()
		if f.For > 0 {
			e.restartAfter(f.For, f.N)
		}
		return nil
	case FaultRestart:
		return e.restart(f.N)
	case FaultClear:
		return e.Reset()
	case FaultPartition:
		e.partition(f.For)
		return nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	switch f.Kind {
	case FaultStop:
		e.stop(f.For)
	case FaultHalfOpen:
		if e.process != nil {
			e.process.line.muteAll()
		}
	case FaultDropLive:
		e.pending.dropLive += f.N
	case FaultDropReplay:
		e.pending.dropReplay = append(e.pending.dropReplay, f.N)
	case FaultCutReplay:
		e.pending.cutReplay = append(e.pending.cutReplay, f.N)
	case FaultLoseEnd:
		e.pending.loseEnd += f.N
	case FaultSlowReplay:
		e.pending.slow = append(e.pending.slow, f.For)
	case FaultEndlessReplay:
		e.pending.endless = append(e.pending.endless, f.For)
	case FaultMuteReplay:
		e.pending.mute += f.N
	case FaultNonsenseReplay:
		e.pending.nonsense += f.N
	case FaultTwoFrames:
		e.pending.twoFrames += f.N
	case FaultUnknownEvent:
		e.pending.unknownEvents += f.N
	case FaultRoll:
		e.history.keep(f.N)
	case FaultBurn:
		if !e.down {
			e.next += uint64(f.N)
		}
	case FaultUnreadable:
		for range f.N {
			// No msgpack begins with 0xc1. The rest makes it unique, as a timestamp would.
			if err := e.publish(e.next, fmt.Appendf(nil, "\xc1 life %d batch %d", e.life, e.next)); err != nil {
				return err
			}
		}
	case FaultWrongLength:
		return e.sendWrongLengths(now, f.N)
	}
	return nil
}

// sendWrongLengths sends n messages whose numbers have another length than 8 bytes. e.mu is held.
func (e *Engine) sendWrongLengths(now time.Time, n int) error {
	if e.process == nil {
		return nil
	}
	b := event.Batch{Time: e.timestamp(now), Events: []event.Event{{Type: event.AllBlocksCleared}}}
	payload, err := b.Append(nil, e.config.Form)
	if err != nil {
		return fmt.Errorf("enginesim: %w", err)
	}
	for i := range n {
		number := append(binary.BigEndian.AppendUint64(nil, e.next), 0)
		length := []int{7, 9, 0, 4}[i%4]
		e.process.pub.Send([]byte(e.config.Topic), number[:length], payload)
	}
	return nil
}

// withUnknownEvent puts an event of an unknown type before the others of a payload of our own making.
func withUnknownEvent(payload []byte, form event.Form) []byte {
	_, rest, err := msgp.ReadArrayHeaderBytes(payload)
	if err == nil {
		rest, err = msgp.Skip(rest) // the time
	}
	head := payload[:len(payload)-len(rest)]
	var n uint32
	if err == nil {
		n, rest, err = msgp.ReadArrayHeaderBytes(rest)
	}
	if err != nil {
		panic(err) // it was made by Batch.Append
	}
	changed := msgp.AppendArrayHeader(append([]byte(nil), head...), n+1)
	if form >= event.VLLM024 {
		changed = msgp.AppendMapHeader(changed, 2)
		changed = msgp.AppendString(changed, "type")
		changed = msgp.AppendString(changed, "BlockPinned")
		changed = msgp.AppendString(changed, "block_hashes")
	} else {
		changed = msgp.AppendArrayHeader(changed, 2)
		changed = msgp.AppendString(changed, "BlockPinned")
	}
	changed = msgp.AppendArrayHeader(changed, 1)
	changed = msgp.AppendUint64(changed, 42)
	return append(changed, rest...)
}

// FaultCount returns how often faults of a kind were injected, scripted ones included.
func (e *Engine) FaultCount(k FaultKind) int {
	if !k.valid() {
		return 0
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.injected[k]
}

// Life returns which of its lives the engine is in: 0, then one more with each restart. While it is down, that is the
// one that ended.
func (e *Engine) Life() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.life
}

// Heal ends every fault that waits or lasts: doses that were not used up are forgotten, half-open connections break,
// a stopped process and a partitioned network go on, a replay that is slow or endless comes to its end, and an engine
// that is down starts again as with FaultRestart. If its endpoints cannot be bound, that is tried again until they
// can. Config.Faults stays as it is.
func (e *Engine) Heal() {
	if e.lock() != nil {
		return
	}
	defer e.unlock()
	e.mu.Lock()
	e.pending = pending{nonsenseTurn: e.pending.nonsenseTurn}
	close(e.healed)
	e.healed = make(chan struct{})
	e.stoppedUntil, e.cutUntil, e.restartAt = time.Time{}, time.Time{}, time.Time{}
	down := e.down
	if e.process != nil {
		e.process.line.cutMuted()
	}
	e.mu.Unlock()
	e.endStop()
	e.endPartition()
	if down {
		e.restartAfter(0, 0)
		e.endKill()
	}
}

// retryAfter is how long an engine waits before it tries again to bind its endpoints.
const retryAfter = 100 * time.Millisecond

// after calls f, with the turn, when d has passed, unless the engine is closed by then.
func (e *Engine) after(d time.Duration, f func()) {
	time.AfterFunc(d, func() {
		e.mu.Lock()
		if e.closed {
			e.mu.Unlock()
			return
		}
		e.tasks.Add(1)
		e.mu.Unlock()
		defer e.tasks.Done()
		if e.lock() != nil {
			return
		}
		defer e.unlock()
		f()
	})
}

// later returns the later of t and d from now.
func later(t time.Time, d time.Duration) time.Time {
	if at := time.Now().Add(d); at.After(t) {
		return at
	}
	return t
}

// kill ends the process, if there is one. The turn is held.
func (e *Engine) kill() {
	e.mu.Lock()
	p := e.process
	if !e.down {
		e.down, e.stopped = true, false
		e.restartAt = time.Time{}
		e.schedule.abort(ErrDown)
		e.process = nil
		e.turned()
	}
	e.mu.Unlock()
	if p != nil {
		p.end()
	}
}

// restartAfter starts a killed process again when d has passed. The turn is held.
func (e *Engine) restartAfter(d time.Duration, n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.restartAt, e.restartN = later(e.restartAt, d), n
	if d > 0 {
		e.after(d, e.endKill)
	}
}

// endKill starts a process that was killed for a time, if that is over. The turn is held.
func (e *Engine) endKill() {
	e.mu.Lock()
	due := e.down && !e.restartAt.IsZero() && !time.Now().Before(e.restartAt)
	n := e.restartN
	e.mu.Unlock()
	if !due {
		return
	}
	if err := e.restart(n); err != nil {
		e.retry("restart", err, e.endKill)
	}
}

func (e *Engine) retry(what string, err error, f func()) {
	e.log.Warn("trying again to bind the endpoints", "after", what, "error", err)
	e.after(retryAfter, f)
}

// restart makes a new process and a new life. The turn is held.
func (e *Engine) restart(n int) error {
	e.kill()
	now := e.config.Now()
	e.mu.Lock()
	started, cut := e.started, e.partitioned
	if !started {
		defer e.mu.Unlock()
		return e.renew(now, n)
	}
	e.mu.Unlock()
	if cut {
		return e.open(nil, nil, true, func() error { return e.renew(now, n) })
	}
	pub, replay, err := e.listen(e.ctx)
	if err == nil {
		err = e.open(pub, replay, false, func() error { return e.renew(now, n) })
	}
	if err != nil {
		closeAll(pub, replay)
	}
	return err
}

// renew begins a new life, and publishes n batches in it. e.mu is held.
func (e *Engine) renew(now time.Time, n int) error {
	stats := e.schedule.stats
	e.schedule = newScheduler(&e.config)
	e.schedule.stats = stats
	e.history = ring{limit: max(e.config.BufferSteps, 0)}
	e.next, e.numbered = e.config.FirstSeq, false
	e.floor = e.stamp + 1
	e.life++
	e.down = false
	for i := range n {
		events := e.advance()
		if len(events) == 0 {
			// An idle engine: a block of a content of its own.
			prompt := make([]uint32, e.config.BlockSize)
			prompt[0], prompt[len(prompt)-1] = uint32(e.life), uint32(i)
			e.schedule.submit(Request{Prompt: prompt}, nil)
			events = e.schedule.step()
		}
		if len(events) == 0 {
			events = e.schedule.reset() // its requests hold every block
		}
		if _, err := e.publishEvents(now, events); err != nil {
			return err
		}
	}
	return nil
}

// stop stops the process. e.mu is held.
func (e *Engine) stop(d time.Duration) {
	if e.down {
		return
	}
	if !e.stopped {
		e.stopped, e.stoppedUntil = true, time.Time{}
		if e.process != nil {
			e.process.line.stop()
		}
	}
	e.stoppedUntil = later(e.stoppedUntil, d)
	e.after(d, e.endStop)
}

// endStop lets a stopped process go on, if it is time to. The turn is held.
func (e *Engine) endStop() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.stopped || time.Now().Before(e.stoppedUntil) {
		return
	}
	e.stopped = false
	if e.process != nil {
		e.process.line.resume()
	}
}

// partition takes the network down. The turn is held.
func (e *Engine) partition(d time.Duration) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.started {
		return
	}
	if !e.partitioned {
		e.partitioned, e.cutUntil = true, time.Time{}
	}
	e.cutUntil = later(e.cutUntil, d)
	if e.process != nil {
		e.process.cut()
	}
	e.after(d, e.endPartition)
}

func (p *process) cut() {
	p.line.refuse(true)
	for _, d := range []*door{p.pubDoor, p.replayDoor} {
		if d != nil {
			d.shut()
		}
	}
}

// endPartition brings the network back, if it is time to. The turn is held.
func (e *Engine) endPartition() {
	e.mu.Lock()
	due := e.partitioned && !time.Now().Before(e.cutUntil)
	p := e.process
	if due && p == nil {
		e.partitioned = false // the next process binds its endpoints itself
	}
	e.mu.Unlock()
	if !due || p == nil {
		return
	}
	pub, replay, err := e.listen(e.ctx)
	if err != nil {
		closeAll(pub, replay)
		e.retry("partition", err, e.endPartition)
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.partitioned = false
	p.line.refuse(false)
	if pub != nil {
		p.pubDoor.open(pub)
	}
	if replay != nil {
		p.replayDoor.open(replay)
	}
}
