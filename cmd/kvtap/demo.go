// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/kvtap/kvtap/enginesim"
	"github.com/kvtap/kvtap/kvcache"
)

func (a *app) demoCommand() *cobra.Command {
	var duration time.Duration
	var rate float64
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Watch a simulated engine, without any set-up",
		Long: `Start a simulated engine on free ports of this machine and show its events as "kvtap tail" does, until
interrupted or for --duration. The engine has published some batches before it is followed, so these come by replay.`,
		Example: `  kvtap demo
  kvtap demo --duration 5s --json`,
		Args:              exactly(),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case duration < 0:
				return usagef("--duration must not be negative: %v", duration)
			case !(rate > 0 && rate <= 1e6):
				return usagef("--rate must be above 0 and at most 1000000, not %v", rate)
			}
			ctx := cmd.Context()
			if duration > 0 {
				inner, cancel := context.WithTimeoutCause(ctx, duration, errDone)
				defer cancel()
				ctx = inner
			}
			return a.demo(ctx, rate)
		},
	}
	cmd.Flags().DurationVar(&duration, "duration", 0, "end after this `time`, such as 5s; 0 is until interrupted")
	cmd.Flags().Float64Var(&rate, "rate", 2, "`N` scheduler steps of the engine per second")
	return cmd
}

const demoHeader = `A simulated engine answers made-up requests and publishes what its KV cache does at
%s, with replay at %s.
Below is what kvtap tail shows of it. To stop: Ctrl-C.

`

// demoHistory is how many steps the engine makes before it is followed.
const demoHistory = 8

func (a *app) demo(ctx context.Context, rate float64) error {
	config := enginesim.Config{
		Model:             "demo",
		PubEndpoint:       "tcp://127.0.0.1:0",
		ReplayEndpoint:    "tcp://127.0.0.1:0",
		RequestsPerSecond: rate,
		// A small cache is soon full, so that blocks go as well as come: one line for each request, not for each block.
		Blocks:        192,
		GroupRemovals: true,
		Seed:          1,
	}
	engine, err := begin(ctx, config)
	if err != nil {
		return err
	}
	defer func() { _ = engine.Close() }()
	for range demoHistory {
		if _, err := engine.Step(); err != nil {
			return err
		}
	}
	pub, replay := engine.Endpoints()
	if !a.wantsJSON(false) {
		_, err := fmt.Fprintf(a.stdout, demoHeader, pub, replay)
		if err != nil {
			return err
		}
	}
	running, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- engine.Run(running) }()
	err = a.tail(ctx, &kvcache.ZMQClientConfig{
		PodKey:         "demo",
		PubEndpoint:    pub,
		ReplayEndpoint: replay,
		StopTimeout:    stopPatience,
		Logger:         a.clientLog(),
	}, "")
	stop()
	return errors.Join(err, <-ended)
}
