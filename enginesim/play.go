// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package enginesim

import (
	"context"
	"fmt"
	"iter"
	"time"
)

// Play publishes recorded batches under their recorded numbers, rate of them per second; zero means without a pause. It
// returns when all are published or ctx ends, then with the context's error. Payloads are copied. The engine should
// not step meanwhile, or its own batches would come in between.
func Play(ctx context.Context, engine *Engine, batches iter.Seq2[uint64, []byte], rate float64) error {
	if !(rate >= 0) {
		return fmt.Errorf("enginesim: rate is %v batches per second", rate)
	}
	var interval time.Duration
	if rate > 0 {
		interval = period(rate)
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	due := time.Now()
	for seq, payload := range batches {
		if interval > 0 {
			select {
			case <-ctx.Done():
			case <-engine.ctx.Done():
			case <-timer.C:
			}
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := engine.PublishAt(seq, payload); err != nil {
			return err
		}
		due = due.Add(interval)
		timer.Reset(time.Until(due))
	}
	return nil
}
