// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package event_test

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvtap/kvtap/event"
)

// FuzzDecode checks that whatever decodes is in order, and survives being encoded in every form that can express it.
func FuzzDecode(f *testing.F) {
	for _, name := range vectorNames(f, "*") {
		f.Add(vector(f, name))
	}
	f.Add(batchOf(list{"BlockStored", list{1.0, []byte{1}}, nil, list{list{1, 2}}, 1, nil, nil,
		pairs{"cache_salt", "s"}}))
	f.Add(batchOf(pairs{"event_type", "BlockStored", "block_hashes", list{-1}, "extra_keys",
		list{list{1, nil, list{"a", 1}}}, "ownership", 1}))
	f.Fuzz(func(t *testing.T, payload []byte) {
		var b, again event.Batch
		err := b.Decode(payload)
		if err != nil {
			var at *event.DecodeError
			if !errors.As(err, &at) || at.Offset < 0 || at.Offset > len(payload) || at.Reason == "" {
				t.Errorf("error %#v", err)
			}
			if !errors.Is(err, event.ErrMalformed) && !errors.Is(err, event.ErrNotBatch) {
				t.Errorf("error %v is of no kind", err)
			}
			if diff := cmp.Diff(content{}, contentOf(&b)); diff != "" {
				t.Errorf("left something (-want +got):\n%s", diff)
			}
			return
		}
		bounded(t, &b, len(payload))
		// Memory that was used before must make no difference.
		if err := again.Decode(vector(t, "vllm-main-20260807-mixed")); err != nil {
			t.Fatal(err)
		}
		if err := again.Decode(payload); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(contentOf(&b), contentOf(&again)); diff != "" {
			t.Errorf("reused memory (-fresh +reused):\n%s", diff)
		}
		for form := range allForms {
			p, err := b.Append(nil, form)
			if err == nil {
				survives(t, &b, p, form)
			} else if !errors.Is(err, event.ErrForm) {
				t.Errorf("%v: %v", form, err)
			}
		}
		var fold event.Fold
		fold.Apply(&b)
		for p, c := range fold.All() {
			if c.Lower < 0 || c.Upper < max(1, c.Lower) {
				t.Errorf("%+v: %+v", p, c)
			}
		}
	})
}

// bounded checks that b holds no more than a payload of this length can say, and that every event makes sense.
func bounded(t *testing.T, b *event.Batch, length int) {
	t.Helper()
	n := len(b.Events) + len(b.Skipped) + b.UnknownFields
	for i := range b.Events {
		e := &b.Events[i]
		n += len(e.Hashes) + len(e.Tokens) + len(e.ExtraKeys)
		n += len(e.LoRAName) + len(e.CacheSalt) + len(e.SpecKind) + len(e.Ownership) + len(e.SessionID) + len(e.Medium)
		for _, keys := range e.ExtraKeys {
			n += len(keys)
			for _, k := range keys {
				n += len(k.Text)
			}
		}
		wantStride := 0
		if e.Type == event.BlockStored {
			wantStride = 1 + (e.Stride-1)&1
		}
		if e.Type.String() == "unknown" || e.Stride != wantStride || e.Stride == 2 && len(e.Tokens)%2 != 0 {
			t.Errorf("event %d: %+v", i, e)
		}
		for k := range e.Hashes {
			if tokens := e.BlockTokens(k); tokens != nil && int64(len(tokens)) != e.BlockSize.V*int64(e.Stride) {
				t.Errorf("event %d: block %d of %d tokens", i, k, len(tokens))
			}
		}
	}
	if n > 3*length {
		t.Errorf("%d bytes were read as %d values", length, n)
	}
}
