// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package enginesim_test

import (
	"reflect"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvtap/kvtap/enginesim"
)

func moments(config enginesim.TrafficConfig, n int) [][]enginesim.Request {
	t := enginesim.NewTraffic(config)
	list := make([][]enginesim.Request, n)
	for i := range list {
		list[i] = t.Next()
	}
	return list
}

func TestTrafficIsDecidedByItsSeed(t *testing.T) {
	t.Parallel()
	a, b := moments(enginesim.TrafficConfig{Seed: 5}, 300), moments(enginesim.TrafficConfig{Seed: 5}, 300)
	if !reflect.DeepEqual(a, b) {
		t.Error("one seed, two results")
	}
	if c := moments(enginesim.TrafficConfig{Seed: 6}, 300); reflect.DeepEqual(a, c) {
		t.Error("two seeds, one result")
	}
}

func TestTrafficHasAllItsKindsOfRequests(t *testing.T) {
	t.Parallel()
	const n = 2000
	var twins, loras, salts, followUps int
	var earlier [][]uint32
	systems := map[uint32]int{} // by first token
	for _, requests := range moments(enginesim.TrafficConfig{Conversations: 16}, n) {
		r := requests[0]
		for _, other := range requests[1:] {
			if !reflect.DeepEqual(r, other) {
				t.Fatal("requests of one moment differ")
			}
		}
		if len(requests) > 1 {
			twins++
		}
		if r.LoRA != "" {
			loras++
		}
		if r.CacheSalt != "" {
			salts++
		}
		if len(r.Prompt) == 0 || len(r.Prompt)+len(r.Answer) > 4096 {
			t.Fatalf("%d tokens of prompt, %d of answer", len(r.Prompt), len(r.Answer))
		}
		systems[r.Prompt[0]]++
		whole := slices.Concat(r.Prompt, r.Answer)
		for _, e := range earlier {
			if len(r.Prompt) > len(e) && slices.Equal(r.Prompt[:len(e)], e) {
				followUps++
				break
			}
		}
		if earlier = append(earlier, whole); len(earlier) > 200 {
			earlier = earlier[1:]
		}
	}
	for _, c := range []struct {
		kind      string
		got       int
		low, high int
	}{
		{"moments of several equal requests", twins, n / 20, n / 5},
		{"requests with an adapter", loras, n / 40, n / 4},
		{"requests with a salt", salts, n / 100, n / 6},
		{"further turns", followUps, n / 2, n},
		{"system prompts", len(systems), 8, 16},
		{"uses of the most popular one", slices.Max(values(systems)), n / 5, n * 4 / 5},
	} {
		if c.got < c.low || c.got > c.high {
			t.Errorf("%s: %d, not between %d and %d", c.kind, c.got, c.low, c.high)
		}
	}
}

func values(m map[uint32]int) (list []int) {
	for _, v := range m {
		list = append(list, v)
	}
	return list
}

func TestTheSamePromptHasTheSameAnswerInAllTraffic(t *testing.T) {
	t.Parallel()
	config := enginesim.TrafficConfig{SystemTokens: 2, QuestionTokens: 1, Vocabulary: 2, LoRAShare: -1, SaltShare: -1}
	answers := map[string][]uint32{}
	again := 0
	for seed := range uint64(20) {
		config.Seed = seed
		for _, requests := range moments(config, 50) {
			key := string(bytesOf(requests[0].Prompt))
			if before, ok := answers[key]; ok {
				again++
				if !slices.Equal(before, requests[0].Answer) {
					t.Fatalf("prompt %v has two answers", requests[0].Prompt)
				}
			}
			answers[key] = requests[0].Answer
		}
	}
	if again < 100 {
		t.Errorf("only %d prompts came again", again)
	}
}

func bytesOf(tokens []uint32) (list []byte) {
	for _, token := range tokens {
		list = append(list, byte(token))
	}
	return list
}

func TestTrafficKeepsToOddLimits(t *testing.T) {
	t.Parallel()
	for name, config := range map[string]enginesim.TrafficConfig{
		"one token":            {MaxTokens: 1},
		"two tokens":           {MaxTokens: 2},
		"shorter than a start": {MaxTokens: 100},
		"negative lengths":     {SystemTokens: -1, QuestionTokens: -1, AnswerTokens: -1, SystemPrompts: -1, Turns: -1},
		"one conversation":     {Conversations: -1, TwinShare: -1},
		"negative bound":       {MaxTokens: -5},
	} {
		for _, requests := range moments(config, 200) {
			r := requests[0]
			limit := config.MaxTokens
			if limit == 0 {
				limit = 4096
			}
			if len(r.Prompt) == 0 || len(r.Prompt)+len(r.Answer) > max(limit, 1) {
				t.Fatalf("%s: %d tokens of prompt, %d of answer", name, len(r.Prompt), len(r.Answer))
			}
		}
	}
}

func TestCuttingAPromptLeavesTheSystemPromptAlone(t *testing.T) {
	t.Parallel()
	whole := map[uint32][]uint32{} // by first token
	for _, requests := range moments(enginesim.TrafficConfig{}, 300) {
		whole[requests[0].Prompt[0]] = requests[0].Prompt
	}
	longest := 0
	for _, requests := range moments(enginesim.TrafficConfig{MaxTokens: 100}, 300)[200:] {
		n, system := 0, whole[requests[0].Prompt[0]]
		for n < min(len(system), len(requests[0].Prompt)) && system[n] == requests[0].Prompt[n] {
			n++
		}
		longest = max(longest, n)
	}
	// Questions have 24 to 72 tokens, which leaves up to 75 of the system prompt.
	if longest < 65 {
		t.Errorf("late prompts share %d tokens with their system prompt", longest)
	}
}

func TestACatalogueIsSharedAcrossSeeds(t *testing.T) {
	t.Parallel()
	starts := func(seed, catalogue uint64) map[uint32]bool {
		set := map[uint32]bool{}
		for _, requests := range moments(enginesim.TrafficConfig{
			Seed: seed, Catalogue: catalogue, SystemPrompts: 2, LoRAShare: -1,
		}, 100) {
			set[requests[0].Prompt[0]] = true
		}
		return set
	}
	if diff := cmp.Diff(starts(1, 0), starts(2, 0)); diff != "" {
		t.Errorf("system prompts differ:\n%s", diff)
	}
	if cmp.Equal(starts(1, 0), starts(1, 9)) {
		t.Error("two catalogues have the same system prompts")
	}
}
