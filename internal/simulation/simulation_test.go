// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package simulation_test

import (
	"errors"
	"flag"
	"fmt"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

var (
	schedules = flag.Uint64("schedules", 500, "how many schedules of faults to play, from seed 1 on")
	oneSeed   = flag.Uint64("seed", 0, "play this one alone, and tell what happens")
	repeats   = flag.Int("repeat", 1, "how often to play -seed, until it fails: goroutines race differently each time")
	shrinks   = flag.Bool("shrink", true, "look for the shortest schedule that fails like one that failed")
	firstSeed = flag.Uint64("from", 1, "the first seed of -schedules")
)

// After any fault a handler has seen every event of the engine's present life once and in order, or was told that it
// has not.
func TestClientToldTheTruthUnderFaults(t *testing.T) {
	t.Parallel()
	if *oneSeed != 0 {
		s := draw(*oneSeed)
		var trace []string
		for range *repeats {
			_, lines, err := play(t, s, true)
			if err != nil {
				report(t, s, err)
				return
			}
			trace = lines
		}
		t.Logf("nothing went wrong with\n%v\n%s", s, strings.Join(trace, "\n"))
		return
	}
	// A bubble's sockets are garbage a moment later, and all that lives is small: let it pile up.
	t.Cleanup(func(percent int) func() { return func() { debug.SetGCPercent(percent) } }(debug.SetGCPercent(400)))
	var next atomic.Uint64
	next.Store(*firstSeed)
	end := *firstSeed + *schedules
	var mu sync.Mutex
	var all tally
	failed := 0
	begun := time.Now()
	t.Cleanup(func() { t.Log(all.table(time.Since(begun))) })
	for range runtime.GOMAXPROCS(0) {
		t.Run("schedules", func(t *testing.T) {
			t.Parallel()
			var mine tally
			for seed := next.Add(1) - 1; seed < end; seed = next.Add(1) - 1 {
				s := draw(seed)
				played, _, err := play(t, s, false)
				mine.add(&played)
				if err != nil {
					mu.Lock()
					failed++
					tell := failed <= 3
					mu.Unlock()
					if tell {
						report(t, s, err)
					} else {
						t.Errorf("seed %d: %v", seed, err)
					}
				}
			}
			mu.Lock()
			defer mu.Unlock()
			all.add(&mine)
		})
	}
}

// report tells of a schedule that failed, and of the shortest that fails alike.
func report(t *testing.T, s *schedule, err error) {
	t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "%v\nfails: %v\n", s, err)
	fmt.Fprintf(&b, "to try it again: go test ./internal/simulation -v -run=Faults$ -seed=%d -repeat=1000\n", s.seed)
	if *shrinks {
		small, lines, err := shrink(t, s, err)
		fmt.Fprintf(&b, "the shortest that fails alike:\n%v\nfails: %v\n%s\n", small, err, strings.Join(lines, "\n"))
	}
	t.Error(b.String())
}

// shrink drops what it can from a schedule that failed, as long as it fails alike. If it does not fail again, lines is
// empty.
func shrink(t *testing.T, s *schedule, err error) (shortest *schedule, lines []string, _ error) {
	t.Helper()
	class := classOf(err)
	fails := func(s *schedule, tries int) (found error) {
		for range tries {
			if _, trace, err := play(t, s, true); err != nil && classOf(err) == class {
				lines = trace
				return err
			}
		}
		return nil
	}
	// Not every run of it fails. What is left out must not be the reason why one did not.
	tries := 0
	for n := 1; n <= 512 && tries == 0; n *= 2 {
		if again := fails(s, n); again != nil {
			err, tries = again, 4*n
		}
	}
	budget := 6000
	attempt := func(smaller *schedule) bool {
		if budget -= tries; tries == 0 || budget < 0 {
			return false
		}
		again := fails(smaller, tries)
		if again != nil {
			s, err = smaller, again
		}
		return again != nil
	}
	for size := len(s.ops); size > 0; {
		shrunk := false
		for at := 0; at < len(s.ops); {
			smaller := *s
			smaller.ops = slices.Delete(slices.Clone(s.ops), at, min(at+size, len(s.ops)))
			if attempt(&smaller) {
				shrunk = true
			} else {
				at += size
			}
		}
		if !shrunk || size > 1 {
			size /= 2
		}
	}
	for _, simplify := range []func(*setup){
		func(s *setup) { s.slowEvery, s.slow = 0, 0 },
		func(s *setup) { s.lagEvery, s.lag = 0, 0 },
		func(s *setup) { s.shared = false },
		func(s *setup) { s.failEvery = 0 },
		func(s *setup) { s.panicEvery = 0 },
		func(s *setup) { s.resetEvery = 0 },
		func(s *setup) { s.before = 0 },
		func(s *setup) { s.before = 1 },
		func(s *setup) { s.dialsIn = false },
		func(s *setup) { s.lateEngine = false },
		func(s *setup) { s.hwm = 0 },
		func(s *setup) { s.replayHWM = 0 },
		func(s *setup) { s.buffer = 10_000 },
		func(s *setup) { s.budget = 1 << 20 },
		func(s *setup) { s.memory = 0 },
		func(s *setup) { s.firstSeq = 0 },
		func(s *setup) { s.topic = "" },
		func(s *setup) { s.framing = 0 },
		func(s *setup) { s.keep = false },
		func(s *setup) { s.ping, s.pingTimeout = 20*time.Second, 0 },
		func(s *setup) { s.verify = 0 },
		func(s *setup) { s.replayTimeout = 0 },
		func(s *setup) { s.reconnect = 0 },
	} {
		smaller := *s
		simplify(&smaller.setup)
		if smaller.setup != s.setup {
			attempt(&smaller)
		}
	}
	for i := range s.ops {
		for _, simplify := range []func(*op){
			func(o *op) { o.n, o.fault.N = min(o.n, 1), min(o.fault.N, 1) },
			func(o *op) { o.more = 0 },
			func(o *op) { o.n = 0 },
		} {
			smaller := *s
			smaller.ops = slices.Clone(s.ops)
			simplify(&smaller.ops[i])
			if smaller.ops[i] != s.ops[i] {
				attempt(&smaller)
			}
		}
	}
	return s, lines, err
}

func classOf(err error) string {
	var f *failure
	if errors.As(err, &f) {
		return f.class
	}
	return err.Error()
}
