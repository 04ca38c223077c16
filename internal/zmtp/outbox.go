// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp

import (
	"sync"
)

// outbox is the bounded queue of messages to one peer, and the goroutine that writes them (run).
type outbox struct {
	conn *Conn
	hwm  int // messages, negative: no bound
	wake chan struct{}

	mu    sync.Mutex
	queue [][][]byte // from head on; frames are shared between peers and never changed
	head  int
}

func newOutbox(c *Conn, hwm int) *outbox {
	return &outbox{conn: c, hwm: hwm, wake: make(chan struct{}, 1)}
}

// push queues a message. It returns false, without waiting, if the queue is full.
func (o *outbox) push(message [][]byte) bool {
	o.mu.Lock()
	n := len(o.queue) - o.head
	if o.hwm >= 0 && n >= o.hwm {
		o.mu.Unlock()
		return false
	}
	if len(o.queue) == cap(o.queue) && o.head > len(o.queue)/2 {
		clear(o.queue[copy(o.queue, o.queue[o.head:]):])
		o.queue, o.head = o.queue[:n], 0
	}
	o.queue = append(o.queue, message)
	o.mu.Unlock()
	select {
	case o.wake <- struct{}{}:
	default:
	}
	return true
}

func (o *outbox) pop() [][]byte {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.head == len(o.queue) {
		return nil
	}
	message := o.queue[o.head]
	o.queue[o.head] = nil
	o.head++
	if o.head == len(o.queue) {
		o.queue, o.head = o.queue[:0], 0
		if cap(o.queue) > 4096 {
			o.queue = nil
		}
	}
	return message
}

// writeBatch is about how many bytes go into one write, and so how much may leave the queue ahead of the socket.
const writeBatch = 64 << 10

// run writes what is queued until the connection ends.
func (o *outbox) run() {
	for {
		select {
		case <-o.wake:
		case <-o.conn.done:
			return
		}
		for {
			n, err := o.write()
			if err != nil {
				return
			}
			if n == 0 {
				break
			}
		}
	}
}

// write writes some messages and returns how many.
func (o *outbox) write() (n int, err error) {
	c := o.conn
	if err := c.lock(); err != nil {
		return 0, err
	}
	defer c.unlock()
	c.out = c.out[:0]
	for len(c.out) < writeBatch {
		message := o.pop()
		if message == nil {
			break
		}
		c.out = c.appendMessage(c.out, message)
		n++
	}
	if n == 0 {
		return 0, nil
	}
	return n, c.flush()
}

// cloneMessage copies a message into memory of its own.
func cloneMessage(frames [][]byte) [][]byte {
	size := 0
	for _, f := range frames {
		size += len(f)
	}
	memory := make([]byte, 0, size)
	clone := make([][]byte, len(frames))
	for i, f := range frames {
		at := len(memory)
		memory = append(memory, f...)
		clone[i] = memory[at:len(memory):len(memory)]
	}
	return clone
}
