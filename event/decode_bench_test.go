// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package event_test

import (
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/kvtap/kvtap/event"
)

// prompt is a store of 16 blocks of 16 tokens from a vocabulary of this size. Token ids take more bytes, of more
// different lengths, the larger it is.
func prompt(vocabulary uint32) event.Event {
	r := rand.New(rand.NewPCG(1, 2))
	e := event.Event{
		Type: event.BlockStored, Stride: 1, BlockSize: event.Some(int64(16)), Medium: []byte("GPU"),
		Hashes: make([]event.Hash, 16), Tokens: make([]uint32, 256),
	}
	for i := range e.Hashes {
		e.Hashes[i] = event.Hash(r.Uint64())
	}
	for i := range e.Tokens {
		e.Tokens[i] = r.Uint32N(vocabulary)
	}
	return e
}

func encode(tb testing.TB, f event.Form, events ...event.Event) []byte {
	tb.Helper()
	b := event.Batch{Time: event.Some(1757500000.25), Rank: event.Some(int64(0)), Events: events}
	p, err := b.Append(nil, f)
	if err != nil {
		tb.Fatal(err)
	}
	return p
}

// benchmarkPayloads are the batches that an engine sends most.
func benchmarkPayloads(tb testing.TB) map[string][]byte {
	tb.Helper()
	small, large := prompt(512), prompt(128_000)
	grouped := small
	grouped.Group, grouped.SpecKind = event.Some(int64(0)), []byte("full_attention")
	var removed []event.Event
	for _, h := range small.Hashes {
		removed = append(removed, event.Event{
			Type: event.BlockRemoved, Hashes: []event.Hash{h}, Medium: []byte("GPU"), Group: event.Some(int64(0)),
		})
	}
	return map[string][]byte{
		"array":                  encode(tb, event.VLLM014, small),
		"array large vocabulary": encode(tb, event.VLLM014, large),
		"map":                    encode(tb, event.VLLM032, grouped),
		"hybrid":                 stream(tb, "real-v0.32.0-hybrid")[0],
		"removed":                encode(tb, event.VLLM032, removed...),
	}
}

func BenchmarkDecode(b *testing.B) {
	payloads := benchmarkPayloads(b)
	for _, name := range slices.Sorted(maps.Keys(payloads)) {
		payload := payloads[name]
		b.Run(name, func(b *testing.B) {
			var batch event.Batch
			b.ReportAllocs()
			b.SetBytes(int64(len(payload)))
			for b.Loop() {
				if err := batch.Decode(payload); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
