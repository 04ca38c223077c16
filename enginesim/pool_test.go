// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package enginesim_test

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvtap/kvtap/enginesim"
	"github.com/kvtap/kvtap/event"
)

// naivePool is vLLM's block pool in lists and strings: a block's key spells out everything that its content depends on.
type naivePool struct {
	size   int
	blocks []naiveBlock
	queue  []int // free blocks, the next to evict first
	clock  int
	events []string
}

type naiveBlock struct {
	key  string // empty: not cached
	refs int
	at   int // when it was cached
}

type naiveSequence struct {
	tokens     []uint32
	blocks     []int
	full       int
	lora, salt string
}

func newNaivePool(blocks, size int) *naivePool {
	p := &naivePool{size: size, blocks: make([]naiveBlock, blocks)}
	for i := range blocks {
		p.queue = append(p.queue, i)
	}
	return p
}

func (p *naivePool) key(s *naiveSequence, i int) string {
	return fmt.Sprint(s.lora, "|", s.salt, "|", s.tokens[:(i+1)*p.size])
}

func (p *naivePool) lookup(key string) int {
	found := -1
	for i, b := range p.blocks {
		if b.key == key && (found < 0 || b.at < p.blocks[found].at) {
			found = i
		}
	}
	return found
}

func (p *naivePool) take(s *naiveSequence, n int) {
	for range n {
		i := p.queue[0]
		p.queue = p.queue[1:]
		if p.blocks[i].key != "" {
			p.events = append(p.events, "removed "+p.blocks[i].key)
			p.blocks[i].key = ""
		}
		p.blocks[i].refs = 1
		s.blocks = append(s.blocks, i)
	}
}

func (p *naivePool) fill(s *naiveSequence) {
	stored := ""
	for ; (s.full+1)*p.size <= len(s.tokens); s.full++ {
		if stored == "" {
			stored = "stored after "
			if s.full > 0 {
				stored += p.key(s, s.full-1)
			}
		}
		key := p.key(s, s.full)
		p.clock++
		p.blocks[s.blocks[s.full]].key, p.blocks[s.blocks[s.full]].at = key, p.clock
		stored += ": " + key
	}
	if stored != "" {
		p.events = append(p.events, stored)
	}
}

func (p *naivePool) admit(r enginesim.Request) (s *naiveSequence, cached int, err error) {
	s = &naiveSequence{tokens: r.Prompt, lora: r.LoRA, salt: r.CacheSalt}
	need := (len(r.Prompt) + p.size - 1) / p.size
	if need > len(p.blocks) {
		return nil, 0, enginesim.ErrTooLong
	}
	for s.full < (len(r.Prompt)-1)/p.size {
		i := p.lookup(p.key(s, s.full))
		if i < 0 {
			break
		}
		s.blocks = append(s.blocks, i)
		s.full++
	}
	queue := slices.DeleteFunc(slices.Clone(p.queue), func(i int) bool { return slices.Contains(s.blocks, i) })
	if need-s.full > len(queue) {
		return nil, 0, enginesim.ErrFull
	}
	p.queue = queue
	for _, i := range s.blocks {
		p.blocks[i].refs++
	}
	cached = s.full * p.size
	p.take(s, need-s.full)
	p.fill(s)
	return s, cached, nil
}

func (p *naivePool) extend(s *naiveSequence, tokens []uint32) error {
	more := (len(s.tokens)+len(tokens)+p.size-1)/p.size - len(s.blocks)
	if more > len(p.queue) {
		return enginesim.ErrFull
	}
	s.tokens = slices.Concat(s.tokens, tokens)
	p.take(s, more)
	p.fill(s)
	return nil
}

func (p *naivePool) release(s *naiveSequence) {
	for _, i := range slices.Backward(s.blocks) {
		if p.blocks[i].refs--; p.blocks[i].refs == 0 {
			p.queue = append(p.queue, i)
		}
	}
}

func (p *naivePool) reset() error {
	if len(p.queue) < len(p.blocks) {
		return enginesim.ErrBusy
	}
	for i := range p.blocks {
		p.blocks[i].key = ""
	}
	p.events = append(p.events, "cleared")
	return nil
}

func (p *naivePool) held() map[string]int {
	held := map[string]int{}
	for _, b := range p.blocks {
		if b.key != "" {
			held[b.key]++
		}
	}
	return held
}

// dictionary translates hashes into the naive model's keys.
type dictionary struct {
	keys   map[event.Hash]string
	hashes map[string]event.Hash
}

func (d *dictionary) learn(t *testing.T, h event.Hash, key string) {
	t.Helper()
	if k, ok := d.keys[h]; ok && k != key {
		t.Fatalf("one hash %v for %q and %q", h, k, key)
	}
	if g, ok := d.hashes[key]; ok && g != h {
		t.Fatalf("two hashes %v and %v for %q", g, h, key)
	}
	d.keys[h], d.hashes[key] = key, h
}

// spell writes events as the naive model does. It learns the hashes of stored blocks from want, the model's version, so
// that a wrong hash shows as a contradiction later.
func (d *dictionary) spell(t *testing.T, p *enginesim.Pool, events []event.Event, want []string) []string {
	t.Helper()
	var spelt []string
	for i, e := range events {
		switch e.Type {
		case event.BlockStored:
			if i < len(want) {
				for j, key := range strings.Split(want[i], ": ")[1:] {
					if j < len(e.Hashes) {
						d.learn(t, e.Hashes[j], key)
					}
				}
			}
			var line strings.Builder
			line.WriteString("stored after ")
			if e.Parent.OK {
				line.WriteString(d.keys[e.Parent.V])
			}
			for j, h := range e.Hashes {
				key := d.keys[h]
				line.WriteString(": " + key)
				tokens := fmt.Sprint(e.BlockTokens(j))
				if !strings.HasSuffix(key, strings.TrimPrefix(tokens, "[")) {
					t.Fatalf("block %d of %q has tokens %s", j, key, tokens)
				}
				var extra []string
				for _, k := range e.ExtraKeys[j] {
					extra = append(extra, string(k.Text))
				}
				lora, rest, _ := strings.Cut(key, "|")
				salt, _, _ := strings.Cut(rest, "|")
				var keys []string
				if lora != "" {
					keys = append(keys, lora)
				}
				if salt != "" && j == 0 && !e.Parent.OK {
					keys = append(keys, salt)
				}
				if !slices.Equal(extra, keys) || string(e.LoRAName) != lora || e.LoRAID.OK != (lora != "") {
					t.Fatalf("block %d of %q has extra keys %q, LoRA %q and its number %v", j, key, extra, e.LoRAName,
						e.LoRAID)
				}
			}
			if !e.TokensUsable() || e.BlockSize.V != int64(p.BlockSize()) || string(e.Medium) != "GPU" {
				t.Fatalf("unusable: %+v", e)
			}
			spelt = append(spelt, line.String())
		case event.BlockRemoved:
			for _, h := range e.Hashes {
				spelt = append(spelt, "removed "+d.keys[h])
			}
		case event.AllBlocksCleared:
			spelt = append(spelt, "cleared")
		}
	}
	return spelt
}

// tally adds events up to copies per hash. Unlike event.Fold it fails on a removal of what is not held.
func tally(t *testing.T, held map[event.Hash]int, events []event.Event) {
	t.Helper()
	for _, e := range events {
		switch e.Type {
		case event.BlockStored:
			for _, h := range e.Hashes {
				held[h]++
			}
		case event.BlockRemoved:
			for _, h := range e.Hashes {
				if held[h]--; held[h] < 0 {
					t.Fatalf("%v is removed but not held", h)
				} else if held[h] == 0 {
					delete(held, h)
				}
			}
		case event.AllBlocksCleared:
			clear(held)
		default:
			t.Fatalf("event of type %v", e.Type)
		}
	}
}

// runScript drives a pool and the naive model with the same operations, read from bytes, and compares everything that
// can be seen after each.
func runScript(t *testing.T, script []byte) {
	next := func() int {
		if len(script) == 0 {
			return 0
		}
		b := script[0]
		script = script[1:]
		return int(b)
	}
	blocks, size := 1+next()%14, 1+next()%4
	pool := enginesim.NewPool(enginesim.PoolConfig{Blocks: blocks, BlockSize: size, HashSeed: uint64(next())})
	model := newNaivePool(blocks, size)
	dict := &dictionary{keys: map[event.Hash]string{}, hashes: map[string]event.Hash{}}
	folded := map[event.Hash]int{}

	type pair struct {
		real  *enginesim.Sequence
		naive *naiveSequence
	}
	var running []pair
	// Few different tokens, so that prompts share prefixes often.
	tokens := func(n, start int) []uint32 {
		var list []uint32
		for i := range n {
			list = append(list, uint32(7+(start+i/5)%3))
		}
		return list
	}
	for len(script) > 0 {
		var err, wantErr error
		switch op := next() % 8; op {
		case 0, 1, 2:
			kind := next()
			r := enginesim.Request{Prompt: tokens(1+next()%24, kind%2)}
			if kind%16 >= 13 {
				r.LoRA = "a"
			}
			if kind%16 == 15 || kind%16 == 12 {
				r.CacheSalt = "s"
			}
			match := pool.Match(r)
			var p pair
			var cached int
			p.real, err = pool.Admit(r)
			p.naive, cached, wantErr = model.admit(r)
			if err == nil && wantErr == nil {
				if p.real.Cached() != cached || match*size != cached || p.real.Len() != len(r.Prompt) {
					t.Fatalf("%d tokens are cached and %d matched, want %d", p.real.Cached(), match*size, cached)
				}
				running = append(running, p)
			}
		case 3, 4:
			if len(running) > 0 {
				p := running[next()%len(running)]
				more := tokens(next()%7, next()%2)
				err = pool.Extend(p.real, more...)
				wantErr = model.extend(p.naive, more)
			}
		case 5, 6:
			if len(running) > 0 {
				i := next() % len(running)
				pool.Release(running[i].real)
				pool.Release(running[i].real) // once more, without effect
				model.release(running[i].naive)
				running = slices.Delete(running, i, i+1)
			}
		case 7:
			err, wantErr = pool.Reset(), model.reset()
		}
		if !errors.Is(err, wantErr) || (err == nil) != (wantErr == nil) {
			t.Fatalf("error %v, want %v", err, wantErr)
		}
		events := pool.Events()
		tally(t, folded, events)
		want := model.events
		model.events = nil
		// Equal before Diff, here and below: cmp takes its time.
		if got := dict.spell(t, pool, events, want); !slices.Equal(want, got) {
			t.Fatalf("events (-want +got):\n%s", cmp.Diff(want, got))
		}
		truth := maps.Collect(pool.Held())
		if !maps.Equal(truth, folded) {
			t.Fatalf("the events add up to something else than the pool holds (-pool +events):\n%s",
				cmp.Diff(truth, folded))
		}
		held := map[string]int{}
		copies := 0
		for h, n := range truth {
			held[dict.keys[h]] = n
			copies += n
		}
		if want := model.held(); !maps.Equal(want, held) {
			t.Fatalf("held (-want +got):\n%s", cmp.Diff(want, held))
		}
		if used := blocks - len(model.queue); pool.Used() != used || pool.Cached() != copies || copies > blocks {
			t.Fatalf("%d of %d used and %d cached, want %d and %d", pool.Used(), blocks, pool.Cached(), used, copies)
		}
	}
}

func script(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	s := make([]byte, n)
	for i := range s {
		s[i] = byte(r.Uint32())
	}
	return s
}

func FuzzPoolDoesWhatTheNaiveModelDoes(f *testing.F) {
	for seed := range uint64(60) {
		f.Add(script(seed, 300))
	}
	f.Fuzz(func(t *testing.T, script []byte) {
		if len(script) > 2000 {
			t.Skip("quadratic in the model")
		}
		runScript(t, script)
	})
}

func prompt(n int) []uint32 {
	p := make([]uint32, n)
	for i := range p {
		p[i] = uint32(100 + i)
	}
	return p
}

func admit(t *testing.T, p *enginesim.Pool, r enginesim.Request) *enginesim.Sequence {
	t.Helper()
	s, err := p.Admit(r)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestAFullyCachedAlignedPromptRecomputesItsLastBlock(t *testing.T) {
	t.Parallel()
	p := enginesim.NewPool(enginesim.PoolConfig{Blocks: 8, BlockSize: 4})
	a := admit(t, p, enginesim.Request{Prompt: prompt(12)})
	b := admit(t, p, enginesim.Request{Prompt: prompt(12)})
	if a.Cached() != 0 || b.Cached() != 8 {
		t.Errorf("%d and %d tokens were cached, want 0 and 8", a.Cached(), b.Cached())
	}
	events := p.Events()
	if len(events) != 2 || len(events[1].Hashes) != 1 || events[1].Hashes[0] != events[0].Hashes[2] ||
		events[1].Parent != event.Some(events[0].Hashes[1]) {
		t.Fatalf("events: %+v", events)
	}
	copies := maps.Collect(p.Held())
	if copies[events[0].Hashes[2]] != 2 || copies[events[0].Hashes[0]] != 1 || p.Used() != 4 {
		t.Errorf("copies: %v, %d used", copies, p.Used())
	}
}

func TestTheTailOfAPromptIsEvictedFirst(t *testing.T) {
	t.Parallel()
	for _, grouped := range []bool{false, true} {
		p := enginesim.NewPool(enginesim.PoolConfig{Blocks: 4, BlockSize: 2, GroupRemovals: grouped})
		a := admit(t, p, enginesim.Request{Prompt: prompt(8)})
		stored := p.Events()[0].Hashes
		p.Release(a)
		admit(t, p, enginesim.Request{Prompt: []uint32{1, 2, 3}})
		var removed [][]event.Hash
		for _, e := range p.Events() {
			if e.Type == event.BlockRemoved {
				removed = append(removed, e.Hashes)
			}
		}
		want := [][]event.Hash{{stored[3]}, {stored[2]}}
		if grouped {
			want = [][]event.Hash{{stored[3], stored[2]}}
		}
		if diff := cmp.Diff(want, removed); diff != "" {
			t.Errorf("grouped %v: removed (-want +got):\n%s", grouped, diff)
		}
	}
}

func TestTheOldestCopyIsReused(t *testing.T) {
	t.Parallel()
	p := enginesim.NewPool(enginesim.PoolConfig{Blocks: 5, BlockSize: 4})
	// A prompt of one block never finds itself, so these are three copies.
	a, b, c := admit(t, p, enginesim.Request{Prompt: prompt(4)}), admit(t, p, enginesim.Request{Prompt: prompt(4)}),
		admit(t, p, enginesim.Request{Prompt: prompt(4)})
	other := admit(t, p, enginesim.Request{Prompt: []uint32{1, 2, 3, 4}})
	for _, s := range []*enginesim.Sequence{a, b, other, c} {
		p.Release(s)
	}
	events := p.Events()
	copied, lone := events[0].Hashes[0], events[3].Hashes[0]
	admit(t, p, enginesim.Request{Prompt: []uint32{5, 6, 7, 8, 9}}) // evicts the first copy
	p.Events()
	// Now the second copy is the oldest. It is taken from the head of the queue, and the lone block comes next there;
	// were it the third copy, the second one would be evicted.
	admit(t, p, enginesim.Request{Prompt: prompt(5)})
	if events = p.Events(); len(events) != 1 || !slices.Equal(events[0].Hashes, []event.Hash{lone}) {
		t.Errorf("events %+v, want the removal of %v", events, lone)
	}
	if n := maps.Collect(p.Held())[copied]; n != 2 {
		t.Errorf("%d copies are left, want 2", n)
	}
}

func TestAPoolRefusesWhatDoesNotFit(t *testing.T) {
	t.Parallel()
	p := enginesim.NewPool(enginesim.PoolConfig{Blocks: 2, BlockSize: 4})
	if _, err := p.Admit(enginesim.Request{}); !errors.Is(err, enginesim.ErrEmptyPrompt) {
		t.Errorf("empty: %v", err)
	}
	if _, err := p.Admit(enginesim.Request{Prompt: prompt(9)}); !errors.Is(err, enginesim.ErrTooLong) {
		t.Errorf("too long: %v", err)
	}
	s := admit(t, p, enginesim.Request{Prompt: prompt(8)})
	if err := p.Extend(s, 1); !errors.Is(err, enginesim.ErrFull) || s.Len() != 8 {
		t.Errorf("extended to %d: %v", s.Len(), err)
	}
	if _, err := p.Admit(enginesim.Request{Prompt: prompt(1)}); !errors.Is(err, enginesim.ErrFull) {
		t.Errorf("full: %v", err)
	}
	if err := p.Reset(); !errors.Is(err, enginesim.ErrBusy) {
		t.Errorf("busy: %v", err)
	}
	p.Release(s)
	if err := p.Reset(); err != nil || p.Cached() != 0 {
		t.Errorf("%d blocks are cached after Reset, %v", p.Cached(), err)
	}
}

func TestHashesDependOnTheSeedAndOnEverythingBefore(t *testing.T) {
	t.Parallel()
	hashes := func(seed uint64, r enginesim.Request) []event.Hash {
		p := enginesim.NewPool(enginesim.PoolConfig{BlockSize: 2, HashSeed: seed})
		admit(t, p, r)
		return p.Events()[0].Hashes
	}
	plain := enginesim.Request{Prompt: []uint32{1, 2, 1, 2}}
	if diff := cmp.Diff(hashes(7, plain), hashes(7, plain)); diff != "" {
		t.Errorf("one seed, two results:\n%s", diff)
	}
	seen := map[event.Hash]bool{}
	for _, list := range [][]event.Hash{
		hashes(0, plain),
		hashes(1, plain),
		hashes(0, enginesim.Request{Prompt: plain.Prompt, LoRA: "x"}),
		hashes(0, enginesim.Request{Prompt: plain.Prompt, CacheSalt: "x"}),
		hashes(0, enginesim.Request{Prompt: plain.Prompt, LoRA: "x", CacheSalt: "x"}),
		hashes(0, enginesim.Request{Prompt: []uint32{2, 1, 1, 2}}),
	} {
		for _, h := range list {
			if seen[h] {
				t.Errorf("%v stands for two contents", h)
			}
			seen[h] = true
		}
	}
}

func TestAPoolOfImpossibleSizePanics(t *testing.T) {
	t.Parallel()
	for _, config := range []enginesim.PoolConfig{
		{Blocks: -1}, {BlockSize: -1}, {Blocks: 1<<30 + 1}, {BlockSize: 1<<30 + 1},
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%+v made a pool", config)
				}
			}()
			enginesim.NewPool(config)
		}()
	}
}

func TestHeldStopsWhenItsReaderDoes(t *testing.T) {
	t.Parallel()
	p := enginesim.NewPool(enginesim.PoolConfig{BlockSize: 1})
	admit(t, p, enginesim.Request{Prompt: prompt(5)})
	n := 0
	for range p.Held() {
		if n++; n == 2 {
			break
		}
	}
	if n != 2 || p.Blocks() != 1024 {
		t.Errorf("read %d of a pool of %d", n, p.Blocks())
	}
}
