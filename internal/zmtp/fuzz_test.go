// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp_test

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/kvtap/kvtap/internal/zmtp"
)

// naiveMessage is a message, and what was left out of it.
type naiveMessage struct {
	Frames  []string
	Omitted uint64
	left    []string // the frames that were left out
}

// naiveParse reads messages from a stream in the plainest way: everything is there and nothing is reused. It stops at
// the first thing that is not allowed. most is how much a reader has to hold at once.
func naiveParse(b []byte, maxMessage, maxFrames int, skip bool) (messages []naiveMessage, whole bool, most int) {
	message := naiveMessage{Frames: []string{}}
	size := 0
	for len(b) > 0 {
		flags := b[0]
		header := 2
		if flags&2 != 0 {
			header = 9
		}
		most = max(most, size+header)
		if len(b) < header {
			return messages, false, most
		}
		n := uint64(b[1])
		if header == 9 {
			n = binary.BigEndian.Uint64(b[1:9])
		}
		isCommand := flags == 4 || flags == 6
		room := maxMessage - size
		if skip {
			room = min(maxMessage, maxMessage+4096-size)
		}
		isLarge := !isCommand && n > uint64(room)
		if flags > 3 && !isCommand || isCommand && n > 1<<16 || isLarge && !skip ||
			!isCommand && len(message.Frames) == maxFrames {
			return messages, false, most
		}
		if !isLarge {
			most = max(most, size+header+int(n))
		}
		b = b[header:]
		if n > uint64(len(b)) {
			return messages, false, most
		}
		body := string(b[:n])
		b = b[n:]
		if isCommand {
			if n == 0 || body[0] == 0 || len(body) < 1+int(body[0]) {
				return messages, false, most
			}
			name, data := body[1:1+body[0]], body[1+body[0]:]
			if name == "ERROR" || name == "PING" && (len(data) < 2 || len(data) > 18) {
				return messages, false, most
			}
			continue
		}
		if isLarge {
			message.Omitted += n
			message.left = append(message.left, body)
			body = ""
		}
		message.Frames = append(message.Frames, body)
		size += len(body)
		if flags&1 == 0 {
			messages = append(messages, message)
			message, size = naiveMessage{Frames: []string{}}, 0
		}
	}
	return messages, len(message.Frames) == 0, most
}

// pieces is a connection that delivers a stream in reads of the given sizes, over and over, and takes every write.
type pieces struct {
	net.Conn
	stream []byte
	sizes  []byte
	reads  int
}

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.stream) == 0 {
		return 0, io.EOF
	}
	n := len(b)
	if len(p.sizes) > 0 {
		n = min(n, 1+int(p.sizes[p.reads%len(p.sizes)]))
	}
	p.reads++
	n = copy(b[:n], p.stream)
	p.stream = p.stream[n:]
	return n, nil
}

// FuzzRecv turns bytes into a peer's stream after its READY, cut into reads by other bytes, and compares what Recv
// makes of it with a naive parser: with a connection that ends at what is too large, and with one that skips it.
func FuzzRecv(f *testing.F) {
	add := func(parts ...[]byte) { f.Add(join(parts...), []byte{0, 3, 255}, uint8(0)) }
	add(message([]byte("topic"), []byte("12345678"), make([]byte, 700)))
	add(command("PING", "\x00\x01ctx"), frame(1, []byte("a")), command("PONG", ""), frame(0, nil))
	add(frame(2, make([]byte, 300)), repeat(frame(1, nil), 70))
	add(binary.BigEndian.AppendUint64([]byte{2}, 1<<62))
	add(command("ERROR", "\x01x"))
	add([]byte{7, 0, 4, 0, 5, 1, 1})
	add(message([]byte("topic"), make([]byte, 1100)), message([]byte("x")), message(make([]byte, 1001), []byte("y")))
	add(frame(1, make([]byte, 990)), command("PONG", ""), frame(1, make([]byte, 11)), frame(1, make([]byte, 10)),
		frame(0, []byte("left out")))
	add(repeat(frame(1, make([]byte, 1001)), 9))
	f.Add(repeat(message(make([]byte, 60)), 20), []byte{}, uint8(200))
	f.Fuzz(func(t *testing.T, stream, sizes []byte, buffer uint8) {
		o := zmtp.Options{MaxMessage: 1000, MaxFrames: 8, ReadBuffer: 1 + int(buffer)}
		fuzzRecv(t, stream, sizes, o)
		o.SkipTooLarge = true
		fuzzRecv(t, stream, sizes, o)
	})
}

func fuzzRecv(t *testing.T, stream, sizes []byte, o zmtp.Options) {
	want, whole, most := naiveParse(stream, o.MaxMessage, o.MaxFrames, o.SkipTooLarge)
	// A buffer grows when it is nearly full, by a quarter of what it has to hold.
	most = max(o.ReadBuffer, 16, most+most/2+32)
	var first []uint64 // the digests
	for range 2 {
		nc := &pieces{Conn: silentConn{}, stream: join(hello(1, "PUB"), stream), sizes: sizes}
		c, err := zmtp.NewConn(t.Context(), nc, zmtp.SUB, &o)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		var got []naiveMessage
		var digests []uint64
		for {
			frames, err := c.Recv()
			if n := c.BufferSize(); n > most {
				t.Errorf("a buffer of %d bytes, at most %d are needed", n, most)
			}
			if err != nil {
				if clean := errors.Is(err, io.EOF); clean != whole {
					t.Errorf("ended with %v; a clean end: %v", err, whole)
				}
				break
			}
			omitted, digest := c.Omitted()
			got = append(got, naiveMessage{Frames: copies(frames), Omitted: omitted})
			digests = append(digests, digest)
		}
		if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(naiveMessage{})); diff != "" {
			t.Fatalf("messages (-naive +Recv)\n%s", diff)
		}
		if first == nil {
			first = digests
		} else if !slices.Equal(first, digests) {
			t.Errorf("digests %x, in other pieces %x", first, digests)
		}
		sizes = nil // the second time in reads as large as the buffer has room for
	}
	for i := range min(len(want), 20) {
		for j := range i {
			same := slices.Equal(want[i].left, want[j].left)
			if (first[i] == first[j]) != same {
				t.Errorf("digests %x and %x of %q and %q", first[i], first[j], want[i].left, want[j].left)
			}
		}
	}
}

// FuzzHandshake feeds a stranger's bytes to the handshake: it ends, with an error or a known peer.
func FuzzHandshake(f *testing.F) {
	f.Add(hello(1, "PUB"))
	f.Add(hello(0, "XPUB"))
	f.Add(hello(1, "ROUTER"))
	f.Add([]byte("HTTP/1.1 200 OK\r\n\r\n"))
	f.Add([]byte{1, 0})
	f.Add(append(greeting(1), command("READY", "\x0bSocket-Type\x00\x00\x00\x03PUB\x01x\xff\xff\xff\xff")...))
	f.Fuzz(func(t *testing.T, stream []byte) {
		c, err := zmtp.NewConn(t.Context(), &pieces{Conn: silentConn{}, stream: stream}, zmtp.SUB, nil)
		if err != nil {
			return
		}
		defer c.Close()
		if c.PeerType() != zmtp.PUB && c.PeerType() != zmtp.XPUB {
			t.Errorf("a SUB accepted a %q", c.PeerType())
		}
	})
}
