// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache_test

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvtap/kvtap/internal/interop"
	"github.com/kvtap/kvtap/internal/zmtp"
	"github.com/kvtap/kvtap/kvcache"
)

// These tests break a publisher made of libzmq's own sockets in the ways in which engines and networks break. After
// every fault the handler must have seen each batch of the engine's present life once and in order, and the bound must
// be exact. What the batches hold was published by real engines.

// streamOf returns the path of a recorded stream.
func streamOf(name string) string { return filepath.Join("..", "testdata", "streams", name+".txt.gz") }

// manyBatches returns a stream of n batches, and their payloads: the recorded streams one after the other, as often as
// it takes.
func manyBatches(t testing.TB, n int) (path string, payloads []string) {
	t.Helper()
	streams, err := filepath.Glob(streamOf("*"))
	if err != nil || len(streams) == 0 {
		t.Fatalf("no recorded streams: %v", err)
	}
	for i := 0; len(payloads) < n; i++ {
		payloads = append(payloads, recorded(t, streams[i%len(streams)])...)
	}
	payloads = payloads[:n]
	path = filepath.Join(t.TempDir(), "many.txt.gz")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	zw, err := gzip.NewWriterLevel(f, gzip.NoCompression)
	for i, payload := range payloads {
		_, writeErr := fmt.Fprintf(zw, "%d %s\n", i, payload)
		err = errors.Join(err, writeErr)
	}
	if err := errors.Join(err, zw.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
	return path, payloads
}

// following is a client that runs, and what its handler saw.
type following struct {
	*collector
	client *kvcache.ZMQClient
}

// follow starts a client of the publisher that change may change, and stops it at the end of the test. before, if it is
// not nil, is called first with each batch.
func follow(
	t testing.TB, publisher *interop.Peer, before func(kvcache.BatchInfo), change func(*kvcache.ZMQClientConfig),
) *following {
	t.Helper()
	config := kvcache.ZMQClientConfig{
		PodKey:         t.Name(),
		PubEndpoint:    publisher.Endpoint("pub"),
		ReplayEndpoint: publisher.Endpoint("replay"),
		ReconnectDelay: 20 * time.Millisecond,
		// One of its own: a handler that a test blocks would keep the replays of other tests waiting.
		ReplayLimiter: kvcache.NewReplayLimiter(1),
	}
	if change != nil {
		change(&config)
	}
	c := newCollector()
	c.before = before
	f := &following{c, kvcache.NewZMQClient(&config, c)}
	if err := f.client.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.client.Stop(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// reaches waits until the client is live, has been reset for the given reasons and has seen as many batches as want
// has. Then these must be those of want, each once and in order, and the bound exact.
func (f *following) reaches(t testing.TB, what string, want []string, resets ...kvcache.Reason) {
	t.Helper()
	f.wait(t, what, func() bool {
		return len(f.resets) >= len(resets) && len(f.order) >= len(want) && f.client.State().State == kvcache.StateLive
	})
	f.mu.Lock()
	defer f.mu.Unlock()
	if diff := cmp.Diff(resets, f.resets); diff != "" {
		t.Fatalf("%s: resets (-want +got):\n%s", what, diff)
	}
	if len(f.order) != len(want) {
		t.Fatalf("%s: %d batches came, want %d", what, len(f.order), len(want))
	}
	for i, seq := range f.order {
		if seq != uint64(i) || f.payloads[seq] != want[i] {
			t.Fatalf("%s: batch %d came at place %d, or with other bytes", what, seq, i)
		}
	}
	if s := f.client.State(); s.Bound != kvcache.BoundExact || s.Reason != "" {
		t.Fatalf("%s: status %+v, want an exact bound", what, s)
	}
	if len(want) == 0 {
		for place := range f.fold.All() {
			t.Fatalf("%s: %v is held, and nothing was published", what, place)
		}
	}
}

// recovering waits until the client says that it is.
func (f *following) recovering(t testing.TB, what string) kvcache.Status {
	t.Helper()
	var s kvcache.Status
	f.wait(t, what, func() bool {
		s = f.client.State()
		return s.State == kvcache.StateRecovering
	})
	return s
}

// gate blocks a handler when a batch is reached.
type gate struct {
	at      uint64
	reached chan struct{} // closed when the handler stands there
	open    chan struct{} // closed to let it go on
}

func newGate(at int) *gate {
	return &gate{at: uint64(at), reached: make(chan struct{}), open: make(chan struct{})}
}

func (g *gate) pass(info kvcache.BatchInfo) {
	if info.Sequence == g.at {
		close(g.reached)
		<-g.open
	}
}

// trickle publishes a batch every millisecond until done says so of their number, at most limit, and returns how many.
func trickle(publisher *interop.Peer, limit int, done func(published int) bool) (published int) {
	ticker := time.NewTicker(time.Millisecond)
	defer ticker.Stop()
	for !done(published) && published < limit {
		publisher.Say("publish 1")
		publisher.Expect("published")
		published++
		<-ticker.C
	}
	return published
}

// narrow leaves the kernel little room between an endpoint and the client, so that what the client does not read stays
// with libzmq. The other half of it is the publisher's SNDBUF.
func narrow(config *kvcache.ZMQClientConfig, endpoint string, bytes int) {
	config.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		if err != nil || "tcp://"+address != endpoint {
			return conn, err
		}
		return conn, conn.(*net.TCPConn).SetReadBuffer(bytes)
	}
}

// A restarted process counts from 0 again, and may have come to any number before the client is back.
func TestClientFollowsAPublisherOfLibzmqThatIsKilledAndRestarted(t *testing.T) {
	t.Parallel()
	streams := []string{"stream-main", "real-v0.32.0-hybrid"} // of every other life
	for _, test := range []struct {
		name  string
		lives []int // how many batches each has published when the client comes
	}{
		{"the new process has published less than the old one", []int{200, 50}},
		{"it has overtaken the old one", []int{100, 230}},
		{"it has published as much", []int{150, 150}},
		{"it has published nothing", []int{200, 0}},
		{"the first one had published nothing", []int{0, 100}},
		{"it restarts twice", []int{100, 200, 50}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			const more = 20
			var publisher *interop.Peer
			var f *following
			var resets []kvcache.Reason
			for life, published := range test.lives {
				stream := streamOf(streams[life%len(streams)])
				want := recorded(t, stream)
				args := []string{"publish", "--stream", stream, "--before", strconv.Itoa(published)}
				if life == 0 {
					publisher = interop.Start(t, args...)
					f = follow(t, publisher, nil, nil)
					resets = append(resets, kvcache.ReasonStart)
				} else {
					publisher = publisher.Restart(args[1:]...)
					resets = append(resets, kvcache.ReasonRestart)
				}
				what := "life " + strconv.Itoa(life)
				f.reaches(t, what, want[:published], resets...)
				publisher.Say("publish", strconv.Itoa(more))
				f.reaches(t, what+", live", want[:published+more], resets...)
			}
		})
	}
}

// A publisher that connects out finds the client again by itself.
func TestClientThatListensFollowsAPublisherOfLibzmqThatIsKilledAndRestarted(t *testing.T) {
	t.Parallel()
	first, second := recorded(t, streamOf("stream-main")), recorded(t, streamOf("real-v0.32.0-hybrid"))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	publisher := interop.Start(t, "publish", "--connect-out", "--pub", "tcp://"+l.Addr().String(),
		"--stream", streamOf("stream-main"), "--before", "100")
	f := follow(t, publisher, nil, func(config *kvcache.ZMQClientConfig) {
		config.Listen = true
		config.ListenFunc = func(context.Context, string, string) (net.Listener, error) { return l, nil }
	})
	f.reaches(t, "the first life", first[:100], kvcache.ReasonStart)
	publisher.Say("publish 20")
	f.reaches(t, "the first life, live", first[:120], kvcache.ReasonStart)
	publisher = publisher.Restart("--stream", streamOf("real-v0.32.0-hybrid"), "--before", "200")
	f.reaches(t, "the second life", second[:200], kvcache.ReasonStart, kvcache.ReasonRestart)
	publisher.Say("publish 20")
	f.reaches(t, "the second life, live", second[:220], kvcache.ReasonStart, kvcache.ReasonRestart)
}

// A stopped process says nothing and breaks nothing: only heartbeats find it. What it had queued for the connection is
// lost with it.
func TestClientFollowsAPublisherOfLibzmqThatWasStopped(t *testing.T) {
	t.Parallel()
	stream, want := manyBatches(t, 6000)
	for _, test := range []struct {
		name              string
		interval, timeout time.Duration
		long              bool
	}{
		{"with short heartbeats", 100 * time.Millisecond, 300 * time.Millisecond, false},
		{"with the default heartbeats", 0, 0, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			if test.long && testing.Short() {
				t.Skip("it takes 9 seconds")
			}
			publisher := interop.Start(t, "publish", "--stream", stream, "--before", "100", "--opt", "SNDBUF=16384")
			g := newGate(150)
			f := follow(t, publisher, g.pass, func(config *kvcache.ZMQClientConfig) {
				config.PingInterval, config.PingTimeout = test.interval, test.timeout
				narrow(config, config.PubEndpoint, 16<<10)
			})
			f.reaches(t, "what was published before", want[:100], kvcache.ReasonStart)
			publisher.Say("publish 5000")
			publisher.Expect("published")
			<-g.reached
			publisher.Pause()
			publisher.Say("publish 500")
			stopped := time.Now()
			close(g.open)
			s := f.recovering(t, "the silence to be noticed")
			t.Logf("noticed %v after the process was stopped and the handler free", time.Since(stopped))
			f.wait(t, "the reason", func() bool { s = f.client.State(); return s.Err != "" })
			if !strings.Contains(s.Err, zmtp.ErrSilent.Error()) {
				t.Errorf("status %+v, want %q", s, zmtp.ErrSilent)
			}
			publisher.Continue()
			f.reaches(t, "what was published while it was stopped", want[:5600], kvcache.ReasonStart)
			publisher.Say("publish all")
			f.reaches(t, "the rest", want, kvcache.ReasonStart)
		})
	}
}

// A ROUTER drops what a replay has in excess of its high-water mark, 1000 unless told otherwise, anywhere in the answer
// and at its end.
func TestClientGetsAWholeBufferFromLibzmq(t *testing.T) {
	t.Parallel()
	const kept = 10_000
	stream, want := manyBatches(t, kept+4000)
	start := func(t *testing.T, before func(kvcache.BatchInfo), args ...string) (*interop.Peer, *following) {
		publisher := interop.Start(t, append([]string{
			"publish", "--stream", stream, "--before", strconv.Itoa(kept), "--buffer", strconv.Itoa(len(want)),
		}, args...)...)
		return publisher, follow(t, publisher, before, func(config *kvcache.ZMQClientConfig) {
			config.ReplayTimeout = time.Second // for what comes without an end
			if len(args) > 0 {
				narrow(config, config.ReplayEndpoint, 64<<10)
			}
		})
	}
	report := func(t *testing.T, f *following) {
		s := f.client.Stats()
		t.Logf("%d replays, of which %d failed; %d batches, of which %d replayed",
			s.Replays, s.ReplayFailures, s.Batches, s.Replayed)
	}
	for round := range 2 {
		t.Run(fmt.Sprintf("of an idle publisher, round %d", round), func(t *testing.T) {
			publisher, f := start(t, nil)
			f.reaches(t, "the buffer", want[:kept], kvcache.ReasonStart)
			report(t, f)
			publisher.Say("publish 10")
			f.reaches(t, "live batches", want[:kept+10], kvcache.ReasonStart)
		})
	}
	for round := range 2 {
		t.Run(fmt.Sprintf("while it publishes, round %d", round), func(t *testing.T) {
			// The handler stands at the first batch until the publisher has sent the whole answer, of which most is dropped,
			// and live batches behind it.
			g := newGate(0)
			publisher, f := start(t, g.pass, "--replay-opt", "SNDBUF=65536")
			<-g.reached
			publisher.Say("publish 1000")
			publisher.Expect("published")
			published := kept + 1000
			close(g.open)
			published += trickle(publisher, len(want)-published, func(int) bool {
				return f.client.State().State == kvcache.StateLive
			})
			f.reaches(t, "all that was published", want[:published], kvcache.ReasonStart)
			report(t, f)
			t.Logf("%d batches were published meanwhile", published-kept)
		})
	}
}

// With a small high-water mark every replay loses its end, and the marker with it.
func TestClientPutsCutRepliesOfLibzmqTogether(t *testing.T) {
	t.Parallel()
	const published = 300
	want := recorded(t, streamOf("real-v0.32.0-hybrid"))
	for _, framing := range []string{"old", "new"} {
		t.Run(framing, func(t *testing.T) {
			t.Parallel()
			publisher := interop.Start(t, "publish", "--stream", streamOf("real-v0.32.0-hybrid"), "--framing", framing,
				"--before", strconv.Itoa(published), "--replay-opt", "SNDHWM=40", "--replay-opt", "SNDBUF=8192")
			f := follow(t, publisher, nil, func(config *kvcache.ZMQClientConfig) {
				config.ReplayTimeout = 500 * time.Millisecond
				narrow(config, config.ReplayEndpoint, 8<<10)
			})
			f.reaches(t, "what was published before", want[:published], kvcache.ReasonStart)
			s := f.client.Stats()
			t.Logf("%d replays", s.Replays)
			if s.Replays < 4 {
				t.Errorf("%d replays: too little was cut for this test", s.Replays)
			}
			publisher.Say("publish 20")
			f.reaches(t, "live batches", want[:published+20], kvcache.ReasonStart)
		})
	}
}

// While a handler blocks, the PUB drops what its high-water mark does not hold.
func TestClientGetsWhatThePubOfLibzmqDropped(t *testing.T) {
	t.Parallel()
	const published = 5000
	stream, want := manyBatches(t, published+2000)
	for _, test := range []struct {
		name   string
		tail   bool          // nothing is published behind it
		verify time.Duration // VerifyInterval
		pause  time.Duration // the least that the handler takes
	}{
		{"and the next batch shows it", false, time.Hour, 0},
		{"and the silence behind it shows it", true, 200 * time.Millisecond, 0},
		{"and the pause makes the client look", true, time.Hour, 2 * zmtp.AwayAfter},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			publisher := interop.Start(t, "publish", "--stream", stream, "--before", "10", "--opt", "SNDHWM=50",
				"--opt", "SNDBUF=16384")
			g := newGate(20)
			f := follow(t, publisher, g.pass, func(config *kvcache.ZMQClientConfig) {
				config.ReplayTimeout = time.Second
				config.VerifyInterval = test.verify
				narrow(config, config.PubEndpoint, 16<<10)
			})
			f.reaches(t, "what was published before", want[:10], kvcache.ReasonStart)
			// One replay fetches what was published before, one verifies its end, and a second later one looks again: what
			// follows is not found by these.
			for range 3 {
				publisher.Expect("replayed")
			}
			publisher.Say("publish", strconv.Itoa(published-10))
			publisher.Expect("published")
			<-g.reached
			<-time.After(test.pause)
			close(g.open)
			total := published
			if !test.tail {
				// These are dropped too until the client has read what the publisher kept.
				total += trickle(publisher, len(want)-published, func(more int) bool {
					f.mu.Lock()
					defer f.mu.Unlock()
					return len(f.order) == published+more
				})
			}
			f.reaches(t, "what was dropped", want[:total], kvcache.ReasonStart)
			s := f.client.Stats()
			if s.Replayed < published/2 {
				t.Errorf("%d batches came by replay: too few were dropped for this test", s.Replayed)
			}
			t.Logf("%d replays; %d batches, of which %d replayed", s.Replays, s.Batches, s.Replayed)
		})
	}
}

// A network that parts the client from the engine loses what is published meanwhile; the engine keeps it.
func TestClientFollowsAPublisherOfLibzmqThroughAPartition(t *testing.T) {
	t.Parallel()
	const name = "real-v0.32.0-hybrid"
	want := recorded(t, streamOf(name))
	held := truth(t, strings.TrimSuffix(streamOf(name), ".txt.gz")+".truth.json")
	for _, test := range []struct {
		name string
		part func(*interop.Proxy)
	}{
		{"that refuses connections", (*interop.Proxy).Cut},
		{"that swallows everything", (*interop.Proxy).Silence},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			publisher := interop.Start(t, "publish", "--stream", streamOf(name), "--before", "100")
			pub := interop.StartProxy(t, publisher.Endpoint("pub"))
			replay := interop.StartProxy(t, publisher.Endpoint("replay"))
			f := follow(t, publisher, nil, func(config *kvcache.ZMQClientConfig) {
				config.PubEndpoint, config.ReplayEndpoint = pub.Endpoint(), replay.Endpoint()
				config.PingInterval, config.PingTimeout = 100*time.Millisecond, 300*time.Millisecond
			})
			published := 100
			f.reaches(t, "what was published before", want[:published], kvcache.ReasonStart)
			for range 2 {
				test.part(pub)
				test.part(replay)
				publisher.Say("publish 100")
				publisher.Expect("published")
				published += 100
				parted := f.recovering(t, "the partition to be noticed")
				publisher.Say("publish 50")
				publisher.Expect("published")
				published += 50
				f.wait(t, "the reason", func() bool { return f.client.State().Err != "" })
				s := f.client.State()
				if s.State != kvcache.StateRecovering || !s.ObservedAt.Equal(parted.ObservedAt) {
					t.Errorf("in the partition: %+v, before %+v", s, parted)
				}
				pub.Open()
				replay.Open()
				f.reaches(t, "what was published meanwhile", want[:published], kvcache.ReasonStart)
				if s := f.client.State(); !s.ObservedAt.After(parted.ObservedAt) || s.Err != "" {
					t.Errorf("after the partition: %+v, in it %+v", s, parted)
				}
			}
			publisher.Say("publish all")
			f.reaches(t, "the rest", want, kvcache.ReasonStart)
			f.check(t, want, held)
		})
	}
}

// The replay endpoint alone can be gone. What only it has is lost then; when it is back, all is fetched anew.
func TestClientFetchesEverythingAnewWhenTheReplaysOfLibzmqAreBack(t *testing.T) {
	t.Parallel()
	want := recorded(t, streamOf("stream-main"))
	publisher := interop.Start(t, "publish", "--stream", streamOf("stream-main"), "--before", "100")
	replay := interop.StartProxy(t, publisher.Endpoint("replay"))
	f := follow(t, publisher, nil, func(config *kvcache.ZMQClientConfig) { config.ReplayEndpoint = replay.Endpoint() })
	f.reaches(t, "what was published before", want[:100], kvcache.ReasonStart)
	replay.Cut()
	publisher.Say("lose 10")
	publisher.Say("publish 10")
	f.wait(t, "the replays to be given up", func() bool { return len(f.resets) == 2 })
	publisher.Say("publish 10")
	publisher.Expect("published")
	replay.Open()
	resets := []kvcache.Reason{kvcache.ReasonStart, kvcache.ReasonHistoryLost, kvcache.ReasonResync}
	f.reaches(t, "everything", want[:130], resets...)
	publisher.Say("publish 20")
	f.reaches(t, "live batches", want[:150], resets...)
}

// BenchmarkRecovery measures how long a client with the default configuration takes until it is live and complete
// again: from the batch that shows a gap, from the moment at which a restarted publisher can be reached, from the end
// of a partition of ten seconds. Run it with -benchtime=12x or so; a partition takes as long as it says.
func BenchmarkRecovery(b *testing.B) {
	const before = 200
	stream, want := manyBatches(b, 12_000)
	byDefault := func(config *kvcache.ZMQClientConfig) { config.ReconnectDelay = 0 }
	start := func(b *testing.B, change func(*interop.Peer, *kvcache.ZMQClientConfig)) (*interop.Peer, *following) {
		publisher := interop.Start(b, "publish", "--stream", stream, "--before", strconv.Itoa(before))
		f := follow(b, publisher, nil, func(config *kvcache.ZMQClientConfig) {
			byDefault(config)
			if change != nil {
				change(publisher, config)
			}
		})
		f.reaches(b, "what was published before", want[:before], kvcache.ReasonStart)
		return publisher, f
	}
	// live returns when the client became live.
	live := func(f *following) time.Time {
		f.mu.Lock()
		defer f.mu.Unlock()
		return f.told[kvcache.StateLive]
	}
	report := func(b *testing.B, took []time.Duration) {
		slices.Sort(took)
		b.ReportMetric(0, "ns/op") // preparations included, so of no interest
		b.ReportMetric(took[len(took)/2].Seconds()*1e3, "median-ms")
		b.ReportMetric(took[len(took)-1].Seconds()*1e3, "max-ms")
	}

	for _, lost := range []int{1, 1000} {
		b.Run(fmt.Sprintf("gap=%d", lost), func(b *testing.B) {
			var took []time.Duration
			publisher, f := start(b, nil)
			published := before
			for b.Loop() {
				if published+lost+1 > len(want) {
					_ = f.client.Stop()
					publisher.Stop()
					publisher, f = start(b, nil)
					published = before
				}
				publisher.Say("lose", strconv.Itoa(lost))
				publisher.Expect("lost")
				publisher.Say("publish 1")
				published += lost + 1
				f.reaches(b, "the gap to be filled", want[:published], kvcache.ReasonStart)
				f.mu.Lock()
				took = append(took, f.told[kvcache.StateLive].Sub(f.told[kvcache.StateRecovering]))
				f.mu.Unlock()
			}
			report(b, took)
		})
	}
	b.Run("restart", func(b *testing.B) {
		var took []time.Duration
		for b.Loop() {
			publisher, f := start(b, nil)
			publisher = publisher.Restart("--stream", streamOf("real-v0.32.0-hybrid"))
			begun := time.Now()
			f.reaches(b, "the new life", recorded(b, streamOf("real-v0.32.0-hybrid"))[:before],
				kvcache.ReasonStart, kvcache.ReasonRestart)
			took = append(took, live(f).Sub(begun))
			_ = f.client.Stop()
			publisher.Stop()
		}
		report(b, took)
	})
	for name, part := range map[string]func(*interop.Proxy){
		"refused": (*interop.Proxy).Cut, "swallowed": (*interop.Proxy).Silence,
	} {
		b.Run("partition="+name, func(b *testing.B) {
			var took []time.Duration
			for b.Loop() {
				var proxies []*interop.Proxy
				publisher, f := start(b, func(publisher *interop.Peer, config *kvcache.ZMQClientConfig) {
					pub := interop.StartProxy(b, publisher.Endpoint("pub"))
					replay := interop.StartProxy(b, publisher.Endpoint("replay"))
					config.PubEndpoint, config.ReplayEndpoint = pub.Endpoint(), replay.Endpoint()
					proxies = []*interop.Proxy{pub, replay}
				})
				for _, p := range proxies {
					part(p)
				}
				publisher.Say("publish 100")
				<-time.After(10 * time.Second)
				begun := time.Now()
				for _, p := range proxies {
					p.Open()
				}
				f.reaches(b, "what was published meanwhile", want[:before+100], kvcache.ReasonStart)
				took = append(took, live(f).Sub(begun))
				_ = f.client.Stop()
				publisher.Stop()
			}
			report(b, took)
		})
	}
}
