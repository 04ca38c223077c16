// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Conn is one connection whose handshake is done. Recv belongs to one goroutine; everything else may be called from
// any.
//
// A failed read ends the connection, and so does a write that was not done in time. Any other failed write ends only
// the writing, for good: most often the peer has closed, and what it sent before that is still to be read.
type Conn struct {
	nc    net.Conn
	o     Options
	local SocketType
	limit uint64 // bytes of one message
	born  time.Time

	// Of the handshake only: how far it came, for errors, and the first failed write.
	stage     string
	unwritten error

	peerType     SocketType
	peerMinor    int
	peerIdentity []byte

	framing framing        // nil: bare frames
	subs    *subscriptions // PUB only

	// The reader's own. buf[pos:end] has arrived and is not yet parsed; frames are the parts of the message being read,
	// slices of buf[:pos] in rising order. What lies before them, and between them, is free.
	buf      []byte
	pos, end int
	start    int // where the message being read began, 0 once it has moved to the front
	frames   [][]byte
	calm     int // messages in a row that did not need a grown buffer
	omitted  uint64
	digest   maphash.Hash // of what was omitted, if anything was

	// What the keeper sees of the reader, in nanoseconds since born; readSince is 0 unless a Recv waits for bytes.
	lastReceived atomic.Int64
	readSince    atomic.Int64
	ttl          atomic.Int64 // the peer's own, from its last PING; 0: none

	pongMu sync.Mutex
	pongs  pongQueue
	wake   chan struct{} // tells the keeper of pongs and of a TTL

	writing chan struct{} // the write lock; a channel, so that waiting for it ends with the connection
	// Under the write lock: what is being written, and why nothing can be written any more.
	out        []byte
	unwritable error

	once  sync.Once
	cause error // why the connection ended; set before done is closed
	done  chan struct{}
	kept  chan struct{} // closed when the keeper has ended
}

// NewConn runs the handshake over a connection that was accepted or made in memory, as a socket of type t. ctx and
// HandshakeTimeout bound it; ctx has no hold on the connection afterwards. nc belongs to the Conn, and is closed on
// error.
func NewConn(ctx context.Context, nc net.Conn, t SocketType, o *Options) (*Conn, error) {
	opts := o.withDefaults()
	ctx, cancel := context.WithTimeout(ctx, opts.HandshakeTimeout)
	defer cancel()
	return newConn(ctx, nc, t, &opts)
}

// now is the time since the connection was born, in nanoseconds and never 0.
func (c *Conn) now() int64 { return int64(time.Since(c.born)) + 1 }

// fail ends the connection; the first cause counts.
func (c *Conn) fail(cause error) {
	c.once.Do(func() {
		c.cause = cause
		close(c.done)
		c.nc.Close()
	})
}

// failed returns why the connection ended, having ended it with err if it had not.
func (c *Conn) failed(err error) error {
	c.fail(err)
	<-c.done
	return c.cause
}

// Recv returns the frames of the next message. They are slices of the connection's own buffer, valid until the next
// Recv; each may be changed in place, and an append to one does not reach into the next. Commands are handled on the
// way: PING is answered, subscriptions of a PUB's peer are noted (the Recv of a PUB returns nothing but its error, in
// the end).
//
// With SkipTooLarge a frame may be empty because it did not fit: see Omitted.
//
// An error is final. It matches io.EOF if the peer closed between messages, io.ErrUnexpectedEOF if within one,
// ErrClosed, ErrSilent, ErrTooLarge, or is a *ProtocolError, or the network's own.
func (c *Conn) Recv() ([][]byte, error) {
	select {
	case <-c.done:
		return nil, c.cause
	default:
	}
	if len(c.buf) > c.o.ReadBuffer {
		c.shrink()
	}
	c.frames, c.start, c.omitted = c.frames[:0], c.pos, 0
	var size uint64 // of the frames so far
	for {
		flags, h, n, ok := parseHeader(c.buf[c.pos:c.end])
		if !ok {
			if err := c.fill(h); err != nil {
				return nil, c.lost(err)
			}
			continue
		}
		if err := c.checkHeader(flags, n, size, c.framing != nil); err != nil {
			if !errors.Is(err, errSkip) {
				return nil, c.failed(err)
			}
			c.pos += h
			if err := c.skip(n); err != nil {
				return nil, c.lost(err)
			}
			if flags&flagMore != 0 {
				continue
			}
			return c.frames, nil
		}
		whole := h + int(n)
		if c.end-c.pos < whole {
			if err := c.fill(whole); err != nil {
				return nil, c.lost(err)
			}
			continue
		}
		body := c.buf[c.pos+h : c.pos+whole : c.pos+whole]
		c.pos += whole
		if c.framing != nil {
			var err error
			if flags, body, err = c.framing.open(flags, body); err == nil {
				err = c.checkHeader(flags, uint64(len(body)), size, false)
			}
			if err != nil {
				return nil, c.failed(err)
			}
		}
		if flags&flagCommand != 0 {
			if err := c.command(body); err != nil {
				return nil, c.failed(err)
			}
			continue
		}
		c.frames = append(c.frames, body)
		size += uint64(len(body))
		if flags&flagMore != 0 {
			continue
		}
		if c.subs != nil {
			if err := c.oldSubscription(); err != nil {
				return nil, c.failed(err)
			}
			c.frames, size = c.frames[:0], 0
			continue
		}
		return c.frames, nil
	}
}

// sealing is the most that a framing may add to a frame, in bytes.
const sealing = 64

// envelope is what the frames before the last may take beside it, in bytes, where large frames are skipped: whether a
// payload fits is to depend on it alone, and not on what a topic or an empty frame before it takes.
const envelope = 4096

// errSkip is checkHeader's word for a frame that is too large, but does not cost the connection.
var errSkip = errors.New("skip")

// checkHeader refuses a frame before its body is read. size counts the message's frames so far. A sealed frame travels
// as a command, may be as long as a message, and is checked again when it is open. It is never skipped, since its seal
// is over the whole of it.
func (c *Conn) checkHeader(flags byte, n, size uint64, sealed bool) error {
	if flags&^flagLong&^flagMore == 0 {
		if len(c.frames) >= c.o.MaxFrames {
			return fmt.Errorf("%w: a message of more than %d frames", ErrTooLarge, c.o.MaxFrames)
		}
		skips := c.o.SkipTooLarge && c.framing == nil
		if skips && n > min(c.limit, c.limit+envelope-size) {
			return errSkip
		}
		if !skips && n > c.limit-size {
			return fmt.Errorf("%w: a message of at least %d bytes, at most %d", ErrTooLarge, satAdd(size, n), c.limit)
		}
		return nil
	}
	if flags&^flagLong != flagCommand {
		return malformed(fmt.Sprintf("a frame with flags %#02x", flags), "flags 0 to 4 or 6")
	}
	limit := uint64(maxCommand)
	if sealed {
		limit = max(limit, c.limit-size) + sealing
	}
	if n > limit {
		return fmt.Errorf("%w: a command of %d bytes, at most %d", ErrTooLarge, n, limit)
	}
	return nil
}

func satAdd(a, b uint64) uint64 {
	if a+b < a {
		return ^uint64(0)
	}
	return a + b
}

// digestSeed makes the digests of one process comparable, and no peer can make two bodies that share one.
var digestSeed = maphash.MakeSeed()

// skip drops the n bytes from pos on as they arrive and leaves an empty frame in their place. What is dropped is free
// room for the next read, so that no length makes the buffer grow.
func (c *Conn) skip(n uint64) error {
	if c.omitted == 0 {
		c.digest.SetSeed(digestSeed)
	}
	c.omitted = satAdd(c.omitted, n)
	// The length counts too, so that bytes do not pass from one frame to the next. The place does not: a batch has other
	// frames before its payload when it is replayed.
	var length [8]byte
	binary.LittleEndian.PutUint64(length[:], n)
	_, _ = c.digest.Write(length[:])
	c.frames = append(c.frames, c.buf[c.pos:c.pos:c.pos]) // before any read: an end of the stream is now within a message
	for {
		k := int(min(n, uint64(c.end-c.pos)))
		_, _ = c.digest.Write(c.buf[c.pos : c.pos+k])
		n -= uint64(k)
		if n == 0 {
			c.pos += k
			return nil
		}
		c.pos = c.end
		if err := c.fill(0); err != nil {
			return err
		}
	}
}

// Omitted says of the message that Recv returned last how many bytes of it did not fit into MaxMessage and were left
// out (SkipTooLarge), and gives a digest of the frames that they were. 0 bytes: the message is whole, and the digest 0.
// Where bytes and digest are equal, the same was left out, on whatever connection and behind whatever other frames; a
// digest means nothing to another process. After an error of Recv it says nothing. It belongs to the goroutine that
// calls Recv.
func (c *Conn) Omitted() (bytes uint64, digest uint64) {
	if c.omitted == 0 {
		return 0, 0
	}
	return c.omitted, c.digest.Sum64()
}

// fill waits for more bytes, having made room for a frame that takes need bytes from pos on.
func (c *Conn) fill(need int) error {
	if len(c.frames) == 0 && c.pos == c.end {
		c.pos, c.end, c.start = 0, 0, 0
	}
	// A message that began further back moves to the front once, so that reads stay large. Later only a full buffer makes
	// it move again: commands between its frames cannot make each read cost a copy.
	if c.end == len(c.buf) || c.start > 0 && c.end > len(c.buf)/2 {
		c.compact(need)
	}
	now := c.now()
	if away := time.Duration(now - c.lastReceived.Load()); away > AwayAfter && c.o.Away != nil {
		c.o.Away(away)
		now = c.now()
	}
	c.readSince.Store(now)
	var n int
	var err error
	for range 100 { // nothing and no error is allowed, as from TLS, but not for ever
		if n, err = c.nc.Read(c.buf[c.end:]); n > 0 || err != nil {
			break
		}
	}
	if n > 0 {
		c.lastReceived.Store(c.now())
	}
	c.readSince.Store(0)
	c.end += n
	switch {
	case n > 0:
		return nil // an error that came along will come again
	case err == nil:
		return io.ErrNoProgress
	case errors.Is(err, io.EOF) && (len(c.frames) > 0 || c.pos < c.end):
		return io.ErrUnexpectedEOF
	}
	return err
}

// lost returns why a fill did not help, having ended the connection.
func (c *Conn) lost(err error) error {
	switch {
	case errors.Is(err, io.EOF):
		err = fmt.Errorf("zmtp: peer closed: %w", err)
	case errors.Is(err, io.ErrUnexpectedEOF):
		err = fmt.Errorf("zmtp: peer closed within a message: %w", err)
	default:
		err = fmt.Errorf("zmtp: read: %w", err)
	}
	return c.failed(err)
}

// compact moves the message being read to the front of the buffer, without what lies between its frames, and gives it a
// larger buffer if little room would be left: at most twice the old, and never much more than the message needs, so
// that memory follows the bytes that arrived and not the lengths that a peer claims.
func (c *Conn) compact(need int) {
	held := 0
	for _, f := range c.frames {
		held += len(f)
	}
	dst := c.buf
	if free := len(c.buf) - held - (c.end - c.pos); free <= len(c.buf)/8 {
		need += held
		need = max(need, len(c.buf))
		dst = make([]byte, min(2*len(c.buf), need+need/4+minReadBuffer))
	}
	at := 0
	for i, f := range c.frames {
		n := copy(dst[at:], f)
		c.frames[i] = dst[at : at+n : at+n]
		at += n
	}
	c.pos, c.end, c.start = at, at+copy(dst[at:], c.buf[c.pos:c.end]), 0
	c.buf = dst
}

// keptBuffer is the largest grown buffer that stays for the next message.
const keptBuffer = 1 << 20

// shrink gives a grown buffer back: a large one at once, others when 64 messages in a row did without it.
func (c *Conn) shrink() {
	size := 0
	for _, f := range c.frames {
		size += len(f)
	}
	c.calm++
	if size > c.o.ReadBuffer*7/8 {
		c.calm = 0
	}
	rest := c.buf[c.pos:c.end]
	if len(rest) > c.o.ReadBuffer/2 || c.calm < 64 && len(c.buf) <= keptBuffer {
		return
	}
	c.buf = make([]byte, c.o.ReadBuffer)
	c.pos, c.end = 0, copy(c.buf, rest)
	c.calm = 0
}

// command handles one command frame. Names that we do not know are ignored, as the protocol asks.
func (c *Conn) command(body []byte) error {
	name, data, err := splitCommand(body)
	if err != nil {
		return err
	}
	switch string(name) {
	case "PING":
		return c.ping(data)
	case "SUBSCRIBE":
		if c.subs != nil {
			return c.subs.add(data)
		}
	case "CANCEL":
		if c.subs != nil {
			c.subs.remove(data)
		}
	case "ERROR":
		return refusal(data)
	}
	return nil // a PONG has done its work by arriving
}

// oldSubscription takes the form in which ZMTP 3.0 subscribes: a message whose first byte is 1, or 0 to cancel. Other
// messages to a PUB are dropped, as by libzmq.
func (c *Conn) oldSubscription() error {
	if b := c.frames[0]; len(c.frames) == 1 && len(b) > 0 {
		switch b[0] {
		case 1:
			return c.subs.add(b[1:])
		case 0:
			c.subs.remove(b[1:])
		}
	}
	return nil
}

// Send writes one message. It is safe for concurrent use: messages never interleave. The frames are the caller's again
// when it returns. An error is final, for writing.
func (c *Conn) Send(frames ...[]byte) error {
	if c.local == SUB {
		return errors.New("zmtp: a SUB socket does not send messages")
	}
	if len(frames) == 0 {
		return errors.New("zmtp: a message has at least one frame")
	}
	if err := c.lock(); err != nil {
		return err
	}
	defer c.unlock()
	c.out = c.appendMessage(c.out[:0], frames)
	return c.flush()
}

// Subscribe asks a publisher for every message whose first frame starts with prefix; an empty prefix asks for all.
func (c *Conn) Subscribe(prefix []byte) error { return c.subscription("SUBSCRIBE", 1, prefix) }

// Unsubscribe takes Subscribe back.
func (c *Conn) Unsubscribe(prefix []byte) error { return c.subscription("CANCEL", 0, prefix) }

func (c *Conn) subscription(command string, old byte, prefix []byte) error {
	if c.local != SUB {
		return fmt.Errorf("zmtp: a %s socket does not subscribe", c.local)
	}
	if err := c.lock(); err != nil {
		return err
	}
	defer c.unlock()
	if c.peerMinor >= 1 {
		c.out = c.appendCommand(c.out[:0], command, prefix)
	} else {
		c.out = c.appendFrame(c.out[:0], 0, append([]byte{old}, prefix...))
	}
	return c.flush()
}

// lock takes the write lock unless nothing can be written any more.
func (c *Conn) lock() error {
	select {
	case <-c.done:
		return c.cause
	default:
	}
	select {
	case c.writing <- struct{}{}:
		if err := c.unwritable; err != nil {
			c.unlock()
			return err
		}
		return nil
	case <-c.done:
		return c.cause
	}
}

func (c *Conn) unlock() { <-c.writing }

// flush writes out, under the write lock.
func (c *Conn) flush() error {
	if t := c.o.WriteTimeout; t > 0 {
		c.nc.SetWriteDeadline(time.Now().Add(t))
	}
	_, err := c.nc.Write(c.out)
	if cap(c.out) > keptBuffer {
		c.out = nil
	}
	if err == nil {
		return nil
	}
	err = fmt.Errorf("zmtp: write: %w", err)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return c.failed(err)
	}
	select {
	case <-c.done:
		return c.cause
	default:
		c.unwritable = err
		return err
	}
}

func (c *Conn) appendMessage(dst []byte, frames [][]byte) []byte {
	for i, f := range frames {
		flags := byte(flagMore)
		if i == len(frames)-1 {
			flags = 0
		}
		dst = c.appendFrame(dst, flags, f)
	}
	return dst
}

func (c *Conn) appendFrame(dst []byte, flags byte, body []byte) []byte {
	if c.framing != nil {
		return c.framing.seal(dst, flags, body)
	}
	return appendFrame(dst, flags, body)
}

func (c *Conn) appendCommand(dst []byte, name string, data []byte) []byte {
	if c.framing != nil {
		return c.framing.seal(dst, flagCommand, appendCommandBody(nil, name, data))
	}
	return appendCommand(dst, name, data)
}

// PeerType is the socket type that the peer announced.
func (c *Conn) PeerType() SocketType { return c.peerType }

// PeerMinor is the minor version of ZMTP 3 that the peer speaks: 0 or 1. PINGs go only to 1 and later.
func (c *Conn) PeerMinor() int { return c.peerMinor }

// PeerIdentity is the identity that the peer announced, or nil. It must not be changed.
func (c *Conn) PeerIdentity() []byte { return c.peerIdentity }

// LocalAddr is the address of our end.
func (c *Conn) LocalAddr() net.Addr { return c.nc.LocalAddr() }

// RemoteAddr is the address of the peer's end.
func (c *Conn) RemoteAddr() net.Addr { return c.nc.RemoteAddr() }

// LastReceived is when bytes last arrived: at the latest during the handshake.
func (c *Conn) LastReceived() time.Time { return c.born.Add(time.Duration(c.lastReceived.Load() - 1)) }

// Close ends the connection, cuts a Recv or Send that waits, and returns when the keeper has ended. It may be called
// again. Its error is always nil.
func (c *Conn) Close() error {
	c.fail(ErrClosed)
	<-c.kept
	return nil
}
