// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package enginesim_test

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/kvtap/kvtap/enginesim"
	"github.com/kvtap/kvtap/internal/memnet"
	"github.com/kvtap/kvtap/internal/zmtp"
)

// freePorts are endpoints on the loopback interface of the real network.
func freePorts(config enginesim.Config) enginesim.Config {
	config.PubEndpoint, config.ReplayEndpoint = "tcp://127.0.0.1:0", "tcp://127.0.0.1:0"
	return config
}

// inMemory moves an engine to a network of its own.
func inMemory(config enginesim.Config) (enginesim.Config, *memnet.Network) {
	m := new(memnet.Network)
	config = freePorts(config)
	config.Listen, config.Dial = m.Listen, m.Dial
	return config, m
}

func newEngine(t testing.TB, config enginesim.Config) *enginesim.Engine {
	t.Helper()
	e, err := enginesim.New(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

func startEngine(t testing.TB, config enginesim.Config) *enginesim.Engine {
	t.Helper()
	e := newEngine(t, config)
	if err := e.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return e
}

// dial connects a client socket to an engine; m may be nil, for the real network.
func dial(t testing.TB, m *memnet.Network, endpoint string, kind zmtp.SocketType) *zmtp.Conn {
	t.Helper()
	o := &zmtp.Options{}
	if m != nil {
		o.Dial = m.Dial
	}
	c, err := zmtp.Dial(t.Context(), endpoint, kind, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// subscribe connects to an engine's publisher and waits until the engine knows of it.
func subscribe(t testing.TB, e *enginesim.Engine, m *memnet.Network, topic string) *zmtp.Conn {
	t.Helper()
	pub, _ := e.Endpoints()
	c := dial(t, m, pub, zmtp.SUB)
	if err := c.Subscribe([]byte(topic)); err != nil {
		t.Fatal(err)
	}
	if err := e.WaitSubscribers(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	return c
}

// message is what a subscriber or a replay gets for one batch.
type message struct {
	Topic   string
	Seq     uint64
	Payload string
}

// receive reads one message, of the given number of frames.
func receive(t testing.TB, c *zmtp.Conn, frames int) [][]byte {
	t.Helper()
	list, err := c.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != frames {
		t.Fatalf("a message of %d frames, want %d: %q", len(list), frames, list)
	}
	return list
}

// live reads one published message.
func live(t testing.TB, c *zmtp.Conn) message {
	t.Helper()
	f := receive(t, c, 3)
	return message{string(f[0]), number(t, f[1]), string(f[2])}
}

func number(t testing.TB, frame []byte) uint64 {
	t.Helper()
	if len(frame) != 8 {
		t.Fatalf("a number of %d bytes: %x", len(frame), frame)
	}
	return binary.BigEndian.Uint64(frame)
}

// replay asks an engine for what it has from start on, and reads up to the end marker.
func replay(t testing.TB, c *zmtp.Conn, framing enginesim.Framing, start uint64) []message {
	t.Helper()
	if err := c.Send(nil, binary.BigEndian.AppendUint64(nil, start)); err != nil {
		t.Fatal(err)
	}
	return replies(t, c, framing)
}

func replies(t testing.TB, c *zmtp.Conn, framing enginesim.Framing) []message {
	t.Helper()
	var list []message
	for {
		m, end := reply(t, c, framing)
		if end {
			return list
		}
		list = append(list, m)
	}
}

func reply(t testing.TB, c *zmtp.Conn, framing enginesim.Framing) (m message, end bool) {
	t.Helper()
	n := 4
	if framing == enginesim.FramingNoTopic {
		n = 3
	}
	f := receive(t, c, n)
	if len(f[0]) != 0 {
		t.Fatalf("the first frame is %q", f[0])
	}
	if n == 4 {
		m.Topic = string(f[1])
	}
	m.Seq, m.Payload = number(t, f[n-2]), string(f[n-1])
	if bytes.Equal(f[n-2], bytes.Repeat([]byte{0xff}, 8)) {
		if m.Topic != "" || m.Payload != "" {
			t.Fatalf("an end marker with topic %q and payload %q", m.Topic, m.Payload)
		}
		return m, true
	}
	return m, false
}
