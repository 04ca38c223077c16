// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

//go:build e2e && unix

package e2e_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/kvtap/kvtap/internal/interop"
	"github.com/kvtap/kvtap/kvcache"
)

// What the clients of a real vLLM are told is what it holds, after every batch.
func TestFoldEqualsTheEnginesBlockPool(t *testing.T) {
	if os.Getenv("KVTAP_E2E_PUB") != "" {
		t.Skip("KVTAP_E2E_PUB names an engine elsewhere, which TestEngineElsewhere follows")
	}
	for _, name := range []string{"KVTAP_E2E_PYTHON", "KVTAP_E2E_MODELS"} {
		if os.Getenv(name) == "" {
			t.Fatalf("%s is not set: e2e/run installs what this test needs, and runs it", name)
		}
	}
	results := &table{}
	t.Cleanup(func() {
		if err := results.print(t.Output()); err != nil {
			t.Error(err)
		}
	})
	// Two engines at a time fit two cores and 8 GB.
	t.Run("one rank", func(t *testing.T) {
		t.Parallel()
		oneRank(t, results)
	})
	t.Run("hybrid, then two ranks", func(t *testing.T) {
		t.Parallel()
		t.Run("hybrid", func(t *testing.T) { hybrid(t, results) })
		t.Run("two ranks", func(t *testing.T) { twoRanks(t, results) })
	})
}

// oneRank is an engine of full attention: the usual traffic, then everything that goes wrong.
func oneRank(t *testing.T, results *table) {
	e := newEngine(t, "llama", 1)
	s := &scene{name: "one rank", t: t, engine: e, table: results}
	// First is there before the engine, and to the end.
	var first, cut *follower
	var pub, replay *interop.Proxy
	phases := []phase{{
		name: "a client that waits for the engine", exact: true,
		play: func(ctx context.Context, t *testing.T) {
			first = s.follow(s.t, "first", 0)
			e.start(ctx, s.t)
			e.ask(ctx, t, 1, traffic(1).prompts(8, 70))
		},
	}}
	phases = append(phases, s.usual(traffic(2))...)
	phases = append(phases, phase{
		name: "broken connections", exact: true,
		play: func(ctx context.Context, t *testing.T) {
			pub = interop.StartProxy(s.t, fmt.Sprintf("tcp://127.0.0.1:%d", e.pub))
			replay = interop.StartProxy(s.t, fmt.Sprintf("tcp://127.0.0.1:%d", e.route))
			cut = s.follow(s.t, "cut", 0, pub, replay)
			cut.settle(ctx, t)
			n := traffic(3)
			for range 3 {
				load := e.background(ctx, 2, n.prompts(60, 100))
				at := cut.position()
				cut.await(ctx, t, "ten batches came", func() bool { return int(cut.next) >= at+10 })
				pub.Cut()
				pub.Open()
				load(t)
			}
			// What is published meanwhile can come by replay alone.
			pub.Cut()
			replay.Cut()
			e.ask(ctx, t, 2, n.prompts(40, 100))
			pub.Open()
			replay.Open()
			cut.settle(ctx, t)
			if n := cut.client.Stats().Disconnections; n < 4 {
				t.Errorf("the connection was lost %d times, want at least 4", n)
			}
		},
		premise: func(_ *comparison, seen counts) string { return wants("replayed batches", seen.replayed, 40) },
	}, phase{
		name: "a connection that goes dead without a word", exact: true,
		play: func(ctx context.Context, t *testing.T) {
			n := traffic(4)
			e.ask(ctx, t, 2, n.prompts(10, 100))
			cut.settle(ctx, t)
			pub.Silence()
			replay.Silence()
			e.ask(ctx, t, 2, n.prompts(40, 100))
			cut.await(ctx, t, "it notices the silence", func() bool { return cut.status.State == kvcache.StateRecovering })
			pub.Open()
			replay.Open()
			cut.settle(ctx, t)
			// From here on it hears nothing until the engine's next life.
			pub.Cut()
			replay.Cut()
			s.leave(cut)
		},
	}, phase{
		name: "a client that comes late, stops, and comes anew", exact: true,
		play: func(ctx context.Context, t *testing.T) {
			// More than a ROUTER's high-water mark of 1000, so that replays may lose what is beyond.
			n := traffic(5)
			for {
				published, err := e.published(0)
				if err != nil {
					t.Fatal(err)
				}
				if published > 1300 {
					break
				}
				e.ask(ctx, t, 2, n.prompts(50, 70))
			}
			late := s.follow(t, "late", 0)
			late.settle(ctx, t)
			s.leave(late)
			late.stop(t)
			e.ask(ctx, t, 2, n.prompts(50, 100))
			load := e.background(ctx, 2, n.prompts(50, 100))
			anew := s.follow(t, "anew", 0)
			load(t)
			anew.settle(ctx, t)
			s.leave(anew)
			anew.stop(t)
		},
		premise: func(_ *comparison, seen counts) string { return wants("replayed batches", seen.replayed, 2600) },
	})
	phases = append(phases, s.doubtful(traffic(6))...)
	phases = append(phases, phase{
		name: "kill -9 under load, and a restart", exact: true,
		play: func(ctx context.Context, t *testing.T) {
			s.expected[first.name] = []kvcache.Reason{kvcache.ReasonRestart}
			n := traffic(7)
			load := e.try(ctx, 4, n.prompts(400, 150))
			at := first.position()
			first.await(ctx, t, "twenty batches came", func() bool { return int(first.next) >= at+20 })
			now, _ := e.now()
			now.kill()
			load() // most of it fails, as it should
			e.start(ctx, s.t)
			// The same prompts as in the life before: the same hashes at the same numbers.
			e.ask(ctx, t, 1, traffic(1).prompts(8, 70))
			e.ask(ctx, t, 2, n.prompts(40, 100))
		},
	}, phase{
		name: "a restart unseen until the numbers are higher", exact: true,
		play: func(ctx context.Context, t *testing.T) {
			n := traffic(8)
			for {
				published, err := e.published(0)
				if err != nil {
					t.Fatal(err)
				}
				if published > cut.position()+20 {
					break
				}
				e.ask(ctx, t, 2, n.prompts(20, 70))
			}
			s.expected[cut.name] = []kvcache.Reason{kvcache.ReasonRestart}
			s.following = append(s.following, cut)
			pub.Open()
			replay.Open()
			cut.settle(ctx, t)
			e.ask(ctx, t, 2, n.prompts(20, 100))
		},
	})
	s.play(t, phases)
}

// hybrid is an engine with groups of full and of sliding-window attention.
func hybrid(t *testing.T, results *table) {
	e := newEngine(t, "gemma3", 1)
	s := &scene{name: "hybrid", t: t, engine: e, table: results}
	s.play(t, append(append([]phase{{
		name: "start", exact: true,
		play: func(ctx context.Context, t *testing.T) {
			e.start(ctx, s.t)
			s.follow(s.t, "first", 0)
			e.ask(ctx, t, 1, traffic(1).prompts(8, 70))
		},
	}}, s.usual(traffic(2))...), s.doubtful(traffic(3))...))
}

// twoRanks is an engine of two data-parallel ranks, each with its cache and its stream.
func twoRanks(t *testing.T, results *table) {
	e := newEngine(t, "llama", 2)
	s := &scene{name: "two ranks", t: t, engine: e, table: results}
	s.play(t, append([]phase{{
		name: "traffic to each and to both", exact: true,
		play: func(ctx context.Context, t *testing.T) {
			e.start(ctx, s.t)
			s.follow(s.t, "rank 0", 0)
			s.follow(s.t, "rank 1", 1)
			n := traffic(1)
			for rank := range 2 {
				prompts := n.prompts(20, 100)
				for i := range prompts {
					prompts[i].rank = rank
				}
				e.ask(ctx, t, 2, prompts)
			}
			// A prompt that both hold is a block of each, under one hash.
			shared := n.tokens(200)
			for rank := range 2 {
				c := ask(shared, 1)
				c.rank = rank
				e.ask(ctx, t, 1, []completion{c})
			}
			e.ask(ctx, t, 8, n.prompts(60, 100))
		},
	}}, append(s.usual(traffic(2)), s.doubtful(traffic(3))...)...))
}

// usual is what an engine sees all day. No fold is uncertain after it.
func (s *scene) usual(n *generator) []phase {
	e := s.engine
	return []phase{{
		name: "shared prefixes", exact: true,
		play: func(ctx context.Context, t *testing.T) {
			var prefixes [4][]int
			for i := range prefixes {
				prefixes[i] = n.tokens(3*blockSize + n.IntN(blockSize))
			}
			var requests []completion
			for range 80 {
				// A tail of more than a block: no two requests store the very same blocks.
				prompt := append(append([]int{}, prefixes[n.IntN(len(prefixes))]...), n.tokens(2*blockSize+n.IntN(64))...)
				requests = append(requests, ask(prompt, 1+n.IntN(40)))
			}
			if e.ask(ctx, t, 4, requests) == 0 {
				t.Error("no prefix was reused")
			}
		},
		premise: func(_ *comparison, seen counts) string { return wants("evictions", seen.removed, 10) },
	}, {
		name: "growing chats", exact: true,
		play: func(ctx context.Context, t *testing.T) {
			var chats sync.WaitGroup
			for chat := range 3 {
				n := traffic(uint64(100 + chat))
				chats.Go(func() { e.chat(ctx, t, n, 6) })
			}
			chats.Wait()
		},
	}, {
		name: "prompts of whole blocks, three times each", exact: true,
		play: func(ctx context.Context, t *testing.T) {
			for blocks := 2; blocks <= 7; blocks++ {
				prompt := n.tokens(blocks * blockSize)
				for range 3 {
					e.askEach(ctx, t, ask(prompt, 1))
				}
			}
		},
		premise: func(c *comparison, _ counts) string { return wants("copies of a block", int(c.copies), 2) },
	}, {
		name: "cache salts", exact: true,
		play: func(ctx context.Context, t *testing.T) {
			var requests []completion
			for range 8 {
				prompt := n.tokens(2*blockSize + 10)
				for _, salt := range []string{"", "green", "blue", "", "green", "blue"} {
					c := ask(prompt, 2)
					c.CacheSalt, c.rank = salt, 0
					requests = append(requests, c)
				}
			}
			if cached := e.ask(ctx, t, 1, requests); cached != len(requests)/2*2*blockSize {
				t.Errorf("%d tokens were reused, want those of 2 blocks in every other request of %d", cached, len(requests))
			}
		},
	}}
}

// doubtful is what makes folds uncertain, and the resets that make them exact again.
func (s *scene) doubtful(n *generator) []phase {
	e := s.engine
	return []phase{{
		name: "identical prompts at once",
		play: func(ctx context.Context, t *testing.T) {
			for round := range 12 {
				prompt := n.tokens((1+round%6)*blockSize + round%3*7)
				var requests []completion
				for range 6 {
					c := ask(prompt, 1+round%3*16)
					c.rank = round % e.ranks
					requests = append(requests, c)
				}
				e.ask(ctx, t, len(requests), requests)
			}
		},
		premise: func(c *comparison, _ counts) string { return wants("copies of a block", int(c.copies), 3) },
	}, {
		name: "full reports",
		play: func(ctx context.Context, t *testing.T) {
			for round := range 15 {
				prompt := n.tokens(2*blockSize + n.IntN(6*blockSize))
				for range 3 {
					c := ask(prompt, 1)
					c.rank = round % e.ranks
					c.XArgs = map[string]string{"kv_cache_report_mode": "full"}
					e.ask(ctx, t, 1, []completion{c})
					prompt = append(prompt, n.tokens(round*5)...)
				}
			}
		},
		premise: func(c *comparison, _ counts) string { return wants("uncertain blocks", c.uncertain, 1) },
	}, {
		name: "reset while idle", exact: true,
		play: func(ctx context.Context, t *testing.T) {
			s.reset(ctx, t, false)
			e.askEach(ctx, t, n.prompts(1, 70)[0])
			e.ask(ctx, t, 4, n.prompts(30, 100))
			s.reset(ctx, t, false)
			s.reset(ctx, t, false)
			e.askEach(ctx, t, n.prompts(1, 70)[0])
		},
		premise: func(_ *comparison, seen counts) string { return wants("clears", seen.cleared, 2*len(s.following)) },
	}, {
		name: "reset under load", exact: true,
		play: func(ctx context.Context, t *testing.T) {
			watched := s.following[0]
			for range 4 {
				var requests []completion
				for range 24 {
					requests = append(requests, ask(n.tokens(blockSize+n.IntN(100)), 30))
				}
				load := e.background(ctx, 6, requests)
				at := watched.position()
				watched.await(ctx, t, "batches came", func() bool { return int(watched.next) >= at+5 })
				if _, err := e.reset(ctx, false); err != nil { // mostly refused, since requests run
					t.Error(err)
				}
				s.reset(ctx, t, true)
				load(t)
			}
		},
		premise: func(_ *comparison, seen counts) string { return wants("clears", seen.cleared, 4*len(s.following)) },
	}}
}

// reset has the engine drop its cache, and fails the test if it does not.
func (s *scene) reset(ctx context.Context, t *testing.T, running bool) {
	t.Helper()
	if done, err := s.engine.reset(ctx, running); err != nil || !done {
		t.Errorf("the engine did not reset its cache: %v, %v", done, err)
	}
}

// wants says what is missing if there are fewer of something than the least.
func wants(what string, n, least int) string {
	if n >= least {
		return ""
	}
	return fmt.Sprintf("%d %s, want at least %d", n, what, least)
}

// generator makes up prompts. The same seed makes the same ones.
type generator struct{ *rand.Rand }

func traffic(seed uint64) *generator { return &generator{rand.New(rand.NewPCG(seed, 0))} }

// tokens returns n tokens of a byte each.
func (n *generator) tokens(count int) []int {
	tokens := make([]int, count)
	for i := range tokens {
		tokens[i] = 5 + n.IntN(256)
	}
	return tokens
}

// prompts returns requests that have nothing in common, of so many tokens and up to a block more.
func (n *generator) prompts(count, tokens int) []completion {
	requests := make([]completion, count)
	for i := range requests {
		requests[i] = ask(n.tokens(tokens+n.IntN(blockSize)), 1)
	}
	return requests
}

// ask has the engine answer requests, width of them at a time. It returns how many tokens were reused.
func (e *engine) ask(ctx context.Context, t testing.TB, width int, requests []completion) int {
	t.Helper()
	cached, err := e.completeAll(ctx, width, requests)
	if err != nil {
		t.Fatal(err)
	}
	return cached
}

// askEach has each rank answer a request.
func (e *engine) askEach(ctx context.Context, t testing.TB, c completion) {
	t.Helper()
	for rank := range e.ranks {
		c.rank = rank
		e.ask(ctx, t, 1, []completion{c})
	}
}

// background asks while the test goes on. The function that it returns waits for the end.
func (e *engine) background(ctx context.Context, width int, requests []completion) func(t *testing.T) {
	done := make(chan error, 1)
	go func() {
		_, err := e.completeAll(ctx, width, requests)
		done <- err
	}()
	return func(t *testing.T) {
		t.Helper()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
}

// try is background for an engine that will not live to answer.
func (e *engine) try(ctx context.Context, width int, requests []completion) (wait func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = e.completeAll(ctx, width, requests) // it is killed meanwhile
	}()
	return func() { <-done }
}

// chat goes on for turns, each with all that was said before.
func (e *engine) chat(ctx context.Context, t *testing.T, n *generator, turns int) {
	words := strings.Fields("which engine holds the longest prefix of this prompt and how many blocks would be computed")
	say := func(count int) string {
		var said []string
		for range count {
			said = append(said, words[n.IntN(len(words))])
		}
		return strings.Join(said, " ")
	}
	messages := []message{{"system", say(20)}}
	for range turns {
		messages = append(messages, message{"user", say(8)})
		c := ask(nil, 24)
		c.Messages = messages
		a, err := e.complete(ctx, c)
		if err != nil {
			t.Error(err)
			return
		}
		messages = append(messages, message{"assistant", a.text})
	}
}
