// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const vectors = "../../testdata/vectors"

// cleared is a batch with an AllBlocksCleared, at 1757500000.25.
const cleared = "93cb41da30549810000091" + "91b0416c6c426c6f636b73436c656172656400"

func TestDecodeShowsEveryVector(t *testing.T) {
	t.Parallel()
	names, err := filepath.Glob(vectors + "/*.hex")
	if err != nil || len(names) < 100 {
		t.Fatalf("%d vectors, %v", len(names), err)
	}
	for _, name := range names {
		if strings.HasPrefix(filepath.Base(name), "bad-") {
			continue
		}
		t.Run(filepath.Base(name), func(t *testing.T) {
			t.Parallel()
			got := kvtap(t, "", "decode", name)
			if got.code != exitDone || got.stderr != "" {
				t.Fatalf("code %d, stderr %q", got.code, got.stderr)
			}
			want := wantDecoded(t, strings.TrimSuffix(name, ".hex")+".json")
			if diff := cmp.Diff(want, numbers(t, got.stdout)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestDecodeSurvivesBadVectors(t *testing.T) {
	t.Parallel()
	names, err := filepath.Glob(vectors + "/bad-*.hex")
	if err != nil || len(names) < 10 {
		t.Fatalf("%d vectors, %v", len(names), err)
	}
	for _, name := range names {
		got := kvtap(t, "", "decode", name)
		reported := got.code == exitFailed && strings.Contains(got.stderr, "line 1: ") && got.stdout == ""
		skipped := got.code == exitDone && strings.Contains(got.stdout, `"events":[],"skipped":[{"index":0,"reason":"`)
		if !reported && !skipped {
			t.Errorf("%s: code %d, stdout %q, stderr %q", name, got.code, got.stdout, got.stderr)
		}
	}
}

func TestDecodeGolden(t *testing.T) {
	t.Parallel()
	in := filepath.Join("testdata", "decode.in")
	for _, format := range []string{"json", "text"} {
		got := kvtap(t, "", "decode", "-o", format, in)
		golden(t, "decode."+format, got.stdout)
		golden(t, "decode.err", strings.ReplaceAll(got.stderr, in, "decode.in"))
		if got.code != exitFailed {
			t.Errorf("code %d in spite of unreadable lines", got.code)
		}
	}
}

func TestDecodeReadsEveryFormOfInput(t *testing.T) {
	t.Parallel()
	payload, err := hex.DecodeString(cleared)
	if err != nil {
		t.Fatal(err)
	}
	record := fmt.Sprintf(`{"received_at":"2026-03-01T12:00:00.5Z","topic":"t","seq":7,"payload":%q}`,
		base64.StdEncoding.EncodeToString(payload))
	const want = `{"ts":1757500000.25,"data_parallel_rank":0,"events":[{"type":"AllBlocksCleared"}],"skipped":[]}` +
		"\n"
	for name, in := range map[string]string{
		"hex":               cleared + "\n",
		"upper-case hex":    strings.ToUpper(cleared) + "\n",
		"no newline at end": cleared,
		"Windows newlines":  cleared + "\r\n",
		"seq hex":           "7 " + cleared + "\n",
		"a recording":       record + "\n",
	} {
		for _, args := range [][]string{{"decode"}, {"decode", "-"}, {"decode", "--json", "-"}} {
			if got := kvtap(t, in, args...); got != (result{exitDone, want, ""}) {
				t.Errorf("%s by %v: %+v", name, args, got)
			}
		}
	}
}

func TestDecodeReportsADamagedFile(t *testing.T) {
	t.Parallel()
	whole, err := os.ReadFile("../../testdata/streams/stream-main.txt.gz")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "cut.gz")
	if err := os.WriteFile(path, whole[:len(whole)/2], 0o666); err != nil {
		t.Fatal(err)
	}
	got := kvtap(t, "", "decode", path)
	if n := strings.Count(got.stdout, "\n"); got.code != exitFailed || n < 50 ||
		!strings.Contains(got.stderr, fmt.Sprintf("after line %d: ", n)) {
		t.Errorf("code %d, %d lines, stderr %q", got.code, n, got.stderr)
	}
	for _, args := range [][]string{{"decode", t.TempDir()}, {"decode", path + "-no"}, {"fold", t.TempDir()}} {
		if got := kvtap(t, "", args...); got.code != exitFailed || got.stderr == "" {
			t.Errorf("%v: %+v", args, got)
		}
	}
	if got := kvtap(t, "\x1f\x8bnonsense", "decode"); got.code != exitFailed || !strings.Contains(got.stderr, "gzip") {
		t.Errorf("false gzip: %+v", got)
	}
}

func TestDecodeEndsWithItsOutput(t *testing.T) {
	t.Parallel()
	in := strings.Repeat(cleared+"\n", 10)
	var stderr bytes.Buffer
	if code := run(t.Context(), []string{"decode"}, strings.NewReader(in), failingWriter{io.ErrClosedPipe},
		&stderr); code != exitDone ||
		stderr.Len() > 0 {
		t.Errorf("closed pipe: code %d, stderr %q", code, &stderr)
	}
	if code := run(t.Context(), []string{"decode"}, strings.NewReader(in), failingWriter{errDiskFull},
		&stderr); code != exitFailed ||
		!strings.Contains(stderr.String(), errDiskFull.Error()) {
		t.Errorf("full disk: code %d, stderr %q", code, &stderr)
	}
}

// numbers reads JSON without losing digits of large numbers.
func numbers(t *testing.T, text string) any {
	t.Helper()
	decoder := json.NewDecoder(strings.NewReader(text))
	decoder.UseNumber()
	var v any
	if err := decoder.Decode(&v); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	if decoder.More() {
		t.Fatalf("more than one value: %s", text)
	}
	return v
}

// wantDecoded returns what decode has to print, from a vector's untyped content.
func wantDecoded(t *testing.T, path string) any {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	vector := numbers(t, string(text)).(map[string]any)
	wire := vector["wire"]
	// A bare event is a batch of one.
	batch, ok := wire.([]any)
	if !ok {
		batch = []any{nil, []any{wire}}
	} else if _, bare := batch[0].(string); bare {
		batch = []any{nil, []any{wire}}
	}
	ts, rank := batch[0], any(nil)
	// Mooncake counts milliseconds.
	if n, ok := ts.(json.Number); ok && !strings.Contains(n.String(), ".") {
		ms, err := n.Int64()
		if err != nil {
			t.Fatal(err)
		}
		ts = json.Number(strconv.FormatFloat(float64(ms)/1e3, 'f', -1, 64))
	}
	if len(batch) > 2 {
		rank = batch[2]
	}
	events, skipped := []any{}, []any{}
	for i, e := range batch[1].([]any) {
		fields := named(e)
		switch kind := fields["type"]; kind {
		case "BlockStored":
			events = append(events, wantStored(t, fields))
		case "BlockRemoved":
			events = append(events, map[string]any{
				"type": kind, "block_hashes": hashes(t, fields["block_hashes"]), "medium": fields["medium"],
				"group_idx": fields["group_idx"], "locality": fields["locality"], "ownership": fields["ownership"],
			})
		case "AllBlocksCleared":
			events = append(events, map[string]any{"type": kind})
		default:
			skipped = append(skipped, map[string]any{
				"index": json.Number(strconv.Itoa(i)), "reason": "unknown event type " + kind.(string),
			})
		}
	}
	return map[string]any{"ts": ts, "data_parallel_rank": rank, "events": events, "skipped": skipped}
}

// named returns an event's fields by name.
func named(e any) map[string]any {
	if m, ok := e.(map[string]any); ok {
		if m["type"] == nil {
			m["type"] = m["event_type"]
		}
		return m
	}
	names := []string{"type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium",
		"lora_name",
		"extra_keys", "group_idx", "kv_cache_spec_kind", "kv_cache_spec_sliding_window"}
	list := e.([]any)
	if list[0] == "BlockRemoved" {
		names = []string{"type", "block_hashes", "medium", "group_idx"}
	}
	fields := map[string]any{}
	for i, v := range list {
		// SGLang has a map there, with the salt.
		if salt, ok := v.(map[string]any); ok && names[i] == "lora_name" {
			fields["cache_salt"] = salt["cache_salt"]
			continue
		}
		fields[names[i]] = v
	}
	return fields
}

func wantStored(t *testing.T, fields map[string]any) map[string]any {
	t.Helper()
	want := map[string]any{"type": "BlockStored"}
	for _, name := range []string{"block_size", "lora_id", "lora_name", "medium", "extra_keys", "group_idx",
		"kv_cache_spec_kind", "kv_cache_spec_sliding_window", "locality", "cache_salt", "ownership", "session_id"} {
		want[name] = fields[name]
	}
	want["block_hashes"] = hashes(t, fields["block_hashes"])
	want["parent_block_hash"] = nil
	if parent := fields["parent_block_hash"]; parent != nil {
		want["parent_block_hash"] = hash(t, parent)
	}
	// Tokens that are not as many as the blocks have room for say nothing about them.
	want["token_ids"] = nil
	if tokens, ok := fields["token_ids"].([]any); ok {
		size, err := strconv.Atoi(fmt.Sprint(fields["block_size"]))
		if err == nil && len(tokens) == size*len(fields["block_hashes"].([]any)) {
			want["token_ids"] = tokens
		}
	}
	return want
}

func hashes(t *testing.T, list any) []any {
	t.Helper()
	out := []any{}
	for _, h := range list.([]any) {
		out = append(out, hash(t, h))
	}
	return out
}

// hash returns the canonical form of a hash: 16 hex digits.
func hash(t *testing.T, h any) string {
	t.Helper()
	switch h := h.(type) {
	case json.Number:
		if u, err := strconv.ParseUint(h.String(), 10, 64); err == nil {
			return fmt.Sprintf("%016x", u)
		}
		i, err := h.Int64()
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("%016x", uint64(i))
	case map[string]any:
		digest, err := hex.DecodeString(h["$bytes"].(string))
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("%016x", binary.BigEndian.Uint64(append(make([]byte, 8), digest...)[len(digest):]))
	}
	t.Fatalf("no hash: %v", h)
	return ""
}
