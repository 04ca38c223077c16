// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package enginesim_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvtap/kvtap/enginesim"
	"github.com/kvtap/kvtap/event"
	"github.com/kvtap/kvtap/internal/zmtp"
)

// small is traffic that fills and evicts a small pool within a few steps.
var small = enginesim.TrafficConfig{
	SystemPrompts: 4, SystemTokens: 30, QuestionTokens: 8, AnswerTokens: 20, Conversations: 6, MaxTokens: 160,
	Vocabulary: 500, LoRAShare: 0.3, SaltShare: 0.2, TwinShare: 0.5,
}

func smallConfig() enginesim.Config {
	clock := time.Unix(1_750_000_000, 0)
	return enginesim.Config{Blocks: 60, BlockSize: 4, Traffic: small, Now: func() time.Time {
		clock = clock.Add(time.Millisecond)
		return clock
	}}
}

func step(t testing.TB, e *enginesim.Engine) bool {
	t.Helper()
	published, err := e.Step()
	if err != nil {
		t.Fatal(err)
	}
	return published
}

// checkFold compares what a listener has made of the batches with what the engine holds.
func checkFold(t *testing.T, e *enginesim.Engine, fold *event.Fold) {
	t.Helper()
	truth, _ := e.Truth()
	upper := map[event.Hash]int{}
	for place, c := range fold.All() {
		upper[place.Hash] += int(c.Upper)
		if c.Lower < 0 || c.Lower > c.Upper {
			t.Errorf("%v: at least %d and at most %d copies", place, c.Lower, c.Upper)
		}
	}
	if !cmp.Equal(truth, upper) {
		t.Fatalf("the batches do not add up to the truth (-truth +batches):\n%s", cmp.Diff(truth, upper))
	}
	if n := fold.UnmatchedRemoves(); n != 0 {
		t.Fatalf("%d removals of what was not held", n)
	}
}

var forms = map[string]event.Form{
	"0.9.0": event.VLLM090, "0.9.1": event.VLLM091, "0.10.2": event.VLLM0102, "0.14": event.VLLM014,
	"0.17": event.VLLM017, "0.20": event.VLLM020, "0.22": event.VLLM022, "0.24": event.VLLM024,
	"0.26": event.VLLM026, "0.32": event.VLLM032,
}

func TestPublishedBatchesAddUpToTheTruthInEveryForm(t *testing.T) {
	t.Parallel()
	for name, form := range forms {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config := smallConfig()
			config.Form, config.GroupRemovals, config.Seed = form, form == event.VLLM014, uint64(form)
			config.Rank = 3
			config, m := inMemory(config)
			e := startEngine(t, config)
			c := subscribe(t, e, m, "")
			var fold event.Fold
			var batch event.Batch
			next := uint64(0)
			for i := range 250 {
				if i == 120 {
					if err := e.Reset(); err != nil {
						t.Fatal(err)
					}
				} else if !step(t, e) {
					continue
				}
				got := live(t, c)
				if got.Seq != next || got.Topic != "" {
					t.Fatalf("batch %d with topic %q, want %d", got.Seq, got.Topic, next)
				}
				next++
				if err := batch.Decode([]byte(got.Payload)); err != nil {
					t.Fatal(err)
				}
				if len(batch.Skipped) > 0 || batch.UnknownFields > 0 {
					t.Fatalf("%d unknown fields, skipped %v", batch.UnknownFields, batch.Skipped)
				}
				if want := event.Some[int64](3); form != event.VLLM090 && batch.Rank != want {
					t.Fatalf("rank %v, want %v", batch.Rank, want)
				}
				fold.Apply(&batch)
				checkFold(t, e, &fold)
			}
			s := e.Stats()
			if s.Batches != next || next < 200 || s.CachedTokens == 0 || s.Preempted == 0 || s.Finished < 50 {
				t.Errorf("%d batches came, %+v", next, s)
			}
		})
	}
}

func TestEnginesOfOneConfigurationPublishTheSameBytes(t *testing.T) {
	t.Parallel()
	run := func() []message {
		config, m := inMemory(smallConfig())
		config.ReplayHWM = -1
		e := newEngine(t, config)
		for range 100 {
			step(t, e)
		}
		if err := e.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		_, endpoint := e.Endpoints()
		return replay(t, dial(t, m, endpoint, zmtp.DEALER), enginesim.FramingTopic, 0)
	}
	a, b := run(), run()
	if len(a) < 50 || !slices.Equal(a, b) {
		t.Errorf("%d and %d batches, which are not the same", len(a), len(b))
	}
}

func TestAnEngineSaysWhatItReused(t *testing.T) {
	t.Parallel()
	e := newEngine(t, enginesim.Config{Quiet: true, BlockSize: 4})
	r := enginesim.Request{Prompt: prompt(18), Answer: []uint32{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}}
	if step(t, e) {
		t.Error("an idle engine published a batch")
	}
	first := e.Submit(r)
	for range 3 {
		step(t, e)
	}
	if got := <-first; got != (enginesim.Result{}) {
		t.Errorf("first result: %+v", got)
	}
	if got := e.Match(r); got != 16 {
		t.Errorf("%d tokens match, want 16", got)
	}
	// The next turn finds the answer too, except its last token, which was never computed.
	follow := enginesim.Request{Prompt: slices.Concat(r.Prompt, r.Answer, []uint32{1})}
	second := e.Submit(follow)
	step(t, e)
	if got, want := <-second, (enginesim.Result{CachedTokens: 28}); got != want {
		t.Errorf("second result: %+v, want %+v", got, want)
	}
	want := enginesim.Stats{
		Requests: 2, Finished: 2, PromptTokens: 48, CachedTokens: 28, CachedBlocks: 7, Batches: 3,
	}
	if diff := cmp.Diff(want, e.Stats()); diff != "" {
		t.Errorf("stats (-want +got):\n%s", diff)
	}
}

func TestRequestsThatCannotRunAreRejected(t *testing.T) {
	t.Parallel()
	e := newEngine(t, enginesim.Config{Quiet: true, BlockSize: 4, Blocks: 4, MaxWaiting: 1})
	for _, c := range []struct {
		name    string
		request enginesim.Request
		want    error
	}{
		{"no tokens", enginesim.Request{}, enginesim.ErrEmptyPrompt},
		{"a prompt longer than the pool", enginesim.Request{Prompt: prompt(17)}, enginesim.ErrTooLong},
		{"an answer that will not fit", enginesim.Request{Prompt: prompt(10), Answer: prompt(8)}, enginesim.ErrTooLong},
	} {
		if got := <-e.Submit(c.request); !errors.Is(got.Err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, got.Err, c.want)
		}
	}
	fits := e.Submit(enginesim.Request{Prompt: prompt(10), Answer: prompt(7)})
	if got := <-e.Submit(enginesim.Request{Prompt: prompt(1)}); !errors.Is(got.Err, enginesim.ErrQueueFull) {
		t.Errorf("a second one in a queue for one: %v", got.Err)
	}
	step(t, e)
	step(t, e)
	if got := <-fits; got.Err != nil {
		t.Error(got.Err)
	}
	if s := e.Stats(); s.Rejected != 4 || s.Requests != 1 {
		t.Errorf("%+v", s)
	}
}

func TestARequestWithoutBlocksWaitsOrTakesThemFromTheLastOne(t *testing.T) {
	t.Parallel()
	e := newEngine(t, enginesim.Config{Quiet: true, BlockSize: 4, Blocks: 8, TokensPerStep: 4})
	long := func(token uint32) enginesim.Request {
		return enginesim.Request{Prompt: slices.Repeat([]uint32{token}, 12), Answer: slices.Repeat([]uint32{token}, 13)}
	}
	first, second, third := e.Submit(long(1)), e.Submit(long(2)), e.Submit(long(3))
	step(t, e)
	if s := e.Stats(); s.Running != 2 || s.Waiting != 1 || s.UsedBlocks != 6 {
		t.Errorf("two of three should fit: %+v", s)
	}
	step(t, e) // both take one more block, the last ones
	step(t, e) // the second gives way to the first
	if s := e.Stats(); s.Running != 1 || s.Waiting != 2 || s.Preempted != 1 || s.UsedBlocks != 5 {
		t.Errorf("one should have given way: %+v", s)
	}
	var order []int
	for range 20 {
		step(t, e)
		for i, result := range []<-chan enginesim.Result{first, second, third} {
			select {
			case got := <-result:
				order = append(order, i)
				if got != (enginesim.Result{}) {
					t.Errorf("request %d: %+v", i, got)
				}
			default:
			}
		}
	}
	if want := []int{0, 1, 2}; !slices.Equal(order, want) {
		t.Errorf("the requests ended in the order %v, want %v: who gave way is the next", order, want)
	}
	if s := e.Stats(); s.Finished != 3 || s.UsedBlocks != 0 || s.PromptTokens != 36 {
		t.Errorf("%+v", s)
	}
}

func TestARequestThatGaveWayGoesOnWhereItWas(t *testing.T) {
	t.Parallel()
	e := newEngine(t, enginesim.Config{Quiet: true, BlockSize: 4, Blocks: 8, TokensPerStep: 4})
	whole := [][]uint32{prompt(25), append([]uint32{1}, prompt(24)...)}
	var results []<-chan enginesim.Result
	for _, tokens := range whole {
		results = append(results, e.Submit(enginesim.Request{Prompt: tokens[:12], Answer: tokens[12:]}))
	}
	for range 20 {
		step(t, e)
	}
	for _, result := range results {
		if got := <-result; got.Err != nil {
			t.Error(got.Err)
		}
	}
	if s := e.Stats(); s.Preempted != 1 {
		t.Fatalf("%+v", s)
	}
	if got := e.Match(enginesim.Request{Prompt: whole[1]}); got != 24 {
		t.Errorf("%d tokens of prompt and answer are cached, want 24", got)
	}
}

func TestNoRequestStartsInAStepInWhichOneGaveWay(t *testing.T) {
	t.Parallel()
	e := newEngine(t, enginesim.Config{Quiet: true, BlockSize: 4, Blocks: 7, TokensPerStep: 4})
	for token := range uint32(2) {
		e.Submit(enginesim.Request{Prompt: slices.Repeat([]uint32{token}, 12), Answer: prompt(13)})
	}
	step(t, e)
	step(t, e) // the first takes the last block; the second finds none and gives up its own three, which would do to start
	if s := e.Stats(); s.Running != 1 || s.Waiting != 1 || s.Preempted != 1 || s.UsedBlocks != 4 {
		t.Errorf("%+v", s)
	}
}

func TestRunningRequestsAreLimited(t *testing.T) {
	t.Parallel()
	e := newEngine(t, enginesim.Config{Quiet: true, MaxRunning: 2})
	for range 5 {
		e.Submit(enginesim.Request{Prompt: prompt(3), Answer: prompt(3)})
	}
	step(t, e)
	if s := e.Stats(); s.Running != 2 || s.Waiting != 3 {
		t.Errorf("%+v", s)
	}
}

func TestResetClearsTheCacheUnderRunningRequests(t *testing.T) {
	t.Parallel()
	config, m := inMemory(enginesim.Config{Quiet: true, BlockSize: 4})
	e := startEngine(t, config)
	c := subscribe(t, e, m, "")
	a := e.Submit(enginesim.Request{Prompt: prompt(20), Answer: prompt(30)})
	b := e.Submit(enginesim.Request{Prompt: prompt(9), Answer: prompt(30)})
	step(t, e)
	live(t, c)
	if err := e.Reset(); err != nil {
		t.Fatal(err)
	}
	var batch event.Batch
	if err := batch.Decode([]byte(live(t, c).Payload)); err != nil {
		t.Fatal(err)
	}
	if len(batch.Events) != 1 || batch.Events[0].Type != event.AllBlocksCleared {
		t.Errorf("%+v", batch.Events)
	}
	if held, next := e.Truth(); len(held) != 0 || next != 2 {
		t.Errorf("%d blocks are held, the next batch is %d", len(held), next)
	}
	for range 6 {
		step(t, e)
	}
	if x, y := <-a, <-b; x.Err != nil || y.Err != nil {
		t.Errorf("%+v, %+v", x, y)
	}
}

func TestReplayAndLiveMessagesOverTCP(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		form    event.Form
		framing enginesim.Framing
		want    enginesim.Framing
	}{
		{"vLLM 0.25 replays without a topic", event.VLLM024, enginesim.FramingOfForm, enginesim.FramingNoTopic},
		{"vLLM 0.26 replays with one", event.VLLM026, enginesim.FramingOfForm, enginesim.FramingTopic},
		{"the framing can be chosen", event.VLLM032, enginesim.FramingNoTopic, enginesim.FramingNoTopic},
		{"whatever the form", event.VLLM090, enginesim.FramingTopic, enginesim.FramingTopic},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			config := freePorts(smallConfig())
			config.Form, config.Framing, config.Topic, config.FirstSeq = c.form, c.framing, "kv@pod@model", 1
			e := startEngine(t, config)
			for range 30 {
				step(t, e)
			}
			sub := subscribe(t, e, nil, "kv@pod")
			before, _ := e.LastSeq()
			for range 10 {
				step(t, e)
			}
			last, _ := e.LastSeq()
			var fromLive []message
			for seq := before + 1; seq <= last; seq++ {
				fromLive = append(fromLive, live(t, sub))
			}

			_, endpoint := e.Endpoints()
			dealer := dial(t, nil, endpoint, zmtp.DEALER)
			all := replay(t, dealer, c.want, 0)
			if uint64(len(all)) != last || all[0].Seq != 1 {
				t.Fatalf("%d of %d batches were replayed", len(all), last)
			}
			for i := range all {
				if c.want == enginesim.FramingNoTopic {
					all[i].Topic = "kv@pod@model" // not said
				}
			}
			if diff := cmp.Diff(fromLive, all[before:]); diff != "" {
				t.Errorf("replayed otherwise than sent (-live +replay):\n%s", diff)
			}
			if some := replay(t, dealer, c.want, last-1); len(some) != 2 || some[0].Seq != last-1 {
				t.Errorf("from the last but one on: %d batches", len(some))
			}
			if none := replay(t, dealer, c.want, last+1); len(none) != 0 {
				t.Errorf("from beyond the last: %v", none)
			}
			if s := e.Stats(); s.Replays < 2 || s.Dropped != 0 {
				t.Errorf("%+v", s)
			}
		})
	}
}

func TestASubscriberOfAnotherTopicHearsNothing(t *testing.T) {
	t.Parallel()
	config, m := inMemory(enginesim.Config{Quiet: true, Topic: "kv@a@m"})
	e := startEngine(t, config)
	pub, _ := e.Endpoints()
	other := dial(t, m, pub, zmtp.SUB)
	if err := other.Subscribe([]byte("kv@b")); err != nil {
		t.Fatal(err)
	}
	if err := e.WaitSubscribers(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	if err := e.Publish([]byte("not for b")); err != nil {
		t.Fatal(err)
	}
	if err := other.Subscribe([]byte("kv@a")); err != nil {
		t.Fatal(err)
	}
	// Publishing until the new subscription works: what comes first is not the first batch.
	got := make(chan message, 1)
	go func() {
		f, err := other.Recv()
		if err == nil && len(f) == 3 {
			got <- message{Topic: string(f[0]), Payload: string(f[2])}
		}
		close(got)
	}()
	for {
		select {
		case first := <-got:
			if want := (message{Topic: "kv@a@m", Payload: "for a"}); first != want {
				t.Errorf("got %+v, want %+v", first, want)
			}
			return
		default:
			if err := e.Publish([]byte("for a")); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestReplayKeepsTheLastBatchesOnly(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name      string
		steps     int
		published int
		start     uint64
		want      []uint64
	}{
		{"a buffer that is not full", 5, 3, 0, []uint64{0, 1, 2}},
		{"a full one", 5, 5, 2, []uint64{2, 3, 4}},
		{"a rolled one begins at its oldest", 5, 13, 0, []uint64{8, 9, 10, 11, 12}},
		{"a rolled one from the middle", 5, 13, 10, []uint64{10, 11, 12}},
		{"no buffer", -1, 4, 0, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			config, m := inMemory(enginesim.Config{Quiet: true, BufferSteps: c.steps})
			e := startEngine(t, config)
			for i := range c.published {
				if err := e.Publish([]byte{byte(i)}); err != nil {
					t.Fatal(err)
				}
			}
			_, endpoint := e.Endpoints()
			var got []uint64
			for _, m := range replay(t, dial(t, m, endpoint, zmtp.DEALER), enginesim.FramingTopic, c.start) {
				if m.Payload != string([]byte{byte(m.Seq)}) {
					t.Errorf("batch %d has payload %q", m.Seq, m.Payload)
				}
				got = append(got, m.Seq)
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("replayed (-want +got):\n%s", diff)
			}
		})
	}
}

func TestReplayIgnoresEverythingButItsOwnRequest(t *testing.T) {
	t.Parallel()
	config, m := inMemory(enginesim.Config{Quiet: true})
	e := startEngine(t, config)
	if err := e.Publish([]byte("x")); err != nil {
		t.Fatal(err)
	}
	_, endpoint := e.Endpoints()
	c := dial(t, m, endpoint, zmtp.DEALER)
	zero := make([]byte, 8)
	for _, frames := range [][][]byte{
		{zero}, {nil}, {nil, nil}, {nil, zero, nil}, {nil, nil, zero}, {zero, zero}, {nil, zero[:7]},
		{nil, []byte("123456789")},
	} {
		if err := c.Send(frames...); err != nil {
			t.Fatal(err)
		}
	}
	if got := replay(t, c, enginesim.FramingTopic, 0); len(got) != 1 {
		t.Errorf("replayed %v", got)
	}
	// Had one of the others been answered, its answer would have come first; so there is one end marker only.
	if got := replay(t, c, enginesim.FramingTopic, 1); len(got) != 0 {
		t.Errorf("replayed %v", got)
	}
	if got := e.Stats().Replays; got > 2 {
		t.Errorf("%d replays", got)
	}
}

func TestALongReplayLosesMessagesUnlessItsLimitIsLifted(t *testing.T) {
	t.Parallel()
	const batches = 3000
	for _, c := range []struct {
		name    string
		hwm     int
		dropped bool
	}{{"libzmq's limit", 0, true}, {"no limit", -1, false}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			config, m := inMemory(enginesim.Config{Quiet: true, ReplayHWM: c.hwm})
			e := startEngine(t, config)
			for range batches {
				if err := e.Publish(make([]byte, 64)); err != nil {
					t.Fatal(err)
				}
			}
			_, endpoint := e.Endpoints()
			dealer := dial(t, m, endpoint, zmtp.DEALER)
			if err := dealer.Send(nil, make([]byte, 8)); err != nil {
				t.Fatal(err)
			}
			// A pipe has no buffer, so nothing leaves the queue while nobody reads.
			for e.Stats().Replays == 0 {
				select {
				case <-t.Context().Done():
					t.Fatal("no replay")
				default:
				}
			}
			if got := e.Stats().Dropped; (got > 0) != c.dropped || got > batches {
				t.Fatalf("%d messages were dropped", got)
			}
			if !c.dropped {
				if got := replies(t, dealer, enginesim.FramingTopic); len(got) != batches {
					t.Errorf("%d batches of %d came", len(got), batches)
				}
			}
		})
	}
}

func TestAPublisherCanConnectOut(t *testing.T) {
	t.Parallel()
	l, err := zmtp.Listen(t.Context(), "tcp://127.0.0.1:0", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	endpoint := "tcp://" + l.Addr().String()
	e := startEngine(t, enginesim.Config{Quiet: true, NoReplay: true, PubEndpoint: endpoint, Connect: true})
	if pub, replay := e.Endpoints(); pub != endpoint || replay != "" {
		t.Errorf("endpoints %q and %q", pub, replay)
	}
	for _, text := range []string{"first connection", "second connection"} {
		nc, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		c, err := zmtp.NewConn(t.Context(), nc, zmtp.SUB, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Subscribe(nil); err != nil {
			t.Fatal(err)
		}
		if err := e.WaitSubscribers(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		// The old connection may still count as a subscriber; so publish until something comes.
		got := make(chan string, 1)
		go func() {
			f, err := c.Recv()
			if err != nil || len(f) != 3 {
				got <- fmt.Sprint("nothing: ", err)
				return
			}
			got <- string(f[2])
		}()
		for done := false; !done; {
			select {
			case payload := <-got:
				done = true
				if payload != text {
					t.Errorf("got %q, want %q", payload, text)
				}
			default:
				if err := e.Publish([]byte(text)); err != nil {
					t.Fatal(err)
				}
			}
		}
		c.Close()
	}
}

func TestStartFailsClearly(t *testing.T) {
	t.Parallel()
	first := startEngine(t, freePorts(enginesim.Config{Quiet: true}))
	pub, replay := first.Endpoints()

	second := newEngine(t, enginesim.Config{Quiet: true, PubEndpoint: pub, ReplayEndpoint: "tcp://127.0.0.1:0"})
	third := newEngine(t, enginesim.Config{Quiet: true, PubEndpoint: "tcp://127.0.0.1:0", ReplayEndpoint: replay})
	for endpoint, e := range map[string]*enginesim.Engine{pub: second, replay: third} {
		err := e.Start(t.Context())
		if err == nil || !strings.Contains(err.Error(), "in use") || !strings.Contains(err.Error(), endpoint) {
			t.Errorf("the error for %s is %v", endpoint, err)
		}
		if a, b := e.Endpoints(); a != "" || b != "" {
			t.Errorf("endpoints %q and %q", a, b)
		}
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if err := second.Start(t.Context()); err != nil {
		t.Errorf("the address is free again, yet: %v", err)
	}
	if err := second.Start(t.Context()); err == nil {
		t.Error("an engine started twice")
	}
	if err := first.Start(t.Context()); !errors.Is(err, enginesim.ErrClosed) {
		t.Errorf("starting a closed engine: %v", err)
	}
	for _, config := range []enginesim.Config{
		{PubEndpoint: "http://x"},
		{PubEndpoint: "http://x", Connect: true},
		{PubEndpoint: "tcp://*:5557", Connect: true},
		{PubEndpoint: "tcp://127.0.0.1:0", Connect: true},
	} {
		config.Quiet, config.NoReplay = true, true
		bad := newEngine(t, config)
		if err := bad.Start(t.Context()); err == nil || !strings.Contains(err.Error(), config.PubEndpoint) {
			t.Errorf("connect %v to the bad endpoint %s: %v", config.Connect, config.PubEndpoint, err)
		}
	}
}

func TestAnEngineThatIsClosedWhileItStarts(t *testing.T) {
	t.Parallel()
	config, m := inMemory(enginesim.Config{Quiet: true})
	var e *enginesim.Engine
	listen := config.Listen
	config.Listen = func(ctx context.Context, network, address string) (net.Listener, error) {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
		return listen(ctx, network, address)
	}
	e = newEngine(t, config)
	if err := e.Start(t.Context()); !errors.Is(err, enginesim.ErrClosed) {
		t.Errorf("started: %v", err)
	}
	if n := m.Listeners(); n != 0 {
		t.Errorf("%d listeners are left", n)
	}
}

func TestAClosedEngineDoesNothing(t *testing.T) {
	t.Parallel()
	e := newEngine(t, enginesim.Config{})
	if err := e.WaitSubscribers(t.Context(), 1); !errors.Is(err, enginesim.ErrNotStarted) {
		t.Errorf("WaitSubscribers: %v", err)
	}
	if _, ok := e.LastSeq(); ok {
		t.Error("there is a last number before the first batch")
	}
	waiting := e.Submit(enginesim.Request{Prompt: prompt(5)})
	for range 2 {
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if got := <-waiting; !errors.Is(got.Err, enginesim.ErrClosed) {
		t.Errorf("a waiting request: %+v", got)
	}
	if got := <-e.Submit(enginesim.Request{Prompt: prompt(5)}); !errors.Is(got.Err, enginesim.ErrClosed) {
		t.Errorf("a new request: %+v", got)
	}
	_, err := e.Step()
	for name, err := range map[string]error{
		"Step": err, "Reset": e.Reset(), "Publish": e.Publish(nil), "PublishAt": e.PublishAt(1, nil),
		"PublishBatch": e.PublishBatch(&event.Batch{}), "Run": e.Run(t.Context()), "Start": e.Start(t.Context()),
	} {
		if !errors.Is(err, enginesim.ErrClosed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNumbersOfCustomBatches(t *testing.T) {
	t.Parallel()
	config, m := inMemory(enginesim.Config{Quiet: true, FirstSeq: 7})
	e := startEngine(t, config)
	sub := subscribe(t, e, m, "")
	payload := []byte("a")
	check := func(want message) {
		t.Helper()
		if got := live(t, sub); got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
		if last, ok := e.LastSeq(); last != want.Seq || !ok {
			t.Errorf("the last number is %d, %v, want %d", last, ok, want.Seq)
		}
	}
	publish := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	publish(e.Publish(payload))
	payload[0] = 'b' // the engine has its own
	check(message{Seq: 7, Payload: "a"})
	publish(e.PublishAt(20, payload))
	check(message{Seq: 20, Payload: "b"})
	publish(e.Publish(payload))
	check(message{Seq: 21, Payload: "b"})
	publish(e.PublishAt(0, payload))
	check(message{Seq: 0, Payload: "b"})

	batch := event.Batch{Time: event.Some(1.5), Rank: event.Some[int64](4)}
	batch.Events = append(batch.Events, event.Event{Type: event.BlockRemoved, Hashes: []event.Hash{1, 2}})
	publish(e.PublishBatch(&batch))
	var got event.Batch
	if err := got.Decode([]byte(live(t, sub).Payload)); err != nil {
		t.Fatal(err)
	}
	if got.Time.V != 1.5 || got.Rank.V != 4 || len(got.Events) != 1 ||
		!slices.Equal(got.Events[0].Hashes, []event.Hash{1, 2}) {
		t.Errorf("%+v", got)
	}

	_, endpoint := e.Endpoints()
	var seqs []uint64
	for _, m := range replay(t, dial(t, m, endpoint, zmtp.DEALER), enginesim.FramingTopic, 1) {
		seqs = append(seqs, m.Seq)
	}
	if want := []uint64{7, 20, 21, 1}; !slices.Equal(seqs, want) {
		t.Errorf("from 1 on, %v were replayed, want %v: in the order of publishing", seqs, want)
	}
}

func TestAnUnusableBatchIsAnError(t *testing.T) {
	t.Parallel()
	e := newEngine(t, enginesim.Config{Quiet: true})
	batch := event.Batch{Events: []event.Event{{}}} // an event of no type
	if err := e.PublishBatch(&batch); err == nil {
		t.Error("published")
	}
	if _, ok := e.LastSeq(); ok {
		t.Error("it has used a number")
	}
}

func TestConfigurationsThatCannotWork(t *testing.T) {
	t.Parallel()
	for field, config := range map[string]enginesim.Config{
		"Blocks":            {Blocks: -1},
		"BlockSize":         {BlockSize: -1},
		"BlockSize is":      {BlockSize: 1<<30 + 1},
		"HWM":               {HWM: -1},
		"TokensPerStep":     {TokensPerStep: -1},
		"MaxRunning":        {MaxRunning: -1},
		"MaxWaiting":        {MaxWaiting: -1},
		"RequestsPerSecond": {RequestsPerSecond: math.NaN()},
		"Framing":           {Framing: 9},
		"orm":               {Form: 99},
	} {
		if _, err := enginesim.New(config); err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
	}
}

func TestRunStepsAtItsRate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		config, m := inMemory(enginesim.Config{RequestsPerSecond: 50, Blocks: 300})
		e := startEngine(t, config)
		c := subscribe(t, e, m, "")
		read := make(chan int)
		go func() {
			n := 0
			for {
				if _, err := c.Recv(); err != nil {
					read <- n
					return
				}
				n++
			}
		}()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second+time.Millisecond)
		defer cancel()
		start := time.Now()
		if err := e.Run(ctx); err != nil {
			t.Error(err)
		}
		if took := time.Since(start); took != 10*time.Second+time.Millisecond {
			t.Errorf("ran for %v", took)
		}
		synctest.Wait()
		s := e.Stats()
		if moments := s.Requests + s.Rejected; moments < 500 || moments > 800 {
			t.Errorf("%d requests arrived in 500 steps, some of them in groups: %+v", moments, s)
		}
		if err := e.Close(); err != nil {
			t.Error(err)
		}
		if n := <-read; uint64(n) != s.Batches || n < 450 {
			t.Errorf("%d of %d batches came", n, s.Batches)
		}
		// The bubble ends only if every goroutine has.
	})
}

func TestCloseEndsARun(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		config, _ := inMemory(enginesim.Config{})
		e := startEngine(t, config)
		ended := make(chan error)
		go func() { ended <- e.Run(t.Context()) }()
		time.Sleep(350 * time.Millisecond)
		if s := e.Stats(); s.Batches == 0 || s.Batches > 3 {
			t.Errorf("%d batches in three steps", s.Batches)
		}
		if err := e.Close(); err != nil {
			t.Error(err)
		}
		if err := <-ended; !errors.Is(err, enginesim.ErrClosed) {
			t.Errorf("Run ended with %v", err)
		}
	})
}

func TestAVerySlowRunOnlyWaits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		e := newEngine(t, enginesim.Config{RequestsPerSecond: 1e-300})
		ctx, cancel := context.WithTimeout(t.Context(), 10*365*24*time.Hour)
		defer cancel()
		if err := e.Run(ctx); err != nil {
			t.Error(err)
		}
		if s := e.Stats(); s.Requests != 0 {
			t.Errorf("%d requests came in ten years", s.Requests)
		}
	})
}

func TestRunCatchesUpForASecondAtMost(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		steps := 0
		e := newEngine(t, enginesim.Config{Quiet: true, RequestsPerSecond: 10, Now: func() time.Time {
			if steps++; steps == 10 {
				time.Sleep(5 * time.Second) // a stopped process
			} else if steps == 20 {
				time.Sleep(500 * time.Millisecond)
			}
			return time.Now()
		}})
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second+time.Millisecond)
		defer cancel()
		if err := e.Run(ctx); err != nil {
			t.Error(err)
		}
		// 100 steps were due; the 50 of the long stop are lost, the 5 of the short one are not.
		if steps < 49 || steps > 52 {
			t.Errorf("%d steps", steps)
		}
	})
}

func TestAnEngineIsSafeForConcurrentUse(t *testing.T) {
	t.Parallel()
	config, m := inMemory(smallConfig())
	config.ReplayHWM = -1
	config.Now = nil
	e := startEngine(t, config)
	_, endpoint := e.Endpoints()
	var tasks sync.WaitGroup
	for i := range 3 {
		dealer := dial(t, m, endpoint, zmtp.DEALER)
		tasks.Go(func() {
			for range 40 {
				if _, err := e.Step(); err != nil {
					t.Error(err)
				}
				e.Submit(enginesim.Request{Prompt: prompt(10 + i), Answer: prompt(4)})
				e.Truth()
				e.Stats()
			}
		})
		tasks.Go(func() {
			for range 5 {
				got := replay(t, dealer, enginesim.FramingTopic, 0)
				for i, m := range got {
					if m.Seq != uint64(i) {
						t.Errorf("batch %d came as number %d", m.Seq, i)
					}
				}
			}
		})
	}
	tasks.Wait()
	held, next := e.Truth()
	dealer := dial(t, m, endpoint, zmtp.DEALER)
	var fold event.Fold
	var batch event.Batch
	for _, m := range replay(t, dealer, enginesim.FramingTopic, 0) {
		if err := batch.Decode([]byte(m.Payload)); err != nil {
			t.Fatal(err)
		}
		fold.Apply(&batch)
		next--
	}
	if next != 0 || len(held) == 0 {
		t.Errorf("%d batches are missing, %d blocks held", next, len(held))
	}
	checkFold(t, e, &fold)
}
