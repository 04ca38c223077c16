// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package simulation_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kvtap/kvtap/enginesim"
	"github.com/kvtap/kvtap/event"
	"github.com/kvtap/kvtap/kvcache"
)

// onLoopback is the operating system's network.
func onLoopback() transport {
	return transport{
		pub: "tcp://127.0.0.1:0", replay: "tcp://127.0.0.1:0",
		dial: new(net.Dialer).DialContext, listen: new(net.ListenConfig).Listen,
	}
}

// The same over real sockets, for what a network in memory does not have: buffers, ports, and clocks that nobody stops.
func TestClientToldTheTruthUnderFaultsOverRealSockets(t *testing.T) {
	t.Parallel()
	for seed := range uint64(6) {
		t.Run(strconv.FormatUint(seed, 10), func(t *testing.T) {
			t.Parallel()
			s := drawForLoopback(seed)
			r := &run{schedule: s, begun: time.Now(), trace: new(trace), network: onLoopback()}
			// A deadline that is met says nothing of the client; it only ends a test that hangs.
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if err := r.playForReal(ctx); err != nil {
				t.Errorf("%v\nfails: %v\n%s", s, err, strings.Join(r.trace.lines, "\n"))
			}
		})
	}
}

func drawForLoopback(seed uint64) *schedule {
	r := rand.New(rand.NewPCG(seed, 0x6c6f6f70))
	s := &schedule{setup: setup{
		seed: seed, form: event.VLLM032, framing: enginesim.Framing(r.IntN(3)), buffer: 10_000, blocks: 32, before: r.IntN(9),
		budget: 1 << 20, ping: 50 * time.Millisecond, pingTimeout: 100 * time.Millisecond, verify: 200 * time.Millisecond,
		replayTimeout: 200 * time.Millisecond, reconnect: 10 * time.Millisecond,
	}}
	kinds := enginesim.FaultKinds()
	for range 3 {
		for range 12 {
			o := op{kind: opStep, n: 1 + r.IntN(4)}
			switch r.IntN(6) {
			case 0, 1:
				f := drawFault(r, kinds[r.IntN(len(kinds))])
				switch f.Kind {
				case enginesim.FaultRestart:
					// Its port may be taken for a moment; a process that was killed for a time tries again.
					f.Kind, f.N = enginesim.FaultKill, 0
				case enginesim.FaultSlowReplay, enginesim.FaultEndlessReplay:
					f.For = 5 * time.Millisecond
				}
				if f.Kind == enginesim.FaultKill || f.Kind == enginesim.FaultStop || f.Kind == enginesim.FaultPartition {
					f.For = drawDuration(r, time.Millisecond, 300*time.Millisecond)
				}
				o = op{kind: opFault, fault: f}
			case 2:
				o = op{kind: opBlock}
			}
			s.ops = append(s.ops, o)
		}
		s.ops = append(s.ops, op{kind: opQuiet})
	}
	return s
}

func (r *run) playForReal(ctx context.Context) (err error) {
	if err := r.start(ctx, kvcache.NewHoldBudget(r.budget), kvcache.NewReplayLimiter(1)); err != nil {
		return err
	}
	defer func() {
		stopErr := r.client.Stop()
		r.handler.end()
		err = errors.Join(err, stopErr, r.engine.Close(), r.examine())
		if n := r.sockets.Load(); err == nil && n != 0 {
			err = failf("sockets", "%d sockets of the client are open after Stop", n)
		}
		if n := r.held.Used(); err == nil && n != 0 {
			err = failf("budget", "%d bytes of the hold budget are in use after Stop", n)
		}
	}()
	for i, o := range r.ops {
		r.note("op %d: %v", i, o)
		if o.kind != opQuiet {
			if err := r.do(o); err != nil {
				return err
			}
			continue
		}
		r.handler.release()
		// What lasts for a time ends by itself.
		if err := r.await(ctx); err != nil {
			return err
		}
		r.engine.Heal()
		r.unknownEvents = false
		r.record()
		if err := r.publish(1 + i%3); err != nil {
			return err
		}
		if err := r.await(ctx); err != nil {
			return err
		}
	}
	return nil
}

// await returns when the handler has been told of everything that the engine has published, and that nothing is
// missing where nothing was lost.
func (r *run) await(ctx context.Context) error {
	for {
		r.record()
		if err := r.examine(); err != nil {
			return err
		}
		told, l := r.checker.told, &r.lives[r.present]
		if told.State == kvcache.StateLive && told.Bound != kvcache.BoundUnknown && r.complete() &&
			(told.Bound == kvcache.BoundExact || !r.mustBeExact(l, false)) {
			r.note("well: %v", told)
			return nil
		}
		select {
		case <-r.handler.called:
		case <-ctx.Done():
			held, next := r.engine.Truth()
			return failf("stuck", "told %+v at %+v, the engine is in life %d with next %d and %d blocks; the client: %+v",
				told, r.checker.at, r.present, next, len(held), r.client.State())
		}
	}
}
