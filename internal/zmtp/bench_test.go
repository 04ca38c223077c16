// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp_test

import (
	"cmp"
	"io"
	"net"
	"testing"

	"github.com/kvtap/kvtap/internal/zmtp"
)

// A batch of this size is typical: 16 hashes and 256 tokens.
const benchPayload = 657

func engineMessage(payload int) []byte {
	return message([]byte("kv@10.0.0.1:8000@model"), []byte("\x00\x00\x00\x00\x00\x00\x00\x01"), make([]byte, payload))
}

// endless is a connection whose peer said hello and then repeats one chunk for ever, or ends, or stays silent.
type endless struct {
	net.Conn
	hello []byte
	chunk []byte
	at    int
	ends  bool
	last  error // how it ends, nil for io.EOF
}

func (e *endless) Read(p []byte) (int, error) {
	if len(e.hello) > 0 {
		n := copy(p, e.hello)
		e.hello = e.hello[n:]
		return n, nil
	}
	if e.ends {
		return 0, cmp.Or(e.last, io.EOF)
	}
	n := copy(p, e.chunk[e.at:])
	e.at += n
	if e.at == len(e.chunk) {
		e.at = 0
	}
	return n, nil
}

// BenchmarkRecv reads from a sender that writes pre-encoded chunks over loopback TCP.
func BenchmarkRecv(b *testing.B) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		nc, err := l.Accept()
		if err != nil {
			return
		}
		defer nc.Close()
		go io.Copy(io.Discard, nc)
		if _, err := nc.Write(hello(1, "PUB")); err != nil {
			return
		}
		chunk := repeat(engineMessage(benchPayload), 1500)
		for {
			if _, err := nc.Write(chunk); err != nil {
				return
			}
		}
	}()
	c, err := zmtp.Dial(b.Context(), "tcp://"+l.Addr().String(), zmtp.SUB, nil)
	if err != nil {
		b.Fatal(err)
	}
	benchmarkRecv(b, c)
	c.Close()
	<-sent
}

// BenchmarkRecvParse is the cost of Recv without a network.
func BenchmarkRecvParse(b *testing.B) {
	for name, payload := range map[string]int{"657B": benchPayload, "10KiB": 10 << 10, "100KiB": 100 << 10} {
		b.Run(name, func(b *testing.B) {
			nc := &endless{Conn: silentConn{}, hello: hello(1, "PUB"), chunk: repeat(engineMessage(payload), 1<<20/payload)}
			c, err := zmtp.NewConn(b.Context(), nc, zmtp.SUB, nil)
			if err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			benchmarkRecv(b, c)
		})
	}
}

func benchmarkRecv(b *testing.B, c *zmtp.Conn) {
	var bytes int64
	b.ReportAllocs()
	for b.Loop() {
		frames, err := c.Recv()
		if err != nil {
			b.Fatal(err)
		}
		for _, f := range frames {
			bytes += int64(len(f))
		}
	}
	b.SetBytes(bytes / int64(b.N))
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msg/s")
}

// BenchmarkPublisher sends over loopback TCP from a Publisher to a SUB that counts.
func BenchmarkPublisher(b *testing.B) {
	l, err := zmtp.Listen(b.Context(), "tcp://127.0.0.1:*", nil)
	if err != nil {
		b.Fatal(err)
	}
	p := zmtp.NewPublisher(nil, 100_000)
	defer p.Close()
	go p.Serve(b.Context(), l)
	c, err := zmtp.Dial(b.Context(), "tcp://"+l.Addr().String(), zmtp.SUB, nil)
	if err != nil {
		b.Fatal(err)
	}
	if err := c.Subscribe(nil); err != nil {
		b.Fatal(err)
	}
	if err := p.WaitSubscribers(b.Context(), 1); err != nil {
		b.Fatal(err)
	}
	received := make(chan int)
	go func() {
		n := 0
		for {
			if _, err := c.Recv(); err != nil {
				received <- n
				return
			}
			n++
		}
	}()
	topic, seq, payload := []byte("kv@10.0.0.1:8000@model"), make([]byte, 8), make([]byte, benchPayload)
	b.ReportAllocs()
	for b.Loop() {
		p.Send(topic, seq, payload)
	}
	seconds := b.Elapsed().Seconds()
	p.Close()
	b.ReportMetric(float64(<-received)/seconds, "msg/s")
	b.ReportMetric(float64(p.Dropped())/float64(b.N), "dropped/op")
	c.Close()
}
