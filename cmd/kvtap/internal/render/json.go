// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

// Package render writes batches, states and folded blocks as JSON lines and as readable text.
//
// The JSON forms are a contract with scripts: a field keeps its name, its place and its type. They are appended by hand
// because a long recording is mostly numbers, and reflection would cost more than all the decoding.
package render

import (
	"encoding/hex"
	"math"
	"strconv"
	"unicode/utf8"

	"github.com/kvtap/kvtap/event"
)

// Provenance says how a batch came to a client.
type Provenance struct {
	Seq      uint64
	Replayed bool
	// Pod and Model name the engine. They are left out where empty.
	Pod, Model string
}

// AppendBatch appends b as one JSON object, without a newline: ts, data_parallel_rank, events and skipped.
// Hashes are 16 hex digits; token_ids is null where the tokens do not describe the blocks. A skipped event has its
// index and a reason, which names the event's type where that could be read.
func AppendBatch(dst []byte, b *event.Batch) []byte {
	dst = append(dst, '{')
	dst = appendBatchFields(dst, b)
	return append(dst, '}')
}

// AppendTailBatch appends b as AppendBatch does, with where it came from in front.
func AppendTailBatch(dst []byte, b *event.Batch, from Provenance) []byte {
	dst = append(dst, `{"kind":"batch","seq":`...)
	dst = strconv.AppendUint(dst, from.Seq, 10)
	dst = append(dst, `,"replayed":`...)
	dst = strconv.AppendBool(dst, from.Replayed)
	if from.Pod != "" {
		dst = append(dst, `,"pod":`...)
		dst = AppendString(dst, from.Pod)
	}
	if from.Model != "" {
		dst = append(dst, `,"model":`...)
		dst = AppendString(dst, from.Model)
	}
	dst = append(dst, ',')
	dst = appendBatchFields(dst, b)
	return append(dst, '}')
}

// AppendState appends a client's state as one JSON object. An empty reason becomes null.
func AppendState(dst []byte, state, bound, reason string) []byte {
	dst = append(dst, `{"kind":"state","state":`...)
	dst = AppendString(dst, state)
	dst = append(dst, `,"bound":`...)
	dst = AppendString(dst, bound)
	dst = append(dst, `,"reason":`...)
	if reason == "" {
		dst = append(dst, "null"...)
	} else {
		dst = AppendString(dst, reason)
	}
	return append(dst, '}')
}

// AppendReset appends a reset as one JSON object.
func AppendReset(dst []byte, reason string) []byte {
	dst = append(dst, `{"kind":"reset","reason":`...)
	dst = AppendString(dst, reason)
	return append(dst, '}')
}

// AppendHeld appends one block of a folded state as one JSON object. copies is the upper count; certain_copies, the
// lower one, is there only where they differ.
func AppendHeld(dst []byte, h event.Held) []byte {
	dst = append(dst, `{"hash":`...)
	dst = appendHash(dst, h.Hash)
	dst = append(dst, `,"group":`...)
	dst = appendOptInt(dst, h.Group)
	dst = append(dst, `,"medium":`...)
	if h.Medium.OK {
		dst = AppendString(dst, h.Medium.V)
	} else {
		dst = append(dst, "null"...)
	}
	dst = append(dst, `,"copies":`...)
	dst = strconv.AppendInt(dst, h.Upper, 10)
	if h.Lower != h.Upper {
		dst = append(dst, `,"certain_copies":`...)
		dst = strconv.AppendInt(dst, h.Lower, 10)
	}
	return append(dst, '}')
}

func appendBatchFields(dst []byte, b *event.Batch) []byte {
	dst = append(dst, `"ts":`...)
	// JSON has no NaN and no infinity, and an engine's clock should not be able to break a reader.
	if b.Time.OK && !math.IsNaN(b.Time.V) && !math.IsInf(b.Time.V, 0) {
		dst = appendFloat(dst, b.Time.V)
	} else {
		dst = append(dst, "null"...)
	}
	dst = append(dst, `,"data_parallel_rank":`...)
	dst = appendOptInt(dst, b.Rank)
	dst = append(dst, `,"events":[`...)
	for i := range b.Events {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = appendEvent(dst, &b.Events[i])
	}
	dst = append(dst, `],"skipped":[`...)
	for i := range b.Skipped {
		s := &b.Skipped[i]
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = append(dst, `{"index":`...)
		dst = strconv.AppendInt(dst, int64(s.Index), 10)
		dst = append(dst, `,"reason":`...)
		dst = AppendString(dst, skipReason(s))
		dst = append(dst, '}')
	}
	return append(dst, ']')
}

func appendEvent(dst []byte, e *event.Event) []byte {
	dst = append(dst, `{"type":"`...)
	dst = append(dst, e.Type.String()...)
	dst = append(dst, '"')
	switch e.Type {
	case event.BlockStored:
		dst = appendStored(dst, e)
	case event.BlockRemoved:
		dst = append(dst, `,"block_hashes":`...)
		dst = appendHashes(dst, e.Hashes)
		dst = appendTextField(dst, `,"medium":`, e.Medium)
		dst = append(dst, `,"group_idx":`...)
		dst = appendOptInt(dst, e.Group)
		dst = appendTextField(dst, `,"locality":`, e.Locality)
		dst = appendTextField(dst, `,"ownership":`, e.Ownership)
	}
	return append(dst, '}')
}

func appendStored(dst []byte, e *event.Event) []byte {
	dst = append(dst, `,"block_hashes":`...)
	dst = appendHashes(dst, e.Hashes)
	dst = append(dst, `,"parent_block_hash":`...)
	if e.Parent.OK {
		dst = appendHash(dst, e.Parent.V)
	} else {
		dst = append(dst, "null"...)
	}
	dst = append(dst, `,"token_ids":`...)
	dst = appendTokens(dst, e)
	dst = append(dst, `,"block_size":`...)
	dst = appendOptInt(dst, e.BlockSize)
	dst = append(dst, `,"lora_id":`...)
	dst = appendOptInt(dst, e.LoRAID)
	dst = appendTextField(dst, `,"lora_name":`, e.LoRAName)
	dst = appendTextField(dst, `,"medium":`, e.Medium)
	dst = append(dst, `,"extra_keys":`...)
	dst = appendExtraKeys(dst, e.ExtraKeys)
	dst = append(dst, `,"group_idx":`...)
	dst = appendOptInt(dst, e.Group)
	dst = appendTextField(dst, `,"kv_cache_spec_kind":`, e.SpecKind)
	dst = append(dst, `,"kv_cache_spec_sliding_window":`...)
	dst = appendOptInt(dst, e.SlidingWindow)
	dst = appendTextField(dst, `,"locality":`, e.Locality)
	dst = appendTextField(dst, `,"cache_salt":`, e.CacheSalt)
	dst = appendTextField(dst, `,"ownership":`, e.Ownership)
	return appendTextField(dst, `,"session_id":`, e.SessionID)
}

// appendTokens appends token ids flat, or in lists of Stride where a position has several (EAGLE's pairs).
func appendTokens(dst []byte, e *event.Event) []byte {
	if e.Tokens == nil || !e.TokensUsable() {
		return append(dst, "null"...)
	}
	dst = append(dst, '[')
	for i, token := range e.Tokens {
		if i > 0 {
			dst = append(dst, ',')
		}
		if e.Stride > 1 && i%e.Stride == 0 {
			dst = append(dst, '[')
		}
		dst = strconv.AppendUint(dst, uint64(token), 10)
		if e.Stride > 1 && i%e.Stride == e.Stride-1 {
			dst = append(dst, ']')
		}
	}
	return append(dst, ']')
}

func appendExtraKeys(dst []byte, blocks []event.BlockKeys) []byte {
	if blocks == nil {
		return append(dst, "null"...)
	}
	dst = append(dst, '[')
	for i, keys := range blocks {
		if i > 0 {
			dst = append(dst, ',')
		}
		if keys == nil {
			dst = append(dst, "null"...)
			continue
		}
		dst = append(dst, '[')
		for j := range keys {
			if j > 0 {
				dst = append(dst, ',')
			}
			dst = appendKey(dst, &keys[j])
		}
		dst = append(dst, ']')
	}
	return append(dst, ']')
}

func appendKey(dst []byte, k *event.Key) []byte {
	switch k.Kind {
	case event.KeyText:
		return AppendString(dst, k.Text)
	case event.KeyTextOffset:
		dst = append(dst, '[')
		dst = AppendString(dst, k.Text)
		dst = append(dst, ',')
		dst = strconv.AppendInt(dst, k.Number, 10)
		return append(dst, ']')
	case event.KeyInt:
		return strconv.AppendInt(dst, k.Number, 10)
	case event.KeyBytes:
		dst = append(dst, `{"$bytes":"`...)
	default:
		dst = append(dst, `{"$msgpack":"`...)
	}
	dst = hex.AppendEncode(dst, k.Text)
	return append(dst, `"}`...)
}

func appendHashes(dst []byte, hashes []event.Hash) []byte {
	dst = append(dst, '[')
	for i, h := range hashes {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = appendHash(dst, h)
	}
	return append(dst, ']')
}

func appendHash(dst []byte, h event.Hash) []byte {
	dst = append(dst, '"')
	for shift := 60; shift >= 0; shift -= 4 {
		dst = append(dst, hexDigits[h>>shift&0xf])
	}
	return append(dst, '"')
}

func appendOptInt(dst []byte, v event.Opt[int64]) []byte {
	if !v.OK {
		return append(dst, "null"...)
	}
	return strconv.AppendInt(dst, v.V, 10)
}

func appendTextField(dst []byte, name string, text []byte) []byte {
	dst = append(dst, name...)
	if text == nil {
		return append(dst, "null"...)
	}
	return AppendString(dst, text)
}

// appendFloat appends v as JSON readers expect it: without an exponent where the number is of a usual size.
func appendFloat(dst []byte, v float64) []byte {
	if a := math.Abs(v); a != 0 && (a < 1e-6 || a >= 1e21) {
		return strconv.AppendFloat(dst, v, 'e', -1, 64)
	}
	return strconv.AppendFloat(dst, v, 'f', -1, 64)
}

const hexDigits = "0123456789abcdef"

// AppendString appends s as a JSON string. Bytes that are not UTF-8 become U+FFFD, because JSON cannot carry them.
func AppendString[T string | []byte](dst []byte, s T) []byte {
	dst = append(dst, '"')
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c < utf8.RuneSelf {
			if c >= 0x20 && c != '"' && c != '\\' && c != 0x7f {
				i++
				continue
			}
			dst = append(dst, s[start:i]...)
			switch c {
			case '"', '\\':
				dst = append(dst, '\\', c)
			case '\n':
				dst = append(dst, `\n`...)
			case '\t':
				dst = append(dst, `\t`...)
			case '\r':
				dst = append(dst, `\r`...)
			default:
				dst = append(dst, `\u00`...)
				dst = append(dst, hexDigits[c>>4], hexDigits[c&0xf])
			}
			i++
			start = i
			continue
		}
		r, n := utf8.DecodeRuneInString(string(s[i:min(i+utf8.UTFMax, len(s))]))
		// C1 controls drive terminals as ESC does, and some readers take U+2028 and U+2029 for the end of a line.
		if r == utf8.RuneError && n == 1 || r < 0xa0 || r == 0x2028 || r == 0x2029 {
			dst = append(dst, s[start:i]...)
			dst = append(dst, `\u`...)
			for shift := 12; shift >= 0; shift -= 4 {
				dst = append(dst, hexDigits[r>>shift&0xf])
			}
			i += n
			start = i
			continue
		}
		i += n
	}
	dst = append(dst, s[start:]...)
	return append(dst, '"')
}
