// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package enginesim

import (
	"errors"
	"fmt"
	"iter"
	"math/bits"

	"github.com/kvtap/kvtap/event"
)

// Errors of a pool.
var (
	// ErrFull says that requests in flight hold too many blocks. The request can be tried again when one of them ends.
	ErrFull = errors.New("enginesim: no free blocks")

	// ErrTooLong says that a request needs more blocks than the pool has.
	ErrTooLong = errors.New("enginesim: request is longer than the pool")

	// ErrBusy says that a pool cannot be reset while requests hold blocks.
	ErrBusy = errors.New("enginesim: blocks are in use")

	// ErrEmptyPrompt says that a request has no tokens.
	ErrEmptyPrompt = errors.New("enginesim: prompt without tokens")
)

// PoolConfig sets up a Pool. Its zero value works.
type PoolConfig struct {
	// Blocks is the number of physical blocks. Zero means 1024.
	Blocks int

	// BlockSize is the number of tokens per block. Zero means 16.
	BlockSize int

	// HashSeed is the root of every block's hash. Pools with the same seed name the same content by the same hash, as
	// engines with one PYTHONHASHSEED do; zero is a seed like any other.
	HashSeed uint64

	// GroupRemovals puts the blocks that are evicted at one allocation into one BlockRemoved. Otherwise each has its
	// own, as in vLLM.
	GroupRemovals bool
}

// Pool is a block pool with prefix caching that behaves as vLLM's does: full blocks are found by a hash chained over
// everything before them; a request holds references on its blocks; a block without references stays cached, in a
// queue from which the longest unused is evicted first; and one hash may be held by several physical blocks, each with
// a BlockStored and a BlockRemoved of its own.
//
// A Pool is not safe for concurrent use.
type Pool struct {
	size    int // tokens per block
	seed    uint64
	grouped bool

	blocks []block
	first  map[event.Hash]int32 // the oldest copy, which is the one that a lookup finds
	hashed int                  // blocks with a hash: the sum over all copies

	// The free queue holds every block without references, the next to evict first. Its ends are the sentinel's
	// neighbours; the sentinel is the last of blocks.
	free int

	loras  map[string]int64 // numbers of adapters, in order of first use
	events []event.Event
}

// block is one physical block. Links are indexes into Pool.blocks.
type block struct {
	hash   event.Hash
	cached bool // hash is set and the block is in the ring of its copies
	refs   int32

	prev, next         int32 // the free queue; meaningful while refs is 0
	prevCopy, nextCopy int32 // the ring of blocks with this hash, oldest first; meaningful while cached
}

// NewPool returns an empty pool. It panics if a size is negative or above 2^30.
func NewPool(config PoolConfig) *Pool {
	if config.Blocks == 0 {
		config.Blocks = 1024
	}
	if config.BlockSize == 0 {
		config.BlockSize = 16
	}
	if min(config.Blocks, config.BlockSize) < 0 || max(config.Blocks, config.BlockSize) > 1<<30 {
		panic(fmt.Sprintf("enginesim: a pool of %d blocks of %d tokens", config.Blocks, config.BlockSize))
	}
	p := &Pool{
		size:    config.BlockSize,
		seed:    config.HashSeed,
		grouped: config.GroupRemovals,
		blocks:  make([]block, config.Blocks+1),
		first:   make(map[event.Hash]int32),
		loras:   make(map[string]int64),
	}
	sentinel := p.sentinel()
	p.blocks[sentinel].prev, p.blocks[sentinel].next = sentinel, sentinel
	for i := range sentinel {
		p.pushFree(i)
	}
	return p
}

// Sequence is a request that holds blocks of a pool.
type Sequence struct {
	pool   *Pool
	tokens []uint32     // computed so far
	blocks []int32      // hold tokens in order; the last may be partial
	hashes []event.Hash // of the full ones
	cached int          // tokens reused at admission

	salt, lora string
}

// Len returns the number of tokens computed so far.
func (s *Sequence) Len() int { return len(s.tokens) }

// Cached returns the number of tokens that admission found in the pool, a multiple of the block size.
func (s *Sequence) Cached() int { return s.cached }

// Blocks returns the number of physical blocks.
func (p *Pool) Blocks() int { return len(p.blocks) - 1 }

// BlockSize returns the number of tokens per block.
func (p *Pool) BlockSize() int { return p.size }

// Used returns the number of blocks that sequences hold; the rest can be had, by eviction if need be.
func (p *Pool) Used() int { return p.Blocks() - p.free }

// Cached returns the number of blocks that have a hash, copies counted.
func (p *Pool) Cached() int { return p.hashed }

// Held yields each hash that the pool holds, with the number of its physical copies, in no particular order.
func (p *Pool) Held() iter.Seq2[event.Hash, int] {
	return func(yield func(event.Hash, int) bool) {
		for h, first := range p.first {
			n := 1
			for i := p.blocks[first].nextCopy; i != first; i = p.blocks[i].nextCopy {
				n++
			}
			if !yield(h, n) {
				return
			}
		}
	}
}

// Match returns the number of blocks that a prompt would reuse if it came now. At least one token is always computed,
// so of n tokens at most (n-1)/BlockSize blocks are reused. The answer to the request plays no part.
func (p *Pool) Match(r Request) int {
	n := 0
	h := p.root()
	for ; n < (len(r.Prompt)-1)/p.size; n++ {
		h = p.chain(h, n, r.Prompt[n*p.size:(n+1)*p.size], r.LoRA, r.CacheSalt)
		if _, ok := p.first[h]; !ok {
			break
		}
	}
	return n
}

// Admit computes the whole prompt of a request: it takes references on the blocks that are found, and new blocks for
// the rest. The caller must Release the sequence. On ErrFull, ErrTooLong and ErrEmptyPrompt nothing has changed.
func (p *Pool) Admit(r Request) (*Sequence, error) {
	n := len(r.Prompt)
	if n == 0 {
		return nil, ErrEmptyPrompt
	}
	need := p.blocksFor(n)
	if need > p.Blocks() {
		return nil, fmt.Errorf("%w: %d tokens need %d blocks of %d", ErrTooLong, n, need, p.Blocks())
	}
	hit := p.Match(r)
	s := &Sequence{
		pool:   p,
		blocks: make([]int32, 0, need),
		hashes: make([]event.Hash, 0, n/p.size),
		cached: hit * p.size,
		salt:   r.CacheSalt,
		lora:   r.LoRA,
	}
	// A block that is found but unreferenced is among the free ones too, and stops being free by being used.
	free := p.free
	for i := range hit {
		h := p.chain(s.parent(i), i, r.Prompt[i*p.size:(i+1)*p.size], s.lora, s.salt)
		b := p.first[h]
		if p.blocks[b].refs == 0 {
			free--
		}
		s.hashes = append(s.hashes, h)
		s.blocks = append(s.blocks, b)
	}
	if need-hit > free {
		return nil, ErrFull
	}
	for _, b := range s.blocks {
		if p.blocks[b].refs++; p.blocks[b].refs == 1 {
			p.unlinkFree(b)
		}
	}
	s.tokens = make([]uint32, n, n+len(r.Answer))
	copy(s.tokens, r.Prompt)
	p.allocate(s, need-hit)
	p.cacheFull(s)
	return s, nil
}

// Extend computes further tokens of a sequence. On ErrFull nothing has changed.
func (p *Pool) Extend(s *Sequence, tokens ...uint32) error {
	more := p.blocksFor(len(s.tokens)+len(tokens)) - len(s.blocks)
	if more > p.free {
		return ErrFull
	}
	s.tokens = append(s.tokens, tokens...)
	p.allocate(s, more)
	p.cacheFull(s)
	return nil
}

// Release gives up the references of a sequence. Its full blocks stay cached; the tail of the prompt is evicted before
// the head, as the head is the more likely to be shared. A second Release does nothing.
func (p *Pool) Release(s *Sequence) {
	for i := len(s.blocks) - 1; i >= 0; i-- {
		b := s.blocks[i]
		if p.blocks[b].refs--; p.blocks[b].refs == 0 {
			p.pushFree(b)
		}
	}
	s.blocks = nil
}

// Reset drops the whole cache, or returns ErrBusy if a sequence holds blocks.
func (p *Pool) Reset() error {
	if p.Used() > 0 {
		return ErrBusy
	}
	for i := range p.blocks {
		p.blocks[i].cached = false
	}
	clear(p.first)
	p.hashed = 0
	p.events = append(p.events, event.Event{Type: event.AllBlocksCleared})
	return nil
}

// Events returns what happened since the last call, in order. It belongs to the caller, except that the byte slices in
// it must not be written to.
func (p *Pool) Events() []event.Event {
	events := p.events
	p.events = nil
	return events
}

// blocksFor returns how many blocks n tokens take.
func (p *Pool) blocksFor(n int) int { return (n + p.size - 1) / p.size }

// parent returns the hash that block i of s is chained to.
func (s *Sequence) parent(i int) event.Hash {
	if i == 0 {
		return s.pool.root()
	}
	return s.hashes[i-1]
}

// allocate appends n blocks to s, evicting what they held. The caller has checked that n are free.
func (p *Pool) allocate(s *Sequence, n int) {
	sentinel := p.sentinel()
	group := -1 // index of the open BlockRemoved
	for range n {
		i := p.blocks[sentinel].next
		p.unlinkFree(i)
		p.blocks[i].refs = 1
		s.blocks = append(s.blocks, i)
		if !p.blocks[i].cached {
			continue
		}
		h := p.blocks[i].hash
		p.uncache(i)
		if p.grouped && group >= 0 {
			p.events[group].Hashes = append(p.events[group].Hashes, h)
			continue
		}
		group = len(p.events)
		p.events = append(p.events, event.Event{
			Type:   event.BlockRemoved,
			Hashes: []event.Hash{h},
			Medium: mediumGPU,
			Group:  event.Some[int64](0),
		})
	}
}

// cacheFull gives a hash to each block of s that is full and has none, and tells of them in one BlockStored.
func (p *Pool) cacheFull(s *Sequence) {
	from, to := len(s.hashes), len(s.tokens)/p.size
	if from == to {
		return
	}
	for i := from; i < to; i++ {
		h := p.chain(s.parent(i), i, s.tokens[i*p.size:(i+1)*p.size], s.lora, s.salt)
		s.hashes = append(s.hashes, h)
		p.cache(s.blocks[i], h)
	}
	// Elements of s.hashes and s.tokens are never written twice, so the event may point into both.
	e := event.Event{
		Type:      event.BlockStored,
		Hashes:    s.hashes[from:to:to],
		Tokens:    s.tokens[from*p.size : to*p.size : to*p.size],
		Stride:    1,
		BlockSize: event.Some(int64(p.size)),
		ExtraKeys: make([]event.BlockKeys, to-from),
		Medium:    mediumGPU,
		Group:     event.Some[int64](0),
		SpecKind:  kindFullAttention,
	}
	if from > 0 {
		e.Parent = event.Some(s.hashes[from-1])
	}
	if s.lora != "" {
		e.LoRAID = event.Some(p.loraID(s.lora))
		e.LoRAName = []byte(s.lora)
		keys := event.BlockKeys{{Kind: event.KeyText, Text: e.LoRAName}}
		for i := range e.ExtraKeys {
			e.ExtraKeys[i] = keys[:1:1]
		}
	}
	if s.salt != "" && from == 0 {
		// vLLM names the salt on the first block only; the chain carries it on.
		e.ExtraKeys[0] = append(e.ExtraKeys[0], event.Key{Kind: event.KeyText, Text: []byte(s.salt)})
	}
	p.events = append(p.events, e)
}

var (
	mediumGPU         = []byte("GPU")
	kindFullAttention = []byte("full_attention")
)

// loraID returns the number of an adapter, counted from 1.
func (p *Pool) loraID(name string) int64 {
	id, ok := p.loras[name]
	if !ok {
		id = int64(len(p.loras)) + 1
		p.loras[name] = id
	}
	return id
}

// cache enters block i under h, as the youngest copy.
func (p *Pool) cache(i int32, h event.Hash) {
	b := &p.blocks[i]
	b.hash, b.cached = h, true
	p.hashed++
	first, ok := p.first[h]
	if !ok {
		p.first[h] = i
		b.prevCopy, b.nextCopy = i, i
		return
	}
	last := p.blocks[first].prevCopy
	b.prevCopy, b.nextCopy = last, first
	p.blocks[last].nextCopy, p.blocks[first].prevCopy = i, i
}

// uncache forgets the hash of block i; other copies keep theirs.
func (p *Pool) uncache(i int32) {
	b := &p.blocks[i]
	b.cached = false
	p.hashed--
	if b.nextCopy == i {
		delete(p.first, b.hash)
		return
	}
	p.blocks[b.prevCopy].nextCopy, p.blocks[b.nextCopy].prevCopy = b.nextCopy, b.prevCopy
	if p.first[b.hash] == i {
		p.first[b.hash] = b.nextCopy
	}
}

func (p *Pool) sentinel() int32 { return int32(len(p.blocks) - 1) }

// pushFree puts block i at the end of the free queue.
func (p *Pool) pushFree(i int32) {
	sentinel := p.sentinel()
	last := p.blocks[sentinel].prev
	p.blocks[i].prev, p.blocks[i].next = last, sentinel
	p.blocks[last].next, p.blocks[sentinel].prev = i, i
	p.free++
}

// unlinkFree takes block i out of the free queue.
func (p *Pool) unlinkFree(i int32) {
	b := &p.blocks[i]
	p.blocks[b.prev].next, p.blocks[b.next].prev = b.next, b.prev
	p.free--
}

// root returns what the first block of every prompt is chained to.
func (p *Pool) root() event.Hash { return event.Hash(mix(p.seed, 0x6b76746170726f6f)) }

// chain returns the hash of block i, counted from the start of the prompt, with the given tokens and parent.
func (p *Pool) chain(parent event.Hash, i int, tokens []uint32, lora, salt string) event.Hash {
	h := mix(uint64(parent), uint64(len(tokens)))
	for _, t := range tokens {
		h = mix(h, uint64(t))
	}
	if lora != "" {
		h = mixText(mix(h, 1), lora)
	}
	if salt != "" && i == 0 {
		h = mixText(mix(h, 2), salt)
	}
	return event.Hash(h)
}

// mix folds v into h: the product's two halves together depend on every bit of both.
func mix(h, v uint64) uint64 {
	hi, lo := bits.Mul64(h^0x9e3779b97f4a7c15, v^0xd6e8feb86659fd93)
	return hi ^ lo ^ bits.RotateLeft64(h, 23)
}

func mixText(h uint64, s string) uint64 {
	h = mix(h, uint64(len(s)))
	for i := range len(s) {
		h = mix(h, uint64(s[i]))
	}
	return h
}
