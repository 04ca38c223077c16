// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp

import (
	"encoding/binary"
	"fmt"
	"time"
)

// heartbeat decides when to PING and when a peer is silent. It does no I/O and reads no clock: times are nanoseconds
// from one origin, 0 is none.
type heartbeat struct {
	interval, timeout int64 // interval 0: never PING

	muted    bool // nothing can be written any more
	nextPing int64
	awaiting int64 // when the oldest PING was written that no byte has followed yet
	asked    int64 // when its writing began: an answer may be read before we know that it is written
	due      int64 // when the keeper meant to wake, no earlier than the end of its last write
	resumed  int64 // when this process was last found to have stood still
}

// lateness is how late the keeper must wake for us to believe that this process stood still (a stopped container, a
// suspended machine). A peer's answers may then lie unread, so that every count begins again.
const lateness = int64(time.Second)

// woke is the first to be called when the keeper wakes: a write that a peer makes slow must not pass for lateness, or a
// silent one could have its time begin anew for ever.
func (h *heartbeat) woke(now int64) {
	if h.due != 0 && now-h.due > lateness {
		h.resumed = now
	}
}

// step looks at the reader (last: when bytes last arrived; since: since when a Recv waits for bytes, 0 if none does;
// ttl: what the peer's PING allowed us) and says whether to PING now, whether the peer is silent, and when to look
// again.
func (h *heartbeat) step(now, last, since, ttl int64) (ping, silent bool, next int64) {
	next = now + int64(time.Hour)
	if h.awaiting != 0 && last >= h.asked {
		h.awaiting = 0
		if h.muted {
			h.awaiting, h.asked = now, now
		}
	}
	// The peer's time runs only while we read: what it sent during a slow handler waits in the kernel. A Recv that begins
	// after this step is met by the next one, which comes early enough.
	expired := func(from, allowed int64) bool {
		if since == 0 {
			next = min(next, now+allowed)
			return false
		}
		end := max(from, since, h.resumed) + allowed
		next = min(next, max(end, now+1))
		return now >= end
	}
	if h.awaiting != 0 && expired(h.awaiting, h.timeout) {
		silent = true
	}
	if ttl != 0 && expired(last, ttl) {
		silent = true
	}
	if h.interval != 0 {
		if now >= h.nextPing {
			ping = true
			h.nextPing = now + h.interval
		}
		next = min(next, h.nextPing)
	}
	h.due = next
	return ping, silent, next
}

// pinged notes that a PING has been written, between two times, and returns when to look again. The peer's time runs
// from the second, since a write can wait for long.
func (h *heartbeat) pinged(began, now int64) int64 {
	if h.awaiting == 0 {
		h.awaiting, h.asked = now, began
	}
	h.due = max(min(h.due, now+h.timeout), now)
	return h.due
}

// mute notes that nothing can be written any more. No PING will ask again, so that from now on every silence of the
// length that one may take to be answered is the peer's end.
func (h *heartbeat) mute(now int64) {
	h.muted, h.interval = true, 0
	if h.awaiting == 0 {
		h.awaiting, h.asked = now, now
	}
}

// pongQueue holds the contexts of PINGs to be answered. A peer that sends faster than it reads loses the oldest
// answers.
type pongQueue struct {
	n    int
	ring [8]pong
}

type pong struct {
	size    uint8
	context [16]byte
}

func (q *pongQueue) push(context []byte) {
	if q.n == len(q.ring) {
		copy(q.ring[:], q.ring[1:])
		q.n--
	}
	p := &q.ring[q.n]
	p.size = uint8(copy(p.context[:], context))
	q.n++
}

// ping takes a PING: a TTL in tenths of a second and up to 16 bytes that the PONG repeats. The keeper answers, so that
// a peer that does not read never stops our reading.
func (c *Conn) ping(data []byte) error {
	if len(data) < 2 || len(data) > 18 {
		return malformed(fmt.Sprintf("a PING with %d bytes", len(data)), "2 to 18")
	}
	c.ttl.Store(int64(binary.BigEndian.Uint16(data)) * int64(100*time.Millisecond))
	c.pongMu.Lock()
	c.pongs.push(data[2:])
	c.pongMu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
	return nil
}

// timeToLive is the TTL that our PINGs carry, in tenths of a second: the peer may drop us if it hears nothing for that
// long. It leaves room for three PINGs, and is none where it could not outlast one interval, since the peer would drop
// us between two. Publishers and routers set none, since their PINGs queue behind messages that a slow peer has yet to
// read, and such a peer is to lose messages, not its connection.
func (c *Conn) timeToLive() uint16 {
	const tenth, most = 100 * time.Millisecond, 0xffff
	interval, timeout := c.o.HeartbeatInterval, c.o.HeartbeatTimeout
	if c.local == PUB || c.local == ROUTER || interval < 0 || interval+timeout > most*tenth {
		return 0
	}
	ttl := max(3*interval, interval+timeout)
	return uint16(min((ttl+tenth-1)/tenth, most))
}

// keep is the keeper: it runs from the end of the handshake to the end of the connection.
func (c *Conn) keep() {
	defer close(c.kept)
	h := heartbeat{timeout: int64(c.o.HeartbeatTimeout)}
	if c.peerMinor >= 1 && c.o.HeartbeatInterval > 0 {
		h.interval = int64(c.o.HeartbeatInterval)
		h.nextPing = c.now() + h.interval
	}
	ping := binary.BigEndian.AppendUint16(nil, c.timeToLive())
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-c.done:
			return
		case <-c.wake:
		case <-timer.C:
		}
		h.woke(c.now())
		if c.answerPings() != nil {
			h.mute(c.now())
		}
		due, silent, next := h.step(c.now(), c.lastReceived.Load(), c.readSince.Load(), c.ttl.Load())
		if silent {
			c.fail(ErrSilent)
			return
		}
		if due {
			began := c.now()
			if c.sendCommand("PING", ping) != nil {
				h.mute(c.now())
			}
			next = h.pinged(began, c.now())
		}
		timer.Reset(time.Duration(next - c.now()))
	}
}

// answerPings writes the PONGs that are owed.
func (c *Conn) answerPings() error {
	c.pongMu.Lock()
	owed := c.pongs
	c.pongs.n = 0
	c.pongMu.Unlock()
	for i := range owed.n {
		p := &owed.ring[i]
		if err := c.sendCommand("PONG", p.context[:p.size]); err != nil {
			return err
		}
	}
	return nil
}

func (c *Conn) sendCommand(name string, data []byte) error {
	if err := c.lock(); err != nil {
		return err
	}
	defer c.unlock()
	c.out = c.appendCommand(c.out[:0], name, data)
	return c.flush()
}
