// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache_test

import (
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvtap/kvtap/event"
	"github.com/kvtap/kvtap/kvcache"
)

func TestEncodedBatchesDecodeToThemselves(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 9, 10, 10, 26, 40, 123_457_000, time.UTC)
	batch := &kvcache.EventBatch{
		Timestamp:        at,
		DataParallelRank: new(3),
		Events: []kvcache.KVEvent{
			&kvcache.BlockStoredEvent{
				Type: kvcache.EventTypeBlockStored, Timestamp: at, DataParallelRank: 3,
				BlockHashes: []int64{1, -2}, TokenIDs: [][]int32{{1, 2}, {3, 4}}, TokenStride: 1, BlockSize: 2,
				ParentBlockHash: new(int64(-9)), LoraID: new(int64(7)), LoraName: new("sql"), Medium: new("GPU"),
				GroupIdx: new(int64(0)), Locality: new("REMOTE"), SpecKind: new("sliding_window"),
				SlidingWindow: new(int64(64)), Ownership: new(""), SessionID: new("s-1"),
				ExtraKeys: []event.BlockKeys{{{Kind: event.KeyTextOffset, Text: []byte("image"), Number: -3}}, nil},
			},
			&kvcache.BlockStoredEvent{
				Type: kvcache.EventTypeBlockStored, Timestamp: at, DataParallelRank: 3, BlockHashes: []int64{6},
				TokenIDs: [][]int32{nil}, TokenStride: 1, Medium: new("CPU"),
			},
			&kvcache.BlockRemovedEvent{
				Type: kvcache.EventTypeBlockRemoved, Timestamp: at, DataParallelRank: 3, BlockHashes: []int64{1},
				Medium: new("GPU"), GroupIdx: new(int64(0)), Locality: new("LOCAL"), Ownership: new("engine"),
			},
			&kvcache.AllBlocksClearedEvent{Type: kvcache.EventTypeAllCleared, Timestamp: at, DataParallelRank: 3},
		},
	}
	payload, err := kvcache.EncodeEventBatch(batch)
	if err != nil {
		t.Fatal(err)
	}
	got, err := kvcache.DecodeEventBatch(payload)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(batch, got); diff != "" {
		t.Errorf("(-encoded +decoded):\n%s", diff)
	}
}

func TestEncodeRefusesWhatItCannotSay(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		event kvcache.KVEvent
		want  string
	}{
		{
			"too few token lists",
			&kvcache.BlockStoredEvent{BlockHashes: []int64{1, 2}, TokenIDs: [][]int32{{1}}},
			"event 0: 1 entries in TokenIDs for 2 blocks",
		},
		{
			"blocks of unequal length",
			&kvcache.BlockStoredEvent{BlockHashes: []int64{1, 2}, TokenIDs: [][]int32{{1, 2}, {3}}},
			"block 1 has 1 token ids and block 0 has 2",
		},
		{
			"half a pair",
			&kvcache.BlockStoredEvent{BlockHashes: []int64{1}, TokenIDs: [][]int32{{1}}, TokenStride: 2},
			"2 per position",
		},
		{
			"a block size that is not the blocks'",
			&kvcache.BlockStoredEvent{BlockHashes: []int64{1}, TokenIDs: [][]int32{{1, 2}}, BlockSize: 4},
			"BlockSize is 4 and the blocks have 2 positions",
		},
		{
			"SGLang's salt, for which vLLM has no field",
			&kvcache.BlockStoredEvent{BlockHashes: []int64{1}, CacheSalt: new("tenant")},
			"cache_salt",
		},
		{
			"SGLang's pairs",
			&kvcache.BlockStoredEvent{BlockHashes: []int64{1}, TokenIDs: [][]int32{{1, 2, 2, 3}}, TokenStride: 2},
			"pairs",
		},
		{"no event", nil, "not an event: <nil>"},
	} {
		_, err := kvcache.EncodeEventBatch(&kvcache.EventBatch{Events: []kvcache.KVEvent{test.event}})
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %s", test.name, err, test.want)
		}
	}
	if _, err := kvcache.EncodeEventBatch(nil); err == nil {
		t.Error("no batch: no error")
	}
}

func TestDecodeEventBatchTellsBadPayloadsApart(t *testing.T) {
	t.Parallel()
	if _, err := kvcache.DecodeEventBatch([]byte{0x92}); !errors.Is(err, event.ErrMalformed) {
		t.Errorf("truncated: %v", err)
	}
	if _, err := kvcache.DecodeEventBatch([]byte{0x05}); !errors.Is(err, event.ErrNotBatch) {
		t.Errorf("a number: %v", err)
	}
	got, err := kvcache.DecodeEventBatch([]byte("\x92\x00\x91\x92\xa3New\x01"))
	if err != nil || got.Skipped != 1 || len(got.Events) != 0 || got.DataParallelRank != nil {
		t.Errorf("an unknown event: %+v, %v", got, err)
	}
}

func TestTimestampsAreUTCAndTruncatedToMicroseconds(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		ts   event.Opt[float64]
		want time.Time
	}{
		{event.Opt[float64]{}, time.Time{}},
		{event.Some(1757500000.25), time.Unix(1757500000, 250_000_000)},
		{event.Some(1757500000.123457), time.Unix(1757500000, 123_457_000)}, // its float64 is a little less
		{event.Some(2.5e-6), time.Unix(0, 2000)},
		{event.Some(math.MaxFloat64), time.Time{}},
	} {
		b := event.Batch{Time: test.ts, Events: []event.Event{{Type: event.AllBlocksCleared, Map: true}}}
		payload := []byte("\xb0AllBlocksCleared") // a bare event has no time
		if payload = append([]byte{0x91}, payload...); test.ts.OK {
			var err error
			if payload, err = b.Append(nil, event.VLLM032); err != nil {
				t.Fatal(err)
			}
		}
		got, err := kvcache.DecodeEventBatch(payload)
		if err != nil {
			t.Fatal(err)
		}
		if !got.Timestamp.Equal(test.want) || got.Timestamp.Location() != time.UTC {
			t.Errorf("%v: %v, want %v", test.ts, got.Timestamp, test.want)
		}
	}
	for us := range int64(100_000) { // every microsecond survives the way through a float64
		at := time.UnixMicro(1_757_500_000_000_000 + us*7).UTC()
		b := event.Batch{Time: event.Some(float64(at.UnixMicro()) / 1e6)}
		payload, err := b.Append(nil, event.VLLM032)
		if err != nil {
			t.Fatal(err)
		}
		got, err := kvcache.DecodeEventBatch(payload)
		if err != nil || !got.Timestamp.Equal(at) {
			t.Fatalf("%v came back as %v, %v", at, got.Timestamp, err)
		}
	}
}

func TestDecodeEventBatchReadsSGLangsPairs(t *testing.T) {
	t.Parallel()
	payload := []byte("\x92\x00\x91\x95\xabBlockStored\x92\x05\x06\xc0\x92\x92\x01\x02\x92\x02\x03\x01")
	got, err := kvcache.DecodeEventBatch(payload)
	if err != nil || len(got.Events) != 1 {
		t.Fatalf("%+v, %v", got, err)
	}
	e := got.Events[0].(*kvcache.BlockStoredEvent)
	if diff := cmp.Diff([][]int32{{1, 2}, {2, 3}}, e.TokenIDs); diff != "" || e.TokenStride != 2 || e.BlockSize != 1 {
		t.Errorf("stride %d, block size %d, tokens %v", e.TokenStride, e.BlockSize, e.TokenIDs)
	}
}

func TestTokenBytesAreBigEndian(t *testing.T) {
	t.Parallel()
	got := kvcache.TokenBytes([]byte{9}, []int32{1, 0x01020304, -1})
	want := []byte{9, 0, 0, 0, 1, 1, 2, 3, 4, 0xff, 0xff, 0xff, 0xff}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
