// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache_test

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/kvtap/kvtap/event"
	"github.com/kvtap/kvtap/internal/zmtp"
	"github.com/kvtap/kvtap/kvcache"
)

// benchPayload is a store of 16 blocks of 16 tokens, 657 bytes in all.
func benchPayload(tb testing.TB) []byte {
	tb.Helper()
	r := rand.New(rand.NewPCG(1, 2))
	e := event.Event{
		Type: event.BlockStored, Stride: 1, BlockSize: event.Some(int64(16)), Medium: []byte("GPU"),
		Hashes: make([]event.Hash, 16), Tokens: make([]uint32, 256),
	}
	for i := range e.Hashes {
		e.Hashes[i] = event.Hash(r.Uint64())
	}
	for i := range e.Tokens {
		e.Tokens[i] = r.Uint32N(321) // ids of 1 to 3 bytes, which add up to that size
	}
	b := event.Batch{Time: event.Some(1757500000.25), Rank: event.Some(int64(0)), Events: []event.Event{e}}
	payload, err := b.Append(nil, event.VLLM014)
	if err != nil {
		tb.Fatal(err)
	}
	return payload
}

// counter is a batch handler that counts, and says when it has counted enough.
type counter struct {
	events
	left atomic.Int64
	done chan struct{}
}

func (c *counter) HandleBatch(b *event.Batch, _ kvcache.BatchInfo) error {
	if len(b.Events) == 1 && c.left.Add(-1) == 0 {
		close(c.done)
	}
	return nil
}

// BenchmarkSocketToBatch measures the way from the socket to the handler: frames, sequence, decoding. The sender
// writes pre-encoded messages over loopback TCP, so that the receiver is what is measured.
func BenchmarkSocketToBatch(b *testing.B) {
	b.Run("metrics off", func(b *testing.B) { benchmarkSocketToBatch(b, nil) })
	b.Run("metrics on", func(b *testing.B) { benchmarkSocketToBatch(b, prometheus.NewRegistry()) })
}

func benchmarkSocketToBatch(b *testing.B, reg prometheus.Registerer) {
	payload := benchPayload(b)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	start := make(chan struct{})
	var sender sync.WaitGroup
	sender.Go(func() { sendEncoded(l, payload, b.N, start) })
	defer sender.Wait()
	defer func() { _ = l.Close() }()

	h := &counter{done: make(chan struct{})}
	h.left.Store(int64(b.N))
	client := kvcache.NewZMQClient(&kvcache.ZMQClientConfig{
		PodKey: "pod", PubEndpoint: "tcp://" + l.Addr().String(), NoReplay: true, Registerer: reg,
	}, h)
	if err := client.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() { _ = client.Stop() }()
	for !client.IsConnected() {
		time.Sleep(time.Millisecond) // before the measurement begins
	}
	b.ReportAllocs()
	b.SetBytes(int64(len(payload)))
	b.ResetTimer()
	close(start)
	<-h.done
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msg/s")
}

// sendEncoded is a PUB socket that writes n messages, numbered from 0, in large pieces.
func sendEncoded(l net.Listener, payload []byte, n int, start <-chan struct{}) {
	nc, err := l.Accept()
	if err != nil {
		return
	}
	defer func() { _ = nc.Close() }()
	conn, err := zmtp.NewConn(context.Background(), nc, zmtp.PUB, nil)
	if err != nil {
		return
	}
	defer func() { _ = conn.Close() }()
	var reader sync.WaitGroup
	reader.Go(func() { _, _ = conn.Recv() }) // the subscription; returns when the client has gone
	defer reader.Wait()
	<-start

	const messages = 256
	var chunk []byte
	var numbers []int // where the sequence numbers are
	for range messages {
		chunk = append(chunk, 1, 0, 1, 8) // an empty topic, and 8 bytes more
		numbers = append(numbers, len(chunk))
		chunk = append(chunk, make([]byte, 8)...)
		chunk = append(chunk, 2)
		chunk = binary.BigEndian.AppendUint64(chunk, uint64(len(payload)))
		chunk = append(chunk, payload...)
	}
	size := len(chunk) / messages
	for seq := 0; seq < n; seq += messages {
		for i, at := range numbers {
			binary.BigEndian.PutUint64(chunk[at:], uint64(seq+i))
		}
		if _, err := nc.Write(chunk[:size*min(messages, n-seq)]); err != nil {
			return
		}
	}
}

// latency is a batch handler that notes how long ago its batches were sent.
type latency struct {
	events
	took []time.Duration
	want int
	done chan struct{}
}

func (l *latency) HandleBatch(b *event.Batch, _ kvcache.BatchInfo) error {
	l.took = append(l.took, time.Since(time.UnixMicro(int64(b.Time.V*1e6))))
	if len(l.took) == l.want {
		close(l.done)
	}
	return nil
}

// BenchmarkPublishToHandler measures how long a batch takes from Publisher.Send to the handler at 1000 batches a
// second.
func BenchmarkPublishToHandler(b *testing.B) {
	p := zmtp.NewPublisher(nil, 0)
	l, err := zmtp.Listen(b.Context(), "tcp://127.0.0.1:0", nil)
	if err != nil {
		b.Fatal(err)
	}
	go func() { _ = p.Serve(b.Context(), l) }()
	defer p.Close()
	h := &latency{want: b.N, done: make(chan struct{})}
	client := kvcache.NewZMQClient(&kvcache.ZMQClientConfig{
		PodKey: "pod", PubEndpoint: "tcp://" + l.Addr().String(), NoReplay: true,
	}, h)
	if err := client.Start(); err != nil {
		b.Fatal(err)
	}
	defer func() { _ = client.Stop() }()
	if err := p.WaitSubscribers(b.Context(), 1); err != nil {
		b.Fatal(err)
	}
	batch := event.Batch{Events: []event.Event{{
		Type: event.BlockStored, Map: true, Hashes: []event.Hash{1}, Tokens: make([]uint32, 256), Stride: 1,
		BlockSize: event.Some(int64(256)),
	}}}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	b.ResetTimer()
	var payload []byte
	for seq := range uint64(b.N) {
		<-tick.C
		batch.Time = event.Some(float64(time.Now().UnixMicro()) / 1e6)
		if payload, err = batch.Append(payload[:0], event.VLLM032); err != nil {
			b.Fatal(err)
		}
		p.Send(nil, binary.BigEndian.AppendUint64(nil, seq), payload)
	}
	<-h.done
	b.StopTimer()
	slices.Sort(h.took)
	for _, q := range []struct {
		unit string
		at   int
	}{{"p50-us", b.N / 2}, {"p99-us", b.N * 99 / 100}} {
		b.ReportMetric(float64(h.took[q.at].Nanoseconds())/1e3, q.unit)
	}
}
