// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package event

import "testing"

func TestABatchThatMayTakeNoMoreMemoryTakesNoLists(t *testing.T) {
	t.Parallel()
	list := []byte{0x92, 1, 2}
	for name, read := range map[string]func(b *Batch) (ok bool){
		"hashes":       func(b *Batch) bool { _, _, ok := b.hashes(list); return ok },
		"tokens":       func(b *Batch) bool { _, _, _, ok := b.tokens(list); return ok },
		"extra keys":   func(b *Batch) bool { _, _, ok := b.extraKeys([]byte{0x91, 0xc0}); return ok },
		"block's keys": func(b *Batch) bool { _, _, ok := b.blockKeys(list); return ok },
		"an event":     func(b *Batch) bool { b.reserve(1); _, ok := b.event([]byte{0xc0}, 0); return ok },
	} {
		var b Batch
		if read(&b) {
			t.Errorf("%s: read", name)
		}
		b.arena.left = 1 << 10
		if !read(&b) {
			t.Errorf("%s: refused though there is room", name)
		}
	}
	// Texts are no longer than the payload altogether.
	var b Batch
	if got := b.text([]byte("GPU")); string(got) != "GPU" {
		t.Errorf("a text became %q", got)
	}
	// What must not double may still fit.
	slab, left := make([]uint32, 100), 4*40
	if _, ok := room(&left, slab, 40, 4); !ok || left != 0 {
		t.Errorf("no room for 40 elements; %d bytes are left", left)
	}
}
