// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

//go:build e2e && unix

package e2e_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kvtap/kvtap/event"
	"github.com/kvtap/kvtap/internal/interop"
	"github.com/kvtap/kvtap/kvcache"
)

// follower is a client of one rank of an engine, and what its handler makes of what it is told: the fold after every
// batch, to be compared with the truth later.
type follower struct {
	name   string
	engine *engine
	rank   int
	client *kvcache.ZMQClient

	mu      sync.Mutex
	changed chan struct{} // closed and replaced at every call of the handler
	status  kvcache.Status
	fold    event.Fold
	next    uint64 // the number that the next batch must have
	life    int    // of the newest batch
	resets  []kvcache.Reason
	wrong   []string // what broke the client's promise
	pending []step   // not yet compared
	counts
	reported counts       // what of counts went into the table
	stream   bytes.Buffer // everything that was handed on, for whoever looks into a difference
}

// counts are what a follower has seen.
type counts struct {
	batches, replayed        int
	stored, removed, cleared int // events
	replays                  uint64
}

// step is the state after one batch.
type step struct {
	life int
	seq  uint64
	held []event.Held
}

// follow starts a client of one rank of the engine, which stops with tb. Through are a proxy of its events and one of
// its replays, or none.
func follow(tb testing.TB, e *engine, name string, rank int, through ...*interop.Proxy) *follower {
	tb.Helper()
	f := &follower{name: name, engine: e, rank: rank, changed: make(chan struct{})}
	log, err := os.Create(filepath.Join(e.folder, name+".log"))
	if err != nil {
		tb.Fatal(err)
	}
	config := &kvcache.ZMQClientConfig{
		PodKey:         name,
		PodIP:          "127.0.0.1",
		ModelName:      "tiny",
		PubPort:        e.pub + rank,
		RouterPort:     e.route + rank,
		Topic:          "kv-events",
		Rank:           rank,
		ReconnectDelay: 100 * time.Millisecond,
		VerifyInterval: 5 * time.Second,
		Logger:         slog.New(slog.NewTextHandler(log, nil)),
	}
	if len(through) > 0 {
		config.PubEndpoint, config.ReplayEndpoint = through[0].Endpoint(), through[1].Endpoint()
		config.PingInterval, config.PingTimeout = time.Second, 2*time.Second
	}
	f.client = kvcache.NewZMQClient(config, f)
	if err := f.client.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		f.stop(tb)
		if err := log.Close(); err != nil {
			tb.Error(err)
		}
	})
	return f
}

// stop ends the client. It may be called again.
func (f *follower) stop(tb testing.TB) {
	if err := f.client.Stop(); err != nil {
		tb.Errorf("%s: %v", f.name, err)
	}
}

// told ends a call of the handler.
func (f *follower) told() {
	close(f.changed)
	f.changed = make(chan struct{})
	f.mu.Unlock()
}

func (f *follower) HandleEvent(kvcache.KVEvent) error {
	f.mu.Lock()
	defer f.told()
	f.wrong = append(f.wrong, "a handler of batches was given an event")
	return nil
}

func (f *follower) HandleStatus(status kvcache.Status) {
	f.mu.Lock()
	defer f.told()
	f.status = status
}

func (f *follower) HandleReset(reset kvcache.Reset) error {
	f.mu.Lock()
	defer f.told()
	f.resets = append(f.resets, reset.Reason)
	f.fold.Clear()
	f.next = 0
	fmt.Fprintf(&f.stream, "# reset: %s\n", reset.Reason)
	return nil
}

func (f *follower) HandleBatch(batch *event.Batch, info kvcache.BatchInfo) error {
	f.mu.Lock()
	defer f.told()
	fmt.Fprintf(&f.stream, "%d %x\n", info.Sequence, info.Payload)
	life := f.engine.lifeAt(batch.Time.V)
	if info.Sequence != f.next {
		f.wrong = append(f.wrong, fmt.Sprintf("batch %d came where %d was due", info.Sequence, f.next))
	}
	if life < f.life || life > f.life && info.Sequence != 0 {
		f.wrong = append(f.wrong, fmt.Sprintf("batch %d of life %d came after life %d", info.Sequence, life, f.life))
	}
	if info.Rank != f.rank {
		f.wrong = append(f.wrong, fmt.Sprintf("batch %d is of rank %d, not %d", info.Sequence, info.Rank, f.rank))
	}
	for _, skip := range batch.Skipped {
		f.wrong = append(f.wrong,
			fmt.Sprintf("batch %d has an unreadable event: %s: %s", info.Sequence, skip.Tag, skip.Reason))
	}
	if batch.UnknownFields > 0 {
		f.wrong = append(f.wrong, fmt.Sprintf("batch %d has %d unknown fields", info.Sequence, batch.UnknownFields))
	}
	unmatched := f.fold.UnmatchedRemoves()
	f.fold.Apply(batch)
	if n := f.fold.UnmatchedRemoves() - unmatched; n > 0 {
		f.wrong = append(f.wrong, fmt.Sprintf("batch %d removes %d blocks that were not there", info.Sequence, n))
	}
	f.life, f.next = life, info.Sequence+1
	f.pending = append(f.pending, step{life, info.Sequence, slices.Collect(f.all())})
	f.batches++
	if info.Replayed {
		f.replayed++
	}
	for i := range batch.Events {
		switch batch.Events[i].Type {
		case event.BlockStored:
			f.stored++
		case event.BlockRemoved:
			f.removed++
		case event.AllBlocksCleared:
			f.cleared++
		}
	}
	return nil
}

// all yields what the fold holds.
func (f *follower) all() func(yield func(event.Held) bool) {
	return func(yield func(event.Held) bool) {
		for place, copies := range f.fold.All() {
			if !yield(event.Held{Place: place, Copies: copies}) {
				return
			}
		}
	}
}

// await waits until ok says so of the follower, which is locked meanwhile.
func (f *follower) await(ctx context.Context, t testing.TB, what string, ok func() bool) {
	t.Helper()
	every := time.NewTicker(50 * time.Millisecond) // what ok asks for may be of the engine
	defer every.Stop()
	for {
		f.mu.Lock()
		done, changed := ok(), f.changed
		state := fmt.Sprintf("%+v, %d of life %d next", f.status, f.next, f.life)
		f.mu.Unlock()
		if done {
			return
		}
		select {
		case <-changed:
		case <-every.C:
		case <-ctx.Done():
			t.Fatalf("%s: waited in vain until %s: %s", f.name, what, state)
		}
	}
}

// settle waits until the follower has every batch of the engine, and says that it is live and exact.
func (f *follower) settle(ctx context.Context, t testing.TB) {
	t.Helper()
	_, life := f.engine.now()
	var failed error
	f.await(ctx, t, "it has what the engine published and is live and exact", func() bool {
		published, err := f.engine.published(f.rank)
		failed = errors.Join(failed, err)
		complete := published == 0 || f.life == life && f.next == uint64(published)
		return failed != nil || complete && f.status.State == kvcache.StateLive && f.status.Bound == kvcache.BoundExact
	})
	if failed != nil {
		t.Fatal(failed)
	}
}

// compare holds the steps since the last call against the truth.
func (f *follower) compare(t testing.TB, exact bool, c *comparison) {
	t.Helper()
	f.mu.Lock()
	steps := f.pending
	f.pending = nil
	f.mu.Unlock()
	differences := c.differences
	lives := f.engine.all()
	for _, s := range steps {
		tr := lives[s.life].truths[f.rank]
		if _, err := tr.count(); err != nil {
			t.Fatal(err)
		}
		held, err := tr.held(s.seq)
		if err != nil {
			t.Fatalf("%s: %v", f.name, err)
		}
		c.add(s.seq, s.held, held, exact)
	}
	if c.differences > differences {
		f.mu.Lock()
		defer f.mu.Unlock()
		path := filepath.Join(f.engine.folder, f.name+".stream.txt")
		if err := os.WriteFile(path, f.stream.Bytes(), 0o600); err != nil {
			t.Error(err)
		}
		t.Errorf("%s differs from the engine at %d places; its batches are in %s:\n%s", f.name,
			c.differences-differences, path, strings.Join(c.shown, "\n"))
	}
}

// report returns what has happened since the last call: what broke the client's promise, the resets, and counts.
func (f *follower) report() (wrong []string, resets []kvcache.Reason, seen counts) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.replays = f.client.Stats().Replays
	seen.add(f.counts, f.reported)
	wrong, resets = f.wrong, f.resets
	f.wrong, f.resets, f.reported = nil, nil, f.counts
	return wrong, resets, seen
}

// position returns the number that the next batch must have.
func (f *follower) position() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return int(f.next)
}
