// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package render_test

import (
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/kvtap/kvtap/cmd/kvtap/internal/render"
	"github.com/kvtap/kvtap/event"
)

func TestStringsAreJSON(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"", "plain", `"\/`, "\n\r\t\b\f\x00\x1f\x7f", "é €", "😀", "\u2028\u2029\u0085",
		"\xff\xfe", "a\xe2\x82", "\xed\xa0\x80"} {
		out := render.AppendString([]byte("x"), s)
		var got string
		if err := json.Unmarshal(out[1:], &got); err != nil {
			t.Errorf("%q: %v: %s", s, err, out)
			continue
		}
		// FuzzString compares what is not UTF-8 with the standard library.
		if utf8.ValidString(s) && got != s {
			t.Errorf("%q became %q", s, got)
		}
		if string(render.AppendString([]byte("x"), []byte(s))) != string(out) {
			t.Errorf("%q: as bytes it differs", s)
		}
		for _, r := range string(out) {
			if unicode.IsControl(r) {
				t.Errorf("%q: %q holds a control character", s, out)
			}
		}
	}
}

func FuzzString(f *testing.F) {
	f.Add("plain \"é\xff\u2028\x00")
	f.Fuzz(func(t *testing.T, s string) {
		want, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		var a, b string
		if err := json.Unmarshal(want, &a); err != nil {
			t.Fatal(err)
		}
		out := render.AppendString(nil, s)
		if err := json.Unmarshal(out, &b); err != nil || a != b {
			t.Errorf("%q: %v, %s means %q, want %q", s, err, out, b, a)
		}
		if clean := render.Clean(s); utf8.RuneCountInString(clean) > 67 ||
			strings.ContainsFunc(clean, unicode.IsControl) {
			t.Errorf("%q is not clean: %q", s, clean)
		}
	})
}

func TestBatchesAsJSON(t *testing.T) {
	t.Parallel()
	stored := event.Event{
		Type: event.BlockStored, Hashes: []event.Hash{1}, Parent: event.Some(event.Hash(math.MaxUint64)),
		Tokens: []uint32{7, math.MaxUint32}, Stride: 1, BlockSize: event.Some[int64](2), LoRAID: event.Some[int64](-3),
		LoRAName: []byte("l"), CacheSalt: []byte(""), SpecKind: []byte("mamba"), SlidingWindow: event.Some[int64](9),
		Ownership: []byte("o"), SessionID: []byte("s"), Medium: []byte("GPU"), Group: event.Some[int64](4),
		Locality: []byte("LOCAL"),
		ExtraKeys: []event.BlockKeys{nil, {}, {
			{Kind: event.KeyText, Text: []byte("t")}, {Kind: event.KeyTextOffset, Text: []byte("m"), Number: -5},
			{Kind: event.KeyBytes, Text: []byte{1, 0xab}}, {Kind: event.KeyInt, Number: 6}, {Kind: event.KeyOther,
				Text: []byte{0xc3}},
		}},
	}
	const storedJSON = `{"type":"BlockStored","block_hashes":["0000000000000001"],` +
		`"parent_block_hash":"ffffffffffffffff","token_ids":[7,4294967295],"block_size":2,"lora_id":-3,` +
		`"lora_name":"l","medium":"GPU",` +
		`"extra_keys":[null,[],["t",["m",-5],{"$bytes":"01ab"},6,{"$msgpack":"c3"}]],"group_idx":4,` +
		`"kv_cache_spec_kind":"mamba","kv_cache_spec_sliding_window":9,"locality":"LOCAL",` +
		`"cache_salt":"","ownership":"o","session_id":"s"}`
	const bare = `{"type":"BlockStored","block_hashes":%s,"parent_block_hash":null,"token_ids":%s,"block_size":%s,` +
		`"lora_id":null,"lora_name":null,"medium":null,"extra_keys":null,"group_idx":null,"kv_cache_spec_kind":null,` +
		`"kv_cache_spec_sliding_window":null,"locality":null,"cache_salt":null,"ownership":null,"session_id":null}`
	batch := func(ts, rank, events, skipped string) string {
		return fmt.Sprintf(`{"ts":%s,"data_parallel_rank":%s,"events":[%s],"skipped":[%s]}`, ts, rank, events, skipped)
	}
	for _, c := range []struct {
		name  string
		batch event.Batch
		want  string
	}{
		{"an empty batch", event.Batch{}, batch("null", "null", "", "")},
		{"a time keeps its digits", event.Batch{Time: event.Some(1757500000.25), Rank: event.Some[int64](3)},
			batch("1757500000.25", "3", "", "")},
		{"a tiny time has an exponent", event.Batch{Time: event.Some(1e-9)}, batch("1e-09", "null", "", "")},
		{"a time that is no number is null", event.Batch{Time: event.Some(math.NaN())}, batch("null", "null", "", "")},
		{"nor is infinity one", event.Batch{Time: event.Some(math.Inf(-1))}, batch("null", "null", "", "")},
		{"every field has its place", event.Batch{Events: []event.Event{stored}}, batch("null", "null", storedJSON,
			"")},
		{"pairs are pairs", event.Batch{Events: []event.Event{{
			Type: event.BlockStored, Hashes: []event.Hash{1}, Tokens: []uint32{1, 2, 2, 3}, Stride: 2,
			BlockSize: event.Some[int64](2),
		}}}, batch("null", "null", fmt.Sprintf(bare, `["0000000000000001"]`, "[[1,2],[2,3]]", "2"), "")},
		{"tokens that do not fit are null", event.Batch{Events: []event.Event{{
			Type: event.BlockStored, Hashes: []event.Hash{1}, Tokens: []uint32{1, 2, 3}, Stride: 1,
			BlockSize: event.Some[int64](2),
		}}}, batch("null", "null", fmt.Sprintf(bare, `["0000000000000001"]`, "null", "2"), "")},
		{"no tokens are null", event.Batch{Events: []event.Event{{Type: event.BlockStored}}},
			batch("null", "null", fmt.Sprintf(bare, `[]`, "null", "null"), "")},
		{"removals and skips", event.Batch{
			Events: []event.Event{
				{
					Type: event.BlockRemoved, Hashes: []event.Hash{1, 2}, Medium: []byte("CPU"), Ownership: []byte("o"),
				},
				{Type: event.AllBlocksCleared, Medium: []byte("GPU")},
			},
			Skipped: []event.Skip{
				{Index: 1, Reason: "r"}, {Index: 3, Reason: "s", Tag: []byte("\"\x1b")},
				{Index: 4, Reason: "unknown event type", Tag: []byte("T\n")},
				{Index: 5, Reason: "unknown event type", Tag: []byte{}},
			},
		}, batch("null", "null", `{"type":"BlockRemoved","block_hashes":["0000000000000001","0000000000000002"],`+
			`"medium":"CPU","group_idx":null,"locality":null,"ownership":"o"},{"type":"AllBlocksCleared"}`,
			`{"index":1,"reason":"r"},{"index":3,"reason":"\"`+"\ufffd"+`: s"},`+
				`{"index":4,"reason":"unknown event type T`+"\ufffd"+`"},{"index":5,"reason":"unknown event type \"\""}`)},
	} {
		got := string(render.AppendBatch(nil, &c.batch))
		if diff := cmp.Diff(c.want, got); diff != "" || !json.Valid([]byte(got)) {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
		tail := string(render.AppendTailBatch(nil, &c.batch, render.Provenance{Seq: math.MaxUint64, Replayed: true}))
		if want := `{"kind":"batch","seq":18446744073709551615,"replayed":true,` + c.want[1:]; tail != want {
			t.Errorf("%s, in a tail: %s", c.name, tail)
		}
	}
}

func TestOtherLinesAsJSON(t *testing.T) {
	t.Parallel()
	group, medium := event.Some[int64](0), event.Some(`G"`)
	placed := event.Place{Hash: 10, Group: group, Medium: medium}
	named := render.AppendTailBatch(nil, &event.Batch{}, render.Provenance{Pod: "p", Model: "m"})
	for got, want := range map[string]string{
		string(render.AppendState(nil, "live", "exact", "")): `{"kind":"state","state":"live","bound":"exact",` +
			`"reason":null}`,
		string(render.AppendState(nil, "live", "unknown", "gap")): `{"kind":"state","state":"live","bound":"unknown",` +
			`"reason":"gap"}`,
		string(render.AppendReset(nil, "restart")): `{"kind":"reset","reason":"restart"}`,
		string(render.AppendHeld(nil, held(event.Place{}, 1, 1))): `{"hash":"0000000000000000","group":null,` +
			`"medium":null,"copies":1}`,
		string(render.AppendHeld(nil, held(placed, 0, 2))): `{"hash":"000000000000000a","group":0,"medium":"G\"",` +
			`"copies":2,"certain_copies":0}`,
		string(named): `{"kind":"batch","seq":0,"replayed":false,"pod":"p","model":"m","ts":null,` +
			`"data_parallel_rank":null,"events":[],"skipped":[]}`,
	} {
		if got != want {
			t.Errorf("got %s\nwant %s", got, want)
		}
	}
}

func held(p event.Place, lower, upper int64) event.Held {
	return event.Held{Place: p, Copies: event.Copies{Lower: lower, Upper: upper}}
}

func TestTable(t *testing.T) {
	t.Parallel()
	batch := &event.Batch{Time: event.Some(1757500000.25), Events: []event.Event{
		{Type: event.BlockStored, Hashes: []event.Hash{0xabc}, Tokens: []uint32{1, 2}, Stride: 1,
			BlockSize: event.Some[int64](2),
			Medium:    []byte("GPU"), LoRAID: event.Some[int64](7)},
		{Type: event.BlockRemoved, Hashes: []event.Hash{0xabc}, Medium: []byte("\x1b[31mred"),
			Group: event.Some[int64](1)},
		{Type: event.AllBlocksCleared},
	}}
	late := &event.Batch{Skipped: []event.Skip{{Reason: "odd"}, {Reason: "odd", Tag: []byte("BlockRemoved")}}}
	table := &render.Table{Source: true, Zone: time.FixedZone("CET", 3600)}
	var out []byte
	out = table.AppendHeader(out)
	out = table.AppendBatch(out, batch, render.Row{Seq: 41, HasSeq: true, Replayed: true})
	out = table.AppendNote(out, time.Unix(1757500001, 0), "live, exact")
	out = table.AppendBatch(out, late, render.Row{At: time.Unix(1757545200, 0)})
	out = table.AppendBatch(out, &event.Batch{Time: event.Some(math.Inf(1))}, render.Row{})
	const want = "" +
		"TIME               SEQ  FROM    EVENT    BLOCKS  FIRST HASH        PARENT            TOKENS  MEDIUM      " +
		"LORA AND MORE\n" + `2025-09-10 CET
11:26:40.250        41  replay  stored        1  0000000000000abc  -                      2  GPU         lora 7
` + "11:26:40.250        41  replay  removed       1  0000000000000abc  -                      -  " +
		"\ufffd[31mred    group 1\n" + `11:26:40.250        41  replay  cleared       all
11:26:41.000  -- live, exact
2025-09-11 CET
00:00:00.000         -  live    skipped  odd
00:00:00.000         -  live    skipped  BlockRemoved: odd
-                    -  live    nothing
`
	if diff := cmp.Diff(want, string(out)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestTableInColour(t *testing.T) {
	t.Parallel()
	table := &render.Table{Colour: true, Dated: true}
	batch := &event.Batch{Events: []event.Event{{Type: event.BlockStored}, {Type: event.BlockRemoved},
		{Type: event.AllBlocksCleared}}}
	out := string(table.AppendBatch(table.AppendHeader(nil), batch, render.Row{}))
	out += string(table.AppendBatch(nil, batch, render.Row{Replayed: true}))
	lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	colours := map[string]bool{}
	for _, line := range lines {
		start := strings.IndexByte(line, 'm')
		if !strings.HasPrefix(line, "\x1b[") || !strings.HasSuffix(line, "\x1b[0m") {
			t.Fatalf("no colour, or one without an end: %q", line)
		}
		colours[line[:start]] = true
	}
	if len(lines) != 7 || len(colours) != 5 {
		t.Errorf("%d lines in %d colours", len(lines), len(colours))
	}
}

func TestCleanTextIsShort(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"":                        "",
		"plain é":                 "plain é",
		"a\x1b[2Jb\n":             "a\ufffd[2Jb\ufffd",
		"\xff":                    "\ufffd",
		strings.Repeat("a", 64):   strings.Repeat("a", 64),
		strings.Repeat("é", 1000): strings.Repeat("é", 64) + "...",
	} {
		if got := render.Clean(text); got != want {
			t.Errorf("%q became %q", text, got)
		}
	}
}
