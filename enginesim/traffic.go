// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package enginesim

import (
	"math/rand/v2"
	"slices"
	"strconv"
)

// Request is one prompt for an engine, with the answer that its model will give. Its slices are read only: requests of
// one conversation share memory.
type Request struct {
	Prompt []uint32
	Answer []uint32

	// LoRA is the name of the adapter; empty means the bare model.
	LoRA string

	// CacheSalt separates the request's blocks from those of other salts; empty means none.
	CacheSalt string
}

// TrafficConfig sets up a Traffic. Its zero value works.
type TrafficConfig struct {
	// Seed decides everything: traffic with the same configuration is the same.
	Seed uint64

	// Catalogue picks the system prompts. Generators with one Catalogue share them, whatever their Seed.
	Catalogue uint64

	// SystemPrompts is how many system prompts there are; how often each is used falls off as a Zipf distribution.
	// Zero means 16.
	SystemPrompts int

	// SystemTokens, QuestionTokens and AnswerTokens are mean lengths; each is drawn between half and one and a half of
	// it. Zero means 256, 48 and 64.
	SystemTokens, QuestionTokens, AnswerTokens int

	// Conversations is how many can be open at once. Zero means 64.
	Conversations int

	// Turns is the number of requests after which a conversation ends. Zero means 8.
	Turns int

	// MaxTokens bounds prompt and answer together: a conversation whose next turn would exceed it ends, and a turn that
	// alone would is cut. Zero means 4096.
	MaxTokens int

	// Vocabulary is the number of token ids. Zero means 128000.
	Vocabulary uint32

	// LoRAShare and SaltShare are the parts of conversations with an adapter and with a cache salt; TwinShare is the
	// part of requests that come several times at once. Zero means 0.1, 0.05 and 0.1; a negative value means none.
	LoRAShare, SaltShare, TwinShare float64
}

func (c TrafficConfig) withDefaults() TrafficConfig {
	defaultTo(&c.SystemPrompts, 16)
	defaultTo(&c.SystemTokens, 256)
	defaultTo(&c.QuestionTokens, 48)
	defaultTo(&c.AnswerTokens, 64)
	defaultTo(&c.Conversations, 64)
	defaultTo(&c.Turns, 8)
	defaultTo(&c.MaxTokens, 4096)
	defaultTo(&c.Vocabulary, 128_000)
	defaultTo(&c.LoRAShare, 0.1)
	defaultTo(&c.SaltShare, 0.05)
	defaultTo(&c.TwinShare, 0.1)
	return c
}

// defaultTo sets *v to its default if it is zero.
func defaultTo[T comparable](v *T, value T) {
	var zero T
	if *v == zero {
		*v = value
	}
}

// Traffic makes up the requests of a busy engine: conversations that start with one of a few shared system prompts and
// grow by the last answer and a new question each turn. Now and then one uses an adapter or a cache salt, or a request
// comes several times at the same moment. A Traffic is not safe for concurrent use.
type Traffic struct {
	config  TrafficConfig
	rand    *rand.Rand
	zipf    *rand.Zipf
	systems [][]uint32
	open    []conversation
	now     int // requests so far
}

type conversation struct {
	history    []uint32 // only ever appended to: prompts point into it
	turns      int
	ready      int // the request number from which its user has read the last answer
	lora, salt string
}

// NewTraffic returns a generator.
func NewTraffic(config TrafficConfig) *Traffic {
	config = config.withDefaults()
	t := &Traffic{config: config, rand: rand.New(rand.NewPCG(config.Seed, 0x7472616666696300))}
	t.zipf = rand.NewZipf(t.rand, 1.3, 1, uint64(max(config.SystemPrompts, 1)-1))
	for i := range max(config.SystemPrompts, 1) {
		r := rand.New(rand.NewPCG(config.Catalogue, uint64(i)))
		t.systems = append(t.systems, text(r, nil, around(r, config.SystemTokens), config.Vocabulary))
	}
	return t
}

// Next returns the requests that come next, at one moment: mostly one, else two to four identical ones.
func (t *Traffic) Next() []Request {
	t.now++
	c := t.pick()
	question := around(t.rand, t.config.QuestionTokens)
	if len(c.history)+question >= t.config.MaxTokens {
		t.start(c)
		c.history = slices.Clip(c.history[:min(len(c.history), max(t.config.MaxTokens-question-1, 0))])
		question = max(min(question, t.config.MaxTokens-1), 1)
	}
	c.history = text(t.rand, c.history, question, t.config.Vocabulary)
	prompt := slices.Clip(c.history)
	c.history = t.answer(c)
	r := Request{Prompt: prompt, Answer: slices.Clip(c.history[len(prompt):]), LoRA: c.lora, CacheSalt: c.salt}
	c.turns++
	c.ready = t.now + 4 + t.rand.IntN(16)

	n := 1
	if t.rand.Float64() < t.config.TwinShare {
		n = 2 + t.rand.IntN(3)
	}
	return slices.Repeat([]Request{r}, n)
}

// pick returns the conversation whose turn it is: one of those whose users have read the last answer, if there is any.
func (t *Traffic) pick() *conversation {
	limit := max(t.config.Conversations, 1)
	i := t.rand.IntN(limit)
	if i >= len(t.open) {
		t.open = append(t.open, conversation{})
		c := &t.open[len(t.open)-1]
		t.start(c)
		return c
	}
	c := &t.open[i]
	for n := 1; c.ready > t.now && n < len(t.open); n++ {
		c = &t.open[(i+n)%len(t.open)]
	}
	if c.turns >= t.config.Turns {
		t.start(c)
	}
	return c
}

// start makes c a new conversation.
func (t *Traffic) start(c *conversation) {
	*c = conversation{history: slices.Clip(t.systems[t.zipf.Uint64()])}
	if t.rand.Float64() < t.config.LoRAShare {
		c.lora = "adapter-" + strconv.Itoa(1+t.rand.IntN(3))
	}
	if t.rand.Float64() < t.config.SaltShare {
		c.salt = "tenant-" + strconv.Itoa(1+t.rand.IntN(4))
	}
}

// answer returns the history of c with the model's answer to it. As with a greedy model, the same prompt has always the
// same answer, whoever asks.
func (t *Traffic) answer(c *conversation) []uint32 {
	h := mixText(1, c.lora)
	for _, token := range c.history {
		h = mix(h, uint64(token))
	}
	r := rand.New(rand.NewPCG(h, h))
	n := min(around(r, t.config.AnswerTokens), t.config.MaxTokens-len(c.history))
	return text(r, c.history, n, t.config.Vocabulary)
}

// around draws a length between half and one and a half of mean, at least 1.
func around(r *rand.Rand, mean int) int {
	return max(mean/2+r.IntN(max(mean, 0)+1), 1)
}

// text appends n random tokens to dst.
func text(r *rand.Rand, dst []uint32, n int, vocabulary uint32) []uint32 {
	dst = slices.Grow(dst, max(n, 0))
	for range n {
		dst = append(dst, r.Uint32N(vocabulary))
	}
	return dst
}
