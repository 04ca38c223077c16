// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache_test

import (
	"context"
	"fmt"
	"log"
	"net/url"
	"strconv"

	"github.com/kvtap/kvtap/enginesim"
	"github.com/kvtap/kvtap/event"
	"github.com/kvtap/kvtap/kvcache"
)

// MyCacheManager is what a gateway has: something that wants to know of blocks.
type MyCacheManager struct {
	cache cache
}

type cache interface {
	StoreBlock(pod string, hash int64, tokens []int32)
	RemoveBlock(pod string, hash int64)
	ClearPod(pod string)
}

func (m *MyCacheManager) HandleEvent(event kvcache.KVEvent) error {
	switch e := event.(type) {
	case *kvcache.BlockStoredEvent:
		for i, hash := range e.BlockHashes {
			tokens := e.TokenIDs[i]
			m.cache.StoreBlock(e.PodName, hash, tokens)
		}
	case *kvcache.BlockRemovedEvent:
		for _, hash := range e.BlockHashes {
			m.cache.RemoveBlock(e.PodName, hash)
		}
	case *kvcache.AllBlocksClearedEvent:
		m.cache.ClearPod(e.PodName)
	}
	return nil
}

// printed is a cache that says what it is told, and when it has heard of a clear.
type printed struct{ cleared chan struct{} }

func (printed) StoreBlock(pod string, hash int64, tokens []int32) {
	fmt.Println(pod, "stored", hash, tokens)
}
func (printed) RemoveBlock(pod string, hash int64) { fmt.Println(pod, "removed", hash) }
func (p printed) ClearPod(pod string) {
	fmt.Println(pod, "cleared")
	close(p.cleared)
}

// A gateway follows one engine.
func ExampleZMQClient() {
	engine := exampleEngine() // a real one listens at the pod's IP, ports 5557 and 5558
	defer func() { _ = engine.Close() }()
	pubPort, replayPort := ports(engine)
	cleared := make(chan struct{})
	cacheManager := &MyCacheManager{cache: printed{cleared}}

	config := kvcache.DefaultZMQClientConfig("default/llama-0", "127.0.0.1", "llama")
	config.PubPort, config.RouterPort = pubPort, replayPort
	client := kvcache.NewZMQClient(config, cacheManager)
	if err := client.Start(); err != nil {
		log.Fatal(err)
	}
	defer client.Stop()

	<-cleared
	// Output:
	// default/llama-0 stored 11 [1 2]
	// default/llama-0 stored 12 [3 4]
	// default/llama-0 removed 12
	// default/llama-0 cleared
}

// exampleEngine is an engine that has published three batches before anybody listened.
func exampleEngine() *enginesim.Engine {
	engine, err := enginesim.New(enginesim.Config{
		PubEndpoint: "tcp://127.0.0.1:0", ReplayEndpoint: "tcp://127.0.0.1:0", Quiet: true,
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := engine.Start(context.Background()); err != nil {
		log.Fatal(err)
	}
	for _, e := range []event.Event{
		{
			Type: event.BlockStored, Map: true, Hashes: []event.Hash{11, 12}, Tokens: []uint32{1, 2, 3, 4}, Stride: 1,
			BlockSize: event.Some(int64(2)),
		},
		{Type: event.BlockRemoved, Map: true, Hashes: []event.Hash{12}},
		{Type: event.AllBlocksCleared, Map: true},
	} {
		if err := engine.PublishBatch(&event.Batch{Time: event.Some(0.0), Events: []event.Event{e}}); err != nil {
			log.Fatal(err)
		}
	}
	return engine
}

// ports returns the TCP ports of an engine.
func ports(engine *enginesim.Engine) (pub, replay int) {
	pubEndpoint, replayEndpoint := engine.Endpoints()
	return port(pubEndpoint), port(replayEndpoint)
}

func port(endpoint string) int {
	u, err := url.Parse(endpoint)
	if err != nil {
		log.Fatal(err)
	}
	n, err := strconv.Atoi(u.Port())
	if err != nil {
		log.Fatal(err)
	}
	return n
}
