// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache_test

import (
	"bytes"
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tinylib/msgp/msgp"

	"github.com/kvtap/kvtap/event"
	"github.com/kvtap/kvtap/internal/zmtp"
	"github.com/kvtap/kvtap/kvcache"
)

// hostileBatches are payloads of a size that take the most memory when they are decoded.
func hostileBatches(size int) map[string][]byte {
	batch := func(head func(p []byte) []byte, element []byte) []byte {
		p := head(append(msgp.AppendArrayHeader(nil, 2), 0))
		n := (size - len(p) - 5) / len(element)
		p = msgp.AppendArrayHeader(p, uint32(n))
		return append(p, bytes.Repeat(element, n)...)
	}
	removal := func(p []byte) []byte {
		return msgp.AppendString(msgp.AppendArrayHeader(msgp.AppendArrayHeader(p, 1), 2), "BlockRemoved")
	}
	keys := func(p []byte) []byte {
		p = msgp.AppendString(msgp.AppendArrayHeader(msgp.AppendArrayHeader(p, 1), 9), "BlockStored")
		p = append(p, 0x91, 1, 0xc0, 0x91, 1, 1, 0xc0, 0xc0, 0xc0) // hashes to lora_name
		return append(p, 0x91)                                     // of one block
	}
	plain := func(p []byte) []byte { return p }
	return map[string][]byte{
		"hashes of one byte":                     batch(removal, []byte{1}),
		"keys of one byte":                       batch(keys, []byte{1}),
		"short events":                           batch(plain, []byte("\x91\xb0AllBlocksCleared")),
		"nothing that is an event, for too long": batch(plain, []byte{0xc0}),
		"events that nobody knows":               batch(plain, []byte("\x91\xb8some_event_of_this_length")),
	}
}

// peak is a handler that remembers the most memory that was alive while it ran.
type peak struct {
	events
	most    atomic.Uint64
	batches atomic.Int64
}

func alive() uint64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func (p *peak) HandleBatch(*event.Batch, kvcache.BatchInfo) error {
	p.batches.Add(1)
	p.most.Store(max(p.most.Load(), alive()))
	return nil
}

// Not parallel: it looks at the whole process's memory.
func TestAHostileEngineCannotMakeAClientExceedItsMemory(t *testing.T) {
	const maxMemory = 32 << 20
	for name, payload := range hostileBatches(maxMemory / 32) {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, n *network) {
				o := &zmtp.Options{ListenFunc: n.Listen, HeartbeatInterval: -1}
				l, err := zmtp.Listen(t.Context(), pubEndpoint, o)
				if err != nil {
					t.Fatal(err)
				}
				pub := zmtp.NewPublisher(o, 1000)
				defer pub.Close()
				go func() { _ = pub.Serve(t.Context(), l) }()
				var open atomic.Bool
				n.router(func(r *zmtp.Router, id string, frames [][]byte) {
					if open.Load() { // until then the client holds what comes
						r.Send(id, nil, number(0), payload)
						r.Send(id, nil, endOfReplay, nil)
					}
				})
				config := n.config()
				config.MaxMemory = maxMemory
				var p peak
				before := alive()
				c := n.client(config, &p)
				synctest.Wait()
				for seq := range uint64(20) { // far more than there is room to hold
					pub.Send(nil, number(seq), payload)
					synctest.Wait()
				}
				held := alive()
				open.Store(true)
				time.Sleep(20 * time.Second)
				for seq := range uint64(3) {
					pub.Send(nil, number(20+seq), payload)
					synctest.Wait()
				}
				time.Sleep(time.Minute) // the endpoint does not know of these, so it is taken for another engine's
				most := max(p.most.Load(), held) - before
				t.Logf("%d bytes of payload, at most %.1f MiB alive, %d batches", len(payload), float64(most)/(1<<20),
					p.batches.Load())
				if most > maxMemory {
					t.Errorf("%d bytes alive, %d allowed", most, maxMemory)
				}
				if s := c.Stats(); s.Batches == 0 || s.HeldBytes != 0 {
					t.Errorf("stats %+v", s)
				}
			})
		})
	}
}
