// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp

import (
	"encoding/binary"
	"fmt"
)

// The flags that open a frame. The other five bits are reserved and must be zero.
const (
	flagMore    = 1
	flagLong    = 2
	flagCommand = 4
)

// parseHeader reads a frame's header from the front of b. ok is false if b is too short; h is then how much is needed.
func parseHeader(b []byte) (flags byte, h int, n uint64, ok bool) {
	h = 2
	if len(b) < 2 {
		return 0, h, 0, false
	}
	flags = b[0]
	if flags&flagLong == 0 {
		return flags, h, uint64(b[1]), true
	}
	h = 9
	if len(b) < 9 {
		return flags, h, 0, false
	}
	return flags, h, binary.BigEndian.Uint64(b[1:]), true
}

// appendFrame appends one bare frame.
func appendFrame(dst []byte, flags byte, body []byte) []byte {
	dst = appendHeader(dst, flags, len(body))
	return append(dst, body...)
}

func appendHeader(dst []byte, flags byte, n int) []byte {
	if n > 255 {
		dst = append(dst, flags|flagLong)
		return binary.BigEndian.AppendUint64(dst, uint64(n))
	}
	return append(dst, flags, byte(n))
}

// appendCommandBody appends the body of a command frame: a name with its length, then the command's own data.
func appendCommandBody(dst []byte, name string, data []byte) []byte {
	dst = append(dst, byte(len(name)))
	dst = append(dst, name...)
	return append(dst, data...)
}

// appendCommand appends one bare command frame.
func appendCommand(dst []byte, name string, data []byte) []byte {
	dst = appendHeader(dst, flagCommand, 1+len(name)+len(data))
	return appendCommandBody(dst, name, data)
}

// splitCommand splits the body of a command frame.
func splitCommand(body []byte) (name, data []byte, err error) {
	if len(body) == 0 || body[0] == 0 || len(body) < 1+int(body[0]) {
		return nil, nil, malformed(fmt.Sprintf("a command frame %.32q", body), "a command's name with its length")
	}
	n := 1 + int(body[0])
	return body[1:n], body[n:], nil
}
