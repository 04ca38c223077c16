// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp_test

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kvtap/kvtap/internal/zmtp"
)

// naiveParse reads messages from a stream in the plainest way: everything is there and nothing is reused. It stops at
// the first thing that is not allowed.
func naiveParse(b []byte, maxMessage, maxFrames int) (messages [][]string, whole bool) {
	message := []string{}
	size := 0
	for len(b) > 0 {
		flags := b[0]
		header := 2
		if flags&2 != 0 {
			header = 9
		}
		if len(b) < header {
			return messages, false
		}
		n := uint64(b[1])
		if header == 9 {
			n = binary.BigEndian.Uint64(b[1:9])
		}
		isCommand := flags == 4 || flags == 6
		if flags > 3 && !isCommand || isCommand && n > 1<<16 || !isCommand &&
			(n > uint64(maxMessage-size) || len(message) == maxFrames) {
			return messages, false
		}
		b = b[header:]
		if n > uint64(len(b)) {
			return messages, false
		}
		body := string(b[:n])
		b = b[n:]
		if isCommand {
			if n == 0 || body[0] == 0 || len(body) < 1+int(body[0]) {
				return messages, false
			}
			name, data := body[1:1+body[0]], body[1+body[0]:]
			if name == "ERROR" || name == "PING" && (len(data) < 2 || len(data) > 18) {
				return messages, false
			}
			continue
		}
		message = append(message, body)
		size += len(body)
		if flags&1 == 0 {
			messages = append(messages, message)
			message, size = []string{}, 0
		}
	}
	return messages, len(message) == 0
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
// makes of it with a naive parser.
func FuzzRecv(f *testing.F) {
	add := func(parts ...[]byte) { f.Add(join(parts...), []byte{0, 3, 255}, uint8(0)) }
	add(message([]byte("topic"), []byte("12345678"), make([]byte, 700)))
	add(command("PING", "\x00\x01ctx"), frame(1, []byte("a")), command("PONG", ""), frame(0, nil))
	add(frame(2, make([]byte, 300)), repeat(frame(1, nil), 70))
	add(binary.BigEndian.AppendUint64([]byte{2}, 1<<62))
	add(command("ERROR", "\x01x"))
	add([]byte{7, 0, 4, 0, 5, 1, 1})
	f.Add(repeat(message(make([]byte, 60)), 20), []byte{}, uint8(200))
	f.Fuzz(func(t *testing.T, stream, sizes []byte, buffer uint8) {
		const maxMessage, maxFrames = 1000, 8
		want, whole := naiveParse(stream, maxMessage, maxFrames)
		nc := &pieces{Conn: silentConn{}, stream: join(hello(1, "PUB"), stream), sizes: sizes}
		o := &zmtp.Options{MaxMessage: maxMessage, MaxFrames: maxFrames, ReadBuffer: 1 + int(buffer)}
		c, err := zmtp.NewConn(t.Context(), nc, zmtp.SUB, o)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		var got [][]string
		for {
			frames, err := c.Recv()
			if err != nil {
				if clean := errors.Is(err, io.EOF); clean != whole {
					t.Errorf("ended with %v; a clean end: %v", err, whole)
				}
				break
			}
			got = append(got, copies(frames))
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("messages (-naive +Recv)\n%s", diff)
		}
	})
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
