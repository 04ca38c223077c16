// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

// Package kvcache follows the KV-cache events of one LLM inference engine (vLLM, SGLang, TensorRT-LLM, ...) over ZeroMQ
// and hands them to a handler, each exactly once and in the engine's order, those published before it connected
// included. Where that cannot be kept, it says so: by a reset, by Status, by metrics and in the log.
//
// Ordering and back-pressure: calls to one handler from one client never overlap and never reorder. While a handler
// runs, the engine's socket is not read.
package kvcache

import (
	"encoding/binary"
	"time"

	"github.com/kvtap/kvtap/event"
)

// EventType is the tag of an event, as engines send it.
type EventType string

// The types of events.
const (
	EventTypeBlockStored  EventType = "BlockStored"
	EventTypeBlockRemoved EventType = "BlockRemoved"
	EventTypeAllCleared   EventType = "AllBlocksCleared"
)

// KVEvent is one of *BlockStoredEvent, *BlockRemovedEvent and *AllBlocksClearedEvent.
type KVEvent interface {
	GetType() EventType
	// GetTimestamp returns the engine's clock when it sent the batch, in UTC and truncated to microseconds. It is the
	// zero time where the engine sent none.
	GetTimestamp() time.Time
	GetModelName() string
	GetPodName() string
	GetDataParallelRank() int
	stamp(origin)
}

// origin is what the events of one batch have in common.
type origin struct {
	at         time.Time
	model, pod string
	rank       int
}

// BlockStoredEvent says that blocks were stored. They follow each other: the parent of each is the one before it.
type BlockStoredEvent struct {
	Type      EventType
	Timestamp time.Time

	// BlockHashes names the blocks, by the engine's own hashes: 64 bits, or the last 64 of a longer digest.
	BlockHashes []int64
	// TokenIDs has one entry per block, always; it is nil where the engine sent no usable tokens, which it does for
	// blocks in other media and for layers with a sliding window or a state. TokenStride ids make up one position.
	TokenIDs [][]int32
	// TokenStride is 1, or 2 for the pairs of SGLang's EAGLE.
	TokenStride int
	// ParentBlockHash is the block before the first; nil at the start of a prompt.
	ParentBlockHash *int64
	BlockSize       int // positions per block; 0 if the engine does not say

	LoraID    *int64
	LoraName  *string
	Medium    *string // GPU, CPU, ... as sent; nil if the engine does not say
	GroupIdx  *int64  // group of layers of a hybrid model
	CacheSalt *string // SGLang; vLLM sends the salt among ExtraKeys
	Locality  *string // LOCAL or REMOTE
	// SpecKind and SlidingWindow (in tokens) describe the group's attention.
	SpecKind      *string
	SlidingWindow *int64
	Ownership     *string
	SessionID     *string
	// ExtraKeys has one entry per block, or is nil: what besides its tokens makes up a block's identity.
	ExtraKeys []event.BlockKeys

	ModelName        string
	PodName          string
	DataParallelRank int
}

// BlockRemovedEvent says that one copy of each of these blocks was removed. The engine may hold others.
type BlockRemovedEvent struct {
	Type        EventType
	Timestamp   time.Time
	BlockHashes []int64

	Medium    *string
	GroupIdx  *int64
	Locality  *string
	Ownership *string

	ModelName        string
	PodName          string
	DataParallelRank int
}

// AllBlocksClearedEvent says that the engine dropped its cache, in all groups and media.
type AllBlocksClearedEvent struct {
	Type      EventType
	Timestamp time.Time

	ModelName        string
	PodName          string
	DataParallelRank int
}

// GetType returns the type of the event.
func (e *BlockStoredEvent) GetType() EventType { return e.Type }

// GetTimestamp returns the engine's clock.
func (e *BlockStoredEvent) GetTimestamp() time.Time { return e.Timestamp }

// GetModelName returns the configured model.
func (e *BlockStoredEvent) GetModelName() string { return e.ModelName }

// GetPodName returns the configured pod key.
func (e *BlockStoredEvent) GetPodName() string { return e.PodName }

// GetDataParallelRank returns the rank that sent the event.
func (e *BlockStoredEvent) GetDataParallelRank() int { return e.DataParallelRank }

func (e *BlockStoredEvent) stamp(o origin) {
	e.Timestamp, e.ModelName, e.PodName, e.DataParallelRank = o.at, o.model, o.pod, o.rank
}

// GetType returns the type of the event.
func (e *BlockRemovedEvent) GetType() EventType { return e.Type }

// GetTimestamp returns the engine's clock.
func (e *BlockRemovedEvent) GetTimestamp() time.Time { return e.Timestamp }

// GetModelName returns the configured model.
func (e *BlockRemovedEvent) GetModelName() string { return e.ModelName }

// GetPodName returns the configured pod key.
func (e *BlockRemovedEvent) GetPodName() string { return e.PodName }

// GetDataParallelRank returns the rank that sent the event.
func (e *BlockRemovedEvent) GetDataParallelRank() int { return e.DataParallelRank }

func (e *BlockRemovedEvent) stamp(o origin) {
	e.Timestamp, e.ModelName, e.PodName, e.DataParallelRank = o.at, o.model, o.pod, o.rank
}

// GetType returns the type of the event.
func (e *AllBlocksClearedEvent) GetType() EventType { return e.Type }

// GetTimestamp returns the engine's clock.
func (e *AllBlocksClearedEvent) GetTimestamp() time.Time { return e.Timestamp }

// GetModelName returns the configured model.
func (e *AllBlocksClearedEvent) GetModelName() string { return e.ModelName }

// GetPodName returns the configured pod key.
func (e *AllBlocksClearedEvent) GetPodName() string { return e.PodName }

// GetDataParallelRank returns the rank that sent the event.
func (e *AllBlocksClearedEvent) GetDataParallelRank() int { return e.DataParallelRank }

func (e *AllBlocksClearedEvent) stamp(o origin) {
	e.Timestamp, e.ModelName, e.PodName, e.DataParallelRank = o.at, o.model, o.pod, o.rank
}

// TokenBytes appends tokens to dst in the form that gateways hash: 4 bytes each, big-endian.
func TokenBytes(dst []byte, tokens []int32) []byte {
	for _, t := range tokens {
		dst = binary.BigEndian.AppendUint32(dst, uint32(t))
	}
	return dst
}
