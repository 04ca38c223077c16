// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp

import (
	"bytes"
	"errors"
	"net"
	"testing"
	"testing/synctest"
)

// rot is a mechanism with a framing, in the manner of CURVE: each frame travels as a command whose body is the frame's
// flags and body, changed. It shows that the seam carries everything a mechanism needs.
type rot struct{ key byte }

func (rot) name() string { return "ROT" }
func (rot) server() bool { return true }

func (m rot) handshake(c *Conn, metadata []byte) ([]byte, framing, error) {
	var body []byte
	err := c.exchange(appendCommand(nil, "INITIATE", m.turn(bytes.Clone(metadata))), func() (err error) {
		body, err = c.readHandshakeCommand("INITIATE")
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	return m.turn(body), m, nil
}

func (m rot) turn(b []byte) []byte {
	for i := range b {
		b[i] ^= m.key
	}
	return b
}

func (m rot) seal(dst []byte, flags byte, body []byte) []byte {
	inner := m.turn(append([]byte{flags}, body...))
	return appendCommand(dst, "MESSAGE", inner)
}

func (m rot) open(flags byte, body []byte) (byte, []byte, error) {
	if flags&flagCommand == 0 {
		return 0, nil, malformed("a bare frame", "MESSAGE")
	}
	_, inner, err := splitCommand(body)
	if err != nil || len(inner) == 0 {
		return 0, nil, malformed("a broken MESSAGE", "a sealed frame")
	}
	m.turn(inner)
	return inner[0], inner[1:], nil
}

func TestAMechanismCarriesFramesThrough(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		o := &Options{MaxMessage: 200_000, ReadBuffer: 64, security: func() mechanism { return rot{key: 0x55} }}
		ours, theirs := net.Pipe()
		type met struct {
			c   *Conn
			err error
		}
		peers := make(chan met, 1)
		go func() {
			c, err := NewConn(t.Context(), theirs, ROUTER, o)
			peers <- met{c, err}
		}()
		dealer, err := NewConn(t.Context(), ours, DEALER, o)
		if err != nil {
			t.Fatal(err)
		}
		peer := <-peers
		if peer.err != nil {
			t.Fatal(peer.err)
		}
		large := bytes.Repeat([]byte("x"), 100_000) // more than a command may have without a framing
		go func() {
			if err := errors.Join(
				dealer.sendCommand("PING", []byte{0, 0}), dealer.Send(nil, []byte("a"), large),
				dealer.Send(large, large, []byte("b")),
			); err != nil {
				t.Error(err)
			}
		}()
		go dealer.Recv() // takes the PONG
		frames, err := peer.c.Recv()
		if err != nil || len(frames) != 3 || string(frames[1]) != "a" || !bytes.Equal(frames[2], large) {
			t.Fatalf("%d frames, %v", len(frames), err)
		}
		// The limit is on what a message holds, sealed or not.
		if frames, err := peer.c.Recv(); !errors.Is(err, ErrTooLarge) {
			t.Errorf("%d frames, %v", len(frames), err)
		}
		peer.c.Close()
		dealer.Close()
	})
}

// A sealed frame is one whole; what is too large of it cannot be left out.
func TestASealedFrameIsNotSkipped(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		o := &Options{MaxMessage: 1000, SkipTooLarge: true, security: func() mechanism { return rot{key: 0x55} }}
		for _, size := range []int{1001, 500_000} { // within what a command may have, and not
			ours, theirs := net.Pipe()
			peers := make(chan *Conn, 1)
			go func() {
				peer, err := NewConn(t.Context(), theirs, DEALER, o)
				if err != nil {
					t.Error(err)
				}
				peers <- peer
			}()
			dealer, err := NewConn(t.Context(), ours, DEALER, o)
			if err != nil {
				t.Fatal(err)
			}
			peer := <-peers
			go peer.Recv()
			go peer.Send(make([]byte, size))
			if frames, err := dealer.Recv(); !errors.Is(err, ErrTooLarge) {
				t.Errorf("%d frames, %v", len(frames), err)
			}
			dealer.Close()
			peer.Close()
		}
	})
}

func TestAFramingsErrorEndsTheConnection(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		m := rot{key: 1}
		go func() {
			theirs.Write(greeting(m))
			theirs.Write(appendCommand(nil, "INITIATE", m.turn(appendProperty(nil, "Socket-Type", []byte("PUB")))))
			theirs.Write(appendFrame(nil, 0, []byte("bare")))
		}()
		go func() {
			for b := make([]byte, 512); ; {
				if _, err := theirs.Read(b); err != nil {
					return
				}
			}
		}()
		c, err := NewConn(t.Context(), ours, SUB, &Options{security: func() mechanism { return m }})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Recv(); !errors.Is(err, ErrMalformed) {
			t.Errorf("Recv: %v", err)
		}
		c.Close()
	})
}
