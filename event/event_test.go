// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package event_test

import (
	"math"
	"slices"
	"testing"

	"github.com/kvtap/kvtap/event"
)

func TestHashOfDigestTakesTheLastEightBytes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		digest []byte
		want   event.Hash
		text   string
	}{
		{nil, 0, "0000000000000000"},
		{[]byte{0xab}, 0xab, "00000000000000ab"},
		{[]byte{1, 2, 3, 4, 5, 6, 7}, 0x01020304050607, "0001020304050607"},
		{[]byte{1, 2, 3, 4, 5, 6, 7, 8}, 0x0102030405060708, "0102030405060708"},
		{[]byte{9, 9, 0xf1, 2, 3, 4, 5, 6, 7, 8}, 0xf102030405060708, "f102030405060708"},
	} {
		got := event.HashOfDigest(c.digest)
		if got != c.want || got.String() != c.text {
			t.Errorf("%x: %v, want %s", c.digest, got, c.text)
		}
	}
}

func TestATypeIsNamedByItsTag(t *testing.T) {
	t.Parallel()
	for want, typ := range map[string]event.Type{
		"BlockStored":      event.BlockStored,
		"BlockRemoved":     event.BlockRemoved,
		"AllBlocksCleared": event.AllBlocksCleared,
		"unknown":          0,
	} {
		if typ.String() != want {
			t.Errorf("%d is called %s, want %s", typ, typ, want)
		}
	}
}

func TestTokensDescribeBlocksOnlyIfTheirNumbersMatch(t *testing.T) {
	t.Parallel()
	none := event.Opt[int64]{}
	for _, c := range []struct {
		name           string
		hashes, tokens int // -1 tokens: nil
		stride         int
		size           event.Opt[int64]
		usable         bool
	}{
		{"two blocks of two", 2, 4, 1, event.Some(int64(2)), true},
		{"two blocks of two pairs", 2, 8, 2, event.Some(int64(2)), true},
		{"pairs counted as positions", 2, 4, 2, event.Some(int64(2)), false},
		{"one token too many", 2, 5, 1, event.Some(int64(2)), false},
		{"one block too few", 1, 4, 1, event.Some(int64(2)), false},
		{"no token ids sent", 2, -1, 1, event.Some(int64(2)), false},
		{"no block size sent", 2, 4, 1, none, false},
		{"an offloaded block", 1, 0, 1, event.Some(int64(0)), true},
		{"an offloaded block with a size", 1, 0, 1, event.Some(int64(16)), false},
		{"nothing at all", 0, 0, 1, event.Some(int64(16)), true},
		{"tokens of no block", 0, 4, 1, event.Some(int64(4)), false},
		{"tokens of blocks of size 0", 1, 4, 1, event.Some(int64(0)), false},
		{"a negative size", 2, 4, 1, event.Some(int64(-2)), false},
		{"a size that overflows when multiplied", 4, 4, 1, event.Some(int64(math.MaxInt64/2 + 1)), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			e := event.Event{Hashes: make([]event.Hash, c.hashes), Stride: c.stride, BlockSize: c.size}
			if c.tokens >= 0 {
				e.Tokens = make([]uint32, c.tokens)
			}
			for i := range e.Tokens {
				e.Tokens[i] = uint32(i)
			}
			if got := e.TokensUsable(); got != c.usable {
				t.Errorf("usable: %v", got)
			}
			var all []uint32
			for i := range e.Hashes {
				block := e.BlockTokens(i)
				all = append(all, block...)
				if len(block) != cap(block) {
					t.Errorf("block %d could be appended to", i)
				}
			}
			switch {
			case c.usable && !slices.Equal(all, e.Tokens):
				t.Errorf("blocks of %v", all)
			case !c.usable && all != nil:
				t.Errorf("blocks of %v, though unusable", all)
			}
		})
	}
}

func TestBlockTokensPanicsBeyondTheLastBlock(t *testing.T) {
	t.Parallel()
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	e := event.Event{Hashes: make([]event.Hash, 1)}
	e.BlockTokens(1)
}

func TestDoubtBeginsBehindTheLastEventThatMayHaveRemovedBlocks(t *testing.T) {
	t.Parallel()
	skip := func(index int, tag string) event.Skip { return event.Skip{Index: index, Tag: []byte(tag)} }
	for _, test := range []struct {
		name    string
		skipped []event.Skip
		cut     int
		doubt   bool
	}{
		{"nothing skipped", nil, 0, false},
		{"a store hides blocks", []event.Skip{skip(1, "BlockStored")}, 0, false},
		{"an unknown type adds", []event.Skip{skip(0, "BlockTouched")}, 0, false},
		{"a removal", []event.Skip{skip(2, "BlockRemoved")}, 2, true},
		{"a clear behind a store", []event.Skip{skip(0, "BlockStored"), skip(2, "AllBlocksCleared")}, 1, true},
		{"no type, then a store", []event.Skip{{Index: 1}, skip(3, "BlockStored")}, 1, true},
	} {
		b := event.Batch{Skipped: test.skipped}
		if cut, doubt := b.Doubt(); cut != test.cut || doubt != test.doubt {
			t.Errorf("%s: %d, %v, want %d, %v", test.name, cut, doubt, test.cut, test.doubt)
		}
	}
}
