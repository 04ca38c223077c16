// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package enginesim_test

import (
	"context"
	"fmt"
	"log"

	"github.com/kvtap/kvtap/enginesim"
)

// A test drives the engine itself: it submits requests, makes steps and compares what its subject has learnt from the
// endpoints with the engine's truth.
func Example() {
	engine, err := enginesim.New(enginesim.Config{
		PubEndpoint:    "tcp://127.0.0.1:0", // any free port
		ReplayEndpoint: "tcp://127.0.0.1:0",
		BlockSize:      4,
		Quiet:          true, // no requests but those below
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := engine.Start(context.Background()); err != nil {
		log.Fatal(err)
	}
	defer engine.Close()
	pub, replay := engine.Endpoints() // what the subject of the test is to listen to
	fmt.Println("bound:", pub != "" && replay != "")

	hello := []uint32{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}
	first := engine.Submit(enginesim.Request{Prompt: hello})
	if _, err := engine.Step(); err != nil {
		log.Fatal(err)
	}
	second := engine.Submit(enginesim.Request{Prompt: append(hello, 11, 12, 13)})
	if _, err := engine.Step(); err != nil {
		log.Fatal(err)
	}
	fmt.Println("reused tokens:", (<-first).CachedTokens, (<-second).CachedTokens)

	held, next := engine.Truth()
	fmt.Println("blocks held:", len(held), "after batches:", next)
	// Output:
	// bound: true
	// reused tokens: 0 8
	// blocks held: 3 after batches: 2
}

// Requests can be made up for as long as a demonstration lasts.
func ExampleEngine_Run() {
	engine, err := enginesim.New(enginesim.Config{RequestsPerSecond: 200, Seed: 1, NoReplay: true})
	if err != nil {
		log.Fatal(err)
	}
	defer engine.Close()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- engine.Run(ctx) }()
	for engine.Stats().Batches < 3 {
		if _, err := engine.Step(); err != nil { // in a hurry
			log.Fatal(err)
		}
	}
	cancel()
	fmt.Println(<-ended)
	// Output: <nil>
}

// A test of what its subject makes of an engine's misfortunes injects them, heals the engine and compares.
func ExampleEngine_Inject() {
	engine, err := enginesim.New(enginesim.Config{
		PubEndpoint:    "tcp://127.0.0.1:0",
		ReplayEndpoint: "tcp://127.0.0.1:0",
		Faults: enginesim.Script{ // by Step
			{Step: 3, Fault: enginesim.Fault{Kind: enginesim.FaultDropLive, N: 2}},
			{Step: 6, Fault: enginesim.Fault{Kind: enginesim.FaultBurn}},
		},
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := engine.Start(context.Background()); err != nil {
		log.Fatal(err)
	}
	defer engine.Close()
	for range 10 {
		if _, err := engine.Step(); err != nil {
			log.Fatal(err)
		}
	}
	_, next := engine.Truth()
	fmt.Println("life", engine.Life(), "- the next number is", next)

	// A process that is gone publishes nothing, and its successor knows nothing.
	if err := engine.Inject(enginesim.Fault{Kind: enginesim.FaultKill}); err != nil {
		log.Fatal(err)
	}
	published, err := engine.Step()
	fmt.Println("published:", published, err)
	engine.Heal()
	held, next := engine.Truth()
	fmt.Println("life", engine.Life(), "- blocks held:", len(held), "- the next number is", next)
	// Output:
	// life 0 - the next number is 11
	// published: false <nil>
	// life 1 - blocks held: 0 - the next number is 0
}
