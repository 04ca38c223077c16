// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"
)

// mechanism is the seam for security: it runs the part of the handshake between the greeting and the first message.
type mechanism interface {
	// name is what the greeting carries, at most 20 bytes; server is its as-server flag.
	name() string
	server() bool
	// handshake exchanges commands with the peer, sends it our metadata and returns the peer's, valid until the next
	// read. The framing is nil if frames travel as they are.
	handshake(c *Conn, metadata []byte) (peer []byte, f framing, err error)
}

// framing carries frames through a mechanism after its handshake. seal is called under the write lock, open by the
// reader.
type framing interface {
	// seal appends the wire form of one frame to dst. flags are the frame's own (flagMore, flagCommand).
	seal(dst []byte, flags byte, body []byte) []byte
	// open undoes seal on the body of a frame from the wire. The result may share body's memory, but starts no earlier.
	open(flags byte, body []byte) (byte, []byte, error)
}

// null is ZMTP's NULL mechanism: READY both ways, then bare frames.
type null struct{}

func (null) name() string { return "NULL" }
func (null) server() bool { return false }

func (null) handshake(c *Conn, metadata []byte) ([]byte, framing, error) {
	var body []byte
	ready := appendCommand(nil, "READY", metadata)
	err := c.exchange(ready, func() (err error) {
		body, err = c.readHandshakeCommand("READY")
		return err
	})
	return body, nil, err
}

// The greeting of ZMTP 3.x: signature 0-9, version 10-11, mechanism 12-31, as-server 32, filler to 64.
const (
	greetingSize  = 64
	signatureSize = 10
)

func greeting(m mechanism) []byte {
	g := make([]byte, greetingSize)
	g[0], g[8], g[9], g[10], g[11] = 0xff, 1, 0x7f, 3, 1
	copy(g[12:32], m.name())
	if m.server() {
		g[32] = 1
	}
	return g
}

// newConn runs the handshake over nc. opts are complete, and ctx ends at the handshake's deadline. nc is closed on
// error.
func newConn(ctx context.Context, nc net.Conn, t SocketType, opts *Options) (*Conn, error) {
	c := &Conn{
		nc: nc, o: *opts, local: t, limit: uint64(opts.MaxMessage), born: time.Now(),
		// A connection gets its full buffer only after the handshake: strangers cost half a kilobyte.
		buf:  make([]byte, min(512, opts.ReadBuffer)),
		done: make(chan struct{}), kept: make(chan struct{}), wake: make(chan struct{}, 1), writing: make(chan struct{}, 1),
	}
	if accepts[t] == nil {
		nc.Close()
		return nil, fmt.Errorf("%w: this package has no %s socket", ErrSocketType, t)
	}
	if len(opts.Identity) > 255 {
		nc.Close()
		return nil, fmt.Errorf("%w: identity of %d bytes, at most 255", ErrTooLarge, len(opts.Identity))
	}
	if t == PUB {
		// Subscriptions are all that a PUB is ever sent.
		c.subs = new(subscriptions)
		c.limit = min(c.limit, maxCommand)
	}
	if t == PUB || t == ROUTER {
		c.o.SkipTooLarge = false // no subscription and no request is that long
	}
	if deadline, ok := ctx.Deadline(); ok {
		nc.SetDeadline(deadline)
	}
	stop := context.AfterFunc(ctx, func() { c.fail(context.Cause(ctx)) })
	err := c.handshake()
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		c.fail(err)
		if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) {
			return nil, fmt.Errorf("zmtp: no handshake in time (%s): %w", c.stage, os.ErrDeadlineExceeded)
		}
		if !strings.HasPrefix(err.Error(), "zmtp: ") {
			err = fmt.Errorf("zmtp: handshake (%s): %w", c.stage, err)
		}
		return nil, err
	}
	nc.SetDeadline(time.Time{})
	rest := c.buf[c.pos:c.end]
	c.buf = make([]byte, max(opts.ReadBuffer, len(rest)))
	c.pos, c.end = 0, copy(c.buf, rest)
	go c.keep()
	return c, nil
}

func (c *Conn) handshake() error {
	m := c.o.security()
	c.stage = "awaiting the peer's greeting"
	var g [greetingSize]byte
	err := c.exchange(greeting(m), func() error { return c.readGreeting(&g) })
	if err != nil {
		return err
	}
	if name := string(bytes.TrimRight(g[12:32], "\x00")); name != m.name() {
		return &ProtocolError{Kind: ErrMechanism, Got: fmt.Sprintf("%.20q", name), Want: m.name()}
	}
	c.peerMinor = int(g[11])
	if g[10] > 3 {
		c.peerMinor = 1 // a later major version talks to us in ours
	}

	c.stage = "greeted, awaiting READY"
	metadata := appendProperty(nil, "Socket-Type", []byte(c.local))
	if c.local == DEALER || c.local == ROUTER {
		metadata = appendProperty(metadata, "Identity", c.o.Identity)
	}
	body, f, err := m.handshake(c, metadata)
	if err != nil {
		return err
	}
	c.framing = f
	if err := c.readMetadata(body); err != nil {
		return err
	}
	return c.unwritten
}

// exchange writes out while read runs, so that two sides that both write first never wait for each other, not even over
// a connection without buffers. It returns read's error. A failed write is kept in unwritten: what a peer said before
// it closed says more than that it closed.
func (c *Conn) exchange(out []byte, read func() error) error {
	wrote := make(chan error, 1)
	go func() {
		_, err := c.nc.Write(out)
		wrote <- err
	}()
	err := read()
	if err != nil {
		c.fail(err) // which ends the write
	}
	if werr := <-wrote; c.unwritten == nil {
		c.unwritten = werr
	}
	return err
}

// readGreeting reads the peer's greeting and judges each part as soon as it is there: a peer of another protocol may
// never send 64 bytes.
func (c *Conn) readGreeting(g *[greetingSize]byte) error {
	for n := 0; n < greetingSize; {
		if c.pos == c.end {
			if err := c.fill(greetingSize); err != nil {
				if errors.Is(err, io.EOF) {
					return fmt.Errorf("peer closed after %d bytes of a greeting: %w", n, io.ErrUnexpectedEOF)
				}
				return err
			}
		}
		k := copy(g[n:], c.buf[c.pos:c.end])
		c.pos += k
		n += k
		if err := judgeGreeting(g[:n], c.buf[c.pos:c.end]); err != nil {
			return err
		}
	}
	return nil
}

// judgeGreeting looks at what has come of a greeting; rest is what followed it in the same read.
func judgeGreeting(g, rest []byte) error {
	if g[0] != 0xff || len(g) >= signatureSize && g[9] != 0x7f {
		seen := append(bytes.Clone(g), rest...)
		// ZMTP 1.0 begins with a frame, the identity: its length plus one, flags 0.
		if 1 <= seen[0] && seen[0] <= 0x1f {
			if len(seen) == 1 {
				return nil // the next byte tells
			}
			if seen[1] == 0 {
				return tooOld("a ZMTP 1.0 greeting")
			}
		}
		e := &ProtocolError{Kind: ErrNotZMTP, Got: fmt.Sprintf("%.48q", seen), Want: "a ZMTP greeting"}
		switch {
		case bytes.HasPrefix(seen, []byte("HTTP/")):
			e.Hint = "an HTTP server answers on this port"
		case bytes.Contains(seen, []byte(" HTTP/1.")) || bytes.HasPrefix(seen, []byte("GET ")) ||
			bytes.HasPrefix(seen, []byte("PRI * ")):
			e.Hint = "an HTTP client connected"
		case len(seen) >= 2 && (seen[0] == 0x15 || seen[0] == 0x16) && seen[1] == 3:
			e.Hint = "the other side speaks TLS"
		}
		return e
	}
	if len(g) > signatureSize && g[10] < 3 {
		return tooOld(fmt.Sprintf("a greeting of ZMTP %d", g[10]+1))
	}
	return nil
}

func tooOld(got string) error {
	return &ProtocolError{Kind: ErrVersion, Got: got, Want: "ZMTP 3.0 or later", Hint: "libzmq 4.0 or later speaks it"}
}

// readHandshakeCommand reads the command of the given name and returns its body, valid until the next read.
func (c *Conn) readHandshakeCommand(want string) ([]byte, error) {
	for {
		flags, h, n, ok := parseHeader(c.buf[c.pos:c.end])
		if ok {
			if flags&^flagLong != flagCommand {
				return nil, malformed(fmt.Sprintf("a frame with flags %#02x", flags), "the command "+want)
			}
			if n > maxHandshakeCommand {
				return nil, fmt.Errorf("%w: a command of %d bytes in the handshake, at most %d", ErrTooLarge, n,
					maxHandshakeCommand)
			}
			if size := h + int(n); c.end-c.pos >= size {
				body := c.buf[c.pos+h : c.pos+size]
				c.pos += size
				name, body, err := splitCommand(body)
				switch {
				case err != nil:
					return nil, err
				case string(name) == want:
					return body, nil
				case string(name) == "ERROR":
					return nil, refusal(body)
				}
				return nil, malformed(fmt.Sprintf("the command %.32q", name), want)
			}
		}
		if err := c.fill(h + int(min(n, maxHandshakeCommand))); err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return nil, fmt.Errorf("peer closed instead of sending %s; it does so if its mechanism or "+
					"socket type does not fit ours (%s): %w", want, c.local, io.ErrUnexpectedEOF)
			}
			return nil, err
		}
	}
}

func refusal(body []byte) error {
	reason := "no reason"
	if len(body) > 1 && int(body[0]) == len(body)-1 {
		reason = string(body[1:])
	}
	return &ProtocolError{Kind: ErrRefused, Got: fmt.Sprintf("ERROR %.255q", reason)}
}

// appendProperty appends one property of READY's metadata: a name with a length of one byte, a value with four.
func appendProperty(dst []byte, name string, value []byte) []byte {
	dst = append(dst, byte(len(name)))
	dst = append(dst, name...)
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(value)))
	return append(dst, value...)
}

// readMetadata takes the peer's socket type and identity from the metadata of its READY.
func (c *Conn) readMetadata(body []byte) error {
	for len(body) > 0 {
		n := 1 + int(body[0])
		if n == 1 || len(body) < n+4 {
			return malformed("a broken property", "name and value in READY")
		}
		name := string(body[1:n])
		size := uint64(binary.BigEndian.Uint32(body[n:]))
		body = body[n+4:]
		if uint64(len(body)) < size {
			return malformed(fmt.Sprintf("%d bytes of a value of %d", len(body), size), "a whole property in READY")
		}
		value := body[:size]
		body = body[size:]
		switch strings.ToLower(name) { // names are case-insensitive
		case "socket-type":
			c.peerType = SocketType(value)
		case "identity":
			if len(value) > 255 {
				return fmt.Errorf("%w: identity of %d bytes, at most 255", ErrTooLarge, len(value))
			}
			c.peerIdentity = bytes.Clone(value)
		}
	}
	if c.peerType == "" {
		return malformed("no Socket-Type", "one in READY")
	}
	if !c.local.accepts(c.peerType) {
		want := make([]string, 0, 3)
		for _, t := range accepts[c.local] {
			want = append(want, string(t))
		}
		return &ProtocolError{
			Kind: ErrSocketType,
			Got:  fmt.Sprintf("a %.16s socket", c.peerType),
			Want: strings.Join(want, " or ") + " for our " + string(c.local),
			Hint: "is this the port of another socket, as when the publishing and the replay port are swapped?",
		}
	}
	return nil
}
