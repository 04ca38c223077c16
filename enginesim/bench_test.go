// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package enginesim_test

import (
	"testing"

	"github.com/kvtap/kvtap/enginesim"
)

// BenchmarkStep measures a scheduler step with its arrivals, up to the replay buffer. Its allocations are mostly the
// payload, which lives on in the buffer, and the prompts made up.
func BenchmarkStep(b *testing.B) {
	e := newEngine(b, enginesim.Config{Seed: 1})
	for range 500 {
		step(b, e)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := e.Step(); err != nil {
			b.Fatal(err)
		}
	}
}
