// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package event_test

import (
	"bytes"
	"errors"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvtap/kvtap/event"
)

// allForms lists the forms with their names.
var allForms = map[event.Form]string{
	event.VLLM090: "vllm-0.9.0", event.VLLM091: "vllm-0.9.1", event.VLLM0102: "vllm-0.10.2", event.VLLM014: "vllm-0.14",
	event.VLLM017: "vllm-0.17", event.VLLM020: "vllm-0.20", event.VLLM022: "vllm-0.22", event.VLLM024: "vllm-0.24",
	event.VLLM026: "vllm-0.26", event.VLLM032: "vllm-0.32",
}

func TestAFormIsParsedFromItsName(t *testing.T) {
	t.Parallel()
	for f, name := range allForms {
		if f.String() != name {
			t.Errorf("%d is called %s, want %s", f, f, name)
		}
		if got, err := event.ParseForm(name); got != f || err != nil {
			t.Errorf("%s is parsed as %v, error %v", name, got, err)
		}
	}
	for _, f := range []event.Form{0, event.VLLM032 + 1} {
		if f.String() != "unknown" {
			t.Errorf("form %d is called %s", f, f)
		}
	}
	for _, name := range []string{"", "unknown", "vllm-0.9"} {
		if f, err := event.ParseForm(name); f != 0 || err == nil {
			t.Errorf("%q is parsed as %v", name, f)
		}
	}
}

func TestAppendWritesTheVeryBytesOfTheEngine(t *testing.T) {
	t.Parallel()
	forms := map[string]event.Form{
		"vllm-v0.9.0-": event.VLLM090, "vllm-v0.9.2-": event.VLLM091, "vllm-v0.10.2-": event.VLLM0102,
		"vllm-v0.18.0-": event.VLLM017, "vllm-v0.24.0-": event.VLLM024, "vllm-main-20260807-": event.VLLM026,
	}
	count := 0
	for prefix, form := range forms {
		for _, name := range vectorNames(t, prefix+"*") {
			if strings.Contains(name, "bytes") {
				continue // hashes sent as digests: a Batch keeps their canonical form only
			}
			count++
			sameBytes(t, name, vector(t, name), form)
		}
	}
	if count < 70 {
		t.Errorf("only %d vectors", count)
	}
}

func TestAppendWritesTheVeryBytesOfARecordedStream(t *testing.T) {
	t.Parallel()
	count := 0
	for _, name := range streamNames(t) {
		var form event.Form
		switch {
		case strings.HasPrefix(name, "sglang-"), strings.Contains(name, "bytes"):
			continue // no form here is SGLang's; hashes sent as digests
		case strings.HasPrefix(name, "real-v0.32.0"):
			form = event.VLLM032
		case strings.HasPrefix(name, "stream-main"):
			form = event.VLLM026
		case name == "stream-v0.9.0":
			form = event.VLLM090
		case name == "stream-v0.10.1":
			form = event.VLLM091
		case name == "stream-v0.21.0":
			form = event.VLLM020
		default:
			t.Errorf("%s: of no known form", name)
		}
		for _, payload := range stream(t, name) {
			count++
			sameBytes(t, name, payload, form)
		}
	}
	if count < 3000 {
		t.Errorf("only %d payloads", count)
	}
}

// sameBytes decodes the payload and encodes it again.
func sameBytes(t *testing.T, name string, payload []byte, f event.Form) {
	t.Helper()
	var b event.Batch
	if err := b.Decode(payload); err != nil {
		t.Errorf("%s: %v", name, err)
		return
	}
	got, err := b.Append([]byte("before"), f)
	if err != nil {
		t.Errorf("%s: %v", name, err)
		return
	}
	if want := append([]byte("before"), payload...); !bytes.Equal(got, want) {
		t.Errorf("%s as %v:\n got %x\nwant %x", name, f, got, want)
	}
}

// fields gives one event every field in turn, with the first form that can express it on a store and on a removal; 0 is
// none.
var fields = []struct {
	name            string
	set             func(*event.Event)
	stored, removed event.Form
}{
	{"parent_block_hash", func(e *event.Event) { e.Parent = event.Some(event.Hash(1 << 63)) }, event.VLLM090, 0},
	{"token_ids", func(e *event.Event) { e.Tokens = []uint32{0, 1<<32 - 1} }, event.VLLM090, 0},
	{"block_size", func(e *event.Event) { e.BlockSize = event.Some(int64(-1 << 63)) }, event.VLLM090, 0},
	{"lora_id", func(e *event.Event) { e.LoRAID = event.Some(int64(1<<63 - 1)) }, event.VLLM090, 0},
	{"medium", func(e *event.Event) { e.Medium = []byte{} }, event.VLLM0102, event.VLLM0102},
	{"lora_name", func(e *event.Event) { e.LoRAName = []byte("a") }, event.VLLM014, 0},
	{"extra_keys", func(e *event.Event) {
		e.ExtraKeys = []event.BlockKeys{nil, {}, {
			{Kind: event.KeyText, Text: []byte("t")},
			{Kind: event.KeyTextOffset, Text: []byte("o"), Number: -300},
			{Kind: event.KeyBytes, Text: []byte{1}},
			{Kind: event.KeyInt, Number: -1 << 63},
			{Kind: event.KeyOther, Text: []byte{0xc3}},
		}}
	}, event.VLLM017, 0},
	{"group_idx", func(e *event.Event) { e.Group = event.Some(int64(300)) }, event.VLLM020, event.VLLM020},
	{"kv_cache_spec_kind", func(e *event.Event) { e.SpecKind = []byte("mamba") }, event.VLLM022, 0},
	{"kv_cache_spec_sliding_window", func(e *event.Event) { e.SlidingWindow = event.Some(int64(70000)) },
		event.VLLM022, 0},
	{"locality", func(e *event.Event) { e.Locality = []byte("LOCAL") }, event.VLLM026, event.VLLM026},
	{"ownership", func(e *event.Event) { e.Ownership = []byte("o") }, event.VLLM032, event.VLLM032},
	{"session_id", func(e *event.Event) { e.SessionID = []byte("s") }, event.VLLM032, 0},
	{"cache_salt", func(e *event.Event) { e.CacheSalt = []byte("s") }, 0, 0},
	{"block_hashes", func(e *event.Event) { e.Hashes = []event.Hash{1, 1 << 63, 1<<64 - 1} }, event.VLLM090,
		event.VLLM090},
}

func TestAppendSendsAFieldOrRefuses(t *testing.T) {
	t.Parallel()
	for form := range allForms {
		for _, field := range fields {
			stored := event.Event{Type: event.BlockStored, Hashes: []event.Hash{}, Stride: 1}
			removed := event.Event{Type: event.BlockRemoved, Hashes: []event.Hash{}}
			cleared := event.Event{Type: event.AllBlocksCleared}
			for _, c := range []struct {
				e     event.Event
				first event.Form
			}{{stored, field.stored}, {removed, field.removed}, {cleared, 0}} {
				field.set(&c.e)
				b := event.Batch{Events: []event.Event{cleared, c.e}}
				dst := []byte("before")
				p, err := b.Append(dst, form)
				if c.first == 0 || form < c.first {
					want := &event.FormError{Form: form, Event: 1, What: field.name}
					if diff := cmp.Diff(error(want), err); diff != "" || !errors.Is(err,
						event.ErrForm) || string(p) != "before" {
						t.Errorf("%v, %v with %s: appended %q, error (-want +got):\n%s", form, c.e.Type, field.name,
							p, diff)
					}
					continue
				}
				if err != nil {
					t.Errorf("%v, %v with %s: %v", form, c.e.Type, field.name, err)
					continue
				}
				survives(t, &b, p[len("before"):], form)
			}
		}
	}
}

func TestTrimLeavesWhatAFormCanSay(t *testing.T) {
	t.Parallel()
	for form := range allForms {
		for _, field := range fields {
			stored := event.Event{Type: event.BlockStored, Hashes: []event.Hash{}, Stride: 1}
			removed := event.Event{Type: event.BlockRemoved, Hashes: []event.Hash{}}
			for _, c := range []struct {
				e     event.Event
				first event.Form
			}{{stored, field.stored}, {removed, field.removed}} {
				field.set(&c.e)
				b := event.Batch{Rank: event.Some(int64(2)), Events: []event.Event{c.e}}
				b.Trim(form)
				kept := cmp.Diff(c.e, b.Events[0]) == ""
				// What no form can say is not Trim's to take away.
				if want := c.first == 0 || form >= c.first; kept != want {
					t.Errorf("%v, %v with %s: kept %v, want %v", form, c.e.Type, field.name, kept, want)
				}
				if b.Rank.OK != (form >= event.VLLM091) {
					t.Errorf("%v: rank %v", form, b.Rank)
				}
				if _, err := b.Append(nil, form); (err != nil) != (c.first == 0) {
					t.Errorf("%v, %v with %s: trimmed, and yet %v", form, c.e.Type, field.name, err)
				}
			}
		}
	}
	odd := event.Batch{Rank: event.Some(int64(2)), Events: []event.Event{{Type: 9, Medium: []byte("GPU")}}}
	want := event.Batch{Rank: event.Some(int64(2)), Events: []event.Event{{Type: 9, Medium: []byte("GPU")}}}
	odd.Trim(0)
	odd.Trim(event.VLLM091)
	if diff := cmp.Diff(contentOf(&want), contentOf(&odd)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// survives checks that p decodes to what b holds.
func survives(t *testing.T, b *event.Batch, p []byte, f event.Form) {
	t.Helper()
	var got event.Batch
	if err := got.Decode(p); err != nil {
		t.Errorf("%v: decoding %x: %v", f, p, err)
		return
	}
	want := contentOf(b)
	want.Skipped, want.Unknown = nil, 0
	for i := range want.Events {
		want.Events[i].Map = f >= event.VLLM024
	}
	if diff := cmp.Diff(want, contentOf(&got)); diff != "" {
		t.Errorf("%v, payload %x (-want +got):\n%s", f, p, diff)
	}
}

func TestAppendOfTheEnvelope(t *testing.T) {
	t.Parallel()
	for form := range allForms {
		for _, b := range []event.Batch{
			{},
			{Time: event.Some(-1e300)},
			{Rank: event.Some(int64(-1))},
			{Skipped: []event.Skip{{Index: 1}}, UnknownFields: 3},
		} {
			p, err := b.Append(nil, form)
			if form == event.VLLM090 && b.Rank.OK {
				want := "event: form vllm-0.9.0 cannot express the batch's data_parallel_rank"
				if !errors.Is(err, event.ErrForm) || err.Error() != want {
					t.Errorf("%v: error %v", form, err)
				}
				continue
			}
			if err != nil {
				t.Errorf("%v: %v", form, err)
				continue
			}
			survives(t, &b, p, form)
		}
	}
}

func TestAppendRefusesWhatNoFormCanExpress(t *testing.T) {
	t.Parallel()
	withKey := func(k event.Key) event.Batch {
		return event.Batch{Events: []event.Event{{Type: event.BlockStored, ExtraKeys: []event.BlockKeys{{k}}}}}
	}
	for _, c := range []struct {
		name string
		b    event.Batch
		form event.Form
		want string
	}{
		{"an unknown form", event.Batch{}, 0, "form unknown cannot express the batch's form: unknown"},
		{"a time that is NaN", event.Batch{Time: event.Some(math.NaN())}, event.VLLM032,
			"form vllm-0.32 cannot express the batch's ts: not a finite number"},
		{"an infinite time", event.Batch{Time: event.Some(math.Inf(1))}, event.VLLM032,
			"form vllm-0.32 cannot express the batch's ts: not a finite number"},
		{"an event of no type", event.Batch{Events: make([]event.Event, 1)}, event.VLLM032,
			"form vllm-0.32 cannot express event 0: type: unknown"},
		{"an event of a type beyond", event.Batch{Events: []event.Event{{Type: 4}}}, event.VLLM032,
			"form vllm-0.32 cannot express event 0: type: unknown"},
		{"pairs of token ids",
			event.Batch{Events: []event.Event{{Type: event.BlockStored, Tokens: []uint32{1, 2},
				Stride: 2}}}, event.VLLM032,
			"form vllm-0.32 cannot express event 0: token_ids: pairs"},
		{"a key of no kind", withKey(event.Key{}), event.VLLM032,
			"form vllm-0.32 cannot express event 0: extra_keys: not a key"},
		{"a key of a kind beyond", withKey(event.Key{Kind: event.KeyOther + 1}), event.VLLM032,
			"form vllm-0.32 cannot express event 0: extra_keys: not a key"},
		{"a key of no MessagePack", withKey(event.Key{Kind: event.KeyOther}), event.VLLM032,
			"form vllm-0.32 cannot express event 0: extra_keys: not a key"},
		{"a key of two values", withKey(event.Key{Kind: event.KeyOther, Text: []byte{1, 2}}), event.VLLM032,
			"form vllm-0.32 cannot express event 0: extra_keys: not a key"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p, err := c.b.Append([]byte("before"), c.form)
			if !errors.Is(err, event.ErrForm) || err.Error() != "event: "+c.want || string(p) != "before" {
				t.Errorf("appended %q, error %v", p, err)
			}
		})
	}
}

func TestAppendAllocatesNothingWhereThereIsRoom(t *testing.T) {
	var b event.Batch
	if err := b.Decode(benchmarkPayloads(t)["map"]); err != nil {
		t.Fatal(err)
	}
	room := make([]byte, 0, 4096)
	if n := testing.AllocsPerRun(100, func() {
		if _, err := b.Append(room, event.VLLM032); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkAppend(b *testing.B) {
	payloads := benchmarkPayloads(b)
	for _, name := range slices.Sorted(maps.Keys(payloads)) {
		payload := payloads[name]
		b.Run(name, func(b *testing.B) {
			var batch event.Batch
			if err := batch.Decode(payload); err != nil {
				b.Fatal(err)
			}
			var p []byte
			b.ReportAllocs()
			b.SetBytes(int64(len(payload)))
			for b.Loop() {
				var err error
				if p, err = batch.Append(p[:0], event.VLLM032); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
