// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package event_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/tinylib/msgp/msgp"

	"github.com/kvtap/kvtap/event"
)

// content is what a payload says, without memory and origin.
type content struct {
	Time    event.Opt[float64]
	Rank    event.Opt[int64]
	Events  []event.Event
	Skipped []event.Skip
	Unknown int
}

// contentOf copies b's content. Slices of length 0 become nil: whether b had any before does not matter.
func contentOf(b *event.Batch) content {
	return content{
		b.Time, b.Rank, append([]event.Event(nil), b.Events...), append([]event.Skip(nil), b.Skipped...),
		b.UnknownFields,
	}
}

// expect turns the JSON form of a vector into what Decode should make of it. It knows the wire only by the tables here.
type expect struct{ tb testing.TB }

var positions = map[string][]string{
	"BlockStored": {
		"type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name",
		"extra_keys", "group_idx", "kv_cache_spec_kind", "kv_cache_spec_sliding_window",
	},
	"BlockRemoved":     {"type", "block_hashes", "medium", "group_idx"},
	"AllBlocksCleared": {"type"},
}

func (x expect) batch(v any) (c content) {
	switch v := v.(type) {
	case []any:
		c.Time = event.Some(x.float(v[0]))
		x.events(&c, v[1].([]any))
		if len(v) > 2 {
			c.Rank = x.int(v[2])
		}
	case map[string]any:
		c.Time = event.Some(x.float(v["ts"]))
		c.Rank = x.int(v["data_parallel_rank"])
		x.events(&c, v["events"].([]any))
	default:
		x.tb.Fatalf("a batch of type %T", v)
	}
	return c
}

func (x expect) events(c *content, list []any) {
	for i, v := range list {
		fields, named := v.(map[string]any)
		if !named {
			fields = map[string]any{}
			for k, value := range v.([]any) {
				name := positions[v.([]any)[0].(string)][k]
				if salt, ok := value.(map[string]any); ok && name == "lora_name" {
					name, value = "cache_salt", salt["cache_salt"]
				}
				fields[name] = value
			}
		}
		tag := fields["type"].(string)
		e := event.Event{Map: named}
		switch tag {
		case "BlockStored":
			e.Type, e.Stride = event.BlockStored, 1
		case "BlockRemoved":
			e.Type = event.BlockRemoved
		case "AllBlocksCleared":
			e.Type = event.AllBlocksCleared
		default:
			c.Skipped = append(c.Skipped, event.Skip{Index: i, Tag: []byte(tag), Reason: "unknown event type"})
			continue
		}
		for name, value := range fields {
			x.field(c, &e, name, value)
		}
		c.Events = append(c.Events, e)
	}
}

func (x expect) field(c *content, e *event.Event, name string, v any) {
	switch name {
	case "type", "event_type":
	case "block_hashes":
		e.Hashes = []event.Hash{}
		for _, h := range v.([]any) {
			e.Hashes = append(e.Hashes, x.hash(h))
		}
	case "parent_block_hash":
		if v != nil {
			e.Parent = event.Some(x.hash(v))
		}
	case "token_ids":
		if v == nil {
			return
		}
		e.Tokens = []uint32{}
		for _, id := range v.([]any) {
			if pair, ok := id.([]any); ok {
				e.Stride = 2
				e.Tokens = append(e.Tokens, uint32(x.int(pair[0]).V), uint32(x.int(pair[1]).V))
				continue
			}
			e.Tokens = append(e.Tokens, uint32(x.int(id).V))
		}
	case "block_size":
		e.BlockSize = x.int(v)
	case "lora_id":
		e.LoRAID = x.int(v)
	case "medium":
		e.Medium = x.text(v)
	case "lora_name":
		e.LoRAName = x.text(v)
	case "extra_keys":
		if v != nil {
			e.ExtraKeys = x.extraKeys(v.([]any))
		}
	case "group_idx":
		e.Group = x.int(v)
	case "kv_cache_spec_kind":
		e.SpecKind = x.text(v)
	case "kv_cache_spec_sliding_window":
		e.SlidingWindow = x.int(v)
	case "locality":
		e.Locality = x.text(v)
	case "cache_salt":
		e.CacheSalt = x.text(v)
	case "session_id":
		e.SessionID = x.text(v)
	case "ownership":
		e.Ownership = x.text(v)
	default:
		c.Unknown++
	}
}

func (x expect) extraKeys(list []any) []event.BlockKeys {
	blocks := []event.BlockKeys{}
	for _, v := range list {
		if v == nil {
			blocks = append(blocks, nil)
			continue
		}
		keys := event.BlockKeys{}
		for _, v := range v.([]any) {
			switch v := v.(type) {
			case string:
				keys = append(keys, event.Key{Kind: event.KeyText, Text: []byte(v)})
			case []any:
				keys = append(keys, event.Key{Kind: event.KeyTextOffset, Text: x.text(v[0]), Number: x.int(v[1]).V})
			case map[string]any:
				keys = append(keys, event.Key{Kind: event.KeyBytes, Text: unhex(x.tb, v["$bytes"].(string))})
			default:
				x.tb.Fatalf("a key of type %T", v)
			}
		}
		blocks = append(blocks, keys)
	}
	return blocks
}

func (x expect) float(v any) float64 {
	f, err := v.(json.Number).Float64()
	if err != nil {
		x.tb.Fatal(err)
	}
	if !strings.Contains(v.(json.Number).String(), ".") {
		f /= 1000 // the only vectors with an integer are in milliseconds
	}
	return f
}

func (x expect) int(v any) event.Opt[int64] {
	if v == nil {
		return event.Opt[int64]{}
	}
	i, err := v.(json.Number).Int64()
	if err != nil {
		x.tb.Fatal(err)
	}
	return event.Some(i)
}

func (x expect) text(v any) []byte {
	if v == nil {
		return nil
	}
	return []byte(v.(string))
}

func (x expect) hash(v any) event.Hash {
	if digest, ok := v.(map[string]any); ok {
		return event.HashOfDigest(unhex(x.tb, digest["$bytes"].(string)))
	}
	return parseHash(x.tb, v.(json.Number).String())
}

// description returns what the vector's JSON file says of it.
func description(t *testing.T, name string) map[string]any {
	t.Helper()
	text, err := os.ReadFile("../testdata/vectors/" + name + ".json")
	if err != nil {
		t.Fatal(err)
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	var v map[string]any
	if err := d.Decode(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestDecodeReadsWhatEnginesEncode(t *testing.T) {
	t.Parallel()
	var b event.Batch // reused, as it is meant to be
	for _, name := range vectorNames(t, "*") {
		if strings.HasPrefix(name, "bad-") {
			continue
		}
		d := description(t, name)
		if err := b.Decode(vector(t, name)); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got := contentOf(&b)
		if diff := cmp.Diff(expect{t}.batch(d["wire"]), got); diff != "" {
			t.Errorf("%s differs from its wire form (-want +got):\n%s", name, diff)
		}
		if _, typed := d["events"]; !typed {
			continue
		}
		want := expect{t}.batch(d)
		for i := range want.Events {
			want.Events[i].Map = got.Events[i].Map // the typed form names every field
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s differs from its fields (-want +got):\n%s", name, diff)
		}
	}
}

func TestDecodeOfABadVectorIsAnErrorOrASkip(t *testing.T) {
	t.Parallel()
	want := map[string]string{
		"bad-empty":            "event: malformed MessagePack: truncated or invalid (byte 0)",
		"bad-events_not_list":  "event: not a batch: events: not a list (byte 10)",
		"bad-hash_float":       "event 0 BlockRemoved: block_hashes: not a list of hashes",
		"bad-hash_string":      "event 0 BlockRemoved: block_hashes: not a list of hashes",
		"bad-huge_array_len":   "event: malformed MessagePack: truncated or invalid (byte 15)",
		"bad-huge_bin_len":     "event: malformed MessagePack: truncated or invalid (byte 26)",
		"bad-not_array":        "event: not a batch: a map without events (byte 0)",
		"bad-short_array":      "event 0 BlockStored: too few fields",
		"bad-tag_int":          "event 0 : type: not a string",
		"bad-tag_missing":      "event 0 : type: missing",
		"bad-trailing_garbage": "event: malformed MessagePack: trailing bytes (byte 12)",
		"bad-truncated":        "event: malformed MessagePack: truncated or invalid (byte 12)",
	}
	got := map[string]string{}
	for _, name := range vectorNames(t, "bad-*") {
		got[name] = outcome(vector(t, name))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// outcome is the error of a payload, or why its first event was skipped.
func outcome(payload []byte) string {
	var b event.Batch
	if err := b.Decode(payload); err != nil {
		return err.Error()
	}
	if len(b.Skipped) == 0 {
		return fmt.Sprintf("%d events", len(b.Events))
	}
	s := b.Skipped[0]
	return fmt.Sprintf("event %d %s: %s", s.Index, s.Tag, s.Reason)
}

func TestDecodeOfATruncatedPayloadIsMalformedAndLeavesNothing(t *testing.T) {
	t.Parallel()
	var full, b event.Batch
	payloads := map[string][]byte{
		"an event for a batch":    pack(list{"BlockRemoved", list{1, []byte{1}}, "GPU", 300}),
		"positions beyond":        batchOf(list{"BlockRemoved", list{1}, "GPU", 0, list{1, "x"}, pairs{"a", 1.5}}),
		"a batch that is a map":   pack(pairs{"ts", 1.5, "data_parallel_rank", "x", "events", list{list{"New"}}}),
		"more than a batch holds": pack(list{float32(1.5), list{}, raw{0xd2, 0, 0, 0, 1}, list{1, 2}, "x"}),
		"keys of every kind": batchOf(pairs{
			"mm_keys", list{1}, "extra_keys", list{list{"a", list{"b", 300}, []byte("c"), 500, 1.5, pairs{"d", 1}}},
			"type", "BlockStored", "token_ids", list{list{1, 300}}, "ownership", list{1, 300}, "x", list{1, 300},
		}),
		"a skipped event": batchOf(pairs{"type", "BlockStored", "block_hashes", list{"x"}}),
	}
	for _, name := range vectorNames(t, "*") {
		payloads[name] = vector(t, name)
	}
	for name, payload := range payloads {
		if full.Decode(payload) != nil {
			continue
		}
		for n := range payload {
			err := b.Decode(payload[:n])
			var at *event.DecodeError
			if !errors.Is(err, event.ErrMalformed) || !errors.As(err, &at) || at.Offset > n {
				t.Errorf("%s cut to %d of %d bytes: %v", name, n, len(payload), err)
			}
			if diff := cmp.Diff(content{}, contentOf(&b)); diff != "" {
				t.Errorf("%s cut to %d bytes left something (-want +got):\n%s", name, n, diff)
			}
		}
	}
}

// The following build payloads of any shape.

type raw []byte

type pairs []any // a map's keys and values in order, repeated keys included

func pack(v ...any) []byte {
	var p []byte
	for _, v := range v {
		switch v := v.(type) {
		case raw:
			p = append(p, v...)
		case []any:
			p = msgp.AppendArrayHeader(p, uint32(len(v)))
			p = append(p, pack(v...)...)
		case pairs:
			p = msgp.AppendMapHeader(p, uint32(len(v)/2))
			p = append(p, pack(v...)...)
		default:
			var err error
			if p, err = msgp.AppendIntf(p, v); err != nil {
				panic(err)
			}
		}
	}
	return p
}

type list = []any

// batchOf wraps events into a batch.
func batchOf(events ...any) []byte { return pack(list{1.5, events, nil}) }

func TestDecodeOfTheEnvelope(t *testing.T) {
	t.Parallel()
	cleared := list{"AllBlocksCleared"}
	one := []event.Event{{Type: event.AllBlocksCleared}}
	oneMap := []event.Event{{Type: event.AllBlocksCleared, Map: true}}
	at := event.Some(1.5)
	for _, c := range []struct {
		name    string
		payload []byte
		want    content
	}{
		{"an array of two", pack(list{1.5, list{cleared}}), content{Time: at, Events: one}},
		{"an array of three", pack(list{1.5, list{cleared}, 7}),
			content{Time: at, Rank: event.Some(int64(7)), Events: one}},
		{"more elements than known are counted", pack(list{1.5, list{cleared}, 7, "x", list{1}}),
			content{Time: at, Rank: event.Some(int64(7)), Events: one, Unknown: 2}},
		{"a rank of another type is counted", pack(list{1.5, list{cleared}, "zero"}),
			content{Time: at, Events: one, Unknown: 1}},
		{"a rank that is a whole float", pack(list{1.5, list{cleared}, 2.0}),
			content{Time: at, Rank: event.Some(int64(2)), Events: one}},
		{"a rank beyond int64 is counted", pack(list{1.5, list{cleared}, uint64(1 << 63)}),
			content{Time: at, Events: one, Unknown: 1}},
		{"no time", pack(list{nil, list{cleared}}), content{Events: one}},
		{"a time that is NaN", pack(list{raw{0xca, 0x7f, 0xc0, 0, 0}, list{cleared}}), content{Events: one}},
		{"an infinite time", pack(list{raw{0xcb, 0x7f, 0xf0, 0, 0, 0, 0, 0, 0}, list{cleared}}), content{Events: one}},
		{"a time in 32 bits", pack(list{float32(0.5), list{cleared}}), content{Time: event.Some(0.5), Events: one}},
		{"a time in whole seconds", pack(list{99_999_999_999, list{cleared}}),
			content{Time: event.Some(99_999_999_999.0), Events: one}},
		{"a time in milliseconds", pack(list{100_000_000_000, list{cleared}}),
			content{Time: event.Some(1e8), Events: one}},
		{"a time before 1970", pack(list{-5, list{cleared}}), content{Time: event.Some(-5.0), Events: one}},
		{"a time in milliseconds before 1970", pack(list{-200_000_000_000, list{cleared}}),
			content{Time: event.Some(-2e8), Events: one}},
		{"a large float is in seconds", pack(list{1e12, list{cleared}}), content{Time: event.Some(1e12), Events: one}},
		{"a map", pack(pairs{"ts", 1.5, "events", list{cleared}, "data_parallel_rank", 7}),
			content{Time: at, Rank: event.Some(int64(7)), Events: one}},
		{"a map in another order",
			pack(pairs{"data_parallel_rank", nil, "more", 1, 5, 6, "events", list{cleared}, "ts", 1.5, "type",
				"KVEventBatch"}),
			content{Time: at, Events: one, Unknown: 3}},
		{"a map of events alone", pack(pairs{"events", list{cleared}}), content{Events: one}},
		{"a map with a bad rank", pack(pairs{"events", list{cleared}, "data_parallel_rank", "x"}),
			content{Events: one, Unknown: 1}},
		{"no events", pack(list{1.5, list{}}), content{Time: at}},
		{"an event that is an array", pack(cleared), content{Events: one}},
		{"an event that is a map", pack(pairs{"type", "AllBlocksCleared"}), content{Events: oneMap}},
		{"an event with Mooncake's key", pack(pairs{"x", 1, "event_type", "AllBlocksCleared"}),
			content{Events: oneMap, Unknown: 1}},
		{"an event of unknown type", pack(list{"Hello", list{}}),
			content{Skipped: []event.Skip{{Tag: []byte("Hello"), Reason: "unknown event type"}}}},
		{"headers of every length",
			pack(raw{0xdd, 0, 0, 0, 2}, 1.5, raw{0xdc, 0, 2},
				raw{0xde, 0, 1}, raw{0xd9, 4}, raw("type"), raw{0xda, 0, 16}, raw("AllBlocksCleared"),
				raw{0xdf, 0, 0, 0, 1}, raw{0xdb, 0, 0, 0, 4}, raw("type"), raw{0xb0}, raw("AllBlocksCleared")),
			content{Time: at, Events: append(oneMap, oneMap...)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var b event.Batch
			if err := b.Decode(c.payload); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, contentOf(&b)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestDecodeRefusesWhatIsNoBatch(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		payload []byte
		is      error
		want    string
	}{
		{"nil", pack(nil), event.ErrNotBatch, "neither an array nor a map (byte 0)"},
		{"a string", pack("BlockStored"), event.ErrNotBatch, "neither an array nor a map (byte 0)"},
		{"an empty array", pack(list{}), event.ErrNotBatch, "an array of fewer than 2 (byte 0)"},
		{"an array of one", pack(list{1.5}), event.ErrNotBatch, "an array of fewer than 2 (byte 0)"},
		{"a time that is a bool", pack(list{true, list{}}), event.ErrNotBatch, "ts: not a number (byte 1)"},
		{"a time that is a string in a map", pack(pairs{"ts", "now", "events", list{}}), event.ErrNotBatch,
			"ts: not a number (byte 4)"},
		{"events in a map that are no list", pack(pairs{"ts", 1, "events", "x"}), event.ErrNotBatch,
			"events: not a list (byte 12)"},
		{"an empty map", pack(pairs{}), event.ErrNotBatch, "a map without events (byte 0)"},
		{"the byte that MessagePack never uses", raw{0xc1}, event.ErrMalformed, "truncated or invalid (byte 0)"},
		{"that byte inside", pack(list{1.5, list{list{"BlockRemoved", list{1}, raw{0xc1}}}}), event.ErrMalformed,
			"truncated or invalid (byte 27)"},
		{"two batches", pack(list{1.5, list{}}, list{1.5, list{}}), event.ErrMalformed, "trailing bytes (byte 11)"},
		{"no batch, cut short", pack(raw{0x93}, true, list{}), event.ErrMalformed, "truncated or invalid (byte 3)"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var b event.Batch
			err := b.Decode(c.payload)
			if !errors.Is(err, c.is) || err.Error() != c.is.Error()+": "+c.want {
				t.Errorf("got %v, want %v: %s", err, c.is, c.want)
			}
			if diff := cmp.Diff(content{}, contentOf(&b)); diff != "" {
				t.Errorf("left something (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDecodeOfAnEvent(t *testing.T) {
	t.Parallel()
	one := []event.Hash{1}
	stored := event.Event{Type: event.BlockStored, Hashes: one, Stride: 1}
	storedMap := stored
	storedMap.Map = true
	// with returns e with a change.
	with := func(e event.Event, change func(*event.Event)) []event.Event {
		change(&e)
		return []event.Event{e}
	}
	keyed := func(more ...any) pairs { return append(pairs{"type", "BlockStored", "block_hashes", list{1}}, more...) }
	for _, c := range []struct {
		name    string
		event   any
		want    []event.Event
		unknown int
	}{
		{"the shortest stored", list{"BlockStored", list{1}, nil, nil, nil}, []event.Event{stored}, 0},
		{"a longer one than known",
			list{"BlockStored", list{1}, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, 5, pairs{"a", 1}},
			[]event.Event{stored}, 2},
		{"every position", list{"BlockStored", list{1}, 2, list{3, 4}, 2, 5, "GPU", "lora", list{nil, list{}}, 6,
			"mamba", 7},
			[]event.Event{{
				Type: event.BlockStored, Hashes: one, Parent: event.Some(event.Hash(2)),
				Tokens: []uint32{3, 4}, Stride: 1, BlockSize: event.Some(int64(2)), LoRAID: event.Some(int64(5)),
				Medium: []byte("GPU"), LoRAName: []byte("lora"), ExtraKeys: []event.BlockKeys{nil, {}},
				Group: event.Some(int64(6)), SpecKind: []byte("mamba"), SlidingWindow: event.Some(int64(7)),
			}}, 0},
		{"a salt in the place of the adapter",
			list{"BlockStored", list{1}, nil, nil, nil, nil, nil, pairs{"x", 1, "cache_salt", "s", 2, 3}},
			with(stored, func(e *event.Event) { e.CacheSalt = []byte("s") }), 2},
		{"no salt in the place of the adapter",
			list{"BlockStored", list{1}, nil, nil, nil, nil, nil, pairs{"cache_salt", nil}}, []event.Event{stored}, 0},
		{"a removal", list{"BlockRemoved", list{1}}, []event.Event{{Type: event.BlockRemoved, Hashes: one}}, 0},
		{"a removal longer than known", list{"BlockRemoved", list{1}, "CPU", 3, "x"},
			[]event.Event{
				{Type: event.BlockRemoved, Hashes: one, Medium: []byte("CPU"), Group: event.Some(int64(3))},
			}, 1},
		{"a clear with more", list{"AllBlocksCleared", 1, list{}}, []event.Event{{Type: event.AllBlocksCleared}}, 2},
		{"a clear that is a map with another event's fields",
			pairs{"block_hashes", "x", "type", "AllBlocksCleared", "medium", 5},
			[]event.Event{{Type: event.AllBlocksCleared, Map: true}}, 2},
		{"the smallest map", keyed(), []event.Event{storedMap}, 0},
		{"keys of any type, and the type last",
			pairs{nil, 1, 5, "x", list{}, 2, "block_hashes", list{1}, "type",
				"BlockStored"}, []event.Event{storedMap}, 3},
		{"the type wins over Mooncake's",
			pairs{"event_type", "BlockRemoved", "block_hashes", list{1}, "type", "BlockStored"},
			[]event.Event{storedMap}, 0},
		{"Mooncake's type alone", pairs{"event_type", "BlockStored", "block_hashes", list{1}},
			[]event.Event{storedMap}, 0},
		{"fields of maps only", keyed("locality", "REMOTE", "cache_salt", "s", "ownership", "o", "session_id", ""),
			with(storedMap, func(e *event.Event) {
				e.Locality, e.CacheSalt, e.Ownership, e.SessionID = []byte("REMOTE"), []byte("s"), []byte("o"), []byte{}
			}), 0},
		{"a removal with a stored event's fields",
			pairs{"type", "BlockRemoved", "block_hashes", list{1}, "token_ids", "x", "locality", "LOCAL"},
			[]event.Event{{Type: event.BlockRemoved, Map: true, Hashes: one, Locality: []byte("LOCAL")}}, 1},
		{"an ownership that is no string", keyed("ownership", list{1, "x"}), []event.Event{storedMap}, 1},
		{"an ownership that is nil", keyed("ownership", nil), []event.Event{storedMap}, 0},
		{"an unknown key of every length",
			keyed(strings.Repeat("k", 40), 1, strings.Repeat("k", 300), 2, strings.Repeat("k", 70_000), 3),
			[]event.Event{storedMap}, 3},
		{"the last of a repeated key", keyed("token_ids", list{1}, "token_ids", nil, "medium", "a", "medium", "b"),
			with(storedMap, func(e *event.Event) { e.Medium = []byte("b") }), 0},

		{"hashes of every integer", pairs{"type", "BlockRemoved", "block_hashes", list{
			0, 127, raw{0xcc, 200}, raw{0xcd, 1, 0}, raw{0xce, 1, 0, 0, 0}, uint64(1<<64 - 1),
			-1, raw{0xd0, 0x80}, raw{0xd1, 0x80, 0}, raw{0xd2, 0x80, 0, 0, 0}, raw{0xd3, 0x80, 0, 0, 0, 0, 0, 0, 0},
			raw{0xd0, 5},
		}}, []event.Event{{Type: event.BlockRemoved, Map: true, Hashes: []event.Hash{
			0, 127, 200, 256, 1 << 24, 1<<64 - 1,
			1<<64 - 1, 1<<64 - 128, 1<<64 - 32768, 1<<64 - 1<<31, 1 << 63, 5,
		}}}, 0},
		{"hashes that are whole floats", list{"BlockRemoved",
			list{7.0, float32(8), -1.0, 0x1p63, -0x1p63, raw{0xcb, 0x80, 0, 0, 0, 0, 0, 0, 0}}},
			[]event.Event{{Type: event.BlockRemoved, Hashes: []event.Hash{7, 8, 1<<64 - 1, 1 << 63, 1 << 63, 0}}}, 0},
		{"hashes that are digests", list{"BlockRemoved",
			list{[]byte{1}, []byte{1, 2, 3, 4, 5, 6, 7, 8, 9}, raw{0xc5, 0, 1, 5}, raw{0xc6, 0, 0, 0, 1, 6}}},
			[]event.Event{{Type: event.BlockRemoved, Hashes: []event.Hash{1, 0x0203040506070809, 5, 6}}}, 0},
		{"no hashes", list{"BlockRemoved", list{}}, []event.Event{{Type: event.BlockRemoved, Hashes: []event.Hash{}}},
			0},
		{"a parent that is a digest", keyed("parent_block_hash", []byte{9}),
			with(storedMap, func(e *event.Event) { e.Parent = event.Some(event.Hash(9)) }), 0},

		{"token ids of every form", keyed("token_ids", list{
			0, 127, raw{0xcc, 255}, raw{0xcd, 255, 255}, raw{0xce, 255, 255, 255, 255},
			raw{0xcf, 0, 0, 0, 0, 0, 0, 0, 1}, raw{0xd0, 1}, raw{0xd1, 0, 2}, raw{0xd2, 0, 0, 0, 3},
			raw{0xd3, 0, 0, 0, 0, 0, 0, 0, 4}, 5.0, float32(6),
		}), with(storedMap, func(e *event.Event) {
			e.Tokens = []uint32{0, 127, 255, 65535, 1<<32 - 1, 1, 1, 2, 3, 4, 5, 6}
		}), 0},
		{"no token ids", keyed("token_ids", list{}), with(storedMap, func(e *event.Event) { e.Tokens = []uint32{} }),
			0},
		{"pairs of token ids", keyed("token_ids",
			list{list{1, 2}, raw{0xdc, 0, 2, 2, 3}, raw{0xdd, 0, 0, 0, 2, 3, 0xcd, 1, 0}}),
			with(storedMap, func(e *event.Event) { e.Tokens, e.Stride = []uint32{1, 2, 2, 3, 3, 256}, 2 }), 0},
		{"token ids among which is a string", keyed("token_ids", list{1, "image", 2}), []event.Event{storedMap}, 0},
		{"token ids among which is a negative", keyed("token_ids", list{1, -1}), []event.Event{storedMap}, 0},
		{"token ids beyond 32 bits", keyed("token_ids", list{uint64(1) << 32}), []event.Event{storedMap}, 0},
		{"token ids that are no integers", keyed("token_ids", list{1.5, 2.5}), []event.Event{storedMap}, 0},
		{"a pair among token ids", keyed("token_ids", list{1, list{1, 2}}), []event.Event{storedMap}, 0},
		{"a token id among pairs", keyed("token_ids", list{list{1, 2}, 1}), []event.Event{storedMap}, 0},
		{"triples of token ids", keyed("token_ids", list{list{1, 2, 3}}), []event.Event{storedMap}, 0},
		{"pairs of strings", keyed("token_ids", list{list{"a", "b"}}), []event.Event{storedMap}, 0},
		{"token ids beside multimodal content", keyed("mm_keys", list{"k"}, "token_ids", list{1, 2}),
			[]event.Event{storedMap}, 1},
		{"pairs beside multimodal content", keyed("token_ids", list{list{1, 2}}, "mm_keys", pairs{"k", 1}),
			[]event.Event{storedMap}, 1},
		{"multimodal content that is no list", keyed("token_ids", list{1}, "mm_keys", "k"), []event.Event{storedMap},
			1},
		{"no multimodal content", keyed("mm_keys", list{}, "token_ids", list{1}, "mm_keys", nil),
			with(storedMap, func(e *event.Event) { e.Tokens = []uint32{1} }), 0},

		{"numbers as whole floats", keyed("block_size", 16.0, "lora_id", float32(-3), "group_idx", 0.0),
			with(storedMap, func(e *event.Event) {
				e.BlockSize, e.LoRAID, e.Group = event.Some(int64(16)), event.Some(int64(-3)), event.Some(int64(0))
			}), 0},

		{"extra keys of every kind", keyed("extra_keys", list{
			nil, list{}, list{"a", list{"b", -3}, []byte("c"), 5, uint64(1) << 63, 1.0, true, nil, list{}, list{"b"},
				list{1, 2}, list{"b", 1.0}, list{"b", uint64(1) << 63}, pairs{"k", list{1}}},
		}), with(storedMap, func(e *event.Event) {
			e.ExtraKeys = []event.BlockKeys{nil, {}, {
				{Kind: event.KeyText, Text: []byte("a")},
				{Kind: event.KeyTextOffset, Text: []byte("b"), Number: -3},
				{Kind: event.KeyBytes, Text: []byte("c")},
				{Kind: event.KeyInt, Number: 5},
				{Kind: event.KeyOther, Text: pack(uint64(1) << 63)},
				{Kind: event.KeyOther, Text: pack(1.0)},
				{Kind: event.KeyOther, Text: pack(true)},
				{Kind: event.KeyOther, Text: pack(nil)},
				{Kind: event.KeyOther, Text: pack(list{})},
				{Kind: event.KeyOther, Text: pack(list{"b"})},
				{Kind: event.KeyOther, Text: pack(list{1, 2})},
				{Kind: event.KeyOther, Text: pack(list{"b", 1.0})},
				{Kind: event.KeyOther, Text: pack(list{"b", uint64(1) << 63})},
				{Kind: event.KeyOther, Text: pack(pairs{"k", list{1}})},
			}}
		}), 0},
		{"no extra keys", keyed("extra_keys", list{}),
			with(storedMap, func(e *event.Event) { e.ExtraKeys = []event.BlockKeys{} }), 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var b event.Batch
			cleared := list{"AllBlocksCleared"}
			if err := b.Decode(batchOf(cleared, c.event, cleared)); err != nil {
				t.Fatal(err)
			}
			want := content{Time: event.Some(1.5), Unknown: c.unknown}
			want.Events = append(append([]event.Event{{Type: event.AllBlocksCleared}}, c.want...),
				event.Event{Type: event.AllBlocksCleared})
			if diff := cmp.Diff(want, contentOf(&b)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestDecodeSkipsAnEventItCannotUnderstandAndKeepsTheRest(t *testing.T) {
	t.Parallel()
	// stored is an array whose position at holds v.
	stored := func(at int, v any) list {
		e := list{"BlockStored", list{1}, nil, list{1}, 1, nil, nil, nil, list{list{"k"}}, nil, nil, nil}
		e[at] = v
		return e
	}
	for _, c := range []struct {
		name   string
		event  any
		tag    string
		reason string
	}{
		{"nil", nil, "", "neither an array nor a map"},
		{"an empty array", list{}, "", "type: missing"},
		{"a number for a type", list{5, list{1}}, "", "type: not a string"},
		{"an empty map", pairs{}, "", "type: missing"},
		{"a type that is nil", pairs{"type", nil, "event_type", "BlockRemoved"}, "", "type: not a string"},
		{"an unknown type", list{"BlockInactive", list{1}}, "BlockInactive", "unknown event type"},
		{"an unknown type in a map after fields of other types", pairs{"block_hashes", "x", "type", "New"}, "New",
			"unknown event type"},
		{"an empty type", pairs{"type", ""}, "", "unknown event type"},
		{"too few fields of a store", list{"BlockStored", list{1}, nil, list{1}}, "BlockStored", "too few fields"},
		{"too few fields of a removal", list{"BlockRemoved"}, "BlockRemoved", "too few fields"},
		{"a map without hashes", pairs{"type", "BlockRemoved", "medium", "GPU"}, "BlockRemoved",
			"block_hashes: missing"},
		{"a tag after the bad field", pairs{"block_hashes", nil, "type", "BlockRemoved"}, "BlockRemoved",
			"block_hashes: not a list of hashes"},
		{"an unknown key before the bad field", pairs{"type", "BlockStored", "x", 1, "block_hashes", nil},
			"BlockStored",
			"block_hashes: not a list of hashes"},
		{"hashes that are nil", stored(1, nil), "BlockStored", "block_hashes: not a list of hashes"},
		{"a hash that is a string", stored(1, list{1, "x"}), "BlockStored", "block_hashes: not a list of hashes"},
		{"a hash that is nil", stored(1, list{nil}), "BlockStored", "block_hashes: not a list of hashes"},
		{"a hash that is a bool", stored(1, list{true}), "BlockStored", "block_hashes: not a list of hashes"},
		{"a hash that is an extension", stored(1, list{raw{0xd4, 5, 1}}), "BlockStored",
			"block_hashes: not a list of hashes"},
		{"a hash that is an empty digest", stored(1, list{[]byte{}}), "BlockStored",
			"block_hashes: not a list of hashes"},
		{"a hash that is a fraction", stored(1, list{1.5}), "BlockStored", "block_hashes: not a list of hashes"},
		{"a hash that is NaN", stored(1, list{raw{0xca, 0x7f, 0xc0, 0, 0}}), "BlockStored",
			"block_hashes: not a list of hashes"},
		{"a hash beyond 64 bits", stored(1, list{0x1p64}), "BlockStored", "block_hashes: not a list of hashes"},
		{"a hash below 64 bits", stored(1, list{-0x1p64}), "BlockStored", "block_hashes: not a list of hashes"},
		{"a parent that is a string", stored(2, "x"), "BlockStored", "parent_block_hash: not a hash"},
		{"a parent that is an empty digest", stored(2, []byte{}), "BlockStored", "parent_block_hash: not a hash"},
		{"token ids that are no list", stored(3, 5), "BlockStored", "token_ids: not a list"},
		{"a fraction of a block size", stored(4, 1.5), "BlockStored", "block_size: not an integer"},
		{"a block size beyond int64", stored(4, uint64(1)<<63), "BlockStored", "block_size: not an integer"},
		{"an adapter's id that is a string", stored(5, "x"), "BlockStored", "lora_id: not an integer"},
		{"a medium that is a number", stored(6, 1), "BlockStored", "medium: not a string"},
		{"an adapter's name that is a number", stored(7, 1), "BlockStored", "lora_name: not a string"},
		{"a salt that is a number", stored(7, pairs{"cache_salt", 1}), "BlockStored", "cache_salt: not a string"},
		{"extra keys that are no list", stored(8, "x"), "BlockStored", "extra_keys: not a list of lists"},
		{"extra keys of a block that are no list", stored(8, list{list{"k"}, "x"}), "BlockStored",
			"extra_keys: not a list of lists"},
		{"a group that is a string", stored(9, "x"), "BlockStored", "group_idx: not an integer"},
		{"a kind that is a number", stored(10, 1), "BlockStored", "kv_cache_spec_kind: not a string"},
		{"a window that is a string", stored(11, "x"), "BlockStored", "kv_cache_spec_sliding_window: not an integer"},
		{"a locality that is a number", pairs{"type", "BlockStored", "locality", 1}, "BlockStored",
			"locality: not a string"},
		{"a session that is a number", pairs{"type", "BlockStored", "session_id", 1}, "BlockStored",
			"session_id: not a string"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			// The neighbours hold something in every kind of memory, and an unknown field each.
			neighbour := list{"BlockStored", list{1, 2}, nil, list{1, 2}, 1, nil, "GPU", nil, list{nil, list{"k"}}, 0,
				nil,
				nil, 5}
			var alone, b event.Batch
			if err := alone.Decode(batchOf(neighbour, neighbour)); err != nil {
				t.Fatal(err)
			}
			if err := b.Decode(batchOf(neighbour, c.event, neighbour)); err != nil {
				t.Fatal(err)
			}
			want := contentOf(&alone)
			skip := event.Skip{Index: 1, Reason: c.reason}
			if c.tag != "" || c.name == "an empty type" {
				skip.Tag = []byte(c.tag)
			}
			want.Skipped = []event.Skip{skip}
			if diff := cmp.Diff(want, contentOf(&b)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestDecodeRefusesABatchOfLittleButSkips(t *testing.T) {
	t.Parallel()
	nils := func(n uint32) []byte {
		p := msgp.AppendArrayHeader(pack(raw{0x92}, 1.5), n)
		return append(p, bytes.Repeat([]byte{0xc0}, int(n))...)
	}
	var b event.Batch
	if err := b.Decode(nils(16_384)); err != nil || len(b.Skipped) != 16_384 {
		t.Errorf("%d skips, error %v", len(b.Skipped), err)
	}
	want := "event: not a batch: events: too many for their length, or too many that are not understood (byte 16397)"
	if err := b.Decode(nils(16_385)); !errors.Is(err, event.ErrNotBatch) || err.Error() != want || len(b.Skipped) != 0 {
		t.Errorf("%d skips, error %v", len(b.Skipped), err)
	}
}

func TestADecodedBatchDoesNotPointIntoThePayload(t *testing.T) {
	t.Parallel()
	for _, name := range vectorNames(t, "*") {
		payload := vector(t, name)
		var want, got event.Batch
		if want.Decode(payload) != nil {
			continue
		}
		spoiled := bytes.Clone(payload)
		if err := got.Decode(spoiled); err != nil {
			t.Fatal(err)
		}
		clear(spoiled)
		if diff := cmp.Diff(contentOf(&want), contentOf(&got)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestABatchThatGrowsKeepsItsFirstEvents(t *testing.T) {
	t.Parallel()
	var want []event.Event
	var events list
	for i := range 60 {
		// Each event has its own values and is longer than the one before.
		e := event.Event{Type: event.BlockStored, Stride: 1, Medium: fmt.Appendf(nil, "medium %d", i)}
		var hashes, tokens, keys list
		for k := range i {
			e.Hashes, hashes = append(e.Hashes, event.Hash(1000*i+k)), append(hashes, 1000*i+k)
			e.Tokens, tokens = append(e.Tokens, uint32(1000*i+k)), append(tokens, 1000*i+k)
			key := event.Key{Kind: event.KeyInt, Number: int64(1000*i + k)}
			e.ExtraKeys, keys = append(e.ExtraKeys, event.BlockKeys{key}), append(keys, list{1000*i + k})
		}
		if i == 0 {
			e.Hashes, e.Tokens, e.ExtraKeys = []event.Hash{}, []uint32{}, []event.BlockKeys{}
		}
		want = append(want, e)
		events = append(events, list{"BlockStored", hashes, nil, tokens, nil, nil, string(e.Medium), nil, keys})
	}
	var b event.Batch
	for range 3 {
		if err := b.Decode(batchOf(events...)); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, b.Events); diff != "" {
			t.Fatalf("(-want +got):\n%s", diff)
		}
	}
	// What a caller appends must not run over into the neighbour.
	_ = append(b.Events[7].Hashes, 1)
	_ = append(b.Events[7].Tokens, 1)
	_ = append(b.Events[7].Medium, 'x')
	_ = append(b.Events[7].ExtraKeys, nil)
	_ = append(b.Events[7].ExtraKeys[6], event.Key{})
	if diff := cmp.Diff(want, b.Events); diff != "" {
		t.Errorf("after appending (-want +got):\n%s", diff)
	}
}

func TestDecodeOfTheUsualBatchesAllocatesNothingOnceWarm(t *testing.T) {
	for name, payload := range benchmarkPayloads(t) {
		var b event.Batch
		decode := func() {
			if err := b.Decode(payload); err != nil {
				t.Fatal(err)
			}
		}
		for range 8 {
			decode()
		}
		if n := testing.AllocsPerRun(100, decode); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
	// The same for the streams of other engines, with all that is in them.
	for _, name := range streamNames(t) {
		payloads := stream(t, name)
		var b event.Batch
		decode := func() {
			for _, p := range payloads {
				if err := b.Decode(p); err != nil {
					t.Fatal(err)
				}
			}
		}
		for range 4 {
			decode()
		}
		if n := testing.AllocsPerRun(2, decode); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// Not parallel: it counts all that is allocated meanwhile.
func TestDecodeNeedsMemoryInProportionToThePayload(t *testing.T) {
	const size = 1 << 18
	many := func(head []byte, element ...byte) []byte {
		n := (size - len(head)) / len(element)
		p := msgp.AppendArrayHeader(head, uint32(n))
		return append(p, bytes.Repeat(element, n)...)
	}
	// growing lists keys of a block in lists of n, 3/2 n and so on: each is just too long for what is left of the last
	// piece of memory.
	growing := func(head []byte) []byte {
		var lists []byte
		blocks := uint32(0)
		for n := 16; len(lists)+n < size; n *= 2 {
			lists = msgp.AppendArrayHeader(lists, uint32(n*2/3+1))
			lists = append(lists, make([]byte, n*2/3+1)...)
			blocks++
		}
		return append(msgp.AppendArrayHeader(head, blocks), lists...)
	}
	start := func() []byte { return pack(raw{0x92}, 1.5) }
	skipped := pack(list{"BlockStored", list{}, nil, append(raw{0xdc, 1, 244}, make(raw, 500)...), "no size"})
	stored := func(at int) []byte {
		fields := []any{raw{0x91}, raw{0x9c}, "BlockStored", list{}, nil, list{}, nil, nil, nil, nil, nil}
		return append(start(), pack(fields[:2+at]...)...)
	}
	for name, payload := range map[string][]byte{
		"a list said to be longer than the payload": pack(raw{0x92}, 1.5, raw{0xdd, 0xff, 0xff, 0xff, 0xff}, "x"),
		"hashes said to be more than the payload":   append(stored(1), 0xdd, 0xff, 0xff, 0xff, 0xff, 1),
		"tokens said to be more than the payload":   append(stored(3), 0xdd, 0xff, 0xff, 0xff, 0xff, 1),
		"keys said to be more than the payload":     append(stored(8), 0xdd, 0xff, 0xff, 0xff, 0xff, 1),
		"small hashes":                              many(stored(1), 1),
		"small tokens":                              many(stored(3), 1),
		"strings for tokens":                        many(stored(3), 0xa0),
		"small pairs":                               many(stored(3), 0x92, 1, 2),
		"lists said to be pairs":                    many(stored(3), 0x90),
		"blocks without keys":                       many(stored(8), 0xc0),
		"blocks of no keys":                         many(stored(8), 0x90),
		"small keys":                                many(append(stored(8), 0x91), 1),
		"ever more small keys":                      growing(stored(8)),
		"blocks of a small key":                     many(stored(8), 0x91, 1),
		"small removals":                            many(start(), pack(list{"BlockRemoved", list{}})...),
		"clears":                                    many(start(), pack(list{"AllBlocksCleared"})...),
		"events of no known type":                   many(start(), pack(list{"abcdefghijklmnopqrst"})...),
		"skipped after their tokens":                many(start(), skipped...),
		"nothing but nil":                           many(start(), 0xc0),
		"lists in lists":                            bytes.Repeat([]byte{0x91}, size),
		"lists in lists in an event":                append(stored(8), bytes.Repeat([]byte{0x91}, size)...),
		"maps in maps":                              bytes.Repeat([]byte{0x81}, size),
		"lists in lists, well formed":               append(append(start(), bytes.Repeat([]byte{0x91}, size)...), 0xc0),
	} {
		var b event.Batch
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		err := b.Decode(payload)
		runtime.ReadMemStats(&after)
		// Stacks are not in TotalAlloc.
		used := int(after.TotalAlloc-before.TotalAlloc) + int(after.StackSys-min(before.StackSys, after.StackSys))
		limit := 24*len(payload) + 4<<20 // texts and what was skipped come on top of 20 to 1
		if strings.HasPrefix(name, "skipped") {
			limit = len(payload) // since the next event uses the same memory
		}
		if used > limit {
			t.Errorf("%s: %d bytes took %d of memory (%d to 1), error %v", name, len(payload), used,
				used/len(payload), err)
		}
		t.Logf("%-45s %3d to 1, error %v", name, used/len(payload), err)
	}
}

// Not parallel: it counts all that is alive meanwhile.
func TestOneHugeBatchDoesNotKeepItsMemory(t *testing.T) {
	small := vector(t, "vllm-main-20260807-mixed")
	hashes := append(raw{0xdd, 0, 0x40, 0, 0}, make(raw, 1<<22)...)
	huge := pack(list{1.5, list{list{"BlockRemoved", hashes}}})
	alive := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	var b event.Batch
	before := alive()
	if err := b.Decode(huge); err != nil || len(b.Events[0].Hashes) != 1<<22 {
		t.Fatalf("error %v", err)
	}
	if kept := alive() - before; kept < 31<<20 {
		t.Errorf("the huge batch holds %d bytes, its hashes alone are 32 MiB", kept)
	}
	if err := b.Decode(small); err != nil {
		t.Fatal(err)
	}
	if now := alive(); now > before+2<<20 {
		t.Errorf("after the next batch %d bytes are still alive", now-before)
	}
	runtime.KeepAlive(&b)
	runtime.KeepAlive(huge)
}
