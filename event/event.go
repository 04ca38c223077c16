// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

// Package event reads and writes what LLM inference engines say about their KV cache: batches of stored, removed and
// cleared blocks in MessagePack, in every form that vLLM, SGLang, TensorRT-LLM and others send (docs/wire-formats.md).
//
// It is pure: bytes in, values out. Fold turns a stream of batches into the multiset of blocks that the engine holds.
package event

import (
	"encoding/binary"
	"fmt"
)

// Hash is the canonical identity of a block within one engine and one group of layers. Engines send it as an integer
// (bit-cast here, so a negative one keeps its bits) or as a digest (its last 8 bytes, big-endian). The same block
// therefore has the same Hash whichever form it arrives in; two engines may use one Hash for different tokens.
type Hash uint64

// HashOfDigest returns the canonical form of a block digest: its last 8 bytes, big-endian; a shorter one is padded on
// the left.
func HashOfDigest(digest []byte) Hash {
	if n := len(digest); n >= 8 {
		return Hash(binary.BigEndian.Uint64(digest[n-8:]))
	}
	var h Hash
	for _, c := range digest {
		h = h<<8 | Hash(c)
	}
	return h
}

// String returns the hash as 16 lower-case hex digits.
func (h Hash) String() string { return fmt.Sprintf("%016x", uint64(h)) }

// Type says what happened to blocks.
type Type uint8

// The three kinds of event. The zero Type is none of them.
const (
	BlockStored Type = iota + 1
	BlockRemoved
	AllBlocksCleared
)

// String returns the tag that engines send.
func (t Type) String() string {
	switch t {
	case BlockStored:
		return "BlockStored"
	case BlockRemoved:
		return "BlockRemoved"
	case AllBlocksCleared:
		return "AllBlocksCleared"
	}
	return "unknown"
}

// Opt is a value that an engine may leave out or send as nil.
type Opt[T any] struct {
	V  T
	OK bool // false: absent or nil
}

// Some returns a value that is present.
func Some[T any](v T) Opt[T] { return Opt[T]{V: v, OK: true} }

// Batch is one message of an engine: the events of one scheduler step. A Batch is meant to be reused: Decode fills it
// in place, and everything it points to is valid until the next Decode into it. The zero Batch is ready.
type Batch struct {
	// Time is the engine's clock in seconds since the Unix epoch. Mooncake's milliseconds are converted.
	// Absent for a bare event.
	Time Opt[float64]

	// Rank is the data-parallel rank, where the engine sends one.
	Rank Opt[int64]

	Events []Event

	// Skipped lists the events that were not understood, in order. Each of them is missing from Events.
	Skipped []Skip

	// UnknownFields counts what was stepped over: keys and positions that this package does not know, a rank or an
	// ownership of another type, and multimodal keys, which make the token ids unusable. Fields of skipped events do
	// not count.
	UnknownFields int

	arena arena
}

// Event is one thing that happened to an engine's blocks. Its slices are owned by the Batch that it was decoded into.
// A nil byte slice means that the engine sent none (or nil); an empty one that it sent an empty string.
type Event struct {
	Type Type

	// Map is true if the event came as a map (vLLM from 0.24) and false if as an array.
	Map bool

	// Hashes names the blocks, parents before children. Empty for AllBlocksCleared.
	Hashes []Hash

	// The following belong to BlockStored.

	// Parent is the block before the first of Hashes; absent at the start of a prompt.
	Parent Opt[Hash]

	// Tokens holds the token ids as sent, Stride of them per position, or nil where the engine sent none, something
	// that is not a list of token ids, or ids beside which multimodal content makes the difference (TensorRT-LLM's
	// mm_keys). They describe the blocks only if TokensUsable says so.
	Tokens []uint32

	// Stride is the number of token ids per position: 2 for EAGLE's pairs in SGLang, else 1; 0 for other events.
	Stride int

	// BlockSize is the number of positions per block.
	BlockSize Opt[int64]

	LoRAID    Opt[int64]
	LoRAName  []byte
	CacheSalt []byte // SGLang only; vLLM sends the salt among the ExtraKeys

	// ExtraKeys holds, per block, what besides the tokens makes up its identity. Nil if the engine sent none.
	ExtraKeys []BlockKeys

	// SpecKind is the kind of attention of the group, such as full_attention, sliding_window or mamba.
	SpecKind      []byte
	SlidingWindow Opt[int64] // in tokens

	Ownership []byte
	SessionID []byte

	// The following belong to BlockStored and BlockRemoved.

	Medium   []byte // GPU, CPU, CPU_PINNED, FS, ... as sent
	Group    Opt[int64]
	Locality []byte // LOCAL or REMOTE
}

// BlockKeys lists the extra keys of one block; nil if it has none.
type BlockKeys []Key

// KeyKind tells the forms of an extra key apart.
type KeyKind uint8

// The forms of an extra key. The zero KeyKind is none of them.
const (
	KeyText       KeyKind = iota + 1 // a string: LoRA name, multimodal id or cache salt
	KeyTextOffset                    // [string, int]: multimodal id and its offset in the block, which may be negative
	KeyBytes                         // bytes: a digest of prompt embeddings
	KeyInt                           // an integer: a LoRA id
	KeyOther                         // anything else, as its MessagePack encoding
)

// Key is one extra key of a block.
type Key struct {
	Kind   KeyKind
	Text   []byte // KeyText, KeyTextOffset, KeyBytes and KeyOther
	Number int64  // KeyInt: the integer; KeyTextOffset: the offset
}

// Skip says which event of a batch was not understood, and why.
type Skip struct {
	Index  int    // position among the batch's events, counting skipped ones
	Tag    []byte // the event's type, if it could be read
	Reason string // a constant
}

// MayRemove reports whether the event may have removed blocks: a removal or a clear that cannot be read, or an event
// whose type cannot. A store that cannot be read only hides blocks, and an event of unknown type adds to what engines
// say.
func (s *Skip) MayRemove() bool {
	t := typeOf(s.Tag)
	return t == BlockRemoved || t == AllBlocksCleared || s.Tag == nil
}

// Doubt reports whether a skipped event may have removed blocks. If so, what is known of the engine no longer holds,
// and neither do the first cut of b.Events; those behind them do.
func (b *Batch) Doubt() (cut int, doubt bool) {
	for i := range b.Skipped {
		if s := &b.Skipped[i]; s.MayRemove() {
			// Index counts skipped events too, of which there are i before this one.
			cut, doubt = s.Index-i, true
		}
	}
	return cut, doubt
}

// TokensUsable reports whether Tokens has exactly BlockSize positions for each of Hashes. In groups of a sliding
// window or a state space (mamba) it does not; their tokens say nothing about a block's content.
func (e *Event) TokensUsable() bool {
	if e.Tokens == nil || !e.BlockSize.OK {
		return false
	}
	n := int64(len(e.Hashes)) * int64(e.Stride)
	size := e.BlockSize.V
	// Divide rather than multiply: the size comes from a peer and the product may overflow.
	if n == 0 || size == 0 {
		return len(e.Tokens) == 0
	}
	return size > 0 && int64(len(e.Tokens))%n == 0 && int64(len(e.Tokens))/n == size
}

// BlockTokens returns the token ids of block i of Hashes, Stride per position, or nil if TokensUsable is false or the
// engine sent no tokens. It panics if i is not an index of Hashes.
func (e *Event) BlockTokens(i int) []uint32 {
	_ = e.Hashes[i]
	if len(e.Tokens) == 0 || !e.TokensUsable() {
		return nil
	}
	n := len(e.Tokens) / len(e.Hashes)
	return e.Tokens[i*n : (i+1)*n : (i+1)*n]
}
