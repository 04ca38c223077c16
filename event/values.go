// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package event

import (
	"encoding/binary"
	"math"

	"github.com/tinylib/msgp/msgp"
)

// The readers of this file take a payload at the start of a value and return the value and what follows it. If ok is
// false the value is of another type or cut short, and everything else is without meaning; skip tells which.

// skip steps over one value. If it fails, rest begins where p is cut short or invalid. It does not recurse, unlike
// msgp.Skip, whose stack grows to hundreds of times the payload if a hostile one nests as deep as it is long.
func skip(p []byte) (rest []byte, ok bool) {
	for pending := uint64(1); pending > 0; pending-- {
		var n uint32
		var err error
		at := p
		switch msgp.NextType(p) {
		case msgp.ArrayType:
			n, p, err = msgp.ReadArrayHeaderBytes(p)
			pending += uint64(n)
		case msgp.MapType:
			n, p, err = msgp.ReadMapHeaderBytes(p)
			pending += 2 * uint64(n)
		default:
			p, err = msgp.Skip(p)
		}
		if err != nil {
			return at, false
		}
	}
	return p, true
}

// integer reads any number whose value is an integer from -2^63 to 2^64-1, as two's complement and its sign. msgp's
// readers each take one sign, no float, and allocate an error for whatever they do not take.
func integer(p []byte) (u uint64, negative bool, rest []byte, ok bool) {
	if len(p) == 0 {
		return 0, false, nil, false
	}
	var i int64
	c, v := p[0], p[1:]
	switch {
	case c < 0x80:
		return uint64(c), false, v, true
	case c >= 0xe0:
		return uint64(int64(int8(c))), true, v, true
	case c == 0xcf && len(v) >= 8:
		return binary.BigEndian.Uint64(v), false, v[8:], true
	case c == 0xce && len(v) >= 4:
		return uint64(binary.BigEndian.Uint32(v)), false, v[4:], true
	case c == 0xcd && len(v) >= 2:
		return uint64(binary.BigEndian.Uint16(v)), false, v[2:], true
	case c == 0xcc && len(v) >= 1:
		return uint64(v[0]), false, v[1:], true
	case c == 0xd3 && len(v) >= 8:
		i, rest = int64(binary.BigEndian.Uint64(v)), v[8:]
	case c == 0xd2 && len(v) >= 4:
		i, rest = int64(int32(binary.BigEndian.Uint32(v))), v[4:]
	case c == 0xd1 && len(v) >= 2:
		i, rest = int64(int16(binary.BigEndian.Uint16(v))), v[2:]
	case c == 0xd0 && len(v) >= 1:
		i, rest = int64(int8(v[0])), v[1:]
	case c == 0xcb && len(v) >= 8:
		u, negative, ok = integral(math.Float64frombits(binary.BigEndian.Uint64(v)))
		return u, negative, v[8:], ok
	case c == 0xca && len(v) >= 4:
		u, negative, ok = integral(float64(math.Float32frombits(binary.BigEndian.Uint32(v))))
		return u, negative, v[4:], ok
	default:
		return 0, false, nil, false
	}
	return uint64(i), i < 0, rest, true
}

func integral(f float64) (u uint64, negative, ok bool) {
	switch {
	case f != math.Trunc(f): // also NaN
		return 0, false, false
	case f >= 0 && f < 1<<64:
		return uint64(f), false, true
	case f < 0 && f >= -1<<63:
		return uint64(int64(f)), true, true
	}
	return 0, false, false
}

// optInt reads an int64 or nil.
func optInt(p []byte) (v Opt[int64], rest []byte, ok bool) {
	if msgp.IsNil(p) {
		return v, p[1:], true
	}
	u, negative, rest, ok := integer(p)
	return Some(int64(u)), rest, ok && negative == (int64(u) < 0)
}

// hash reads an integer or a digest.
func hash(p []byte) (h Hash, rest []byte, ok bool) {
	if msgp.NextType(p) == msgp.BinType {
		digest, rest, err := msgp.ReadBytesZC(p)
		return HashOfDigest(digest), rest, err == nil && len(digest) > 0
	}
	u, _, rest, ok := integer(p)
	return Hash(u), rest, ok
}

// optHash reads a hash or nil.
func optHash(p []byte) (v Opt[Hash], rest []byte, ok bool) {
	if msgp.IsNil(p) {
		return v, p[1:], true
	}
	h, rest, ok := hash(p)
	return Some(h), rest, ok
}

// optText reads a string or nil.
func (b *Batch) optText(p []byte) (v, rest []byte, ok bool) {
	if msgp.IsNil(p) {
		return nil, p[1:], true
	}
	s, rest, err := msgp.ReadStringZC(p)
	if err != nil {
		return nil, nil, false
	}
	return b.text(s), rest, true
}

// list reads the header of a list whose elements can all be in the payload.
func list(p []byte) (n int, rest []byte, ok bool) {
	size, rest, err := msgp.ReadArrayHeaderBytes(p)
	return int(size), rest, err == nil && uint64(size) <= uint64(len(rest))
}

func (b *Batch) hashes(p []byte) (v []Hash, rest []byte, ok bool) {
	n, rest, ok := list(p)
	if !ok {
		return nil, nil, false
	}
	if b.arena.hashes, ok = room(&b.arena.left, b.arena.hashes, n, sizeHash); !ok {
		return nil, nil, false
	}
	from := len(b.arena.hashes)
	v = b.arena.hashes[from : from+n : from+n]
	for i := range v {
		// Nearly all hashes fill 64 bits; a call for each is a tenth of the time of a batch.
		if len(rest) >= 9 && rest[0] == 0xcf {
			v[i], rest = Hash(binary.BigEndian.Uint64(rest[1:])), rest[9:]
			continue
		}
		if v[i], rest, ok = hash(rest); !ok {
			return nil, nil, false
		}
	}
	b.arena.hashes = b.arena.hashes[:from+n]
	return v, rest, true
}

// tokens reads a list of token ids, of pairs of them, or nil. A list of anything else is read as nil: the event still
// says which blocks there are, though not what is in them.
func (b *Batch) tokens(p []byte) (v []uint32, stride int, rest []byte, ok bool) {
	if msgp.IsNil(p) {
		return nil, 1, p[1:], true
	}
	n, rest, ok := list(p)
	if !ok {
		return nil, 0, nil, false
	}
	stride = 1
	if n > 0 && msgp.NextType(rest) == msgp.ArrayType {
		stride = 2
	}
	if b.arena.tokens, ok = room(&b.arena.left, b.arena.tokens, stride*n, sizeToken); !ok {
		return nil, 0, nil, false
	}
	from := len(b.arena.tokens)
	v = b.arena.tokens[from : from+stride*n : from+stride*n]
	if stride == 1 {
		rest, ok = ids(v, rest)
	} else {
		rest, ok = pairs(v, rest)
	}
	if !ok {
		rest, ok = skip(p)
		return nil, 1, rest, ok
	}
	b.arena.tokens = b.arena.tokens[:from+len(v)]
	return v, stride, rest, true
}

// idSizes is the size in bytes of the token id that starts with a given byte, 0 if that is none in the form that
// engines send.
var idSizes = func() (sizes [256]uint8) {
	for c := range 0x80 {
		sizes[c] = 1
	}
	sizes[0xcc], sizes[0xcd], sizes[0xce] = 2, 3, 5
	return sizes
}()

// idForms says how to take a token id of a given size out of the 8 bytes, big-endian, that it starts.
var idForms = [8]struct {
	shift uint8
	mask  uint32
}{1: {56, 0x7f}, 2: {48, 0xff}, 3: {40, 0xffff}, 5: {24, 0xffffffff}}

// ids fills v with token ids. They are most of every payload, and their lengths vary without a pattern that a
// processor could predict, so that the usual form is read without a branch on it: a third less time than integer takes.
// What each step waits for is only the byte at its beginning and its size.
func ids(v []uint32, p []byte) (rest []byte, ok bool) {
	at := 0
	for i := range v {
		if at+8 <= len(p) {
			word := p[at : at+8]
			size := idSizes[word[0]]
			if at += int(size); size > 0 {
				f := &idForms[size&7]
				v[i] = uint32(binary.BigEndian.Uint64(word)>>(f.shift&63)) & f.mask
				continue
			}
		}
		u, negative, rest, ok := integer(p[at:])
		if !ok || negative || u > math.MaxUint32 {
			return nil, false
		}
		v[i], at = uint32(u), len(p)-len(rest)
	}
	return p[at:], true
}

// pairs fills v with pairs of token ids.
func pairs(v []uint32, p []byte) (rest []byte, ok bool) {
	for ; len(v) > 0; v = v[2:] {
		n, rest, ok := list(p)
		if !ok || n != 2 {
			return nil, false
		}
		if p, ok = ids(v[:2], rest); !ok {
			return nil, false
		}
	}
	return p, true
}

// extraKeys reads a list that holds a list of keys or nil for each block, or nil.
func (b *Batch) extraKeys(p []byte) (v []BlockKeys, rest []byte, ok bool) {
	if msgp.IsNil(p) {
		return nil, p[1:], true
	}
	n, rest, ok := list(p)
	if !ok {
		return nil, nil, false
	}
	slab, ok := room(&b.arena.left, b.arena.blocks, n, sizeBlockKeys)
	if !ok {
		return nil, nil, false
	}
	from := len(slab)
	for range n {
		var keys BlockKeys
		if keys, rest, ok = b.blockKeys(rest); !ok {
			return nil, nil, false
		}
		slab = append(slab, keys)
	}
	b.arena.blocks = slab
	return tail(slab, from), rest, true
}

func (b *Batch) blockKeys(p []byte) (v BlockKeys, rest []byte, ok bool) {
	if msgp.IsNil(p) {
		return nil, p[1:], true
	}
	n, rest, ok := list(p)
	if !ok {
		return nil, nil, false
	}
	slab, ok := room(&b.arena.left, b.arena.keys, n, sizeKey)
	if !ok {
		return nil, nil, false
	}
	from := len(slab)
	for range n {
		var k Key
		if k, rest, ok = b.key(rest); !ok {
			return nil, nil, false
		}
		slab = append(slab, k)
	}
	b.arena.keys = slab
	return tail(slab, from), rest, true
}

func (b *Batch) key(p []byte) (k Key, rest []byte, ok bool) {
	switch msgp.NextType(p) {
	case msgp.StrType:
		if s, rest, err := msgp.ReadStringZC(p); err == nil {
			return Key{Kind: KeyText, Text: b.text(s)}, rest, true
		}
	case msgp.BinType:
		if s, rest, err := msgp.ReadBytesZC(p); err == nil {
			return Key{Kind: KeyBytes, Text: b.text(s)}, rest, true
		}
	case msgp.IntType, msgp.UintType:
		if n, rest, ok := optInt(p); ok {
			return Key{Kind: KeyInt, Number: n.V}, rest, true
		}
	case msgp.ArrayType:
		if s, n, rest, ok := textOffset(p); ok {
			return Key{Kind: KeyTextOffset, Text: b.text(s), Number: n}, rest, true
		}
	}
	rest, ok = skip(p)
	if !ok {
		return Key{}, nil, false
	}
	return Key{Kind: KeyOther, Text: b.text(p[:len(p)-len(rest)])}, rest, true
}

// textOffset reads [string, int].
func textOffset(p []byte) (s []byte, offset int64, rest []byte, ok bool) {
	n, rest, ok := list(p)
	if !ok || n != 2 || msgp.NextType(rest) != msgp.StrType {
		return nil, 0, nil, false
	}
	s, rest, err := msgp.ReadStringZC(rest)
	if t := msgp.NextType(rest); err != nil || t != msgp.IntType && t != msgp.UintType {
		return nil, 0, nil, false
	}
	v, rest, ok := optInt(rest)
	return s, v.V, rest, ok
}

// empty reports whether p is at nil or an empty list.
func empty(p []byte) bool {
	if msgp.NextType(p) != msgp.ArrayType {
		return msgp.IsNil(p)
	}
	n, _, err := msgp.ReadArrayHeaderBytes(p)
	return err == nil && n == 0
}
