// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/kvtap/kvtap/event"
)

// EventBatch is one message of an engine, as events.
type EventBatch struct {
	Timestamp        time.Time // zero if the engine sent none
	DataParallelRank *int      // nil if the engine sent none
	Events           []KVEvent
	// Skipped counts events that could not be read and are missing from Events.
	Skipped int
}

// DecodeEventBatch reads one payload in any form that engines send. Events carry the batch's time and rank; model and
// pod are for the caller to know. The error matches event.ErrMalformed or event.ErrNotBatch.
func DecodeEventBatch(payload []byte) (*EventBatch, error) {
	var b event.Batch
	if err := b.Decode(payload); err != nil {
		return nil, fmt.Errorf("kvcache: %w", err)
	}
	batch := &EventBatch{
		Timestamp: timestamp(b.Time),
		Events:    make([]KVEvent, 0, len(b.Events)),
		Skipped:   len(b.Skipped),
	}
	o := origin{at: batch.Timestamp}
	if rank, ok := rankOf(&b); ok {
		batch.DataParallelRank = &rank
		o.rank = rank
	}
	for i := range b.Events {
		e := newEvent(&b.Events[i])
		e.stamp(o)
		batch.Events = append(batch.Events, e)
	}
	return batch, nil
}

// errEncode is the layer of context that every error of EncodeEventBatch carries.
var errEncode = errors.New("kvcache: cannot encode the batch")

// EncodeEventBatch writes batch as vLLM 0.32 would send it: an array of maps. Every block of a BlockStoredEvent needs
// tokens of one length, or none may have any.
func EncodeEventBatch(batch *EventBatch) ([]byte, error) {
	if batch == nil {
		return nil, fmt.Errorf("%w: it is nil", errEncode)
	}
	var b event.Batch
	// vLLM always sends a time, and its decoders want one.
	b.Time = event.Some(0.0)
	if !batch.Timestamp.IsZero() {
		b.Time = event.Some(float64(batch.Timestamp.UnixMicro()) / 1e6)
	}
	if batch.DataParallelRank != nil {
		b.Rank = event.Some(int64(*batch.DataParallelRank))
	}
	for i, e := range batch.Events {
		var out event.Event
		out.Map = true
		var err error
		switch e := e.(type) {
		case *BlockStoredEvent:
			err = e.fill(&out)
		case *BlockRemovedEvent:
			out.Type = event.BlockRemoved
			out.Hashes = toHashes(e.BlockHashes)
			out.Medium, out.Locality, out.Ownership = text(e.Medium), text(e.Locality), text(e.Ownership)
			out.Group = opt(e.GroupIdx)
		case *AllBlocksClearedEvent:
			out.Type = event.AllBlocksCleared
		default:
			err = fmt.Errorf("not an event: %T", e)
		}
		if err != nil {
			return nil, fmt.Errorf("%w: event %d: %w", errEncode, i, err)
		}
		b.Events = append(b.Events, out)
	}
	payload, err := b.Append(nil, event.VLLM032)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errEncode, err)
	}
	return payload, nil
}

// fill sets out to what e says.
func (e *BlockStoredEvent) fill(out *event.Event) error {
	if len(e.TokenIDs) != 0 && len(e.TokenIDs) != len(e.BlockHashes) {
		return fmt.Errorf("%d entries in TokenIDs for %d blocks", len(e.TokenIDs), len(e.BlockHashes))
	}
	out.Type = event.BlockStored
	out.Hashes = toHashes(e.BlockHashes)
	if e.ParentBlockHash != nil {
		out.Parent = event.Some(event.Hash(uint64(*e.ParentBlockHash)))
	}
	out.Stride = max(e.TokenStride, 1)
	out.BlockSize = event.Some(int64(e.BlockSize))
	out.Tokens = []uint32{}
	for i, tokens := range e.TokenIDs {
		if len(tokens) != len(e.TokenIDs[0]) || len(tokens)%out.Stride != 0 {
			return fmt.Errorf("block %d has %d token ids and block 0 has %d, %d per position",
				i, len(tokens), len(e.TokenIDs[0]), out.Stride)
		}
		for _, t := range tokens {
			out.Tokens = append(out.Tokens, uint32(t))
		}
	}
	if n := len(out.Tokens); n > 0 {
		size := len(e.TokenIDs[0]) / out.Stride
		if e.BlockSize != 0 && e.BlockSize != size {
			return fmt.Errorf("BlockSize is %d and the blocks have %d positions", e.BlockSize, size)
		}
		out.BlockSize = event.Some(int64(size))
	}
	out.LoRAID, out.LoRAName, out.CacheSalt = opt(e.LoraID), text(e.LoraName), text(e.CacheSalt)
	out.Medium, out.Locality, out.Group = text(e.Medium), text(e.Locality), opt(e.GroupIdx)
	out.SpecKind, out.SlidingWindow = text(e.SpecKind), opt(e.SlidingWindow)
	out.Ownership, out.SessionID = text(e.Ownership), text(e.SessionID)
	out.ExtraKeys = e.ExtraKeys
	return nil
}

// newEvent builds the event that a handler may keep: nothing in it is shared with e.
func newEvent(e *event.Event) KVEvent {
	switch e.Type {
	case event.BlockStored:
		out := &BlockStoredEvent{
			Type:          EventTypeBlockStored,
			BlockHashes:   fromHashes(e.Hashes),
			TokenIDs:      make([][]int32, len(e.Hashes)),
			TokenStride:   max(e.Stride, 1),
			LoraID:        ptr(e.LoRAID),
			LoraName:      str(e.LoRAName),
			Medium:        str(e.Medium),
			GroupIdx:      ptr(e.Group),
			CacheSalt:     str(e.CacheSalt),
			Locality:      str(e.Locality),
			SpecKind:      str(e.SpecKind),
			SlidingWindow: ptr(e.SlidingWindow),
			Ownership:     str(e.Ownership),
			SessionID:     str(e.SessionID),
			ExtraKeys:     cloneKeys(e.ExtraKeys),
		}
		if e.Parent.OK {
			parent := int64(e.Parent.V)
			out.ParentBlockHash = &parent
		}
		if e.BlockSize.OK && e.BlockSize.V >= 0 && e.BlockSize.V <= math.MaxInt32 {
			out.BlockSize = int(e.BlockSize.V)
		}
		if len(e.Tokens) > 0 && e.TokensUsable() {
			flat := make([]int32, len(e.Tokens))
			for i, t := range e.Tokens {
				flat[i] = int32(t)
			}
			n := len(flat) / len(e.Hashes)
			for i := range out.TokenIDs {
				out.TokenIDs[i] = flat[i*n : (i+1)*n : (i+1)*n]
			}
		}
		return out
	case event.BlockRemoved:
		return &BlockRemovedEvent{
			Type:        EventTypeBlockRemoved,
			BlockHashes: fromHashes(e.Hashes),
			Medium:      str(e.Medium),
			GroupIdx:    ptr(e.Group),
			Locality:    str(e.Locality),
			Ownership:   str(e.Ownership),
		}
	default: // Decode yields three types only
		return &AllBlocksClearedEvent{Type: EventTypeAllCleared}
	}
}

// timestamp returns t in UTC, truncated to microseconds. Times beyond what a float64 can tell apart by a microsecond
// become the zero time.
func timestamp(t event.Opt[float64]) time.Time {
	const limit = 1 << 53 / 1e6 // seconds
	if !t.OK || math.Abs(t.V) > limit {
		return time.Time{}
	}
	// Near today's date a float64 is off by up to 0.12 us. Without the allowance a whole number of microseconds would
	// now and then come out as the one before.
	const allowance = 0.25
	sec := math.Floor(t.V)
	return time.Unix(int64(sec), int64((t.V-sec)*1e6+allowance)*1000).UTC()
}

// rankOf returns the rank that the batch itself states.
func rankOf(b *event.Batch) (int, bool) {
	if b.Rank.OK && b.Rank.V >= 0 && b.Rank.V <= math.MaxInt32 {
		return int(b.Rank.V), true
	}
	return 0, false
}

func toHashes(in []int64) []event.Hash {
	out := make([]event.Hash, len(in))
	for i, h := range in {
		out[i] = event.Hash(uint64(h))
	}
	return out
}

func fromHashes(in []event.Hash) []int64 {
	out := make([]int64, len(in))
	for i, h := range in {
		out[i] = int64(h)
	}
	return out
}

func cloneKeys(in []event.BlockKeys) []event.BlockKeys {
	if in == nil {
		return nil
	}
	out := make([]event.BlockKeys, len(in))
	for i, keys := range in {
		if keys == nil {
			continue
		}
		out[i] = make(event.BlockKeys, len(keys))
		for j, k := range keys {
			k.Text = bytes.Clone(k.Text)
			out[i][j] = k
		}
	}
	return out
}

func ptr(o event.Opt[int64]) *int64 {
	if !o.OK {
		return nil
	}
	return &o.V
}

func opt(p *int64) (o event.Opt[int64]) {
	if p != nil {
		o = event.Some(*p)
	}
	return o
}

func str(b []byte) *string {
	if b == nil {
		return nil
	}
	s := string(b)
	return &s
}

func text(s *string) []byte {
	if s == nil {
		return nil
	}
	return append([]byte{}, *s...) // never nil: an empty string is not an absent one
}
