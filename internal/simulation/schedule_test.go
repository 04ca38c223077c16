// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package simulation_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/kvtap/kvtap/enginesim"
	"github.com/kvtap/kvtap/event"
)

// schedule is one run: what is set up, and what happens then. A seed decides all of it.
type schedule struct {
	setup
	ops []op
}

// setup is an engine, a client and a handler. A zero duration or size is the default of what it configures.
type setup struct {
	seed uint64

	// The engine.
	form       event.Form
	framing    enginesim.Framing
	topic      string
	rank       int
	firstSeq   uint64
	buffer     int // batches that can be replayed
	hwm        int
	replayHWM  int
	blocks     int
	grouped    bool // removals
	before     int  // steps before the client starts
	lateEngine bool // the engine opens its sockets after the client has started

	// The client.
	dialsIn               bool // the engine connects out, the client listens
	noReplay              bool
	deaf                  bool // the engine has no replay endpoint, and the client was not told
	keep                  bool
	from                  uint64
	memory, message       int
	budget                int
	ping, pingTimeout     time.Duration
	verify, replayTimeout time.Duration
	reconnect             time.Duration

	// lagEvery is how many reads of a socket there are to one that comes late, by lag; 0: none does.
	lagEvery int
	lag      time.Duration

	// shared says that a second client, of an engine without faults, shares turns and budget with this one.
	shared bool

	// The handler. One call in so many sleeps, fails, panics, or resets the client; 0: none does.
	slowEvery  int
	slow       time.Duration
	failEvery  int
	panicEvery int
	resetEvery int
}

// op is one thing that happens.
type op struct {
	kind  opKind
	n     int           // opStep: steps, opQuiet: batches published at once, before the client is back
	more  int           // opQuiet: batches published once it is
	d     time.Duration // opSleep
	fault enginesim.Fault
}

type opKind uint8

const (
	opStep  opKind = iota // the engine works
	opSleep               // time passes
	opWait                // everything that can happen now has happened
	opFault
	opReset // the client's caller asks for a reset
	opCut   // all connections break
	opBlock // the handler blocks, until time has to pass
	opQuiet // faults end, time passes, and everything must be right
)

func (o op) String() string {
	switch o.kind {
	case opStep:
		return fmt.Sprintf("step %d", o.n)
	case opSleep:
		return fmt.Sprintf("sleep %v", o.d)
	case opWait:
		return "wait"
	case opFault:
		s := o.fault.Kind.String()
		if o.fault.N != 0 {
			s += fmt.Sprintf(" n=%d", o.fault.N)
		}
		if o.fault.For != 0 {
			s += fmt.Sprintf(" for=%v", o.fault.For)
		}
		return s
	case opReset:
		return "reset"
	case opCut:
		return "cut"
	case opBlock:
		return "block"
	case opQuiet:
		return fmt.Sprintf("quiet %d+%d", o.n, o.more)
	}
	return "invalid"
}

func (s *schedule) String() string {
	words := make([]string, len(s.ops))
	for i, o := range s.ops {
		words[i] = o.String()
	}
	return fmt.Sprintf("%+v\n  %s", s.setup, strings.Join(words, ", "))
}

// The kinds of fault after which a state need not be exact, though it can be replayed from: history is gone, or
// something could not be read.
var lossy = []enginesim.FaultKind{
	enginesim.FaultRoll, enginesim.FaultUnreadable, enginesim.FaultUnknownEvent,
}

// draw makes the schedule of a seed.
func draw(seed uint64) *schedule {
	r := rand.New(rand.NewPCG(seed, 0x7363686564756c65))
	chance := func(percent int) bool { return r.IntN(100) < percent }
	s := &schedule{setup: drawSetup(r, chance)}
	s.seed = seed

	// Few kinds at a time: each meets the others in all combinations, and what they do is not drowned.
	kinds := slices.Clone(enginesim.FaultKinds())
	if chance(60) {
		kinds = slices.DeleteFunc(kinds, func(k enginesim.FaultKind) bool { return slices.Contains(lossy, k) })
	}
	r.Shuffle(len(kinds), func(i, j int) { kinds[i], kinds[j] = kinds[j], kinds[i] })
	kinds = kinds[:1+r.IntN(6)]
	turnover := chance(10)
	if turnover {
		s.lagEvery, s.lag = 2+r.IntN(6), drawDuration(r, 50*time.Millisecond, 3*time.Second)
		s.reconnect = drawDuration(r, 5*time.Millisecond, 200*time.Millisecond)
	}
	blocks, cuts := chance(15), chance(25)
	resets := s.slowEvery == 0 && chance(15)
	if resets {
		kinds = append(slices.Clip(kinds), enginesim.FaultSlowReplay) // a reset is to meet replays that run
	}
	for range 2 + r.IntN(3) {
		for range 4 + r.IntN(14) {
			if turnover && chance(50) {
				s.ops = append(s.ops, drawTurnover(r)...)
				continue
			}
			o := op{kind: opStep, n: 1 + r.IntN(4)}
			switch {
			case chance(35):
				o = op{kind: opFault, fault: drawFault(r, kinds[r.IntN(len(kinds))])}
			case chance(30):
				o = op{kind: opSleep, d: drawDuration(r, time.Millisecond, 40*time.Second)}
			case chance(25):
				o = op{kind: opWait}
			case resets && chance(15):
				o = op{kind: opReset}
			case cuts && chance(20):
				o = op{kind: opCut}
			case blocks && chance(30):
				o = op{kind: opBlock}
			}
			s.ops = append(s.ops, o)
		}
		o := op{kind: opQuiet}
		if chance(50) {
			o.n = 1 + r.IntN(3)
		}
		if chance(50) {
			o.more = 2 + r.IntN(3)
		}
		s.ops = append(s.ops, o)
	}
	if chance(30) {
		s.ops = s.ops[:len(s.ops)-1] // stopped in the midst of things
	}
	return s
}

// drawTurnover makes lives follow each other faster than a slow client reads, so that it asks a new process about what
// an old one still has on its way.
func drawTurnover(r *rand.Rand) []op {
	sleep := func(high time.Duration) op { return op{kind: opSleep, d: drawDuration(r, time.Millisecond, high)} }
	restart := func() op {
		return op{kind: opFault, fault: enginesim.Fault{Kind: enginesim.FaultRestart, N: r.IntN(4)}}
	}
	return []op{
		restart(), {kind: opStep, n: r.IntN(2)}, sleep(300 * time.Millisecond),
		{kind: opFault, fault: enginesim.Fault{Kind: enginesim.FaultMuteReplay, N: 1}},
		{kind: opStep, n: 1 + r.IntN(3)}, sleep(50 * time.Millisecond),
		restart(), sleep(500 * time.Millisecond),
	}
}

func drawSetup(r *rand.Rand, chance func(int) bool) setup {
	s := setup{
		form:    event.Form(1 + r.IntN(int(event.VLLM032))),
		framing: enginesim.Framing(r.IntN(3)),
		rank:    r.IntN(4) - 1,
		buffer:  10_000,
		blocks:  24 + r.IntN(24),
		grouped: chance(30),
		before:  r.IntN(12),
		dialsIn: chance(20),
		budget:  1 << 20,
	}
	if chance(25) {
		s.topic = "kv@10.0.0.1:8000@tiny"
	}
	if chance(25) {
		s.firstSeq = 1
	}
	if chance(35) {
		s.buffer = 1 + r.IntN(40)
	}
	if chance(15) {
		s.hwm = 1 + r.IntN(8)
	}
	if chance(20) {
		s.replayHWM = 6 + r.IntN(20)
	}
	s.lateEngine = !s.dialsIn && chance(10)
	s.noReplay = chance(15)
	s.deaf = !s.noReplay && chance(4)
	s.keep = chance(20)
	if chance(4) {
		s.from = uint64(r.IntN(20))
	}
	if chance(30) {
		s.memory = 1 << 20
	}
	if chance(8) {
		s.message = 200 + r.IntN(400)
	}
	if chance(25) {
		s.budget = []int{0, 4 << 10, 8 << 10, 16 << 10}[r.IntN(4)]
	}
	if chance(50) {
		s.ping = drawDuration(r, 3*time.Second, 20*time.Second)
		s.pingTimeout = drawDuration(r, 200*time.Millisecond, 10*time.Second)
	} else {
		s.ping = 20 * time.Second
	}
	if chance(50) {
		s.verify = drawDuration(r, 8*time.Second, 30*time.Second)
	}
	if chance(50) {
		s.replayTimeout = drawDuration(r, 200*time.Millisecond, 5*time.Second)
	}
	if s.replayHWM > 0 {
		// Each answer loses its end, which a silence tells.
		s.replayTimeout = drawDuration(r, 200*time.Millisecond, time.Second)
	}
	if chance(30) {
		s.reconnect = drawDuration(r, 10*time.Millisecond, 4*time.Second)
	}
	if chance(20) {
		s.lagEvery, s.lag = 1+r.IntN(20), drawDuration(r, time.Millisecond, 12*time.Second)
	}
	if chance(10) {
		s.failEvery = 1 + r.IntN(10)
	}
	if chance(10) {
		s.panicEvery = 1 + r.IntN(10)
	}
	if chance(5) {
		s.resetEvery = 20 + r.IntN(40)
	}
	if chance(5) {
		s.verify = -1
	}
	s.shared = chance(10)
	if s.noReplay && s.resetEvery == 0 && chance(30) {
		// The client holds a mutex while its handler runs. Time stands still in a bubble while another goroutine waits for
		// it, as the reader of a replay would, so that a handler may only sleep where there is but one.
		s.slowEvery, s.slow = 1+r.IntN(20), drawDuration(r, time.Millisecond, 12*time.Second)
	}
	return s
}

// drawDuration draws from low to high, each order of magnitude as likely as the next.
func drawDuration(r *rand.Rand, low, high time.Duration) time.Duration {
	for d := low; ; d *= 4 {
		if d*4 >= high || r.IntN(3) == 0 {
			return d + time.Duration(r.Int64N(int64(min(3*d, max(high-d, 1)))))
		}
	}
}

func drawFault(r *rand.Rand, k enginesim.FaultKind) enginesim.Fault {
	f := enginesim.Fault{Kind: k, N: 1 + r.IntN(4)}
	switch k {
	case enginesim.FaultKill:
		f.N = 0
		if r.IntN(2) == 0 {
			f.For = drawDuration(r, time.Millisecond, 40*time.Second)
		}
	case enginesim.FaultRestart:
		f.N = 0
		if r.IntN(2) == 0 {
			f.N = 1 + r.IntN(40)
		}
	case enginesim.FaultStop, enginesim.FaultPartition:
		f.For = drawDuration(r, time.Millisecond, 60*time.Second)
	case enginesim.FaultSlowReplay, enginesim.FaultEndlessReplay:
		f.For = drawDuration(r, time.Millisecond, 8*time.Second)
	case enginesim.FaultRoll:
		f.N = r.IntN(12) + 1
	}
	return f
}
