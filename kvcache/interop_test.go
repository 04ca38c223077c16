// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache_test

import (
	"bufio"
	"compress/gzip"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvtap/kvtap/event"
	"github.com/kvtap/kvtap/internal/interop"
	"github.com/kvtap/kvtap/kvcache"
)

// collector is a handler that keeps what came since the last reset.
type collector struct {
	events
	mu       sync.Mutex
	payloads map[uint64]string // in hex
	order    []uint64
	resets   []kvcache.Reason
	fold     event.Fold
	before   func(kvcache.BatchInfo)     // called first with each batch, if set
	told     map[kvcache.State]time.Time // when each state was told of last
	changed  chan struct{}               // has room for one
}

func newCollector() *collector {
	return &collector{told: map[kvcache.State]time.Time{}, changed: make(chan struct{}, 1)}
}

func (c *collector) HandleBatch(b *event.Batch, info kvcache.BatchInfo) error {
	if c.before != nil {
		c.before(info)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.payloads == nil {
		c.payloads = map[uint64]string{}
	}
	c.payloads[info.Sequence] = hex.EncodeToString(info.Payload)
	c.order = append(c.order, info.Sequence)
	c.fold.Apply(b)
	c.tell()
	return nil
}

func (c *collector) HandleReset(r kvcache.Reset) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.payloads, c.order = nil, nil
	c.fold.Clear()
	c.resets = append(c.resets, r.Reason)
	c.tell()
	return nil
}

func (c *collector) HandleStatus(s kvcache.Status) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.told[s.State] = time.Now()
	c.tell()
}

func (c *collector) tell() {
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

// wait returns once ok is true, which is asked again after every call of the handler, and now and then for what no call
// tells of.
func (c *collector) wait(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(time.Minute)
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	for {
		c.mu.Lock()
		done := ok()
		order, resets := c.order, c.resets
		c.mu.Unlock()
		if done {
			return
		}
		select {
		case <-c.changed:
		case <-ticker.C:
		case <-deadline:
			t.Fatalf("waiting for %s: %d batches since the last reset, resets %v", what, len(order), resets)
		}
	}
}

// recorded returns the payloads of a recorded stream, in hex.
func recorded(t testing.TB, path string) (payloads []string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	zr, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(zr)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		seq, payload, _ := strings.Cut(lines.Text(), " ")
		if seq != strconv.Itoa(len(payloads)) {
			t.Fatalf("%s: batch %s at line %d", path, seq, len(payloads)+1)
		}
		payloads = append(payloads, payload)
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
	return payloads
}

// truth returns what the engine of a stream held at its end, {"hash:group": copies}.
func truth(t *testing.T, path string) map[string]int64 {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	held := map[string]int64{}
	if err := json.Unmarshal(text, &held); err != nil {
		t.Fatal(err)
	}
	return held
}

// The stream of a serving vLLM, through libzmq's own sockets: half is published before the client starts, some batches
// are lost on the way, and then the engine dies and another begins.
func TestClientFollowsAPublisherOfLibzmq(t *testing.T) {
	t.Parallel()
	const name = "real-v0.32.0-hybrid"
	stream := filepath.Join("..", "testdata", "streams", name+".txt.gz")
	want := recorded(t, stream)
	held := truth(t, filepath.Join("..", "testdata", "streams", name+".truth.json"))
	for _, framing := range []string{"old", "new"} {
		t.Run(framing, func(t *testing.T) {
			t.Parallel()
			start := func(args ...string) *interop.Peer {
				return interop.Start(t, append([]string{
					"publish", "--stream", stream, "--topic", "kv-events", "--framing", framing, "--xpub",
				}, args...)...)
			}
			publisher := start()
			publisher.Say("publish 200")
			publisher.Expect("published")

			c := newCollector()
			client := kvcache.NewZMQClient(&kvcache.ZMQClientConfig{
				PodKey:         "libzmq " + framing,
				PubEndpoint:    publisher.Endpoint("pub"),
				ReplayEndpoint: publisher.Endpoint("replay"),
				ReconnectDelay: 50 * time.Millisecond,
			}, c)
			if err := client.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := client.Stop(); err != nil {
					t.Error(err)
				}
			}()
			c.wait(t, "what was published before", func() bool { return len(c.order) == 200 })
			publisher.Say("publish 50")
			publisher.Say("lose 40")
			publisher.Say("publish all")
			all := func() bool { return len(c.order) == len(want) }
			c.wait(t, "the rest", all)
			c.check(t, want, held)

			// Another process on the same ports, with the same numbers and other bytes at the last of them.
			pub, replay := publisher.Endpoint("pub"), publisher.Endpoint("replay")
			publisher.Stop()
			publisher = start("--pub", pub, "--replay", replay)
			publisher.Say(fmt.Sprintf("publish %d", len(want)-1))
			publisher.Say(fmt.Sprintf("send %d %s", len(want)-1, want[0]))
			c.wait(t, "the restarted engine", func() bool {
				return len(c.resets) == 2 && len(c.order) == len(want)
			})
			c.mu.Lock()
			defer c.mu.Unlock()
			if diff := cmp.Diff([]kvcache.Reason{kvcache.ReasonStart, kvcache.ReasonRestart}, c.resets); diff != "" {
				t.Errorf("resets (-want +got):\n%s", diff)
			}
			if s := client.State(); s.Bound != kvcache.BoundExact {
				t.Errorf("status %+v", s)
			}
		})
	}
}

// check compares what came with what was published and what the engine held.
func (c *collector) check(t *testing.T, want []string, held map[string]int64) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, seq := range c.order {
		if seq != uint64(i) || c.payloads[seq] != want[i] {
			t.Fatalf("batch %d came at place %d, or with other bytes", seq, i)
		}
	}
	got := map[string]int64{}
	for place, copies := range c.fold.All() {
		got[fmt.Sprintf("%d:%d", uint64(place.Hash), place.Group.V)] += copies.Upper
	}
	if diff := cmp.Diff(held, got); diff != "" {
		t.Errorf("held (-engine +fold):\n%s", diff)
	}
}
