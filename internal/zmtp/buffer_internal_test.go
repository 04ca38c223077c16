// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp

import (
	"bytes"
	"io"
	"net"
	"testing"
)

// The buffer follows what has arrived: through large messages, hostile cuts and small messages again.
func TestTheBufferFollowsItsMessages(t *testing.T) {
	t.Parallel()
	const maxMessage, readBuffer = 4 << 20, 4 << 10
	ours, theirs := net.Pipe()
	go io.Copy(io.Discard, theirs)
	go func() {
		theirs.Write(greeting(null{}))
		theirs.Write(appendCommand(nil, "READY", appendProperty(nil, "Socket-Type", []byte("PUB"))))
	}()
	c, err := NewConn(t.Context(), ours, SUB, &Options{MaxMessage: maxMessage, ReadBuffer: readBuffer})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	defer theirs.Close()
	recv := func(wire []byte, frames int) int {
		t.Helper()
		go theirs.Write(wire)
		got, err := c.Recv()
		if err != nil || len(got) != frames {
			t.Fatalf("%d frames, %v", len(got), err)
		}
		return len(c.buf)
	}
	body := func(n int) []byte { return bytes.Repeat([]byte("x"), n) }
	small := appendFrame(nil, 0, body(100))

	if n := recv(small, 1); n != readBuffer {
		t.Errorf("%d bytes for a small message", n)
	}
	// The largest message that is allowed, in 64 frames, with a PONG after each.
	var wire []byte
	for i := range 64 {
		flags := byte(flagMore)
		if i == 63 {
			flags = 0
		}
		wire = append(appendFrame(wire, flags, body(maxMessage/64)), appendCommand(nil, "PONG", body(1000))...)
	}
	if n := recv(wire, 64); n > maxMessage*5/4+maxCommand {
		t.Errorf("%d bytes for a message of %d", n, maxMessage)
	}
	if n := recv(small, 1); n != readBuffer {
		t.Errorf("%d bytes for a small message after the largest", n)
	}
	// One that is moderate stays for the next of its kind, and leaves after 64 that do not need it.
	grown := recv(appendFrame(nil, 0, body(50_000)), 1)
	if grown < 50_000 || grown > 100_000 {
		t.Errorf("%d bytes for a message of 50,000", grown)
	}
	for i := range 64 {
		if n := recv(small, 1); n != grown {
			t.Fatalf("%d bytes after %d small messages, %d before", n, i+1, grown)
		}
	}
	if n := recv(small, 1); n != readBuffer {
		t.Errorf("%d bytes after 65 small messages", n)
	}
}
