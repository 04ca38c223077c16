// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

//go:build e2e && unix

package e2e_test

import (
	"context"
	"fmt"
	"hash/maphash"
	"maps"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/kvtap/kvtap/event"
	"github.com/kvtap/kvtap/kvcache"
)

// An engine that runs elsewhere tells nobody what it holds. What can be seen from outside: that its stream is complete
// and readable, that two clients which came at different times were told the same, and that nothing is removed that was
// not there.
func TestEngineElsewhere(t *testing.T) {
	pub, replay := os.Getenv("KVTAP_E2E_PUB"), os.Getenv("KVTAP_E2E_REPLAY")
	if pub == "" {
		t.Skip("KVTAP_E2E_PUB names no engine elsewhere")
	}
	span, err := time.ParseDuration(os.Getenv("KVTAP_E2E_FOR"))
	if err != nil {
		t.Fatalf("KVTAP_E2E_FOR: %v", err)
	}
	rank, err := strconv.Atoi(os.Getenv("KVTAP_E2E_RANK"))
	if err != nil {
		t.Fatalf("KVTAP_E2E_RANK: %v", err)
	}
	config := kvcache.ZMQClientConfig{
		PodKey:         "elsewhere",
		ModelName:      "elsewhere",
		PubEndpoint:    pub,
		ReplayEndpoint: replay,
		NoReplay:       replay == "",
		Topic:          os.Getenv("KVTAP_E2E_TOPIC"),
		Rank:           rank,
		VerifyInterval: 2 * time.Second,
	}
	ctx, cancel := deadline(t)
	defer cancel()

	first := watch(t, config)
	// Longer than a replay that is given up takes. An engine that is down is not waited for.
	soon, done := context.WithTimeout(ctx, time.Minute)
	defer done()
	first.await(soon, t, "it is live", first.live)
	over := time.NewTimer(span)
	defer over.Stop()
	select {
	case <-over.C:
	case <-ctx.Done():
		t.Fatal(ctx.Err())
	}
	second := watch(t, config)
	second.await(ctx, t, "it is live", second.live)
	reached := first.position()
	second.await(ctx, t, fmt.Sprintf("it has the %d batches of the first client", reached), func() bool {
		return second.next >= reached || second.life > 0
	})
	if replay != "" {
		// A batch in order shows that none is missing before it. Where none comes, the client asks.
		asked := time.Now()
		first.await(ctx, t, "the end of its stream was verified", func() bool {
			return first.client.State().ObservedAt.After(asked)
		})
	}
	for _, w := range []*watcher{first, second} {
		if err := w.client.Stop(); err != nil {
			t.Error(err)
		}
		w.judge(t, replay != "")
	}
	if first.life+second.life > 0 {
		t.Log("the engine restarted meanwhile, so that the two clients are not compared")
		return
	}
	both := 0
	for seq, digest := range second.digests {
		if other, ok := first.digests[seq]; ok {
			if both++; other != digest {
				t.Errorf("batch %d is not the same for both clients", seq)
			}
		}
	}
	if both == 0 && replay != "" {
		t.Error("the clients have no batch in common")
	}
	t.Logf("%d batches were the same for both clients", both)
}

// watcher is a client of an engine elsewhere.
type watcher struct {
	client *kvcache.ZMQClient

	mu      sync.Mutex
	fold    event.Fold
	status  kvcache.Status
	next    uint64
	missing uint64 // numbers between those that came
	life    int    // restarts
	resets  []kvcache.Reason
	media   map[string]bool // of stored blocks
	skipped int
	digests map[uint64]uint64 // of payloads, by number, in the present life
}

// seed is that of all watchers, so that digests can be compared.
var seed = maphash.MakeSeed()

func watch(t *testing.T, config kvcache.ZMQClientConfig) *watcher {
	t.Helper()
	w := &watcher{media: map[string]bool{}, digests: map[uint64]uint64{}}
	w.client = kvcache.NewZMQClient(&config, w)
	if err := w.client.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.client.Stop(); err != nil {
			t.Error(err)
		}
	})
	return w
}

func (w *watcher) HandleEvent(kvcache.KVEvent) error { return nil } // batches come whole

func (w *watcher) HandleStatus(status kvcache.Status) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.status = status
}

func (w *watcher) HandleReset(reset kvcache.Reset) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.resets = append(w.resets, reset.Reason)
	if reset.Reason == kvcache.ReasonRestart {
		w.life++
	}
	w.fold.Clear()
	clear(w.digests)
	w.next, w.missing = 0, 0
	return nil
}

func (w *watcher) HandleBatch(batch *event.Batch, info kvcache.BatchInfo) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.digests) > 0 {
		w.missing += info.Sequence - w.next
	}
	w.next = info.Sequence + 1
	w.digests[info.Sequence] = maphash.Bytes(seed, info.Payload)
	w.skipped += len(batch.Skipped)
	for i := range batch.Events {
		if e := &batch.Events[i]; e.Type == event.BlockStored {
			w.media[string(e.Medium)] = true
		}
	}
	w.fold.Apply(batch)
	return nil
}

// live reports whether the client is live; callers hold mu.
func (w *watcher) live() bool { return w.status.State == kvcache.StateLive }

func (w *watcher) position() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.next
}

// await waits until ok says so of the watcher, which is locked meanwhile.
func (w *watcher) await(ctx context.Context, t *testing.T, what string, ok func() bool) {
	t.Helper()
	every := time.NewTicker(50 * time.Millisecond)
	defer every.Stop()
	for {
		w.mu.Lock()
		done := ok()
		state := fmt.Sprintf("%+v", w.status)
		w.mu.Unlock()
		if done {
			return
		}
		select {
		case <-every.C:
		case <-ctx.Done():
			t.Fatalf("waited in vain until %s: %s; now %+v", what, state, w.client.State())
		}
	}
}

// judge says what is wrong with what a stopped client was told.
func (w *watcher) judge(t *testing.T, replays bool) {
	t.Helper()
	stats := w.client.Stats()
	media := slices.Sorted(maps.Keys(w.media))
	sure := 0
	for _, copies := range w.fold.All() {
		if copies.Lower > 0 {
			sure++
		}
	}
	t.Logf("%s, %s %s: %d batches (%d replayed), next is %d; %d places hold blocks, %d more may; media %q; resets %q",
		w.status.State, w.status.Bound, w.status.Reason, stats.Batches, stats.Replayed, w.next, sure, w.fold.Len()-sure,
		media, w.resets)
	if stats.Batches == 0 {
		t.Error("nothing came: is it the engine's own endpoint and topic, and has it had a request?")
	}
	if w.skipped > 0 || stats.Unreadable > 0 {
		t.Errorf("%d events and %d messages could not be read", w.skipped, stats.Unreadable)
	}
	if w.missing > stats.Burned {
		t.Errorf("%d numbers are missing, of which the engine never used %d", w.missing, stats.Burned)
	}
	for _, reason := range w.resets {
		if reason != kvcache.ReasonStart && reason != kvcache.ReasonRestart {
			t.Errorf("history was lost: %s", reason)
		}
	}
	switch {
	case w.status.Bound == kvcache.BoundExact:
		// One connector names another medium in removals than in stores, which is no loss.
		if n := w.fold.UnmatchedRemoves(); n > 0 && len(media) == 1 {
			t.Errorf("%d removals of blocks that were not there", n)
		}
	case !replays:
		t.Log("without a replay endpoint nothing is known of what came before")
	case w.status.Reason == kvcache.ReasonLateStart:
		t.Log("the engine no longer had its first batches: it holds at least what is known")
	default:
		t.Errorf("the state is not exact: %s, %s", w.status.Bound, w.status.Reason)
	}
}
