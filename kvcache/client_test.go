// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/kvtap/kvtap/enginesim"
	"github.com/kvtap/kvtap/event"
	"github.com/kvtap/kvtap/internal/memnet"
	"github.com/kvtap/kvtap/internal/zmtp"
	"github.com/kvtap/kvtap/kvcache"
)

const (
	pubEndpoint    = "tcp://127.0.0.1:5557"
	replayEndpoint = "tcp://127.0.0.1:5558"
)

// events is a handler of the plain kind; it keeps what it gets.
type events struct {
	mu   sync.Mutex
	got  []kvcache.KVEvent
	fail func(n int) error // called with the number of earlier events
}

func (h *events) HandleEvent(e kvcache.KVEvent) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.got = append(h.got, e)
	if h.fail != nil {
		return h.fail(len(h.got) - 1)
	}
	return nil
}

func (h *events) all() []kvcache.KVEvent {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.got)
}

// journal is a handler of every kind; it writes each call down, one word each.
type journal struct {
	mu      sync.Mutex
	lines   []string
	fold    event.Fold
	onBatch func(b *event.Batch, info kvcache.BatchInfo) error
}

func (j *journal) write(format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, fmt.Sprintf(format, args...))
}

func (j *journal) HandleEvent(kvcache.KVEvent) error {
	j.write("event")
	return nil
}

func (j *journal) HandleBatch(b *event.Batch, info kvcache.BatchInfo) error {
	how := ""
	if info.Replayed {
		how = "r"
	}
	j.write("%d%s", info.Sequence, how)
	j.mu.Lock()
	j.fold.Apply(b)
	onBatch := j.onBatch
	j.mu.Unlock()
	if onBatch != nil {
		return onBatch(b, info)
	}
	return nil
}

func (j *journal) HandleReset(r kvcache.Reset) error {
	j.write("reset:%s", r.Reason)
	j.mu.Lock()
	defer j.mu.Unlock()
	j.fold.Clear()
	return nil
}

func (j *journal) HandleStatus(s kvcache.Status) {
	j.write("%s/%s", s.State, s.Bound)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return strings.Join(j.lines, " ")
}

// checkTruth compares what the journal folded with what the engine holds.
func (j *journal) checkTruth(t *testing.T, e *enginesim.Engine) {
	t.Helper()
	want, _ := e.Truth()
	got := map[event.Hash]int{}
	j.mu.Lock()
	for place, copies := range j.fold.All() {
		got[place.Hash] += int(copies.Upper)
	}
	j.mu.Unlock()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the fold differs from what the engine holds (-engine +fold):\n%s", diff)
	}
}

// network is a test's network and what runs on it.
type network struct {
	t *testing.T
	memnet.Network
}

// engine starts a simulated engine that does nothing by itself.
func (n *network) engine(change func(*enginesim.Config)) *enginesim.Engine {
	n.t.Helper()
	config := enginesim.Config{
		PubEndpoint: pubEndpoint, ReplayEndpoint: replayEndpoint, Quiet: true, Listen: n.Listen, Dial: n.Dial,
	}
	if change != nil {
		change(&config)
	}
	e, err := enginesim.New(config)
	if err != nil {
		n.t.Fatal(err)
	}
	if err := e.Start(n.t.Context()); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() {
		if err := e.Close(); err != nil {
			n.t.Error(err)
		}
	})
	return e
}

func (n *network) config() *kvcache.ZMQClientConfig {
	config := kvcache.DefaultZMQClientConfig("default/pod-0", "127.0.0.1", "tiny")
	config.Dial, config.ListenFunc = n.Dial, n.Listen
	config.ReplayLimiter = kvcache.NewReplayLimiter(8) // channels stay in their bubble
	config.Registerer = prometheus.NewRegistry()
	return config
}

// client starts a client, which is stopped at the end of the test.
func (n *network) client(config *kvcache.ZMQClientConfig, h kvcache.EventHandler) *kvcache.ZMQClient {
	n.t.Helper()
	c := kvcache.NewZMQClient(config, h)
	if err := c.Start(); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = c.Stop() })
	return c
}

// inBubble runs a test with a network and a clock of its own.
func inBubble(t *testing.T, f func(t *testing.T, n *network)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(t, &network{t: t}) })
}

// publish sends batches that store one block each, named as given.
func publish(t *testing.T, e *enginesim.Engine, hashes ...event.Hash) {
	t.Helper()
	for _, h := range hashes {
		if err := e.Publish(stored(h)); err != nil {
			t.Fatal(err)
		}
	}
	synctest.Wait()
}

// stored returns a payload that stores one block of two tokens.
func stored(h event.Hash) []byte {
	return encode(event.Event{
		Type: event.BlockStored, Map: true, Hashes: []event.Hash{h}, Tokens: []uint32{7, 8}, Stride: 1,
		BlockSize: event.Some(int64(2)), Medium: []byte("GPU"), Group: event.Some(int64(0)),
	})
}

func encode(list ...event.Event) []byte {
	b := event.Batch{Time: event.Some(1757500000.25), Rank: event.Some(int64(0)), Events: list}
	payload, err := b.Append(nil, event.VLLM032)
	if err != nil {
		panic(err)
	}
	return payload
}

func expect(t *testing.T, j *journal, want string) {
	t.Helper()
	synctest.Wait()
	if got := j.String(); got != want {
		t.Errorf("the handler saw\n%s, want\n%s", got, want)
	}
}

func TestClientDeliversWhatWasPublishedBeforeAndAfterItsStart(t *testing.T) {
	t.Parallel()
	for _, framing := range []enginesim.Framing{enginesim.FramingTopic, enginesim.FramingNoTopic} {
		inBubble(t, func(t *testing.T, n *network) {
			e := n.engine(func(c *enginesim.Config) { c.Framing = framing })
			publish(t, e, 1, 2, 3)
			var j journal
			c := n.client(n.config(), &j)
			synctest.Wait()
			publish(t, e, 4, 5)
			expect(t, &j, "connecting/at_least reset:start syncing/at_least 0r syncing/exact 1r 2r live/exact 3 4")
			if !c.IsConnected() || c.GetLastSequence() != 4 {
				t.Errorf("connected %v, last sequence %d", c.IsConnected(), c.GetLastSequence())
			}
			s := c.State()
			if s.State != kvcache.StateLive || s.Bound != kvcache.BoundExact || s.Reason != "" || s.Err != "" ||
				!s.ObservedAt.Equal(time.Now()) {
				t.Errorf("status %+v", s)
			}
		})
	}
}

func TestClientDeliversTheEventsOfEngines(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(nil)
		var h events
		n.client(n.config(), &h)
		synctest.Wait()
		if err := e.Publish(encode(
			event.Event{
				Type: event.BlockStored, Map: true, Hashes: []event.Hash{1 << 63, 2}, Parent: event.Some(event.Hash(9)),
				Tokens: []uint32{1, 2, 3, 4}, Stride: 1, BlockSize: event.Some(int64(2)), LoRAID: event.Some(int64(3)),
				LoRAName: []byte("sql"), Medium: []byte("GPU"), Group: event.Some(int64(1)), SpecKind: []byte("full_attention"),
				ExtraKeys: []event.BlockKeys{nil, {{Kind: event.KeyText, Text: []byte("salt")}}},
			},
			event.Event{
				Type: event.BlockStored, Map: true, Hashes: []event.Hash{5, 6}, Tokens: []uint32{1, 2, 3}, Stride: 1,
				BlockSize: event.Some(int64(2)), Medium: []byte("GPU"), SlidingWindow: event.Some(int64(64)),
			},
			event.Event{Type: event.BlockRemoved, Map: true, Hashes: []event.Hash{2}, Medium: []byte("GPU")},
			event.Event{Type: event.AllBlocksCleared, Map: true},
		)); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		at := time.Unix(1757500000, 250_000_000).UTC()
		p := func(v int64) *int64 { return &v }
		s := func(v string) *string { return &v }
		want := []kvcache.KVEvent{
			&kvcache.BlockStoredEvent{
				Type: kvcache.EventTypeBlockStored, Timestamp: at, BlockHashes: []int64{-1 << 63, 2},
				TokenIDs: [][]int32{{1, 2}, {3, 4}}, TokenStride: 1, ParentBlockHash: p(9), BlockSize: 2, LoraID: p(3),
				LoraName: s("sql"), Medium: s("GPU"), GroupIdx: p(1), SpecKind: s("full_attention"),
				ExtraKeys: []event.BlockKeys{nil, {{Kind: event.KeyText, Text: []byte("salt")}}},
				ModelName: "tiny", PodName: "default/pod-0",
			},
			// The tokens do not line up with the blocks, yet there is an entry for each.
			&kvcache.BlockStoredEvent{
				Type: kvcache.EventTypeBlockStored, Timestamp: at, BlockHashes: []int64{5, 6}, TokenIDs: [][]int32{nil, nil},
				TokenStride: 1, BlockSize: 2, Medium: s("GPU"), SlidingWindow: p(64), ModelName: "tiny", PodName: "default/pod-0",
			},
			&kvcache.BlockRemovedEvent{
				Type: kvcache.EventTypeBlockRemoved, Timestamp: at, BlockHashes: []int64{2}, Medium: s("GPU"),
				ModelName: "tiny", PodName: "default/pod-0",
			},
			&kvcache.AllBlocksClearedEvent{
				Type: kvcache.EventTypeAllCleared, Timestamp: at, ModelName: "tiny", PodName: "default/pod-0",
			},
		}
		if diff := cmp.Diff(want, h.all()); diff != "" {
			t.Errorf("events (-want +got):\n%s", diff)
		}
		for _, e := range h.all() {
			if e.GetModelName() != "tiny" || e.GetPodName() != "default/pod-0" || !e.GetTimestamp().Equal(at) ||
				e.GetDataParallelRank() != 0 || e.GetType() == "" {
				t.Errorf("%T does not say where it is from", e)
			}
		}
	})
}

func TestClientNamesTheRankOfTheBatchElseTheConfiguredOne(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(nil)
		config := n.config()
		config.Rank = 3
		var h events
		n.client(config, &h)
		synctest.Wait()
		for _, rank := range []event.Opt[int64]{{}, event.Some(int64(1))} {
			b := event.Batch{Rank: rank, Time: event.Some(0.0), Events: []event.Event{{Type: event.AllBlocksCleared}}}
			payload, err := b.Append(nil, event.VLLM091)
			if err != nil {
				t.Fatal(err)
			}
			if err := e.Publish(payload); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		var got []int
		for _, e := range h.all() {
			got = append(got, e.GetDataParallelRank())
		}
		if !slices.Equal(got, []int{3, 1}) {
			t.Errorf("ranks %v, want 3, then 1", got)
		}
	})
}

func TestClientWaitsForAnEngineThatIsDown(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		var j journal
		c := n.client(n.config(), &j)
		time.Sleep(time.Minute)
		if s := c.State(); s.State != kvcache.StateConnecting || !strings.Contains(s.Err, "refused") || c.IsConnected() {
			t.Errorf("status %+v", s)
		}
		if c.GetLastSequence() != -1 {
			t.Errorf("last sequence %d before any batch", c.GetLastSequence())
		}
		e := n.engine(nil)
		time.Sleep(6 * time.Second) // a host that refuses is tried at least every 5 s
		publish(t, e, 1)
		expect(t, &j, "connecting/at_least reset:start syncing/at_least live/exact 0")
	})
}

func TestClientFollowsARestartedEngine(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(nil)
		var j journal
		c := n.client(n.config(), &j)
		synctest.Wait()
		publish(t, e, 1, 2)
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if s := c.State(); s.State != kvcache.StateRecovering || c.IsConnected() {
			t.Errorf("status of a client without its engine: %+v", s)
		}
		e = n.engine(nil)
		publish(t, e, 10, 11, 12) // the new life overtakes the old number before the client is back
		time.Sleep(6 * time.Second)
		publish(t, e, 13)
		expect(t, &j, "connecting/at_least reset:start syncing/at_least live/exact 0 1 recovering/exact "+
			"reset:restart recovering/at_least 0r recovering/exact 1r 2r live/exact 3")
	})
}

func TestClientGoesOnAfterALostConnection(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(nil)
		var j journal
		n.client(n.config(), &j)
		synctest.Wait()
		publish(t, e, 1)
		if err := n.Cut(); err != nil {
			t.Fatal(err)
		}
		publish(t, e, 2, 3)
		time.Sleep(time.Second)
		publish(t, e, 4)
		expect(t, &j, "connecting/at_least reset:start syncing/at_least live/exact 0 recovering/exact 1r 2r live/exact 3")
	})
}

func TestClientFillsAGap(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(nil)
		var j journal
		n.client(n.config(), &j)
		synctest.Wait()
		publish(t, e, 1)
		if err := e.PublishAt(4, stored(5)); err != nil { // 1 to 3 were burned
			t.Fatal(err)
		}
		synctest.Wait()
		publish(t, e, 6)
		expect(t, &j, "connecting/at_least reset:start syncing/at_least live/exact 0 recovering/exact 4r live/exact 5")
	})
}

func TestClientWithoutAReplayEndpointSaysWhatItDoesNotKnow(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		policy kvcache.Policy
		saw    string
	}{
		{
			kvcache.PolicyClear,
			"connecting/at_least reset:start live/at_least 0 live/exact reset:history_lost live/at_least 4",
		},
		{kvcache.PolicyKeep, "connecting/at_least reset:start live/at_least 0 live/exact live/unknown 4"},
	} {
		t.Run(test.policy.String(), func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, n *network) {
				e := n.engine(func(c *enginesim.Config) { c.NoReplay = true })
				config := n.config()
				config.NoReplay, config.HistoryLost = true, test.policy
				var j journal
				c := n.client(config, &j)
				synctest.Wait()
				publish(t, e, 1)
				if err := e.PublishAt(4, stored(5)); err != nil {
					t.Fatal(err)
				}
				expect(t, &j, test.saw)
				if s := c.State(); s.Reason != kvcache.ReasonHistoryLost {
					t.Errorf("reason %q", s.Reason)
				}
				if err := e.Publish(encode(event.Event{Type: event.AllBlocksCleared})); err != nil {
					t.Fatal(err)
				}
				expect(t, &j, test.saw+" 5 live/exact")
			})
		})
	}
}

func TestClientGivesUpOnAReplayEndpointThatDoesNotAnswer(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(func(c *enginesim.Config) { c.NoReplay = true })
		var j journal
		n.client(n.config(), &j)
		synctest.Wait()
		publish(t, e, 1, 2)
		time.Sleep(2 * time.Second)
		publish(t, e, 3)
		expect(t, &j, "connecting/at_least reset:start syncing/at_least 0 syncing/exact 1 live/exact 2")
	})
}

// router answers each replay request as answer says.
func (n *network) router(answer func(r *zmtp.Router, id string, frames [][]byte)) {
	n.t.Helper()
	o := &zmtp.Options{ListenFunc: n.Listen}
	l, err := zmtp.Listen(n.t.Context(), replayEndpoint, o)
	if err != nil {
		n.t.Fatal(err)
	}
	r := zmtp.NewRouter(o, 0)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = r.Serve(ctx, l) })
	wg.Go(func() {
		for {
			id, frames, err := r.Recv(ctx)
			if err != nil {
				return
			}
			answer(r, id, frames)
		}
	})
	n.t.Cleanup(func() {
		cancel()
		r.Close()
		wg.Wait()
	})
}

func TestClientSurvivesReplaysThatMakeNoSense(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]func(r *zmtp.Router, id string, frames [][]byte){
		"one frame":      func(r *zmtp.Router, id string, _ [][]byte) { r.Send(id, []byte("what?")) },
		"a short number": func(r *zmtp.Router, id string, _ [][]byte) { r.Send(id, nil, []byte{1, 2}, []byte("x")) },
		"silence":        func(*zmtp.Router, string, [][]byte) {},
		"an invalid number": func(r *zmtp.Router, id string, _ [][]byte) {
			r.Send(id, nil, []byte("\xff\xff\xff\xff\xff\xff\xff\xff"), []byte("x"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, n *network) {
				e := n.engine(func(c *enginesim.Config) { c.NoReplay = true })
				n.router(answer)
				var j journal
				n.client(n.config(), &j)
				synctest.Wait()
				publish(t, e, 1)
				time.Sleep(20 * time.Second)
				publish(t, e, 2)
				if got := j.String(); !strings.HasSuffix(got, " 1") || !strings.Contains(got, "live/") {
					t.Errorf("the handler saw %s", got)
				}
			})
		})
	}
}

func TestClientLetsTheHoldOverflowAndReplaysWhatItLost(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(func(c *enginesim.Config) { c.NoReplay = true })
		gate := make(chan struct{})
		number := func(seq uint64) []byte { return binary.BigEndian.AppendUint64(nil, seq) }
		var published atomic.Uint64
		published.Store(1)
		n.router(func(r *zmtp.Router, id string, _ [][]byte) {
			for seq := range published.Load() {
				r.Send(id, nil, number(seq), stored(event.Hash(seq+10)))
			}
			if published.Load() == 1 {
				<-gate // meanwhile live messages overflow the hold
				published.Store(5)
			}
			r.Send(id, nil, number(math.MaxUint64), nil)
		})
		config := n.config()
		config.HoldBudget = kvcache.NewHoldBudget(1) // nothing fits
		var j journal
		n.client(config, &j)
		synctest.Wait()
		publish(t, e, 10, 11, 12, 13, 14)
		close(gate)
		time.Sleep(10 * time.Second)
		published.Store(6)
		publish(t, e, 15)
		expect(t, &j, "connecting/at_least reset:start syncing/at_least 0r syncing/exact 1r 2r 3r 4r live/exact 5")
	})
}

func TestClientDoesNotForgetAMessageThatItHadNoRoomToHold(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(func(c *enginesim.Config) { c.NoReplay = true })
		n.router(func(r *zmtp.Router, id string, _ [][]byte) { // it never knows of batch 1
			r.Send(id, nil, make([]byte, 8), stored(10))
			r.Send(id, nil, []byte("\xff\xff\xff\xff\xff\xff\xff\xff"), nil)
		})
		config := n.config()
		config.HoldBudget = kvcache.NewHoldBudget(1)
		config.VerifyInterval = -1
		var j journal
		n.client(config, &j)
		synctest.Wait()
		if err := e.PublishAt(2, stored(12)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		expect(t, &j, "connecting/at_least reset:start syncing/at_least 0r syncing/exact live/exact recovering/exact "+
			"reset:history_lost live/at_least")
	})
}

func TestClientSkipsWhatItCannotReadAndSaysSo(t *testing.T) {
	t.Parallel()
	// A batch of two stores around an event that cannot be read.
	around := func(tag string) []byte {
		payload := []byte("\x92\xcb\x41\xda\x30\x54\x98\x10\x00\x00\x93")
		payload = append(payload, "\x95\xabBlockStored\x91\x01\xc0\x91\x05\x01"...)
		payload = append(payload, 0x92, 0xa0|byte(len(tag)))
		payload = append(payload, tag...)
		payload = append(payload, 0x05)
		return append(payload, "\x95\xabBlockStored\x91\x02\xc0\x91\x05\x01"...)
	}
	for _, test := range []struct {
		name    string
		payload []byte
		want    string
		held    []event.Hash
	}{
		{"a store", around("BlockStored"), "live/at_least 1 2", []event.Hash{1, 2, 9, 10}},
		{"an event of a kind to come", around("BlockTouched"), "live/at_least 1 2", []event.Hash{1, 2, 9, 10}},
		{"a removal", around("BlockRemoved"), "reset:unreadable live/at_least 1 2", []event.Hash{2, 10}},
		{"a batch", []byte("not msgpack"), "reset:unreadable live/at_least 2", []event.Hash{10}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, n *network) {
				e := n.engine(nil)
				var j journal
				n.client(n.config(), &j)
				synctest.Wait()
				publish(t, e, 9)
				if err := e.Publish(test.payload); err != nil {
					t.Fatal(err)
				}
				publish(t, e, 10)
				expect(t, &j, "connecting/at_least reset:start syncing/at_least live/exact 0 "+test.want)
				var held []event.Hash
				for _, h := range j.fold.Sorted() {
					held = append(held, h.Hash)
				}
				if !slices.Equal(held, test.held) {
					t.Errorf("held %v, want %v", held, test.held)
				}
			})
		})
	}
}

func TestClientOutlivesItsHandlersFaults(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(nil)
		h := events{fail: func(i int) error {
			switch i {
			case 0:
				return errors.New("not today")
			case 1:
				panic("ouch")
			}
			return nil
		}}
		n.client(n.config(), &h)
		synctest.Wait()
		publish(t, e, 1, 2, 3)
		if got := len(h.all()); got != 3 {
			t.Errorf("%d events, want 3", got)
		}
	})
}

func TestClientHandsPayloadsOnBeforeDecodingThem(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(func(c *enginesim.Config) { c.Topic = "kv@pod@tiny" })
		var got []string
		h := payloads(func(info kvcache.BatchInfo) error {
			got = append(got, fmt.Sprintf("%d %s %x", info.Sequence, info.Topic, info.Payload))
			return nil
		})
		n.client(n.config(), h)
		synctest.Wait()
		for _, payload := range [][]byte{stored(1), []byte("junk")} {
			if err := e.Publish(payload); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		want := []string{fmt.Sprintf("0 kv@pod@tiny %x", stored(1)), fmt.Sprintf("1 kv@pod@tiny %x", "junk")}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("payloads (-want +got):\n%s", diff)
		}
	})
}

type payloads func(info kvcache.BatchInfo) error

func (payloads) HandleEvent(kvcache.KVEvent) error            { return nil }
func (f payloads) HandlePayload(info kvcache.BatchInfo) error { return f(info) }

func TestClientIgnoresMessagesThatAreNoBatches(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		o := &zmtp.Options{ListenFunc: n.Listen}
		l, err := zmtp.Listen(t.Context(), pubEndpoint, o)
		if err != nil {
			t.Fatal(err)
		}
		p := zmtp.NewPublisher(o, 0)
		go func() { _ = p.Serve(t.Context(), l) }()
		defer p.Close()
		config := n.config()
		config.NoReplay = true
		var j journal
		n.client(config, &j)
		synctest.Wait()
		seq := func(n byte) []byte { return []byte{0, 0, 0, 0, 0, 0, 0, n} }
		p.Send([]byte("topic"))
		p.Send([]byte("topic"), []byte("short"), stored(1))
		p.Send([]byte("topic"), []byte("\xff\xff\xff\xff\xff\xff\xff\xff"), stored(1))
		p.Send([]byte("topic"), []byte("\xff\xff\xff\xff\xff\xff\xff\xff"), nil)
		p.Send([]byte("topic"), seq(0), stored(1))
		p.Send(seq(1), stored(2)) // two frames, as some publishers send
		expect(t, &j, "connecting/at_least reset:start live/at_least 0 live/exact 1")
	})
}

func TestClientListensForAnEngineThatConnects(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		config := n.config()
		config.Listen, config.PubEndpoint = true, "tcp://*:5557"
		var j journal
		c := n.client(config, &j)
		connect := func(host string) *enginesim.Engine {
			return n.engine(func(c *enginesim.Config) {
				c.Connect, c.NoReplay, c.Dial = true, true, n.From(host)
			})
		}
		e := connect("10.0.0.1")
		synctest.Wait()
		if !c.IsConnected() {
			t.Fatal("not connected")
		}
		publish(t, e, 1)
		// Nobody takes the place of a living engine.
		other, again := connect("10.0.0.2"), connect("10.0.0.1")
		synctest.Wait()
		publish(t, other, 100)
		publish(t, again, 200)
		if err := other.Close(); err != nil {
			t.Fatal(err)
		}
		publish(t, e, 2)
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		publish(t, again, 3)
		expect(t, &j, "connecting/at_least reset:start live/at_least 0 live/exact 1 recovering/exact live/unknown "+
			"reset:restart 1 live/at_least")
	})
}

func TestListeningClientTakesAConnectionForOneThatHasFallenSilent(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		config := n.config()
		config.Listen, config.PubEndpoint = true, "tcp://*:5557"
		var j journal
		c := n.client(config, &j)
		// A peer of ZMTP 3.0 is sent no PING, so that its silence proves nothing.
		old, err := n.Dial(t.Context(), "tcp", "127.0.0.1:5557")
		if err != nil {
			t.Fatal(err)
		}
		go func() { _, _ = io.Copy(io.Discard, old) }()
		hello := append([]byte("\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00NULL"), make([]byte, 48)...)
		hello = append(hello, "\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03PUB"...)
		if _, err := old.Write(hello); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if !c.IsConnected() {
			t.Fatal("not connected")
		}
		time.Sleep(time.Minute)
		e := n.engine(func(c *enginesim.Config) { c.Connect, c.NoReplay = true, true })
		synctest.Wait()
		publish(t, e, 1)
		expect(t, &j, "connecting/at_least reset:start live/at_least recovering/at_least live/at_least 0 live/exact")
		if got := c.State().Err; got != "" {
			t.Errorf("error %q", got)
		}
	})
}

// flaky is a listener whose first Accept fails.
type flaky struct {
	net.Listener
	failed bool
}

func (f *flaky) Accept() (net.Conn, error) {
	if !f.failed {
		f.failed = true
		return nil, fmt.Errorf("accept: %w", syscall.EMFILE)
	}
	return f.Listener.Accept()
}

func TestListeningClientOutlivesWhatIsNotTheEngine(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		config := n.config()
		config.Listen, config.PubEndpoint = true, "tcp://*:5557"
		config.ListenFunc = func(ctx context.Context, network, address string) (net.Listener, error) {
			l, err := n.Listen(ctx, network, address)
			return &flaky{Listener: l}, err
		}
		var j journal
		c := n.client(config, &j)
		synctest.Wait()
		if got := c.State().Err; !strings.Contains(got, "too many open files") {
			t.Errorf("error %q", got)
		}
		time.Sleep(5 * time.Second)
		e := n.engine(func(c *enginesim.Config) { c.Connect, c.NoReplay = true, true })
		synctest.Wait()
		scan, err := n.Dial(t.Context(), "tcp", "127.0.0.1:5557")
		if err != nil {
			t.Fatal(err)
		}
		if err := scan.Close(); err != nil {
			t.Fatal(err)
		}
		publish(t, e, 1)
		expect(t, &j, "connecting/at_least reset:start live/at_least 0 live/exact")
		if got := c.State().Err; got != "" {
			t.Errorf("a scan of the port is an error of the engine: %q", got)
		}
	})
}

func TestClientFollowsAnEngineThatRestartsWhileReplaysFail(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(func(c *enginesim.Config) { c.NoReplay = true })
		var j journal
		c := n.client(n.config(), &j)
		time.Sleep(time.Second)
		publish(t, e, 1, 2, 3)
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
		e = n.engine(func(c *enginesim.Config) { c.NoReplay = true })
		for !c.IsConnected() {
			time.Sleep(time.Millisecond)
		}
		publish(t, e, 11, 12, 13, 14) // held: the replays have not all failed yet
		time.Sleep(time.Second)
		expect(t, &j, "connecting/at_least reset:start syncing/at_least live/at_least 0 live/exact 1 2 recovering/exact "+
			"recovering/unknown reset:restart 0 recovering/exact 1 2 3 live/exact")
	})
}

func TestClientDoesNotBelieveAReplayThatItsConnectionDisproves(t *testing.T) {
	t.Parallel()
	number := func(seq uint64) []byte { return binary.BigEndian.AppendUint64(nil, seq) }
	for _, test := range []struct {
		name    string
		replays int // batches of another engine that the endpoint has
		want    string
	}{
		{
			"it has nothing", 0,
			"connecting/at_least reset:start syncing/at_least live/exact 0 recovering/exact recovering/unknown " +
				"reset:history_lost 5 recovering/at_least live/at_least",
		},
		{
			"it has another engine's", 3,
			"connecting/at_least reset:start syncing/at_least 0r syncing/exact 1r 2r live/exact " +
				"recovering/exact reset:history_lost 0 reset:history_lost recovering/at_least 5 live/at_least",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, n *network) {
				e := n.engine(func(c *enginesim.Config) { c.NoReplay = true })
				n.router(func(r *zmtp.Router, id string, frames [][]byte) {
					for seq := binary.BigEndian.Uint64(frames[1]); seq < uint64(test.replays); seq++ {
						r.Send(id, nil, number(seq), stored(event.Hash(seq+100)))
					}
					r.Send(id, nil, number(math.MaxUint64), nil)
				})
				var j journal
				n.client(n.config(), &j)
				synctest.Wait()
				publish(t, e, 1)
				if err := e.PublishAt(5, stored(5)); err != nil {
					t.Fatal(err)
				}
				time.Sleep(90 * time.Second) // a connection that is merely not yet known to be broken is given time
				expect(t, &j, test.want)
			})
		})
	}
}

func TestClientAsksAgainUntilAReplayBringsNothingNew(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		n.engine(func(c *enginesim.Config) { c.NoReplay = true })
		number := func(seq uint64) []byte { return binary.BigEndian.AppendUint64(nil, seq) }
		var asked []uint64
		n.router(func(r *zmtp.Router, id string, frames [][]byte) {
			from := binary.BigEndian.Uint64(frames[1])
			asked = append(asked, from)
			for seq := from; seq < min(from+3, 5); seq++ { // three at a time get through, and the marker
				r.Send(id, nil, number(seq), stored(event.Hash(seq)))
			}
			r.Send(id, nil, number(math.MaxUint64), nil)
		})
		var j journal
		n.client(n.config(), &j)
		expect(t, &j, "connecting/at_least reset:start syncing/at_least 0r syncing/exact 1r 2r 3r 4r live/exact")
		if want := []uint64{0, 2, 4}; !slices.Equal(asked, want) {
			t.Errorf("asked from %v, want %v", asked, want)
		}
	})
}

func TestClientFindsWhatAnEngineThatFellSilentHadSent(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(func(c *enginesim.Config) { c.NoReplay = true })
		number := func(seq uint64) []byte { return binary.BigEndian.AppendUint64(nil, seq) }
		var sent atomic.Uint64 // batches that the replay endpoint knows of
		var mute atomic.Bool
		n.router(func(r *zmtp.Router, id string, frames [][]byte) {
			if mute.Load() {
				return
			}
			for seq := binary.BigEndian.Uint64(frames[1]); seq < sent.Load(); seq++ {
				r.Send(id, nil, number(seq), stored(event.Hash(seq)))
			}
			r.Send(id, nil, number(math.MaxUint64), nil)
		})
		var j journal
		c := n.client(n.config(), &j)
		synctest.Wait()
		publish(t, e, 0)
		sent.Store(2) // the second never arrives
		time.Sleep(2 * time.Second)
		const soFar = "connecting/at_least reset:start syncing/at_least live/exact 0 1r"
		expect(t, &j, soFar)
		sent.Store(3) // nor does the third, much later
		time.Sleep(34 * time.Second)
		expect(t, &j, soFar+" 2r")

		// A check that fails proves nothing, neither that something is missing nor that nothing is.
		mute.Store(true)
		before := c.State().ObservedAt
		time.Sleep(time.Minute)
		expect(t, &j, soFar+" 2r")
		if s := c.State(); s.Bound != kvcache.BoundExact || !s.ObservedAt.Equal(before) ||
			!strings.Contains(s.Err, "no answer for 5s") {
			t.Errorf("status %+v, observed before at %v", s, before)
		}
		mute.Store(false)
		time.Sleep(40 * time.Second)
		if s := c.State(); s.Err != "" || time.Since(s.ObservedAt) > 40*time.Second {
			t.Errorf("status %+v", s)
		}
	})
}

func TestACheckThatDeniesTheLastBatchProvesNothing(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(func(c *enginesim.Config) { c.NoReplay = true })
		n.router(func(r *zmtp.Router, id string, _ [][]byte) { // it has no batches at all
			r.Send(id, nil, []byte("\xff\xff\xff\xff\xff\xff\xff\xff"), nil)
		})
		var j journal
		c := n.client(n.config(), &j)
		synctest.Wait()
		publish(t, e, 1)
		before := c.State().ObservedAt
		time.Sleep(2 * time.Minute)
		expect(t, &j, "connecting/at_least reset:start syncing/at_least live/exact 0")
		if s := c.State(); !s.ObservedAt.Equal(before) {
			t.Errorf("observed at %v, the batch came at %v", s.ObservedAt, before)
		}
	})
}

func TestClientVerifiesNothingIfToldSo(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		n.engine(nil)
		config := n.config()
		config.VerifyInterval = -1
		c := n.client(config, &events{})
		time.Sleep(time.Second)
		before := c.State().ObservedAt
		time.Sleep(time.Hour)
		if s := c.State(); !s.ObservedAt.Equal(before) || s.State != kvcache.StateLive {
			t.Errorf("status %+v, observed before at %v", s, before)
		}
	})
}

func TestClientTakesNoReplayOfAnotherTopic(t *testing.T) {
	t.Parallel()
	for _, framing := range []enginesim.Framing{enginesim.FramingTopic, enginesim.FramingNoTopic} {
		inBubble(t, func(t *testing.T, n *network) {
			e := n.engine(func(c *enginesim.Config) { c.Topic, c.Framing = "kv@a@m", framing })
			publish(t, e, 1)
			config := n.config()
			config.Topic = "kv@b@"
			var j journal
			c := n.client(config, &j)
			time.Sleep(5 * time.Second)
			publish(t, e, 2)
			// Without a topic frame nothing tells the batches apart.
			want := "connecting/at_least reset:start syncing/at_least live/at_least"
			if framing == enginesim.FramingNoTopic {
				want = "connecting/at_least reset:start syncing/at_least 0r syncing/exact live/exact"
			}
			expect(t, &j, want)
			if got := c.State().Err; (framing == enginesim.FramingTopic) != strings.Contains(got, `"kv@a@m"`) {
				t.Errorf("error %q", got)
			}
		})
	}
}

func TestStopCountsNothingAsHandedOnThatWasNot(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(nil)
		release := make(chan struct{})
		h := events{fail: func(int) error {
			<-release
			return nil
		}}
		c := n.client(n.config(), &h)
		synctest.Wait()
		stored := event.Event{Type: event.BlockStored, Map: true, Hashes: []event.Hash{1}}
		if err := e.Publish(encode(stored, stored, stored)); err != nil {
			t.Fatal(err)
		}
		publish(t, e, 2)
		stopped := make(chan error)
		go func() { stopped <- c.Stop() }()
		synctest.Wait()
		close(release)
		if err := <-stopped; err != nil {
			t.Error(err)
		}
		if got := len(h.all()); got != 1 || c.GetLastSequence() != -1 {
			t.Errorf("%d events of the first batch, last sequence %d", got, c.GetLastSequence())
		}
	})
}

func TestRunEndsWhenTheClientIsStopped(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		c := kvcache.NewZMQClient(n.config(), &events{})
		done := make(chan error)
		go func() { done <- c.Run(t.Context()) }()
		synctest.Wait()
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestStatusShowsThatReplaysFail(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		n.engine(func(c *enginesim.Config) { c.NoReplay = true })
		c := n.client(n.config(), &events{})
		time.Sleep(5 * time.Second)
		if s := c.State(); !strings.Contains(s.Err, "replay from tcp://127.0.0.1:5558: ") || !s.ObservedAt.IsZero() {
			t.Errorf("status %+v", s)
		}
	})
}

func TestClientWarnsOnceOfWhatComesWithEveryMessage(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(nil)
		var log strings.Builder
		config := n.config()
		config.Logger = slog.New(slog.NewTextHandler(&log, nil))
		n.client(config, &events{fail: func(int) error { return errors.New("no") }})
		synctest.Wait()
		for range 100 {
			for _, payload := range [][]byte{stored(1), []byte("junk"), []byte("\x92\x00\x91\x91\xa3New")} {
				if err := e.Publish(payload); err != nil {
					t.Fatal(err)
				}
			}
		}
		synctest.Wait()
		if got := strings.Count(log.String(), "level=WARN"); got != 4 { // handler, batch, its reset, event
			t.Errorf("%d warnings:\n%s", got, log.String())
		}
	})
}

func TestListeningClientSaysWhyItCannotListen(t *testing.T) {
	t.Parallel()
	var n memnet.Network
	l, err := n.Listen(t.Context(), "tcp", "127.0.0.1:5557")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	c := kvcache.NewZMQClient(&kvcache.ZMQClientConfig{
		PubEndpoint: pubEndpoint, Listen: true, ListenFunc: n.Listen,
	}, &events{})
	if err := c.Start(); err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("Start: %v", err)
	}
}

func TestStopIsPromptInEveryState(t *testing.T) {
	t.Parallel()
	for name, prepare := range map[string]func(n *network){
		"no engine":     func(*network) {},
		"a silent peer": func(n *network) { n.deaf(pubEndpoint) },
		"a silent replay": func(n *network) {
			n.engine(func(c *enginesim.Config) { c.NoReplay = true })
			n.deaf(replayEndpoint)
		},
		"an engine": func(n *network) { n.engine(nil) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, n *network) {
				prepare(n)
				c := n.client(n.config(), &events{})
				time.Sleep(time.Second)
				begin := time.Now()
				if err := c.Stop(); err != nil {
					t.Errorf("Stop: %v", err)
				}
				if d := time.Since(begin); d > 100*time.Millisecond {
					t.Errorf("Stop took %v", d)
				}
				if err := c.Stop(); err != nil {
					t.Errorf("a second Stop: %v", err)
				}
				if s := c.State(); s.State != kvcache.StateStopped || c.IsConnected() {
					t.Errorf("after Stop: %+v", s)
				}
				if err := c.Start(); !errors.Is(err, kvcache.ErrStopped) {
					t.Errorf("Start after Stop: %v", err)
				}
			})
		})
	}
}

// deaf listens and says nothing.
func (n *network) deaf(endpoint string) {
	n.t.Helper()
	l, err := zmtp.Listen(n.t.Context(), endpoint, &zmtp.Options{ListenFunc: n.Listen})
	if err != nil {
		n.t.Fatal(err)
	}
	var wg sync.WaitGroup
	var conns []net.Conn
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns = append(conns, c)
		}
	})
	n.t.Cleanup(func() {
		_ = l.Close()
		wg.Wait()
		for _, c := range conns {
			_ = c.Close()
		}
	})
}

func TestStopBeforeStart(t *testing.T) {
	t.Parallel()
	c := kvcache.NewZMQClient(kvcache.DefaultZMQClientConfig("pod", "127.0.0.1", "m"), &events{})
	if err := c.Stop(); err != nil {
		t.Errorf("Stop: %v", err)
	}
	if s := c.State().State; s != kvcache.StateStopped {
		t.Errorf("state %v", s)
	}
}

func TestStopNamesAHandlerThatHangs(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(nil)
		var calls int
		release := make(chan struct{})
		h := events{fail: func(int) error {
			calls++
			<-release
			return nil
		}}
		c := n.client(n.config(), &h)
		synctest.Wait()
		publish(t, e, 1, 2)
		begin := time.Now()
		err := c.Stop()
		var stop *kvcache.StopError
		if !errors.As(err, &stop) || stop.Call != "HandleEvent" || stop.Pod != "default/pod-0" {
			t.Errorf("Stop: %v", err)
		}
		if want := "default/pod-0: HandleEvent of *kvcache_test.events was still running 5s after Stop"; err == nil ||
			!strings.Contains(err.Error(), want) {
			t.Errorf("Stop: %v, want %s", err, want)
		}
		if d := time.Since(begin); d != 5*time.Second {
			t.Errorf("Stop waited %v", d)
		}
		close(release)
		synctest.Wait()
		if calls != 1 {
			t.Errorf("%d calls, want none after Stop", calls)
		}
	})
}

func TestRunEndsWithItsContext(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		ctx, cancel := context.WithCancel(t.Context())
		c := kvcache.NewZMQClient(n.config(), &events{})
		done := make(chan error)
		go func() { done <- c.Run(ctx) }()
		time.Sleep(time.Second)
		if err := c.Start(); !errors.Is(err, kvcache.ErrStarted) {
			t.Errorf("Start of a running client: %v", err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		if err := c.Run(t.Context()); !errors.Is(err, kvcache.ErrStopped) {
			t.Errorf("a second Run: %v", err)
		}
	})
}

func TestStartRefusesWhatCannotWork(t *testing.T) {
	t.Parallel()
	good := func() *kvcache.ZMQClientConfig { return kvcache.DefaultZMQClientConfig("pod", "10.0.0.1", "m") }
	if err := kvcache.ValidateConfig(good()); err != nil {
		t.Errorf("the default: %v", err)
	}
	if err := kvcache.ValidateConfig(kvcache.DefaultZMQClientConfig("pod", "fd00::1", "m")); err != nil {
		t.Errorf("IPv6: %v", err)
	}
	for _, test := range []struct {
		name   string
		change func(c *kvcache.ZMQClientConfig)
		want   string
	}{
		{"no address", func(c *kvcache.ZMQClientConfig) { c.PodIP = "" }, "PodIP is required"},
		{"a host name for an address", func(c *kvcache.ZMQClientConfig) { c.PodIP = "engine-0" }, `address: "engine-0"`},
		{"no port", func(c *kvcache.ZMQClientConfig) { c.PubPort = 0 }, "PubPort is not a TCP port: 0"},
		{"a port too high", func(c *kvcache.ZMQClientConfig) { c.RouterPort = 65536 }, "RouterPort is not a TCP port: 65536"},
		{"one port for two", func(c *kvcache.ZMQClientConfig) { c.RouterPort = c.PubPort }, "another rank's replay port"},
		{"a bad endpoint", func(c *kvcache.ZMQClientConfig) { c.PubEndpoint = "localhost" }, "PubEndpoint"},
		{"a bad replay endpoint", func(c *kvcache.ZMQClientConfig) { c.ReplayEndpoint = "tcp://:x" }, "ReplayEndpoint"},
		{"a wildcard to dial", func(c *kvcache.ZMQClientConfig) { c.PubEndpoint = "tcp://*:5557" }, "a wildcard is for"},
		{"port 0 to dial", func(c *kvcache.ZMQClientConfig) { c.ReplayEndpoint = "tcp://a:0" }, "a wildcard is for"},
		{"listening nowhere", func(c *kvcache.ZMQClientConfig) { c.Listen = true }, "Listen needs PubEndpoint"},
		{"a negative time", func(c *kvcache.ZMQClientConfig) { c.ReplayTimeout = -1 }, "ReplayTimeout is negative"},
		{"a negative size", func(c *kvcache.ZMQClientConfig) { c.MaxMemory = -1 }, "MaxMemory is negative"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			config := good()
			test.change(config)
			err := kvcache.NewZMQClient(config, &events{}).Start()
			if !errors.Is(err, kvcache.ErrInvalidConfig) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Start: %v, want %s", err, test.want)
			}
		})
	}
	if err := kvcache.ValidateConfig(nil); !errors.Is(err, kvcache.ErrInvalidConfig) {
		t.Errorf("no configuration: %v", err)
	}
	if err := kvcache.NewZMQClient(nil, &events{}).Start(); !errors.Is(err, kvcache.ErrInvalidConfig) {
		t.Errorf("a client without configuration: %v", err)
	}
	if err := kvcache.NewZMQClient(good(), nil).Start(); !errors.Is(err, kvcache.ErrInvalidConfig) {
		t.Errorf("a client without a handler: %v", err)
	}
}

func TestClientFollowsASimulatedEngineExactly(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(func(c *enginesim.Config) { c.Quiet, c.Blocks, c.ReplayHWM = false, 300, -1 })
		steps := func(n int) {
			for range n {
				if _, err := e.Step(); err != nil {
					t.Fatal(err)
				}
			}
			synctest.Wait()
		}
		steps(200)
		var j journal
		n.client(n.config(), &j)
		synctest.Wait()
		j.checkTruth(t, e)
		steps(100)
		j.checkTruth(t, e)
		if err := n.Cut(); err != nil {
			t.Fatal(err)
		}
		steps(100)
		time.Sleep(2 * time.Second)
		j.checkTruth(t, e)
		if err := e.Reset(); err != nil {
			t.Fatal(err)
		}
		steps(50)
		j.checkTruth(t, e)
	})
}
