// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kvtap/kvtap/enginesim"
	"github.com/kvtap/kvtap/event"
	"github.com/kvtap/kvtap/internal/zmtp"
	"github.com/kvtap/kvtap/kvcache"
)

// number is a sequence number as it travels.
func number(seq uint64) []byte { return binary.BigEndian.AppendUint64(nil, seq) }

var endOfReplay = []byte("\xff\xff\xff\xff\xff\xff\xff\xff")

// replayer is a replay endpoint that knows of the batches below sent, which a test counts up as it publishes.
type replayer struct {
	sent atomic.Uint64
	mute atomic.Bool
	asks atomic.Int64
}

func (n *network) replayer() *replayer {
	p := &replayer{}
	n.router(func(r *zmtp.Router, id string, frames [][]byte) {
		p.asks.Add(1)
		if p.mute.Load() {
			return
		}
		for seq := binary.BigEndian.Uint64(frames[1]); seq < p.sent.Load(); seq++ {
			r.Send(id, nil, number(seq), stored(event.Hash(seq)))
		}
		r.Send(id, nil, endOfReplay, nil)
	})
	return p
}

func TestReplaysThatWorkAgainBringWhatWasInDoubt(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(func(c *enginesim.Config) { c.NoReplay = true })
		p := n.replayer()
		var j journal
		c := n.client(n.config(), &j)
		synctest.Wait()
		p.sent.Store(1)
		publish(t, e, 0)
		p.mute.Store(true)
		if err := e.PublishAt(2, stored(2)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Second)
		soFar := "connecting/at_least reset:start syncing/at_least live/exact 0 recovering/exact recovering/unknown " +
			"reset:history_lost 2 recovering/at_least live/at_least"
		expect(t, &j, soFar)
		asks := p.asks.Load()
		time.Sleep(5 * time.Minute)
		if got := p.asks.Load() - asks; got < 5 || got > 60 {
			t.Errorf("asked %d times in the background in 5 minutes", got)
		}
		p.sent.Store(3)
		p.mute.Store(false)
		time.Sleep(time.Minute)
		soFar += " reset:resync recovering/at_least 0r recovering/exact 1r 2r live/exact"
		expect(t, &j, soFar)
		if s := c.Stats(); s.Resets != 3 || s.Missed != 1 || s.ReplayFailures < 3 || s.Connections != 1 {
			t.Errorf("stats %+v", s)
		}
	})
}

func TestResetStartsAfresh(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		reset func(c *kvcache.ZMQClient, e *enginesim.Engine)
	}{
		{"from any goroutine", func(c *kvcache.ZMQClient, _ *enginesim.Engine) { c.Reset("container_restarted") }},
		{"twice at once, which is once", func(c *kvcache.ZMQClient, _ *enginesim.Engine) {
			c.Reset("container_restarted")
			c.Reset("again")
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, n *network) {
				e := n.engine(nil)
				var j journal
				c := n.client(n.config(), &j)
				synctest.Wait()
				publish(t, e, 1, 2)
				test.reset(c, e)
				time.Sleep(2 * time.Second)
				publish(t, e, 3)
				expect(t, &j, "connecting/at_least reset:start syncing/at_least live/exact 0 1 reset:container_restarted "+
					"recovering/at_least 0r recovering/exact 1r live/exact 2")
				if s := c.Stats(); s.Connections != 2 || s.Resets != 2 {
					t.Errorf("stats %+v", s)
				}
			})
		})
	}
}

func TestResetWithinAHandlerFollowsItsCall(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(nil)
		var c *kvcache.ZMQClient
		j := journal{}
		j.onBatch = func(_ *event.Batch, info kvcache.BatchInfo) error {
			if info.Sequence == 1 && !info.Replayed {
				c.Reset("")
				j.write("still-in-1")
			}
			return nil
		}
		c = n.client(n.config(), &j)
		synctest.Wait()
		publish(t, e, 1, 2)
		time.Sleep(2 * time.Second)
		expect(t, &j, "connecting/at_least reset:start syncing/at_least live/exact 0 1 still-in-1 reset:caller "+
			"recovering/at_least 0r recovering/exact 1r live/exact")
	})
}

func TestResetIsNoFailure(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		n.engine(nil)
		var j journal
		c := n.client(n.config(), &j)
		for range 8 {
			time.Sleep(5 * time.Second)
			if s := c.State(); s.State != kvcache.StateLive || s.Err != "" {
				t.Fatalf("%+v", s)
			}
			c.Reset("again")
		}
		time.Sleep(1100 * time.Millisecond)
		if s := c.State(); s.State != kvcache.StateLive {
			t.Errorf("not back within a second of the last Reset: %+v", s)
		}
	})
}

func TestResetWithoutAnEngine(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		var j journal
		config := n.config()
		c := kvcache.NewZMQClient(config, &j)
		c.Reset("too_early")
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		c.Reset("down")
		synctest.Wait()
		e := n.engine(nil)
		time.Sleep(10 * time.Second)
		publish(t, e, 1)
		expect(t, &j, "connecting/at_least reset:down connecting/at_least reset:start syncing/at_least live/exact 0")
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
		c.Reset("too_late")
		synctest.Wait()
		expect(t, &j, "connecting/at_least reset:down connecting/at_least reset:start syncing/at_least live/exact 0")
	})
}

func TestResetAndStopWhileAHandlerHangs(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(nil)
		release := make(chan struct{})
		j := journal{onBatch: func(*event.Batch, kvcache.BatchInfo) error {
			<-release
			return nil
		}}
		c := n.client(n.config(), &j)
		synctest.Wait()
		publish(t, e, 1)
		begin := time.Now()
		c.Reset("container_restarted")
		if c.Stats().Batches != 0 || !c.IsConnected() || c.State().State != kvcache.StateLive || time.Since(begin) != 0 {
			t.Errorf("%+v, %+v after %v", c.Stats(), c.State(), time.Since(begin))
		}
		var stop *kvcache.StopError
		if err := c.Stop(); !errors.As(err, &stop) {
			t.Errorf("Stop: %v", err)
		}
		close(release)
		synctest.Wait()
		expect(t, &j, "connecting/at_least reset:start syncing/at_least live/exact 0")
	})
}

// turnstile counts how many have a turn.
type turnstile struct {
	kvcache.ReplayLimiter
	now, most, total atomic.Int64
}

func (l *turnstile) Acquire(ctx context.Context) error {
	if err := l.ReplayLimiter.Acquire(ctx); err != nil {
		return err
	}
	l.total.Add(1)
	for now := l.now.Add(1); ; {
		most := l.most.Load()
		if now <= most || l.most.CompareAndSwap(most, now) {
			return nil
		}
	}
}

func (l *turnstile) Release() {
	l.now.Add(-1)
	l.ReplayLimiter.Release()
}

func TestReplaysTakeTurns(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		limiter := &turnstile{ReplayLimiter: kvcache.NewReplayLimiter(3)}
		e := n.engine(nil)
		publish(t, e, 1, 2, 3)
		var js [20]journal
		for i := range js {
			config := n.config()
			config.ReplayLimiter = limiter
			js[i].onBatch = func(*event.Batch, kvcache.BatchInfo) error {
				time.Sleep(time.Second) // so that turns overlap
				return nil
			}
			n.client(config, &js[i])
		}
		time.Sleep(time.Minute)
		for i := range js {
			js[i].checkTruthOf(t, 3)
		}
		if limiter.most.Load() != 3 || limiter.now.Load() != 0 || limiter.total.Load() < 2*int64(len(js)) {
			t.Errorf("%d at once, %d now, %d in all", limiter.most.Load(), limiter.now.Load(), limiter.total.Load())
		}
	})
}

// checkTruthOf checks that a journal saw the numbers below n once each and is live and exact.
func (j *journal) checkTruthOf(t *testing.T, n int) {
	t.Helper()
	got := j.String()
	for seq := range n {
		if strings.Count(got, fmt.Sprintf(" %dr", seq)) != 1 {
			t.Errorf("batch %d, seen: %s", seq, got)
		}
	}
	if !strings.HasSuffix(got, " live/exact") {
		t.Errorf("it ends otherwise: %s", got)
	}
}

// limiterThat refuses.
type limiterThatRefuses struct{}

func (limiterThatRefuses) Acquire(context.Context) error { return errors.New("not today") }
func (limiterThatRefuses) Release()                      { panic("released without a turn") }

func TestALimiterThatRefusesIsAReplayThatFails(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(nil)
		config := n.config()
		config.ReplayLimiter = limiterThatRefuses{}
		var j journal
		c := n.client(config, &j)
		time.Sleep(2 * time.Second)
		publish(t, e, 1)
		expect(t, &j, "connecting/at_least reset:start syncing/at_least live/at_least 0 live/exact")
		if s := c.State(); !strings.Contains(s.Err, "not today") {
			t.Errorf("status %+v", s)
		}
	})
}

func TestAReplayThatDripsKeepsItsTurnOnlySoLong(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		n.engine(func(c *enginesim.Config) { c.NoReplay = true })
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		n.router(func(r *zmtp.Router, id string, _ [][]byte) {
			for seq := uint64(0); ; seq++ { // always another, just in time
				select {
				case <-ctx.Done():
					return
				case <-time.After(900 * time.Millisecond):
				}
				r.Send(id, nil, number(seq), stored(event.Hash(seq)))
			}
		})
		limiter := kvcache.NewReplayLimiter(1)
		config := n.config()
		config.ReplayLimiter = limiter
		var j journal
		n.client(config, &j)
		time.Sleep(time.Second)

		begin := time.Now()
		if err := limiter.Acquire(ctx); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(begin); d < 20*time.Second || d > 30*time.Second {
			t.Errorf("the other waited for %v", d)
		}
		limiter.Release()
		time.Sleep(time.Minute)
		const want = "connecting/at_least reset:start syncing/at_least 0r syncing/exact 1r 2r 3r"
		if got := j.String(); !strings.HasPrefix(got, want) || strings.Contains(got, "live") {
			t.Errorf("the one that drips: %s", got)
		}
		cancel()
	})
}

func TestAReplayThatNeverEnds(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		pause time.Duration
		seq   func(from uint64, i int) uint64
	}{
		{"and repeats itself at full speed", 0, func(_ uint64, i int) uint64 { return uint64(i % 2) }},
		{"and repeats itself slowly", 4 * time.Second, func(_ uint64, i int) uint64 { return uint64(i % 2) }},
		{"and sends what is older than was asked for", time.Second, func(uint64, int) uint64 { return 0 }},
		{"and sends what is older, at full speed", 0, func(uint64, int) uint64 { return 0 }},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, n *network) {
				e := n.engine(func(c *enginesim.Config) { c.NoReplay = true })
				n.routerPerRequest(func(ctx context.Context, r *zmtp.Router, id string, from uint64) {
					for i := 0; ctx.Err() == nil; i++ {
						if !r.Send(id, nil, number(test.seq(from, i)), stored(event.Hash(100+i%2))) || test.pause > 0 {
							select { // the peer's queue is full, or the peer is gone
							case <-ctx.Done():
							case <-time.After(max(test.pause, 100*time.Millisecond)):
							}
						}
						if i == 3000 {
							return
						}
					}
				})
				var j journal
				c := n.client(n.config(), &j)
				synctest.Wait()
				publish(t, e, 100, 101)
				time.Sleep(time.Minute)
				publish(t, e, 102)
				got := j.String()
				if !strings.HasSuffix(got, "2") || c.State().State != kvcache.StateLive {
					t.Errorf("%s; %+v", got, c.State())
				}
				if s := c.Stats(); s.Batches != 3 || s.Replays > 40 {
					t.Errorf("stats %+v", s)
				}
			})
		})
	}
}

// routerPerRequest answers each request in a goroutine of its own, whose context ends with the test.
func (n *network) routerPerRequest(answer func(ctx context.Context, r *zmtp.Router, id string, from uint64)) {
	ctx, cancel := context.WithCancel(context.Background())
	n.t.Cleanup(cancel)
	n.router(func(r *zmtp.Router, id string, frames [][]byte) {
		go answer(ctx, r, id, binary.BigEndian.Uint64(frames[1]))
	})
}

func TestAnAnswerThatComesTooLateBringsNothingBack(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		// The engine stores block 1 and removes it. A replay of the store is on its way for longer than we wait.
		e := n.engine(func(c *enginesim.Config) { c.NoReplay = true })
		batches := [][]byte{
			stored(1),
			encode(event.Event{
				Type: event.BlockRemoved, Map: true, Hashes: []event.Hash{1}, Medium: []byte("GPU"), Group: event.Some(int64(0)),
			}),
			stored(2),
		}
		n.routerPerRequest(func(ctx context.Context, r *zmtp.Router, id string, from uint64) {
			select {
			case <-ctx.Done():
			case <-time.After(7 * time.Second):
			}
			for seq := from; seq < 3; seq++ {
				r.Send(id, nil, number(seq), batches[seq])
			}
			r.Send(id, nil, endOfReplay, nil)
		})
		var j journal
		c := n.client(n.config(), &j)
		synctest.Wait()
		for _, b := range batches {
			if err := e.Publish(b); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(3 * time.Minute)
		j.mu.Lock()
		held := 0
		for place := range j.fold.All() {
			if held++; place.Hash != 2 {
				t.Errorf("block %d is claimed", place.Hash)
			}
		}
		j.mu.Unlock()
		if held != 1 || c.State().State != kvcache.StateLive {
			t.Errorf("%d blocks are claimed, state %+v: %s", held, c.State(), &j)
		}
	})
}

func TestAnAnswerOfALifeThatEndedMeanwhileIsNotTaken(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(func(c *enginesim.Config) { c.NoReplay = true })
		var life atomic.Int64
		n.routerPerRequest(func(ctx context.Context, r *zmtp.Router, id string, from uint64) {
			// It answers for the life in which it was asked, slowly.
			asked := life.Load()
			for seq := from; seq < 5 && ctx.Err() == nil; seq++ {
				r.Send(id, nil, number(seq), stored(event.Hash(100*asked+int64(seq))))
				select {
				case <-ctx.Done():
				case <-time.After(time.Second):
				}
			}
			r.Send(id, nil, endOfReplay, nil)
		})
		var j journal
		n.client(n.config(), &j)
		time.Sleep(1500 * time.Millisecond) // two batches of the first life have come
		life.Store(1)
		// Behind the same connection another process begins to count: 4 and then 0 can be no one life.
		for _, seq := range []uint64{4, 0, 1, 2, 3, 4} {
			if err := e.PublishAt(seq, stored(event.Hash(100+seq))); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Minute)
		j.mu.Lock()
		defer j.mu.Unlock()
		held := 0
		for place := range j.fold.All() {
			if held++; place.Hash < 100 {
				t.Errorf("block %d of the life that ended is claimed", place.Hash)
			}
		}
		if held != 5 {
			t.Errorf("%d blocks: %s", held, strings.Join(j.lines, " "))
		}
	})
}

func TestPolicyKeepKeepsWhatMayBeGone(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(nil)
		config := n.config()
		config.HistoryLost = kvcache.PolicyKeep
		var j journal
		c := n.client(config, &j)
		synctest.Wait()
		publish(t, e, 1)
		// A removal whose list of hashes is a number.
		unreadable := []byte("\x92\x00\x91\x82\xa4type\xacBlockRemoved\xacblock_hashes\x07")
		for _, payload := range [][]byte{unreadable, []byte("junk")} {
			if err := e.Publish(payload); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		const saw = "connecting/at_least reset:start syncing/at_least live/exact 0 live/unknown 1"
		expect(t, &j, saw)
		if s := c.State(); s.Reason != kvcache.ReasonUnreadable {
			t.Errorf("%+v", s)
		}
		if s := c.Stats(); s.Unreadable != 2 || s.Batches != 3 || s.Resets != 1 {
			t.Errorf("stats %+v", s)
		}
		// Nothing but what the engine says itself makes it known again.
		if err := n.Cut(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		if s := c.State(); s.State != kvcache.StateLive || s.Bound != kvcache.BoundUnknown {
			t.Errorf("%+v", s)
		}
		if err := e.Reset(); err != nil {
			t.Fatal(err)
		}
		if err := e.Publish(encode(event.Event{Type: event.AllBlocksCleared})); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if s := c.State(); s.Bound != kvcache.BoundExact || s.Reason != "" {
			t.Errorf("%+v", s)
		}
	})
}

func TestAMessageThatIsTooLargeCostsItselfAlone(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(nil)
		config := n.config()
		config.MaxMessage = 1000
		var j journal
		c := n.client(config, &j)
		synctest.Wait()
		publish(t, e, 1)
		large := append(stored(2), make([]byte, 2000)...)
		if err := e.Publish(large); err != nil {
			t.Fatal(err)
		}
		publish(t, e, 3)
		const saw = "connecting/at_least reset:start syncing/at_least live/exact 0 reset:unreadable live/at_least 2"
		expect(t, &j, saw)

		// The replay that follows a lost connection brings it again, when it is the last and when it is not.
		if err := n.Cut(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		if err := e.Publish(large); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if err := n.Cut(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		publish(t, e, 4)
		expect(t, &j, saw+" recovering/at_least live/at_least reset:unreadable recovering/at_least live/at_least 4")
		if s := c.Stats(); s.Unreadable != 2 || s.Connections != 3 {
			t.Errorf("stats %+v", s)
		}
		// Another of the same length is another one.
		if err := e.Publish(large); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
		e = n.engine(nil)
		for i := range 5 {
			publish(t, e, event.Hash(10+i))
		}
		large[len(large)-1]++
		if err := e.Publish(large); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		const end = "reset:restart recovering/at_least 0r recovering/exact 1r 2r 3r 4r reset:unreadable " +
			"recovering/at_least live/at_least"
		if got := j.String(); !strings.HasSuffix(got, end) {
			t.Errorf("the handler saw %s", got)
		}
	})
}

func TestAPeerThatStopsIsNoticedWithinPingIntervalAndTimeout(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name              string
		interval, timeout time.Duration // of the config
		within            time.Duration // 0: never
	}{
		{"by default within 10 seconds", 0, 0, 10 * time.Second},
		{"sooner if it is told so", time.Second, 500 * time.Millisecond, 1500 * time.Millisecond},
		{"never, if no PING is sent", -1, 0, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, n *network) {
				l, err := zmtp.Listen(t.Context(), pubEndpoint, &zmtp.Options{ListenFunc: n.Listen})
				if err != nil {
					t.Fatal(err)
				}
				defer l.Close()
				config := n.config()
				config.NoReplay = true
				config.PingInterval, config.PingTimeout = test.interval, test.timeout
				c := n.client(config, &events{})
				nc, err := l.Accept()
				if err != nil {
					t.Fatal(err)
				}
				defer nc.Close()
				// The handshake is done by a Conn whose socket then stops: nothing is read or written any more.
				gate := &stoppable{Conn: nc}
				conn, err := zmtp.NewConn(t.Context(), gate, zmtp.PUB, &zmtp.Options{HeartbeatInterval: -1})
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				go func() { _, _ = conn.Recv() }()
				time.Sleep(20 * time.Second)
				if !c.IsConnected() {
					t.Fatal("a peer that answers was given up")
				}
				gate.stopped.Store(true)
				begin := time.Now()
				for c.IsConnected() && time.Since(begin) < time.Hour {
					time.Sleep(100 * time.Millisecond)
				}
				switch d := time.Since(begin); {
				case test.within == 0 && d < time.Hour:
					t.Errorf("given up after %v", d)
				case test.within > 0 && d > test.within+100*time.Millisecond:
					t.Errorf("given up after %v", d)
				}
			})
		})
	}
}

// stoppable is a connection of a process that can be stopped: bytes that come then are swallowed by the kernel.
type stoppable struct {
	net.Conn
	stopped atomic.Bool
}

func (s *stoppable) Read(p []byte) (int, error) {
	for {
		n, err := s.Conn.Read(p)
		if err != nil || !s.stopped.Load() {
			return n, err
		}
	}
}

func (s *stoppable) Write(p []byte) (int, error) {
	if s.stopped.Load() {
		return len(p), nil
	}
	return s.Conn.Write(p)
}

func TestClientsShareAHoldBudget(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		// Both clients hold, since the replay endpoint is mute for now. The budget has room for one chunk of one of them.
		e := n.engine(func(c *enginesim.Config) { c.NoReplay = true })
		p := n.replayer()
		p.mute.Store(true)
		budget := kvcache.NewHoldBudget(5 << 10)
		var js [2]journal
		var cs [2]*kvcache.ZMQClient
		for i := range js {
			config := n.config()
			config.HoldBudget = budget
			cs[i] = n.client(config, &js[i])
			synctest.Wait()
		}
		for i := range 10 {
			p.sent.Add(1)
			publish(t, e, event.Hash(i))
		}
		held := [2]int{cs[0].Stats().HeldBytes, cs[1].Stats().HeldBytes}
		if held[0]+held[1] == 0 || held[0] != 0 && held[1] != 0 || budget.Used() != held[0]+held[1] {
			t.Errorf("%v bytes held, %d used", held, budget.Used())
		}
		p.mute.Store(false)
		time.Sleep(time.Minute)
		p.sent.Add(1)
		publish(t, e, 10)
		for i := range js {
			if s := cs[i].State(); s.State != kvcache.StateLive || s.Bound != kvcache.BoundExact {
				t.Errorf("client %d: %+v", i, s)
			}
			if s := cs[i].Stats(); s.Batches != 11 || s.Resets != 1 || s.HeldBytes != 0 {
				t.Errorf("client %d: %+v: %s", i, s, &js[i])
			}
		}
		if budget.Used() != 0 {
			t.Errorf("%d bytes used at rest", budget.Used())
		}
	})
}

func TestStatsCountWhatHappened(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		e := n.engine(nil)
		publish(t, e, 1, 2)
		j := journal{onBatch: func(_ *event.Batch, info kvcache.BatchInfo) error {
			switch info.Sequence {
			case 2:
				return io.ErrUnexpectedEOF
			case 4:
				panic("oops")
			}
			return nil
		}}
		c := n.client(n.config(), &j)
		synctest.Wait()
		publish(t, e, 3)
		if err := e.PublishAt(4, stored(4)); err != nil { // 3 is burned
			t.Fatal(err)
		}
		synctest.Wait()
		if err := e.Publish([]byte("junk")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if err := n.Cut(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Second)
		want := kvcache.Stats{
			Connections: 2, Disconnections: 1, Batches: 5, Replayed: 3, Events: 4, Missed: 1, Burned: 1, Unreadable: 1,
			Resets: 2, HandlerErrors: 2,
		}
		got := c.Stats()
		if got.Replays < 4 || got.Duplicates < 3 || got.ReplayFailures != 0 {
			t.Errorf("stats %+v", got)
		}
		got.Replays, got.Duplicates = 0, 0
		if got != want {
			t.Errorf("stats %+v, want %+v", got, want)
		}
	})
}

func TestASlowHandlerHasTheTailLookedAtSoonAfterwards(t *testing.T) {
	t.Parallel()
	// In the second case the regular look falls into the time in which the handler is busy.
	for _, before := range []time.Duration{5 * time.Second, 25 * time.Second} {
		t.Run(before.String(), func(t *testing.T) {
			t.Parallel()
			inBubble(t, func(t *testing.T, n *network) { slowHandler(t, n, before) })
		})
	}
}

func slowHandler(t *testing.T, n *network, before time.Duration) {
	e := n.engine(func(c *enginesim.Config) { c.NoReplay = true })
	p := n.replayer()
	j := journal{onBatch: func(_ *event.Batch, info kvcache.BatchInfo) error {
		if info.Sequence == 1 && !info.Replayed {
			time.Sleep(10 * time.Second)
		}
		return nil
	}}
	n.client(n.config(), &j)
	synctest.Wait()
	p.sent.Store(1)
	publish(t, e, 0)
	time.Sleep(before) // the first look at the tail is over
	asks := p.asks.Load()
	p.sent.Store(3) // the last of them is dropped while the handler is busy
	publish(t, e, 1)
	time.Sleep(12 * time.Second)
	expect(t, &j, "connecting/at_least reset:start syncing/at_least live/exact 0 1 2r")
	if got := p.asks.Load() - asks; got != 2 { // one that brings it, one that brings nothing new
		t.Errorf("%d questions", got)
	}
	time.Sleep(10 * time.Second)
	if got := p.asks.Load() - asks; got != 2 {
		t.Errorf("%d questions", got)
	}
}

func TestAReplayEndpointOfAnotherEngineThatIsAheadIsFoundOut(t *testing.T) {
	t.Parallel()
	inBubble(t, func(t *testing.T, n *network) {
		// Its buffer begins far beyond our engine's numbers, so that no two batches share one.
		e := n.engine(func(c *enginesim.Config) { c.NoReplay = true })
		n.router(func(r *zmtp.Router, id string, frames [][]byte) {
			for seq := max(1000, binary.BigEndian.Uint64(frames[1])); seq < 1005; seq++ {
				r.Send(id, nil, number(seq), stored(event.Hash(seq)))
			}
			r.Send(id, nil, endOfReplay, nil)
		})
		var j journal
		c := n.client(n.config(), &j)
		synctest.Wait()
		for i := range 20 {
			publish(t, e, event.Hash(i))
			time.Sleep(20 * time.Second)
		}
		j.mu.Lock()
		for place := range j.fold.All() {
			if place.Hash >= 1000 {
				t.Errorf("block %d of the other engine is claimed", place.Hash)
			}
		}
		held := j.fold.Len()
		j.mu.Unlock()
		if s := c.State(); held < 5 || s.State != kvcache.StateLive || s.Bound != kvcache.BoundAtLeast {
			t.Errorf("%d blocks, %+v: %s", held, s, &j)
		}
	})
}
