// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package event

import (
	"errors"
	"fmt"
	"math"

	"github.com/tinylib/msgp/msgp"
)

// What Decode's errors match.
var (
	// ErrMalformed means that the payload is not one whole MessagePack value: cut short, invalid, or followed by more.
	ErrMalformed = errors.New("event: malformed MessagePack")

	// ErrNotBatch means that the payload is MessagePack, but neither a batch nor an event.
	ErrNotBatch = errors.New("event: not a batch")
)

// DecodeError says where and why a payload could not be read. It wraps ErrMalformed or ErrNotBatch.
type DecodeError struct {
	Offset int    // in bytes from the start of the payload
	Reason string // a constant
	Err    error
}

func (e *DecodeError) Error() string {
	return fmt.Sprintf("%v: %s (byte %d)", e.Err, e.Reason, e.Offset)
}

// Unwrap returns ErrMalformed or ErrNotBatch.
func (e *DecodeError) Unwrap() error { return e.Err }

const (
	// maxSkipped bounds the events of one batch that may go unread: a byte of payload is enough to make one, and each
	// costs a Skip. No engine has so many events of a new type in one step.
	maxSkipped = 1 << 14

	// maxExpansion bounds the memory of a batch in bytes for each byte of its payload, beside minExpansion. Batches of
	// engines take 3, and the shortest removals of one block each, in arrays, 15.
	maxExpansion = 20
	minExpansion = 64 << 10

	// minEvent is the size in bytes of the shortest event that is understood: an array of "BlockRemoved" and an empty
	// list.
	minEvent = 15

	// maxKept is the size in bytes above which memory is not kept for the next Decode, so that one huge batch does not
	// hold its memory for the rest of a stream's life.
	maxKept = 1 << 20

	// Sizes in bytes on 64-bit machines.
	sizeEvent, sizeSkip, sizeHash, sizeToken, sizeBlockKeys, sizeKey = 336, 48, 8, 4, 24, 40

	// minMillis is the magnitude from which an integer timestamp is in milliseconds, as Mooncake sends it. In seconds
	// it is the year 5138, in milliseconds 1973.
	minMillis = 1e11
)

// field numbers what this package knows of an event.
type field uint8

const (
	fieldUnknown field = iota
	fieldHashes
	fieldParent
	fieldTokens
	fieldBlockSize
	fieldLoRAID
	fieldMedium
	fieldLoRAName // in SGLang's arrays instead a map with the cache salt
	fieldExtraKeys
	fieldGroup
	fieldSpecKind
	fieldWindow
	fieldLocality
	fieldOwnership
	fieldSessionID
	fieldCacheSalt
	fieldMMKeys
	fieldType
	numFields
)

// names holds the key of each field, the same in every engine's maps.
var names = [numFields]string{
	fieldHashes:    "block_hashes",
	fieldParent:    "parent_block_hash",
	fieldTokens:    "token_ids",
	fieldBlockSize: "block_size",
	fieldLoRAID:    "lora_id",
	fieldMedium:    "medium",
	fieldLoRAName:  "lora_name",
	fieldExtraKeys: "extra_keys",
	fieldGroup:     "group_idx",
	fieldSpecKind:  "kv_cache_spec_kind",
	fieldWindow:    "kv_cache_spec_sliding_window",
	fieldLocality:  "locality",
	fieldOwnership: "ownership",
	fieldSessionID: "session_id",
	fieldCacheSalt: "cache_salt",
	fieldMMKeys:    "mm_keys",
	fieldType:      "type",
}

// fieldOf returns the field that a map's key names, or fieldUnknown. A switch, since the compiler turns it into a
// search by length and content that is faster than a map.
func fieldOf(key []byte) field {
	switch string(key) {
	case "block_hashes":
		return fieldHashes
	case "parent_block_hash":
		return fieldParent
	case "token_ids":
		return fieldTokens
	case "block_size":
		return fieldBlockSize
	case "lora_id":
		return fieldLoRAID
	case "medium":
		return fieldMedium
	case "lora_name":
		return fieldLoRAName
	case "extra_keys":
		return fieldExtraKeys
	case "group_idx":
		return fieldGroup
	case "kv_cache_spec_kind":
		return fieldSpecKind
	case "kv_cache_spec_sliding_window":
		return fieldWindow
	case "locality":
		return fieldLocality
	case "ownership":
		return fieldOwnership
	case "session_id":
		return fieldSessionID
	case "cache_salt":
		return fieldCacheSalt
	case "mm_keys":
		return fieldMMKeys
	case "type", "event_type":
		return fieldType
	}
	return fieldUnknown
}

// reasons says, for each field, why its event is skipped when the value is of another type.
var reasons = [numFields]string{
	fieldUnknown:   "truncated",
	fieldHashes:    "block_hashes: not a list of hashes",
	fieldParent:    "parent_block_hash: not a hash",
	fieldTokens:    "token_ids: not a list",
	fieldBlockSize: "block_size: not an integer",
	fieldLoRAID:    "lora_id: not an integer",
	fieldMedium:    "medium: not a string",
	fieldLoRAName:  "lora_name: not a string",
	fieldExtraKeys: "extra_keys: not a list of lists",
	fieldGroup:     "group_idx: not an integer",
	fieldSpecKind:  "kv_cache_spec_kind: not a string",
	fieldWindow:    "kv_cache_spec_sliding_window: not an integer",
	fieldLocality:  "locality: not a string",
	fieldOwnership: "truncated",
	fieldSessionID: "session_id: not a string",
	fieldCacheSalt: "cache_salt: not a string",
	fieldMMKeys:    "truncated",
	fieldType:      "truncated",
}

// layout is what an event of one type carries.
type layout struct {
	positions []field // the fields of an array after its tag
	required  int     // how many of them must be there
	keys      uint32  // a bit for each field that a map may have
}

func keys(fields ...field) (set uint32) {
	for _, f := range fields {
		set |= 1 << f
	}
	return set
}

// layouts is the union of all releases: an older one sends fewer positions, so position and key mean one thing only.
var layouts = [...]layout{
	BlockStored: {
		positions: []field{
			fieldHashes, fieldParent, fieldTokens, fieldBlockSize, fieldLoRAID, fieldMedium, fieldLoRAName,
			fieldExtraKeys, fieldGroup, fieldSpecKind, fieldWindow,
		},
		required: 4,
		keys: keys(fieldHashes, fieldParent, fieldTokens, fieldBlockSize, fieldLoRAID, fieldMedium, fieldLoRAName,
			fieldExtraKeys, fieldGroup, fieldSpecKind, fieldWindow, fieldLocality, fieldOwnership, fieldSessionID,
			fieldCacheSalt, fieldMMKeys),
	},
	BlockRemoved: {
		positions: []field{fieldHashes, fieldMedium, fieldGroup},
		required:  1,
		keys:      keys(fieldHashes, fieldMedium, fieldGroup, fieldLocality, fieldOwnership),
	},
	AllBlocksCleared: {},
}

func typeOf(tag []byte) Type {
	switch string(tag) {
	case "BlockStored":
		return BlockStored
	case "BlockRemoved":
		return BlockRemoved
	case "AllBlocksCleared":
		return AllBlocksCleared
	}
	return 0
}

// arena is the memory that a batch's events point into. A full slab is left to the events that point into it and
// replaced by a larger one, so that nothing handed out ever moves.
type arena struct {
	hashes []Hash
	tokens []uint32
	text   []byte
	blocks []BlockKeys
	keys   []Key
	// left is how many bytes the batch being read may still take.
	left int
}

// marks is how far each slab of an arena is filled.
type marks struct{ hashes, tokens, text, blocks, keys int }

func (a *arena) mark() marks {
	return marks{len(a.hashes), len(a.tokens), len(a.text), len(a.blocks), len(a.keys)}
}

// rewind takes back what was handed out since the mark. Should a slab have been replaced since, the new one is larger,
// so that the mark fits it too.
func (a *arena) rewind(m marks) {
	a.hashes, a.tokens, a.text = a.hashes[:m.hashes], a.tokens[:m.tokens], a.text[:m.text]
	a.blocks, a.keys = a.blocks[:m.blocks], a.keys[:m.keys]
}

// room returns the slab with space for n more elements of a size, itself or a larger one, unless that would take more
// than left. Its result is never nil, so that no empty slice of it is. The caller has checked that n elements can be in
// the payload.
func room[T any](left *int, slab []T, n, size int) (larger []T, ok bool) {
	if slab != nil && cap(slab)-len(slab) >= n {
		return slab, true
	}
	m := max(n, 2*cap(slab), 16)
	if m*size > *left {
		m = n
	}
	if m*size > *left {
		return slab, false
	}
	*left -= m * size
	return make([]T, 0, m), true
}

// tail returns what was added to the slab since it was from elements long; a later append to it does not write there.
func tail[T any](slab []T, from int) []T { return slab[from:len(slab):len(slab)] }

func (b *Batch) text(s []byte) []byte {
	slab, ok := room(&b.arena.left, b.arena.text, len(s), 1)
	if !ok {
		slab = make([]byte, 0, len(s)) // all texts together are no longer than the payload
	}
	b.arena.text = append(slab, s...)
	return tail(b.arena.text, len(slab))
}

// Decode reads one payload into b, reusing its memory: everything b points to is valid until the next Decode, and
// nothing of it points into payload. It accepts every form in docs/wire-formats.md:
//
//   - a batch as an array [ts, events, data_parallel_rank, ...] or as a map with these keys in any order, or one event
//     in place of a batch, which counts as a batch of one;
//   - an event as an array [tag, fields ...], shorter or longer than known, or as a map in any order.
//
// A number may come in any of MessagePack's forms, if its value fits. A list of token ids that holds anything else
// leaves Tokens nil, since blocks count even if their content is not known. Unknown keys, unknown positions, a rank
// that is no integer and an ownership that is no string are stepped over and counted in b.UnknownFields. An event that
// cannot be understood is listed in b.Skipped, and the rest of the batch is good.
//
// The error is a *DecodeError that matches ErrMalformed if the payload is not exactly one MessagePack value, and
// ErrNotBatch if it is one but not a batch, or one with more than 16,384 events that cannot be understood, or whose
// events are too many for its length. Then b is empty.
//
// Lengths in the payload are never trusted. Memory is proportional to the payload: about 3 bytes for each byte of an
// engine's. An event that would make it more than 20 for each byte (and 64 KiB), such as a mass of extra keys of one
// byte, counts as one that cannot be understood. What is beyond 1 MiB is not kept for the next Decode.
func (b *Batch) Decode(payload []byte) error {
	b.reset()
	b.arena.left = maxExpansion*len(payload) + minExpansion
	var rest []byte
	var reason string
	switch msgp.NextType(payload) {
	case msgp.ArrayType:
		rest, reason = b.array(payload)
	case msgp.MapType:
		rest, reason = b.mapping(payload)
	default:
		rest, reason = payload, "neither an array nor a map"
	}
	if reason == "" && len(rest) == 0 {
		return nil
	}
	b.reset()
	// Readers stop at whatever they cannot use. Whether that is broken or only something else shows here.
	end, ok := skip(payload)
	switch {
	case !ok:
		return &DecodeError{Offset: len(payload) - len(end), Reason: "truncated or invalid", Err: ErrMalformed}
	case len(end) > 0:
		return &DecodeError{Offset: len(payload) - len(end), Reason: "trailing bytes", Err: ErrMalformed}
	}
	return &DecodeError{Offset: len(payload) - len(rest), Reason: reason, Err: ErrNotBatch}
}

// reset empties b but keeps its memory, unless that has become too much. Then everything goes, since events left in
// b.Events' capacity may point to anything.
func (b *Batch) reset() {
	a := &b.arena
	if cap(b.Events) > maxKept/sizeEvent || cap(b.Skipped) > maxKept/sizeSkip ||
		cap(a.hashes) > maxKept/sizeHash || cap(a.tokens) > maxKept/sizeToken || cap(a.text) > maxKept ||
		cap(a.blocks) > maxKept/sizeBlockKeys || cap(a.keys) > maxKept/sizeKey {
		*b = Batch{}
		return
	}
	a.rewind(marks{})
	b.Time, b.Rank, b.UnknownFields = Opt[float64]{}, Opt[int64]{}, 0
	b.Events, b.Skipped = b.Events[:0], b.Skipped[:0]
}

// array reads a batch that is an array, or an event. It returns what follows, or what it could not read and why.
func (b *Batch) array(p []byte) (rest []byte, reason string) {
	n, rest, err := msgp.ReadArrayHeaderBytes(p)
	if err == nil && n > 0 && msgp.NextType(rest) == msgp.StrType {
		return b.bare(p)
	}
	if err != nil || n < 2 {
		return p, "an array of fewer than 2"
	}
	if rest, reason = b.timestamp(rest); reason != "" {
		return rest, reason
	}
	if rest, reason = b.events(rest); reason != "" {
		return rest, reason
	}
	ok := true
	if n > 2 {
		rest, ok = b.rank(rest)
	}
	for i := uint32(3); i < n && ok; i++ {
		b.UnknownFields++
		rest, ok = skip(rest)
	}
	if !ok {
		return rest, "truncated"
	}
	return rest, ""
}

// mapping reads a batch that is a map, or an event.
func (b *Batch) mapping(p []byte) (rest []byte, reason string) {
	// Where the values are: whether this is a batch shows only at its end.
	var ts, events, rank []byte
	tagged := false
	unknown := 0
	n, rest, err := msgp.ReadMapHeaderBytes(p)
	ok := err == nil
	for i := uint32(0); i < n && ok; i++ {
		key, value := textOrSkip(rest)
		switch string(key) {
		case "ts":
			ts = value
		case "events":
			events = value
		case "data_parallel_rank":
			rank = value
		case "type", "event_type":
			tagged = true
			unknown++
		default:
			unknown++
		}
		rest, ok = skip(value)
	}
	switch {
	case !ok:
		return rest, "truncated"
	case events == nil && tagged:
		return b.bare(p)
	case events == nil:
		return p, "a map without events"
	}
	b.UnknownFields = unknown
	if ts != nil {
		if at, reason := b.timestamp(ts); reason != "" {
			return at, reason
		}
	}
	if rank != nil {
		b.rank(rank)
	}
	if at, reason := b.events(events); reason != "" {
		return at, reason
	}
	return rest, ""
}

// textOrSkip returns the string at p, or nil where there is something else, and what follows. What follows a value that
// cannot be read is nothing, where the next read fails.
func textOrSkip(p []byte) (s, rest []byte) {
	// All keys in use are below 32 bytes. To read these here takes 15 % off the time of a batch of removals.
	if len(p) > 0 && p[0]&0xe0 == 0xa0 {
		if end := 1 + int(p[0]&0x1f); len(p) >= end {
			return p[1:end], p[end:]
		}
	}
	if msgp.NextType(p) == msgp.StrType {
		s, rest, _ = msgp.ReadStringZC(p)
		return s, rest
	}
	rest, ok := skip(p)
	if !ok {
		return nil, nil
	}
	return nil, rest
}

func (b *Batch) timestamp(p []byte) (rest []byte, reason string) {
	if msgp.IsNil(p) {
		b.Time = Opt[float64]{}
		return p[1:], ""
	}
	switch msgp.NextType(p) {
	case msgp.Float32Type, msgp.Float64Type:
		f, rest, err := msgp.ReadFloat64Bytes(p)
		if err != nil {
			return p, "truncated"
		}
		// Neither NaN nor an infinity is a time, and both spoil every sum they enter.
		b.Time = Opt[float64]{}
		if !math.IsNaN(f) && !math.IsInf(f, 0) {
			b.Time = Some(f)
		}
		return rest, ""
	}
	u, negative, rest, ok := integer(p)
	if !ok {
		return p, "ts: not a number"
	}
	f := float64(u)
	if negative {
		f = float64(int64(u))
	}
	if math.Abs(f) >= minMillis {
		f /= 1000
	}
	b.Time = Some(f)
	return rest, ""
}

// rank reads the data-parallel rank. One that is no integer costs nothing but itself: the events beside it are good,
// and the reader has a rank from its configuration.
func (b *Batch) rank(p []byte) (rest []byte, ok bool) {
	v, rest, ok := optInt(p)
	if !ok {
		b.UnknownFields++
		v = Opt[int64]{}
		rest, ok = skip(p)
	}
	b.Rank = v
	return rest, ok
}

func (b *Batch) events(p []byte) (rest []byte, reason string) {
	n, rest, err := msgp.ReadArrayHeaderBytes(p)
	if err != nil {
		return p, "events: not a list"
	}
	b.reserve(min(int(n), len(rest)/minEvent+1))
	for i := range int(n) {
		at, ok := b.event(rest, i)
		if !ok {
			return rest, "events: too many for their length, or too many that are not understood"
		}
		rest = at
	}
	return rest, ""
}

// bare reads an event that stands in place of a batch.
func (b *Batch) bare(p []byte) (rest []byte, reason string) {
	b.reserve(1)
	rest, ok := b.event(p, 0)
	if !ok {
		return p, "truncated"
	}
	return rest, ""
}

// reserve makes room for n events, or for as many as may be. The one that is being read needs a place even if it is
// skipped in the end.
func (b *Batch) reserve(n int) {
	if cap(b.Events) < n {
		n = min(n, b.arena.left/sizeEvent)
		b.arena.left -= n * sizeEvent
		b.Events = make([]Event, 0, n)
	}
}

// event reads the event at p, number index of its batch, into b.Events or b.Skipped, and returns what follows. It fails
// if p is not MessagePack or too much was skipped.
func (b *Batch) event(p []byte, index int) (rest []byte, ok bool) {
	n, unknown, m := len(b.Events), b.UnknownFields, b.arena.mark()
	if n == cap(b.Events) {
		return nil, false
	}
	b.Events = b.Events[:n+1]
	e := &b.Events[n]
	*e = Event{}
	rest, tag, reason := b.fields(e, p)
	if reason == "" {
		return rest, true
	}
	b.Events, b.UnknownFields = b.Events[:n], unknown
	b.arena.rewind(m)
	if len(b.Skipped) == maxSkipped {
		return nil, false
	}
	if rest, ok = skip(p); ok {
		if tag != nil {
			tag = b.text(tag)
		}
		b.Skipped = append(b.Skipped, Skip{Index: index, Tag: tag, Reason: reason})
	}
	return rest, ok
}

// fields reads the event at p into e and returns what follows, or the tag and why the event cannot be understood.
func (b *Batch) fields(e *Event, p []byte) (rest, tag []byte, reason string) {
	switch msgp.NextType(p) {
	case msgp.ArrayType:
		return b.positional(e, p)
	case msgp.MapType:
		return b.keyed(e, p)
	}
	return nil, nil, "neither an array nor a map"
}

func (b *Batch) positional(e *Event, p []byte) (rest, tag []byte, reason string) {
	n, rest, err := msgp.ReadArrayHeaderBytes(p)
	if err != nil || n == 0 {
		return nil, nil, "type: missing"
	}
	tag, rest, err = msgp.ReadStringZC(rest)
	if err != nil {
		return nil, nil, "type: not a string"
	}
	if e.begin(tag); e.Type == 0 {
		return nil, tag, "unknown event type"
	}
	l := &layouts[e.Type]
	if int(n)-1 < l.required {
		return nil, tag, "too few fields"
	}
	var ok bool
	for i := range int(n) - 1 {
		if i >= len(l.positions) {
			b.UnknownFields++
			if rest, ok = skip(rest); !ok {
				return nil, tag, "truncated"
			}
			continue
		}
		f := l.positions[i]
		if f == fieldLoRAName && msgp.NextType(rest) == msgp.MapType {
			rest, ok = b.saltMap(e, rest)
			f = fieldCacheSalt
		} else {
			rest, ok = b.field(e, f, rest)
		}
		if !ok {
			return nil, tag, reasons[f]
		}
	}
	return rest, tag, ""
}

// saltMap reads what SGLang sends at the position of the LoRA's name: {"cache_salt": ...}.
func (b *Batch) saltMap(e *Event, p []byte) (rest []byte, ok bool) {
	n, rest, err := msgp.ReadMapHeaderBytes(p)
	ok = err == nil
	for i := uint32(0); i < n && ok; i++ {
		key, value := textOrSkip(rest)
		if fieldOf(key) == fieldCacheSalt {
			rest, ok = b.field(e, fieldCacheSalt, value)
			continue
		}
		b.UnknownFields++
		rest, ok = skip(value)
	}
	return rest, ok
}

func (b *Batch) keyed(e *Event, p []byte) (rest, tag []byte, reason string) {
	if tag, reason = tagOf(p); reason != "" {
		return nil, nil, reason
	}
	if e.begin(tag); e.Type == 0 {
		return nil, tag, "unknown event type"
	}
	e.Map = true
	known := layouts[e.Type].keys
	media := false
	// tagOf has read the header.
	n, rest, _ := msgp.ReadMapHeaderBytes(p)
	for range int(n) {
		key, value := textOrSkip(rest)
		f := fieldOf(key)
		var ok bool
		switch {
		case f == fieldType:
			rest, ok = skip(value)
		case known>>f&1 == 0:
			b.UnknownFields++
			rest, ok = skip(value)
		case f == fieldMMKeys:
			media = media || !empty(value)
			rest, ok = skip(value)
		default:
			rest, ok = b.field(e, f, value)
		}
		if !ok {
			return nil, tag, reasons[f]
		}
	}
	if e.Type != AllBlocksCleared && e.Hashes == nil {
		return nil, tag, "block_hashes: missing"
	}
	if media {
		// TensorRT-LLM puts the content of images here and the same placeholders among the tokens: two prompts with
		// other images would look alike.
		b.UnknownFields++
		e.Tokens, e.Stride = nil, 1
	}
	return rest, tag, ""
}

// tagOf returns the type of an event that is a map, or why there is none. Most engines send it first.
func tagOf(p []byte) (tag []byte, reason string) {
	var value []byte
	n, rest, err := msgp.ReadMapHeaderBytes(p)
	ok := err == nil
	for i := uint32(0); i < n && ok; i++ {
		key, at := textOrSkip(rest)
		if string(key) == "type" {
			value = at
			break
		}
		if string(key) == "event_type" {
			value = at
		}
		rest, ok = skip(at)
	}
	if value == nil {
		return nil, "type: missing"
	}
	if tag, _, err = msgp.ReadStringZC(value); err != nil {
		return nil, "type: not a string"
	}
	return tag, ""
}

func (e *Event) begin(tag []byte) {
	e.Type = typeOf(tag)
	if e.Type == BlockStored {
		e.Stride = 1
	}
}

// field reads the value at p into field f of e.
func (b *Batch) field(e *Event, f field, p []byte) (rest []byte, ok bool) {
	switch f {
	case fieldHashes:
		e.Hashes, rest, ok = b.hashes(p)
	case fieldParent:
		e.Parent, rest, ok = optHash(p)
	case fieldTokens:
		e.Tokens, e.Stride, rest, ok = b.tokens(p)
	case fieldBlockSize:
		e.BlockSize, rest, ok = optInt(p)
	case fieldLoRAID:
		e.LoRAID, rest, ok = optInt(p)
	case fieldMedium:
		e.Medium, rest, ok = b.optText(p)
	case fieldLoRAName:
		e.LoRAName, rest, ok = b.optText(p)
	case fieldExtraKeys:
		e.ExtraKeys, rest, ok = b.extraKeys(p)
	case fieldGroup:
		e.Group, rest, ok = optInt(p)
	case fieldSpecKind:
		e.SpecKind, rest, ok = b.optText(p)
	case fieldWindow:
		e.SlidingWindow, rest, ok = optInt(p)
	case fieldLocality:
		e.Locality, rest, ok = b.optText(p)
	case fieldSessionID:
		e.SessionID, rest, ok = b.optText(p)
	case fieldCacheSalt:
		e.CacheSalt, rest, ok = b.optText(p)
	case fieldOwnership:
		if e.Ownership, rest, ok = b.optText(p); !ok {
			// Its type is not settled between engines, and nothing depends on it.
			b.UnknownFields++
			rest, ok = skip(p)
		}
	}
	return rest, ok
}
