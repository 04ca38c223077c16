// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package enginesim_test

import (
	"context"
	"errors"
	"iter"
	"math"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvtap/kvtap/enginesim"
	"github.com/kvtap/kvtap/internal/zmtp"
)

// recording yields n batches with every second number, from one reused buffer.
func recording(n int) iter.Seq2[uint64, []byte] {
	return func(yield func(uint64, []byte) bool) {
		buffer := make([]byte, 1)
		for i := range n {
			buffer[0] = byte('a' + i)
			if !yield(uint64(2*i), buffer) {
				return
			}
		}
	}
}

func TestPlayPublishesARecordingAsItWas(t *testing.T) {
	t.Parallel()
	config, m := inMemory(enginesim.Config{Quiet: true})
	e := startEngine(t, config)
	if err := enginesim.Play(t.Context(), e, recording(3), 0); err != nil {
		t.Fatal(err)
	}
	_, endpoint := e.Endpoints()
	got := replay(t, dial(t, m, endpoint, zmtp.DEALER), enginesim.FramingTopic, 0)
	want := []message{{Seq: 0, Payload: "a"}, {Seq: 2, Payload: "b"}, {Seq: 4, Payload: "c"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("replayed (-want +got):\n%s", diff)
	}
}

func TestPlayKeepsItsRate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, enginesim.Config{Quiet: true})
		start := time.Now()
		if err := enginesim.Play(t.Context(), e, recording(9), 4); err != nil {
			t.Fatal(err)
		}
		// Eight pauses lie between nine batches.
		if took := time.Since(start); took != 2*time.Second {
			t.Errorf("9 batches at 4 per second took %v", took)
		}
	})
}

func TestPlayEndsEarly(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, enginesim.Config{Quiet: true})
		ctx, cancel := context.WithTimeout(t.Context(), 1100*time.Millisecond)
		defer cancel()
		if err := enginesim.Play(ctx, e, recording(9), 4); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a cancelled play ended with %v", err)
		}
		if last, _ := e.LastSeq(); last != 8 {
			t.Errorf("the last number is %d, want 8", last)
		}
		time.AfterFunc(time.Second, func() { e.Close() })
		if err := enginesim.Play(t.Context(), e, recording(9), 0.01); !errors.Is(err, enginesim.ErrClosed) {
			t.Errorf("a play on an engine that was closed ended with %v", err)
		}
		for _, rate := range []float64{-1, math.NaN()} {
			if err := enginesim.Play(t.Context(), e, recording(1), rate); err == nil || errors.Is(err, enginesim.ErrClosed) {
				t.Errorf("at %v per second: %v", rate, err)
			}
		}
	})
}
