// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp_test

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"

	"github.com/kvtap/kvtap/internal/zmtp"
)

// What a scripted peer says, spelled out by hand from the specification and not by the code under test.

func greeting(minor byte) []byte {
	g := make([]byte, 64)
	copy(g, "\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03")
	g[11] = minor
	copy(g[12:], "NULL")
	return g
}

func frame(flags byte, body []byte) []byte {
	if len(body) <= 255 {
		return append([]byte{flags, byte(len(body))}, body...)
	}
	return append(binary.BigEndian.AppendUint64([]byte{flags | 2}, uint64(len(body))), body...)
}

func command(name, data string) []byte {
	return frame(4, []byte(string(rune(len(name)))+name+data))
}

func property(name, value string) string {
	return string(rune(len(name))) + name + string(binary.BigEndian.AppendUint32(nil, uint32(len(value)))) + value
}

func ready(socketType string) []byte {
	return command("READY", property("Socket-Type", socketType)+property("Identity", ""))
}

func hello(minor byte, socketType string) []byte {
	return append(greeting(minor), ready(socketType)...)
}

func message(frames ...[]byte) []byte {
	var b []byte
	for i, f := range frames {
		flags := byte(1)
		if i == len(frames)-1 {
			flags = 0
		}
		b = append(b, frame(flags, f)...)
	}
	return b
}

func repeat(b []byte, n int) []byte { return bytes.Repeat(b, max(n, 1)) }

// silentConn is the net.Conn of a peer that takes everything and says nothing more.
type silentConn struct{}

func (silentConn) Read([]byte) (int, error)         { return 0, io.EOF }
func (silentConn) Write(p []byte) (int, error)      { return len(p), nil }
func (silentConn) Close() error                     { return nil }
func (silentConn) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (silentConn) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (silentConn) SetDeadline(time.Time) error      { return nil }
func (silentConn) SetReadDeadline(time.Time) error  { return nil }
func (silentConn) SetWriteDeadline(time.Time) error { return nil }

// scripted is the far end of a connection, played by the test.
type scripted struct {
	net.Conn
	t *testing.T
}

// meet joins a socket of ours to a scripted peer that says peerHello, over a connection without buffers.
func meet(t *testing.T, local zmtp.SocketType, o *zmtp.Options, peerHello []byte) (*zmtp.Conn, scripted) {
	t.Helper()
	ours, theirs := net.Pipe()
	peer := scripted{theirs, t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		peer.Write(peerHello)
	}()
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		peer.hear(64)
		peer.hear(1)
		peer.hear(int(peer.hear(1)[0]))
	}()
	c, err := zmtp.NewConn(t.Context(), ours, local, o)
	if err != nil {
		t.Fatal(err)
	}
	<-done
	<-heard
	return c, peer
}

// say writes, and reports whether we listened to the end.
func (p scripted) say(parts ...[]byte) bool {
	for _, b := range parts {
		if _, err := p.Write(b); err != nil {
			return false
		}
	}
	return true
}

// hear reads exactly n bytes.
func (p scripted) hear(n int) []byte {
	b := make([]byte, n)
	if _, err := io.ReadFull(p, b); err != nil {
		p.t.Errorf("the peer heard %q, then %v", b, err)
	}
	return b
}

// expect reads exactly what is expected.
func (p scripted) expect(want []byte) {
	p.t.Helper()
	if got := p.hear(len(want)); !bytes.Equal(got, want) {
		p.t.Errorf("the peer heard %q, want %q", got, want)
	}
}

// drain reads until the connection ends and returns everything.
func (p scripted) drain() []byte {
	b, _ := io.ReadAll(p)
	return b
}

// copies returns frames in memory of their own.
func copies(frames [][]byte) []string {
	s := []string{}
	for _, f := range frames {
		s = append(s, string(f))
	}
	return s
}
