// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package enginesim

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

// ScriptedFault is a fault that Step injects before its step of this number, counted from 0.
type ScriptedFault struct {
	Step  int
	Fault Fault
}

// Script is the faults of a run. Its order matters within one step only.
type Script []ScriptedFault

// sorted returns a copy in the order of steps.
func (s Script) sorted() (Script, error) {
	for _, f := range s {
		if f.Step < 0 {
			return nil, fmt.Errorf("enginesim: fault %v at step %d", f.Fault.Kind, f.Step)
		}
		if err := f.Fault.check(); err != nil {
			return nil, err
		}
	}
	s = slices.Clone(s)
	slices.SortStableFunc(s, func(a, b ScriptedFault) int { return cmp.Compare(a.Step, b.Step) })
	return s, nil
}

// playScript injects what is due at this step.
func (e *Engine) playScript() error {
	e.mu.Lock()
	n := 0
	for n < len(e.script) && e.script[n].Step <= e.steps {
		n++
	}
	due := e.script[:n]
	e.script = e.script[n:]
	e.steps++
	e.mu.Unlock()
	for _, f := range due {
		if err := e.Inject(f.Fault); err != nil {
			return err
		}
	}
	return nil
}

// RandomScript makes a script up: at each of the first steps, with probability rate, a fault of one of the kinds, all
// of them if none is given. The same arguments give the same script. Nothing in it lasts for ever: a process that is
// killed is down for up to 5 seconds, a stop or a partition lasts up to 15. At ten steps a second, a rate of much
// more than 0.02 leaves little time in which all is well.
func RandomScript(seed uint64, steps int, rate float64, kinds ...FaultKind) Script {
	if len(kinds) == 0 {
		kinds = FaultKinds()
	}
	r := rand.New(rand.NewPCG(seed, 0x6661756c74))
	var s Script
	for step := range steps {
		// One number per step, whatever comes of it: a higher rate adds to a script.
		if r.Float64() < rate {
			s = append(s, ScriptedFault{Step: step, Fault: randomFault(r, kinds[r.IntN(len(kinds))])})
		}
	}
	return s
}

// randomFault draws a dose that a listener can meet in practice.
func randomFault(r *rand.Rand, k FaultKind) Fault {
	f := Fault{Kind: k}
	upTo := func(n int) int { return 1 + r.IntN(n) }
	within := func(low, high time.Duration) time.Duration {
		return low + time.Duration(r.Int64N(int64(high-low+1)))
	}
	switch k {
	case FaultKill:
		f.For = within(50*time.Millisecond, 5*time.Second)
	case FaultRestart:
		if r.IntN(2) == 0 {
			f.N = upTo(100) // as a fast start does, it may overtake the old number
		}
	case FaultStop, FaultPartition:
		f.For = within(50*time.Millisecond, 15*time.Second) // shorter and longer than heartbeats bear
	case FaultDropLive, FaultDropReplay, FaultCutReplay:
		f.N = upTo(8)
	case FaultBurn, FaultTwoFrames, FaultWrongLength, FaultUnreadable, FaultNonsenseReplay:
		f.N = upTo(3)
	case FaultLoseEnd, FaultMuteReplay, FaultUnknownEvent:
		f.N = upTo(2)
	case FaultRoll:
		f.N = upTo(30)
	case FaultSlowReplay:
		f.For = within(time.Millisecond, 2*time.Second)
	case FaultEndlessReplay:
		f.For = within(time.Millisecond, 100*time.Millisecond)
	}
	return f
}
