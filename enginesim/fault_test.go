// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package enginesim_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvtap/kvtap/enginesim"
	"github.com/kvtap/kvtap/event"
	"github.com/kvtap/kvtap/internal/memnet"
	"github.com/kvtap/kvtap/internal/zmtp"
)

// lab is an engine without traffic of its own on a network in memory, in a synctest bubble.
type lab struct {
	*testing.T
	*enginesim.Engine
	net     *memnet.Network
	prompts uint32
}

func inLab(t *testing.T, config enginesim.Config, f func(l *lab)) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		config.Quiet = !slices.Contains([]string{"traffic"}, config.Model)
		defaultBlocks(&config)
		config, m := inMemory(config)
		f(&lab{T: t, Engine: startEngine(t, config), net: m})
	})
}

func defaultBlocks(config *enginesim.Config) {
	if config.BlockSize == 0 {
		config.BlockSize = 4
	}
}

func (l *lab) inject(f enginesim.Fault) {
	l.Helper()
	if err := l.Inject(f); err != nil {
		l.Fatal(err)
	}
	synctest.Wait()
}

// store makes the engine publish one batch that stores one block of its own.
func (l *lab) store() {
	l.Helper()
	l.prompts++
	l.Submit(enginesim.Request{Prompt: []uint32{l.prompts, 0, 0, 1}})
	if published := step(l, l.Engine); !published {
		l.Fatal("nothing was published")
	}
	synctest.Wait()
}

// peer is a client socket whose messages are read as they come.
type peer struct {
	*zmtp.Conn
	mu       sync.Mutex
	messages [][]string
	err      error
	ended    time.Time
}

// connect dials without heartbeats unless they are asked for.
func (l *lab) connect(endpoint string, kind zmtp.SocketType, heartbeat time.Duration) *peer {
	l.Helper()
	c, err := zmtp.Dial(l.Context(), endpoint, kind,
		&zmtp.Options{Dial: l.net.Dial, HeartbeatInterval: heartbeat, HeartbeatTimeout: heartbeat})
	if err != nil {
		l.Fatal(err)
	}
	l.Cleanup(func() { c.Close() })
	p := &peer{Conn: c}
	go func() {
		for {
			frames, err := c.Recv()
			p.mu.Lock()
			if err != nil {
				p.err, p.ended = err, time.Now()
				p.mu.Unlock()
				return
			}
			var message []string
			for _, f := range frames {
				message = append(message, string(f))
			}
			p.messages = append(p.messages, message)
			p.mu.Unlock()
		}
	}()
	return p
}

func (l *lab) sub() *peer {
	l.Helper()
	pub, _ := l.Endpoints()
	p := l.connect(pub, zmtp.SUB, -1)
	if err := p.Subscribe(nil); err != nil {
		l.Fatal(err)
	}
	synctest.Wait()
	return p
}

func (l *lab) dealer() *peer {
	l.Helper()
	_, replay := l.Endpoints()
	return l.connect(replay, zmtp.DEALER, -1)
}

// take returns what came since the last take, and the error that ended the connection, if one did.
func (p *peer) take() ([][]string, error) {
	synctest.Wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	messages := p.messages
	p.messages = nil
	return messages, p.err
}

// seqs returns the numbers of the live messages that came since the last take.
func (l *lab) seqs(p *peer) []uint64 {
	l.Helper()
	messages, _ := p.take()
	var list []uint64
	for _, m := range messages {
		if len(m) != 3 {
			l.Fatalf("a message of %d frames: %q", len(m), m)
		}
		list = append(list, number(l, []byte(m[1])))
	}
	return list
}

// ask asks for a replay. The answer is spelt with numbers, "end", and what is no part of a replay as it came.
func (l *lab) ask(p *peer, start uint64) []string {
	l.Helper()
	if err := p.Send(nil, binary.BigEndian.AppendUint64(nil, start)); err != nil {
		l.Fatal(err)
	}
	return l.answer(p)
}

func (l *lab) answer(p *peer) []string {
	l.Helper()
	messages, _ := p.take()
	list := []string{}
	for _, m := range messages {
		switch {
		case len(m) != 4 || m[0] != "" || len(m[2]) != 8:
			list = append(list, fmt.Sprintf("%q", m))
		case m[2] == strings.Repeat("\xff", 8):
			list = append(list, "end")
		default:
			list = append(list, fmt.Sprint(number(l, []byte(m[2]))))
		}
	}
	return list
}

func (l *lab) expect(what string, want, got any) {
	l.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		l.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// refused reports whether nobody listens at any endpoint.
func (l *lab) refused() bool {
	pub, replay := l.Endpoints()
	for _, endpoint := range []string{pub, replay} {
		c, err := l.net.Dial(l.Context(), "tcp", strings.TrimPrefix(endpoint, "tcp://"))
		if err == nil {
			c.Close()
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return false
		}
	}
	return true
}

func hungUp(p *peer) bool {
	_, err := p.take()
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

func TestAKilledEngineIsGone(t *testing.T) {
	inLab(t, enginesim.Config{FirstSeq: 1}, func(l *lab) {
		pub, replay := l.Endpoints()
		sub, dealer := l.sub(), l.dealer()
		l.store()
		running := l.Submit(enginesim.Request{Prompt: prompt(4), Answer: prompt(100)})
		step(l, l.Engine)
		synctest.Wait()
		truth, next := l.Truth()
		l.inject(enginesim.Fault{Kind: enginesim.FaultKill})
		l.expect("live", []uint64{1, 2}, l.seqs(sub))
		if !hungUp(sub) || !hungUp(dealer) || !l.refused() {
			t.Error("a killed engine still has sockets")
		}
		if got := <-running; !errors.Is(got.Err, enginesim.ErrDown) {
			t.Errorf("a request that was running: %v", got.Err)
		}
		if got := <-l.Submit(enginesim.Request{Prompt: prompt(4)}); !errors.Is(got.Err, enginesim.ErrDown) {
			t.Errorf("a new request: %v", got.Err)
		}
		if step(l, l.Engine) {
			t.Error("a dead process made a step")
		}
		if err := errors.Join(l.Reset(), l.Publish(nil), l.PublishAt(9, nil)); err != nil {
			t.Error(err)
		}
		for _, k := range []enginesim.FaultKind{
			enginesim.FaultStop, enginesim.FaultHalfOpen, enginesim.FaultUnreadable, enginesim.FaultWrongLength,
			enginesim.FaultBurn, enginesim.FaultClear, enginesim.FaultKill,
		} {
			l.inject(enginesim.Fault{Kind: k})
		}
		held, after := l.Truth()
		l.expect("truth", truth, held)
		if last, ok := l.LastSeq(); last != 2 || !ok || after != next || l.Life() != 0 || l.Stats().Batches != 2 {
			t.Errorf("the last number is %d, %v, the next %d; life %d; %+v", last, ok, after, l.Life(), l.Stats())
		}
		time.Sleep(time.Hour)
		if !l.refused() {
			t.Error("it came back by itself")
		}

		l.inject(enginesim.Fault{Kind: enginesim.FaultRestart})
		if a, b := l.Endpoints(); a != pub || b != replay {
			t.Errorf("endpoints %s and %s, before the restart %s and %s", a, b, pub, replay)
		}
		held, next = l.Truth()
		if _, ok := l.LastSeq(); ok || len(held) != 0 || next != 1 || l.Life() != 1 {
			t.Errorf("a new process holds %v, next is %d, life %d", held, next, l.Life())
		}
		l.expect("replay", []string{"end"}, l.ask(l.dealer(), 0))
		sub = l.sub()
		l.store()
		l.expect("live", []uint64{1}, l.seqs(sub))
		for k, want := range map[enginesim.FaultKind]int{
			enginesim.FaultKill: 2, enginesim.FaultRestart: 1, enginesim.FaultRoll: 0, 0: 0, 99: 0,
		} {
			if got := l.FaultCount(k); got != want {
				t.Errorf("%v was injected %d times, want %d", k, got, want)
			}
		}
		if s := l.Stats(); s.Batches != 3 || s.Requests != 3 {
			t.Errorf("counters do not go back: %+v", s)
		}
	})
}

func TestAKillLosesWhatIsQueued(t *testing.T) {
	inLab(t, enginesim.Config{}, func(l *lab) {
		pub, _ := l.Endpoints()
		slow := dial(l, l.net, pub, zmtp.SUB) // nobody reads
		if err := errors.Join(slow.Subscribe(nil), l.WaitSubscribers(l.Context(), 1)); err != nil {
			t.Fatal(err)
		}
		for range 100 {
			if err := l.Publish(make([]byte, 10_000)); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		l.inject(enginesim.Fault{Kind: enginesim.FaultKill})
		n := 0
		for {
			if _, err := slow.Recv(); err != nil {
				break
			}
			n++
		}
		if n >= 10 {
			t.Errorf("%d messages came from a dead process", n)
		}
	})
}

func TestAKillForATimeEndsByItself(t *testing.T) {
	inLab(t, enginesim.Config{}, func(l *lab) {
		l.store()
		began := time.Now()
		l.inject(enginesim.Fault{Kind: enginesim.FaultKill, For: 3 * time.Second, N: 5})
		waited := make(chan time.Duration, 1)
		go func() {
			if err := l.WaitSubscribers(l.Context(), 1); err != nil {
				t.Error(err)
			}
			waited <- time.Since(began)
		}()
		time.Sleep(time.Second)
		l.inject(enginesim.Fault{Kind: enginesim.FaultKill, For: time.Second}) // does not shorten it
		time.Sleep(2*time.Second - time.Nanosecond)
		synctest.Wait()
		if !l.refused() || l.Life() != 0 {
			t.Error("it was back before its time")
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if l.refused() || l.Life() != 1 {
			t.Error("it did not come back")
		}
		l.expect("replay", []string{"end"}, l.ask(l.dealer(), 0)) // the later kill asked for no batches
		l.sub()
		if took := <-waited; took != 3*time.Second {
			t.Errorf("waiting for a subscriber of the next life took %v", took)
		}

		// A kill without an end forgets the ends of earlier ones.
		l.inject(enginesim.Fault{Kind: enginesim.FaultKill, For: time.Minute, N: 5})
		l.inject(enginesim.Fault{Kind: enginesim.FaultRestart})
		l.inject(enginesim.Fault{Kind: enginesim.FaultKill})
		time.Sleep(time.Hour)
		if l.Life() != 2 {
			t.Errorf("life %d", l.Life())
		}
		l.inject(enginesim.Fault{Kind: enginesim.FaultKill, For: time.Second, N: 3})
		time.Sleep(time.Second)
		synctest.Wait()
		l.expect("replay", []string{"0", "1", "2", "end"}, l.ask(l.dealer(), 0))
	})
}

func TestWaitingForSubscribersEnds(t *testing.T) {
	inLab(t, enginesim.Config{}, func(l *lab) {
		l.inject(enginesim.Fault{Kind: enginesim.FaultKill})
		ctx, cancel := context.WithTimeout(l.Context(), time.Second)
		defer cancel()
		if err := l.WaitSubscribers(ctx, 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("with its context: %v", err)
		}
		time.AfterFunc(time.Second, func() { l.Close() })
		if err := l.WaitSubscribers(l.Context(), 1); !errors.Is(err, enginesim.ErrClosed) {
			t.Errorf("with the engine: %v", err)
		}
	})
}

// batchesOf decodes what a replay from the first batch on holds.
func (l *lab) batchesOf(start uint64) (payloads []string, fold *event.Fold) {
	l.Helper()
	dealer := l.dealer()
	if err := dealer.Send(nil, binary.BigEndian.AppendUint64(nil, start)); err != nil {
		l.Fatal(err)
	}
	messages, _ := dealer.take()
	fold = new(event.Fold)
	var b event.Batch
	for _, m := range messages[:len(messages)-1] {
		payloads = append(payloads, m[3])
		if err := b.Decode([]byte(m[3])); err != nil {
			l.Fatal(err)
		}
		fold.Apply(&b)
	}
	return payloads, fold
}

func TestARestartedEngineCanOvertakeItsOldNumber(t *testing.T) {
	for name, config := range map[string]enginesim.Config{
		"without traffic":   {},
		"with traffic":      {Model: "traffic", Blocks: 60, Traffic: small},
		"with a tiny cache": {Blocks: 1, BlockSize: 1},
		"with a cache that requests hold entirely": {Model: "traffic", Blocks: 3, Traffic: shortTraffic},
	} {
		t.Run(name, func(t *testing.T) {
			config.ReplayHWM = -1
			inLab(t, config, func(l *lab) {
				sub := l.sub()
				l.inject(enginesim.Fault{Kind: enginesim.FaultRestart, N: 50})
				if !hungUp(sub) {
					t.Error("a subscriber of the process before was kept")
				}
				if last, ok := l.LastSeq(); last != 49 || !ok || l.Life() != 1 {
					t.Errorf("the last number is %d, %v, in life %d", last, ok, l.Life())
				}
				payloads, fold := l.batchesOf(0)
				if len(payloads) != 50 {
					t.Errorf("%d batches can be replayed", len(payloads))
				}
				checkFold(t, l.Engine, fold)
			})
		})
	}
}

// shortTraffic is requests of which a few fill three blocks, and run for long.
var shortTraffic = enginesim.TrafficConfig{
	SystemPrompts: 1, SystemTokens: 1, QuestionTokens: 1, AnswerTokens: 8, MaxTokens: 12, Conversations: 6,
}

func TestNoTwoLivesPublishTheSameBytes(t *testing.T) {
	frozen := func() time.Time { return time.Unix(1_750_000_000, 0) }
	inLab(t, enginesim.Config{Now: frozen}, func(l *lab) {
		seen := map[string]int{}
		for life := range 4 {
			for i := range 3 {
				l.Submit(enginesim.Request{Prompt: []uint32{uint32(i), 2, 3, 4}})
				step(l, l.Engine)
			}
			l.inject(enginesim.Fault{Kind: enginesim.FaultUnreadable, N: 2})
			dealer := l.dealer()
			if err := dealer.Send(nil, make([]byte, 8)); err != nil {
				t.Fatal(err)
			}
			messages, _ := dealer.take()
			if len(messages) != 6 {
				t.Fatalf("%d messages", len(messages))
			}
			var b event.Batch
			if err := b.Decode([]byte(messages[0][3])); err != nil {
				t.Fatal(err)
			}
			if since := b.Time.V - 1_750_000_000; since < 0 || since > 1e-5 {
				t.Errorf("life %d publishes at %v, %v after the clock", life, b.Time.V, since)
			}
			for _, m := range messages[:5] {
				if other, ok := seen[m[3]]; ok {
					t.Errorf("lives %d and %d published %q", other, life, m[3])
				}
				seen[m[3]] = life
			}
			l.inject(enginesim.Fault{Kind: enginesim.FaultRestart})
		}
	})
}

func TestARestartThatCannotBindIsTriedAgain(t *testing.T) {
	inLab(t, enginesim.Config{}, func(l *lab) {
		pub, replay := l.Endpoints()
		occupy := func(endpoint string) net.Listener {
			other, err := l.net.Listen(l.Context(), "tcp", strings.TrimPrefix(endpoint, "tcp://"))
			if err != nil {
				t.Fatal(err)
			}
			return other
		}
		l.inject(enginesim.Fault{Kind: enginesim.FaultKill})
		other := occupy(replay)
		if err := l.Inject(enginesim.Fault{Kind: enginesim.FaultRestart}); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("an occupied endpoint: %v", err)
		}
		if l.FaultCount(enginesim.FaultRestart) != 0 || l.Life() != 0 {
			t.Errorf("restarted, life %d", l.Life())
		}
		l.Heal()
		l.Heal()
		time.Sleep(time.Second)
		if err := other.Close(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if l.Life() != 1 || l.refused() {
			t.Errorf("healed, life %d", l.Life())
		}

		l.inject(enginesim.Fault{Kind: enginesim.FaultPartition, For: time.Second})
		other = occupy(pub)
		time.Sleep(2 * time.Second)
		if err := other.Close(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		l.sub()
		l.dealer()
	})
}

func TestAStoppedEngineSaysNothingUntilItGoesOn(t *testing.T) {
	inLab(t, enginesim.Config{}, func(l *lab) {
		pub, replay := l.Endpoints()
		sub, dealer := l.sub(), l.dealer()
		l.store()
		l.expect("before", []uint64{0}, l.seqs(sub))
		// A peer that is in the middle of its handshake, longer than the engine would wait for it.
		raw, err := l.net.Dial(l.Context(), "tcp", strings.TrimPrefix(pub, "tcp://"))
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		l.inject(enginesim.Fault{Kind: enginesim.FaultStop, For: 30 * time.Second})
		began := time.Now()
		rawEnded := make(chan time.Duration, 1)
		go func() {
			_, _ = io.Copy(io.Discard, raw)
			rawEnded <- time.Since(began)
		}()
		if step(l, l.Engine) {
			t.Error("a stopped process made a step")
		}
		if err := l.Publish([]byte("queued")); err != nil {
			t.Error(err)
		}
		beating := make(chan time.Duration, 1)
		go func() { // connects, and is never greeted
			_, err := zmtp.Dial(l.Context(), replay, zmtp.DEALER,
				&zmtp.Options{Dial: l.net.Dial, HandshakeTimeout: 5 * time.Second})
			if err == nil || errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("dialling a stopped engine: %v", err)
			}
			beating <- time.Since(began)
		}()
		patient := make(chan *zmtp.Conn, 1)
		go func() {
			c, err := zmtp.Dial(l.Context(), pub, zmtp.SUB,
				&zmtp.Options{Dial: l.net.Dial, HandshakeTimeout: time.Minute, HeartbeatInterval: -1})
			if err != nil {
				t.Error(err)
			}
			patient <- c
		}()
		l.expect("replay while stopped", []string{}, l.ask(dealer, 0))
		time.Sleep(30*time.Second - time.Nanosecond)
		if took := <-beating; took != 5*time.Second {
			t.Errorf("the handshake ended after %v", took)
		}
		l.expect("live while stopped", []uint64(nil), l.seqs(sub))
		select {
		case took := <-rawEnded:
			t.Errorf("a stopped engine hung up after %v", took)
		case <-patient:
			t.Error("a stopped engine has greeted")
		default:
		}
		time.Sleep(time.Nanosecond)
		l.expect("live afterwards", []uint64{1}, l.seqs(sub))
		l.expect("replay afterwards", []string{"0", "1", "end"}, l.answer(dealer))
		if took := <-rawEnded; took != 30*time.Second {
			t.Errorf("the half-greeted peer was dropped after %v", took)
		}
		if c := <-patient; c != nil {
			c.Close()
		}
		l.store()
		l.expect("later", []uint64{2}, l.seqs(sub))
	})
}

func TestHeartbeatsFindAStoppedAndAHalfOpenEngine(t *testing.T) {
	for _, k := range []enginesim.FaultKind{enginesim.FaultStop, enginesim.FaultHalfOpen} {
		t.Run(k.String(), func(t *testing.T) {
			inLab(t, enginesim.Config{}, func(l *lab) {
				pub, _ := l.Endpoints()
				sub := l.connect(pub, zmtp.SUB, time.Second)
				time.Sleep(10 * time.Second)
				if _, err := sub.take(); err != nil {
					t.Errorf("before the fault: %v", err)
				}
				l.inject(enginesim.Fault{Kind: k, For: time.Minute})
				time.Sleep(3 * time.Second)
				if _, err := sub.take(); !errors.Is(err, zmtp.ErrSilent) {
					t.Errorf("after it: %v", err)
				}
			})
		})
	}
}

func TestStopsOverlap(t *testing.T) {
	inLab(t, enginesim.Config{}, func(l *lab) {
		sub := l.sub()
		arrival := func(f func()) time.Duration {
			t.Helper()
			began := time.Now()
			f()
			if err := l.Publish([]byte("x")); err != nil {
				t.Fatal(err)
			}
			for {
				if messages, err := sub.take(); len(messages) > 0 || err != nil {
					return time.Since(began)
				}
				time.Sleep(time.Second / 2)
			}
		}
		stop := func(d time.Duration) { l.inject(enginesim.Fault{Kind: enginesim.FaultStop, For: d}) }
		for _, c := range []struct {
			name  string
			stops func()
			want  time.Duration
		}{
			{"a stop without a time is short", func() { stop(0) }, time.Second},
			{"a longer one extends a shorter", func() { stop(time.Second); stop(5 * time.Second) }, 5 * time.Second},
			{"a shorter one does not shorten", func() { stop(5 * time.Second); stop(time.Second) }, 5 * time.Second},
			{"an earlier one's end does not end a later", func() {
				stop(2 * time.Second)
				l.Heal()
				time.Sleep(time.Second)
				stop(3 * time.Second)
			}, 4 * time.Second},
		} {
			if got := arrival(c.stops); got != c.want {
				t.Errorf("%s: it ended after %v, want %v", c.name, got, c.want)
			}
		}
		stop(time.Hour)
		l.inject(enginesim.Fault{Kind: enginesim.FaultKill}) // works on a stopped process too
		if !hungUp(sub) || !l.refused() {
			t.Error("a stopped process outlived a kill")
		}
		l.inject(enginesim.Fault{Kind: enginesim.FaultRestart})
		sub = l.sub()
		l.store()
		l.expect("the next process", []uint64{0}, l.seqs(sub))
		stop(time.Hour)
		// Close ends it as well; the bubble would not end otherwise.
	})
}

func TestAConnectionToAStoppedEngineThatEndsBeforeItGoesOn(t *testing.T) {
	inLab(t, enginesim.Config{}, func(l *lab) {
		pub, _ := l.Endpoints()
		l.inject(enginesim.Fault{Kind: enginesim.FaultStop, For: time.Minute})
		for range 300 { // more than wait to be accepted
			ctx, cancel := context.WithTimeout(l.Context(), time.Millisecond)
			c, err := l.net.Dial(ctx, "tcp", strings.TrimPrefix(pub, "tcp://"))
			cancel()
			if err == nil {
				c.Close()
			}
		}
		time.Sleep(time.Minute)
		sub := l.sub()
		l.store()
		l.expect("live", []uint64{0}, l.seqs(sub))
	})
}

func TestAHalfOpenConnectionIsDeadWithoutAWord(t *testing.T) {
	inLab(t, enginesim.Config{}, func(l *lab) {
		pub, _ := l.Endpoints()
		sub, dealer := l.sub(), l.dealer()
		raw, err := l.net.Dial(l.Context(), "tcp", strings.TrimPrefix(pub, "tcp://"))
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		l.inject(enginesim.Fault{Kind: enginesim.FaultHalfOpen})
		rawEnded := make(chan struct{})
		go func() {
			_, _ = io.Copy(io.Discard, raw)
			close(rawEnded)
		}()
		l.store()
		for range 100 { // a host that is gone never makes a sender wait
			l.expect("replay", []string{}, l.ask(dealer, 0))
		}
		time.Sleep(time.Hour) // well beyond the engine's patience with the handshake
		if _, err := raw.Write([]byte("hello?")); err != nil {
			t.Errorf("writing to a host that is gone: %v", err)
		}
		messages, err := sub.take()
		if _, other := dealer.take(); len(messages) > 0 || err != nil || other != nil {
			t.Errorf("%d messages, %v, %v", len(messages), err, other)
		}
		l.expect("a new subscriber", []uint64(nil), l.seqs(l.sub()))
		l.expect("a new replay", []string{"0", "end"}, l.ask(l.dealer(), 0))
		// One that hangs up is forgotten.
		if err := sub.Close(); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		select {
		case <-rawEnded:
			t.Error("a host that is gone hung up")
		default:
		}
		l.Heal()
		synctest.Wait()
		<-rawEnded
		if !hungUp(dealer) {
			t.Error("the connection outlived Heal")
		}
	})
}

func TestAPartitionedEngineCannotBeReachedAndRunsOn(t *testing.T) {
	inLab(t, enginesim.Config{}, func(l *lab) {
		sub, dealer := l.sub(), l.dealer()
		l.inject(enginesim.Fault{Kind: enginesim.FaultPartition, For: 2 * time.Second})
		if !hungUp(sub) || !hungUp(dealer) || !l.refused() {
			t.Error("still connected")
		}
		l.store()
		time.Sleep(time.Second)
		l.inject(enginesim.Fault{Kind: enginesim.FaultPartition}) // ends at the same time
		time.Sleep(time.Second - time.Nanosecond)
		if !l.refused() {
			t.Error("it ended too early")
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		sub = l.sub()
		l.expect("replay", []string{"0", "end"}, l.ask(l.dealer(), 0))
		l.store()
		l.expect("live", []uint64{1}, l.seqs(sub))

		for name, f := range map[string]func(){
			"a restart within": func() { l.inject(enginesim.Fault{Kind: enginesim.FaultRestart, N: 1}) },
			"a kill within": func() {
				l.inject(enginesim.Fault{Kind: enginesim.FaultKill, For: 10 * time.Second, N: 1})
			},
			"a short kill within": func() {
				l.inject(enginesim.Fault{Kind: enginesim.FaultKill, For: time.Second, N: 1})
			},
			"an end by force": func() {
				l.inject(enginesim.Fault{Kind: enginesim.FaultRestart, N: 1})
				l.Heal()
				l.Heal() // again, to no effect
			},
			"a stop within": func() {
				l.inject(enginesim.Fault{Kind: enginesim.FaultRestart, N: 1})
				l.inject(enginesim.Fault{Kind: enginesim.FaultStop, For: 7 * time.Second})
			},
		} {
			l.inject(enginesim.Fault{Kind: enginesim.FaultPartition, For: 5 * time.Second})
			f()
			time.Sleep(11 * time.Second)
			synctest.Wait()
			l.expect(name, []string{"0", "end"}, l.ask(l.dealer(), 0))
		}
	})
}

func TestFaultsOfAnEngineThatConnectsOut(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := new(memnet.Network)
		gateway, err := m.Listen(t.Context(), "tcp", "127.0.0.1:5557")
		if err != nil {
			t.Fatal(err)
		}
		defer gateway.Close()
		e := startEngine(t, enginesim.Config{
			Quiet: true, NoReplay: true, Connect: true, PubEndpoint: "tcp://127.0.0.1:5557", Listen: m.Listen, Dial: m.Dial,
		})
		accept := func() *zmtp.Conn {
			nc, err := gateway.Accept()
			if err != nil {
				t.Fatal(err)
			}
			c, err := zmtp.NewConn(t.Context(), nc, zmtp.SUB, &zmtp.Options{HeartbeatInterval: -1})
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Subscribe(nil); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			return c
		}
		for _, c := range []struct {
			fault    enginesim.Fault
			low, top time.Duration // until it is connected again
			breaks   bool
		}{
			{enginesim.Fault{Kind: enginesim.FaultKill, For: 3 * time.Second}, 3 * time.Second, 4 * time.Second, true},
			{enginesim.Fault{Kind: enginesim.FaultPartition, For: 3 * time.Second}, 3 * time.Second, 4 * time.Second, true},
			{enginesim.Fault{Kind: enginesim.FaultRestart, N: 2}, 0, time.Second, true},
		} {
			conn := accept()
			began := time.Now()
			if err := e.Inject(c.fault); err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Recv(); !errors.Is(err, io.EOF) {
				t.Errorf("%v: %v", c.fault.Kind, err)
			}
			conn.Close()
			again := accept()
			if took := time.Since(began); took < c.low || took > c.top {
				t.Errorf("%v: connected again after %v", c.fault.Kind, took)
			}
			if err := e.Publish([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := again.Recv(); err != nil {
				t.Errorf("%v: %v", c.fault.Kind, err)
			}
			again.Close()
		}
		// A stopped engine does not dial either.
		began := time.Now()
		if err := e.Inject(enginesim.Fault{Kind: enginesim.FaultStop, For: time.Minute}); err != nil {
			t.Fatal(err)
		}
		accept().Close()
		if took := time.Since(began); took < time.Minute || took > time.Minute+time.Second {
			t.Errorf("connected again after %v", took)
		}
		if err := e.Inject(enginesim.Fault{Kind: enginesim.FaultStop, For: time.Minute}); err != nil {
			t.Fatal(err)
		}
	})
}

func TestFaultsOfPublishing(t *testing.T) {
	const unknown = 99 // stands for a message without a readable number
	for name, c := range map[string]struct {
		fault  enginesim.Fault
		live   []uint64 // of three batches after the fault; one came before it
		replay []string
	}{
		"drop_live loses one": {
			enginesim.Fault{Kind: enginesim.FaultDropLive}, []uint64{2, 3}, []string{"0", "1", "2", "3", "end"},
		},
		"drop_live loses some": {
			enginesim.Fault{Kind: enginesim.FaultDropLive, N: 2}, []uint64{3}, []string{"0", "1", "2", "3", "end"},
		},
		"burn takes numbers": {
			enginesim.Fault{Kind: enginesim.FaultBurn, N: 3}, []uint64{4, 5, 6}, []string{"0", "4", "5", "6", "end"},
		},
		"roll forgets all but the newest": {
			enginesim.Fault{Kind: enginesim.FaultRoll}, []uint64{1, 2, 3}, []string{"0", "1", "2", "3", "end"},
		},
		"wrong_length is extra": {
			enginesim.Fault{Kind: enginesim.FaultWrongLength, N: 4}, []uint64{unknown, unknown, unknown, unknown, 1, 2, 3},
			[]string{"0", "1", "2", "3", "end"},
		},
		"unreadable takes a number": {
			enginesim.Fault{Kind: enginesim.FaultUnreadable, N: 2}, []uint64{1, 2, 3, 4, 5},
			[]string{"0", "1", "2", "3", "4", "5", "end"},
		},
		"clear is a batch": {
			enginesim.Fault{Kind: enginesim.FaultClear}, []uint64{1, 2, 3, 4}, []string{"0", "1", "2", "3", "4", "end"},
		},
		"unknown_event is part of a batch": {
			enginesim.Fault{Kind: enginesim.FaultUnknownEvent, N: 2}, []uint64{1, 2, 3}, []string{"0", "1", "2", "3", "end"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			inLab(t, enginesim.Config{Topic: "kv@a@m"}, func(l *lab) {
				sub := l.sub()
				l.store()
				l.seqs(sub)
				l.inject(c.fault)
				for range 3 {
					l.store()
				}
				messages, _ := sub.take()
				var seqs []uint64
				var lengths []int
				for _, m := range messages {
					if len(m) != 3 || m[0] != "kv@a@m" {
						t.Fatalf("%q", m)
					}
					if len(m[1]) == 8 {
						seqs = append(seqs, number(t, []byte(m[1])))
						continue
					}
					seqs = append(seqs, unknown)
					lengths = append(lengths, len(m[1]))
					var b event.Batch
					if err := b.Decode([]byte(m[2])); err != nil || len(b.Events) != 1 ||
						b.Events[0].Type != event.AllBlocksCleared {
						t.Errorf("a number of %d bytes comes with %q, %v", len(m[1]), m[2], err)
					}
				}
				l.expect("live", c.live, seqs)
				l.expect("replay", c.replay, l.ask(l.dealer(), 0))
				if slices.Contains(seqs, unknown) {
					l.expect("lengths", []int{7, 9, 0, 4}, lengths)
				}
				// Live and replayed bytes are the same.
				payloads := map[uint64]string{}
				for _, m := range messages {
					if len(m[1]) == 8 {
						payloads[number(t, []byte(m[1]))] = m[2]
					}
				}
				dealer := l.dealer()
				if err := dealer.Send(nil, make([]byte, 8)); err != nil {
					t.Fatal(err)
				}
				replayed, _ := dealer.take()
				for _, m := range replayed {
					if live, ok := payloads[number(t, []byte(m[2]))]; ok && live != m[3] {
						t.Errorf("sent %q, replayed %q", live, m[3])
					}
				}
			})
		})
	}
}

func TestARolledBufferBeginsLater(t *testing.T) {
	inLab(t, enginesim.Config{BufferSteps: 5}, func(l *lab) {
		dealer := l.dealer()
		for range 8 {
			l.store()
		}
		for _, c := range []struct {
			n    int
			want []string
		}{
			{9, []string{"3", "4", "5", "6", "7", "end"}},
			{5, []string{"3", "4", "5", "6", "7", "end"}},
			{3, []string{"5", "6", "7", "end"}},
			{0, []string{"7", "end"}},
		} {
			l.inject(enginesim.Fault{Kind: enginesim.FaultRoll, N: c.n})
			l.expect(fmt.Sprint("kept ", c.n), c.want, l.ask(dealer, 0))
		}
		for range 6 {
			l.store()
		}
		l.expect("it rolls on", []string{"13", "end"}, l.ask(dealer, 0))
		l.inject(enginesim.Fault{Kind: enginesim.FaultRestart, N: 8})
		dealer = l.dealer()
		l.expect("of a new life", []string{"3", "4", "5", "6", "7", "end"}, l.ask(dealer, 0))
	})
}

func TestTwoFramesAreASequenceAndAPayload(t *testing.T) {
	inLab(t, enginesim.Config{}, func(l *lab) {
		sub := l.sub()
		l.inject(enginesim.Fault{Kind: enginesim.FaultTwoFrames, N: 2})
		l.inject(enginesim.Fault{Kind: enginesim.FaultDropLive}) // comes first
		for range 4 {
			l.store()
		}
		messages, _ := sub.take()
		var got []string
		for _, m := range messages {
			got = append(got, fmt.Sprint(len(m), " frames, number ", number(t, []byte(m[len(m)-2]))))
		}
		l.expect("live", []string{"2 frames, number 1", "2 frames, number 2", "3 frames, number 3"}, got)
		l.expect("replay", []string{"0", "1", "2", "3", "end"}, l.ask(l.dealer(), 0))
	})
}

func TestAnUnknownEventIsBesideTheKnownOnes(t *testing.T) {
	for name, form := range forms {
		t.Run(name, func(t *testing.T) {
			inLab(t, enginesim.Config{Form: form}, func(l *lab) {
				sub := l.sub()
				l.inject(enginesim.Fault{Kind: enginesim.FaultUnknownEvent})
				l.store()
				l.store()
				messages, _ := sub.take()
				var b event.Batch
				for i, skipped := range []int{1, 0} {
					if err := b.Decode([]byte(messages[i][2])); err != nil {
						t.Fatal(err)
					}
					if len(b.Events) != 1 || b.Events[0].Type != event.BlockStored || len(b.Skipped) != skipped {
						t.Errorf("batch %d: %+v, skipped %v", i, b.Events, b.Skipped)
					}
					if skipped > 0 && string(b.Skipped[0].Tag) != "BlockPinned" {
						t.Errorf("skipped %v", b.Skipped[0])
					}
				}
			})
		})
	}
}

func TestUnreadableBatchesAreNotMsgpack(t *testing.T) {
	inLab(t, enginesim.Config{}, func(l *lab) {
		sub := l.sub()
		l.inject(enginesim.Fault{Kind: enginesim.FaultUnreadable, N: 3})
		messages, _ := sub.take()
		var b event.Batch
		for _, m := range messages {
			if b.Decode([]byte(m[2])) == nil {
				t.Errorf("%q was decoded", m[2])
			}
		}
		if held, next := l.Truth(); len(messages) != 3 || len(held) != 0 || next != 3 {
			t.Errorf("%d messages, truth %v before %d", len(messages), held, next)
		}
	})
}

func TestFaultsOfReplays(t *testing.T) {
	whole := []string{"0", "1", "2", "3", "4", "5", "6", "7", "end"}
	withoutOne := []string{"0", "1", "2", "4", "5", "6", "7", "end"}
	withoutFour := []string{"0", "1", "6", "7", "end"}
	fault := func(k enginesim.FaultKind, n int) []enginesim.Fault {
		return []enginesim.Fault{{Kind: k, N: n}}
	}
	for name, c := range map[string]struct {
		faults []enginesim.Fault
		want   [][]string // replays of eight batches, one after the other
	}{
		"drop_replay loses one":           {fault(enginesim.FaultDropReplay, 0), [][]string{withoutOne, whole}},
		"drop_replay loses several":       {fault(enginesim.FaultDropReplay, 4), [][]string{withoutFour, whole}},
		"drop_replay leaves both ends":    {fault(enginesim.FaultDropReplay, 99), [][]string{{"0", "1", "7", "end"}, whole}},
		"cut_replay loses the last":       {fault(enginesim.FaultCutReplay, 0), [][]string{whole[:7], whole}},
		"cut_replay loses the end":        {fault(enginesim.FaultCutReplay, 5), [][]string{whole[:3], whole}},
		"cut_replay may lose all":         {fault(enginesim.FaultCutReplay, 9), [][]string{{}, whole}},
		"lose_end loses one end":          {fault(enginesim.FaultLoseEnd, 0), [][]string{whole[:8], whole}},
		"lose_end loses several":          {fault(enginesim.FaultLoseEnd, 2), [][]string{whole[:8], whole[:8], whole}},
		"mute_replay says nothing":        {fault(enginesim.FaultMuteReplay, 0), [][]string{{}, whole}},
		"mute_replay says nothing, twice": {fault(enginesim.FaultMuteReplay, 2), [][]string{{}, {}, whole}},
		"nonsense_replay takes turns": {fault(enginesim.FaultNonsenseReplay, 4), [][]string{
			{`["error: no such method"]`},
			{`["" "" "1234567" "\x93"]`},
			{`["\x00\xc1" "\xff\xfe garbage" "" "\xc1"]`},
			{`["error: no such method"]`},
			whole,
		}},
		"two of a kind are for two replays": {
			append(fault(enginesim.FaultDropReplay, 0), fault(enginesim.FaultDropReplay, 4)...),
			[][]string{withoutOne, withoutFour, whole},
		},
		"several kinds come one after the other, or at once": {
			slices.Concat(fault(enginesim.FaultLoseEnd, 1), fault(enginesim.FaultDropReplay, 1),
				fault(enginesim.FaultCutReplay, 1), fault(enginesim.FaultNonsenseReplay, 1), fault(enginesim.FaultMuteReplay, 1)),
			[][]string{
				{}, {`["error: no such method"]`}, whole[:7], withoutOne[:7], whole,
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			inLab(t, enginesim.Config{}, func(l *lab) {
				for range 8 {
					l.store()
				}
				for _, f := range c.faults {
					l.inject(f)
				}
				for i, want := range c.want {
					l.expect(fmt.Sprint("replay ", i), want, l.ask(l.dealer(), 0))
				}
				for _, f := range c.faults {
					l.inject(f)
				}
				l.Heal()
				l.expect("healed", whole, l.ask(l.dealer(), 0))
			})
		})
	}
}

func TestAReplayWithoutAMiddleLosesNothing(t *testing.T) {
	inLab(t, enginesim.Config{}, func(l *lab) {
		dealer := l.dealer()
		l.inject(enginesim.Fault{Kind: enginesim.FaultDropReplay, N: 3})
		for _, want := range [][]string{
			{"end"}, {"0", "end"}, {"0", "1", "end"}, {"0", "1", "2", "end"}, {"0", "1", "3", "end"},
			{"0", "1", "2", "3", "4", "end"},
		} {
			l.expect("replay", want, l.ask(dealer, 0))
			l.store()
		}
	})
}

func TestASlowReplayPauses(t *testing.T) {
	inLab(t, enginesim.Config{Framing: enginesim.FramingTopic}, func(l *lab) {
		dealer := l.dealer()
		l.inject(enginesim.Fault{Kind: enginesim.FaultSlowReplay, For: time.Second})
		l.expect("nothing to be slow with", []string{"end"}, l.ask(dealer, 0))
		l.store()
		l.store()
		l.expect("at first", []string{"0"}, l.ask(dealer, 0))
		time.Sleep(time.Second)
		l.expect("a second later", []string{"1"}, l.answer(dealer))
		time.Sleep(time.Second)
		l.expect("two seconds later", []string{"end"}, l.answer(dealer))
		l.expect("the next one", []string{"0", "1", "end"}, l.ask(dealer, 0))

		l.inject(enginesim.Fault{Kind: enginesim.FaultSlowReplay, For: time.Hour})
		l.expect("at first", []string{"0"}, l.ask(dealer, 0))
		l.Heal()
		l.expect("healed", []string{"1", "end"}, l.answer(dealer))

		l.inject(enginesim.Fault{Kind: enginesim.FaultSlowReplay})
		l.expect("at first", []string{"0"}, l.ask(dealer, 0))
		time.Sleep(200 * time.Millisecond)
		l.expect("by default a tenth of a second", []string{"1", "end"}, l.answer(dealer))

		l.inject(enginesim.Fault{Kind: enginesim.FaultSlowReplay, For: time.Hour})
		l.ask(dealer, 0)
		l.inject(enginesim.Fault{Kind: enginesim.FaultKill}) // cuts it
		if !hungUp(dealer) {
			t.Error("a slow replay outlived its process")
		}
	})
}

func TestAnEndlessReplayBeginsAnew(t *testing.T) {
	inLab(t, enginesim.Config{ReplayHWM: 20}, func(l *lab) {
		l.inject(enginesim.Fault{Kind: enginesim.FaultEndlessReplay, For: time.Second})
		dealer := l.dealer()
		l.expect("nothing to repeat", []string{"end"}, l.ask(dealer, 0))
		for range 3 {
			l.store()
		}
		l.expect("at first", []string{"0", "1", "2"}, l.ask(dealer, 0))
		time.Sleep(7 * time.Second)
		l.expect("then", []string{"0", "1", "2", "0", "1", "2", "0"}, l.answer(dealer))
		l.expect("others are answered", []string{"0", "1", "2", "end"}, l.ask(l.dealer(), 0))
		l.Heal()
		l.expect("healed", []string{"end"}, l.answer(dealer))
		time.Sleep(time.Minute)
		l.expect("afterwards", []string{}, l.answer(dealer))

		// A peer that has left ends it, and so does the process's end.
		l.inject(enginesim.Fault{Kind: enginesim.FaultEndlessReplay})
		l.inject(enginesim.Fault{Kind: enginesim.FaultEndlessReplay})
		l.ask(dealer, 2)
		dealer.Close()
		other := l.dealer()
		l.ask(other, 2)
		time.Sleep(25 * time.Millisecond)
		l.expect("each hundredth of a second", []string{"2", "2"}, l.answer(other))
		l.inject(enginesim.Fault{Kind: enginesim.FaultRestart})
		if !hungUp(other) {
			t.Error("an endless replay outlived its process")
		}
	})
}

func TestFaultsBeforeTheStart(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		config, m := inMemory(enginesim.Config{Quiet: true, BlockSize: 4})
		e := newEngine(t, config)
		l := &lab{T: t, Engine: e, net: m}
		l.store()
		for _, k := range []enginesim.FaultKind{
			enginesim.FaultHalfOpen, enginesim.FaultPartition, enginesim.FaultDropLive, enginesim.FaultUnknownEvent,
			enginesim.FaultWrongLength, enginesim.FaultKill,
		} {
			l.inject(enginesim.Fault{Kind: k})
		}
		if err := e.Start(t.Context()); !errors.Is(err, enginesim.ErrDown) {
			t.Errorf("starting an engine that was killed: %v", err)
		}
		l.inject(enginesim.Fault{Kind: enginesim.FaultRestart, N: 2})
		l.inject(enginesim.Fault{Kind: enginesim.FaultStop})
		if err := e.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		sub := l.sub()
		l.expect("replay", []string{"0", "1", "end"}, l.ask(l.dealer(), 0))
		if took := time.Since(began); took != time.Second {
			t.Errorf("it went on after %v", took)
		}
		l.store() // dropped
		l.store() // with an unknown event
		l.store()
		messages, _ := sub.take()
		var b event.Batch
		var skipped []int
		for _, m := range messages {
			if err := b.Decode([]byte(m[2])); err != nil {
				t.Fatal(err)
			}
			skipped = append(skipped, len(b.Skipped))
		}
		l.expect("doses wait for sockets", []int{0, 0}, skipped) // the dropped batch had the unknown event
		l.expect("batches", uint64(6), e.Stats().Batches)
	})
}

func TestFaultsThatMakeNoSense(t *testing.T) {
	t.Parallel()
	e := newEngine(t, enginesim.Config{Quiet: true})
	for name, f := range map[string]enginesim.Fault{
		"unknown kind":    {},
		"of fault 99":     {Kind: 99},
		"burn: N is -1":   {Kind: enginesim.FaultBurn, N: -1},
		"N is 1048577":    {Kind: enginesim.FaultRestart, N: 1<<20 + 1},
		"For is negative": {Kind: enginesim.FaultKill, For: -1},
	} {
		if err := e.Inject(f); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
		config := enginesim.Config{Faults: enginesim.Script{{Fault: f}}}
		if _, err := enginesim.New(config); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("scripted, %s: %v", name, err)
		}
	}
	config := enginesim.Config{Faults: enginesim.Script{{Step: -1, Fault: enginesim.Fault{Kind: enginesim.FaultKill}}}}
	if _, err := enginesim.New(config); err == nil || !strings.Contains(err.Error(), "step -1") {
		t.Errorf("before the first step: %v", err)
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	for _, k := range enginesim.FaultKinds() {
		if err := e.Inject(enginesim.Fault{Kind: k}); !errors.Is(err, enginesim.ErrClosed) || e.FaultCount(k) != 0 {
			t.Errorf("%v on a closed engine: %v", k, err)
		}
	}
	e.Heal()
}

func TestNamesOfFaults(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for _, k := range enginesim.FaultKinds() {
		name := k.String()
		if got, err := enginesim.ParseFaultKind(name); got != k || err != nil || seen[name] || strings.Trim(name,
			"abcdefghijklmnopqrstuvwxyz_") != "" {
			t.Errorf("%d is called %q, which is read as %v, %v", k, name, got, err)
		}
		seen[name] = true
	}
	if len(seen) != 20 || enginesim.FaultKind(0).String() != "unknown" || enginesim.FaultKind(99).String() != "unknown" {
		t.Errorf("%d kinds", len(seen))
	}
	for _, name := range []string{"", "unknown", "Kill", "halfopen"} {
		if k, err := enginesim.ParseFaultKind(name); err == nil {
			t.Errorf("%q is read as %v", name, k)
		}
	}
}

func TestAScriptIsPlayedByItsSteps(t *testing.T) {
	script := enginesim.Script{
		{Step: 5, Fault: enginesim.Fault{Kind: enginesim.FaultRestart}},
		{Step: 0, Fault: enginesim.Fault{Kind: enginesim.FaultBurn, N: 10}},
		{Step: 3, Fault: enginesim.Fault{Kind: enginesim.FaultKill}},
		{Step: 5, Fault: enginesim.Fault{Kind: enginesim.FaultBurn, N: 100}},
	}
	inLab(t, enginesim.Config{Faults: script}, func(l *lab) {
		script[0].Step = 0 // the engine has its own
		var nexts []uint64
		for range 7 {
			l.Submit(enginesim.Request{Prompt: []uint32{uint32(len(nexts)), 0, 0, 0}})
			step(l, l.Engine)
			_, next := l.Truth()
			nexts = append(nexts, next)
		}
		// The request of step 5 was submitted to a dead engine.
		l.expect("next numbers", []uint64{11, 12, 13, 13, 13, 100, 101}, nexts)
	})
	t.Run("whose fault fails", func(t *testing.T) {
		inLab(t, enginesim.Config{Faults: enginesim.Script{
			{Step: 1, Fault: enginesim.Fault{Kind: enginesim.FaultKill}},
			{Step: 2, Fault: enginesim.Fault{Kind: enginesim.FaultRestart}},
		}}, func(l *lab) {
			pub, _ := l.Endpoints()
			step(l, l.Engine)
			step(l, l.Engine)
			if _, err := l.net.Listen(l.Context(), "tcp", strings.TrimPrefix(pub, "tcp://")); err != nil {
				t.Fatal(err)
			}
			if _, err := l.Step(); !errors.Is(err, syscall.EADDRINUSE) {
				t.Errorf("Step: %v", err)
			}
		})
	})
}

func TestARandomScriptIsDecidedByItsSeedAndCanBeSurvived(t *testing.T) {
	t.Parallel()
	const steps = 4000
	a := enginesim.RandomScript(7, steps, 0.25)
	if !slices.Equal(a, enginesim.RandomScript(7, steps, 0.25)) {
		t.Error("one seed, two scripts")
	}
	if slices.Equal(a, enginesim.RandomScript(8, steps, 0.25)) {
		t.Error("two seeds, one script")
	}
	counts := map[enginesim.FaultKind]int{}
	for i, f := range a {
		counts[f.Fault.Kind]++
		if f.Step < 0 || f.Step >= steps || i > 0 && f.Step <= a[i-1].Step {
			t.Fatalf("fault %d at step %d", i, f.Step)
		}
		if f.Fault.For < 0 || f.Fault.For > 15*time.Second || f.Fault.N < 0 || f.Fault.N > 100 {
			t.Errorf("%+v", f.Fault)
		}
		switch f.Fault.Kind {
		case enginesim.FaultKill, enginesim.FaultStop, enginesim.FaultPartition:
			if f.Fault.For == 0 {
				t.Errorf("%+v", f.Fault)
			}
		}
	}
	if n := len(a); n < steps/5 || n > steps*3/10 {
		t.Errorf("%d faults", n)
	}
	for _, k := range enginesim.FaultKinds() {
		if counts[k] < 10 {
			t.Errorf("%d times %v", counts[k], k)
		}
	}
	if n := len(enginesim.RandomScript(1, 100, 1)); n != 100 {
		t.Errorf("%d faults in 100 steps at rate 1", n)
	}
	if n := len(enginesim.RandomScript(1, 100, 0)); n != 0 {
		t.Errorf("%d faults at rate 0", n)
	}
	some := enginesim.RandomScript(1, 100, 0.5, enginesim.FaultBurn, enginesim.FaultClear)
	if len(some) < 30 || slices.ContainsFunc(some, func(f enginesim.ScriptedFault) bool {
		return f.Fault.Kind != enginesim.FaultBurn && f.Fault.Kind != enginesim.FaultClear
	}) {
		t.Errorf("%v", some)
	}
}

// Whatever went wrong, an engine that is healed can be heard, and its batches add up to its truth.
func TestAHealedEngineIsSound(t *testing.T) {
	kinds := slices.DeleteFunc(enginesim.FaultKinds(), func(k enginesim.FaultKind) bool {
		return k == enginesim.FaultRoll // what is forgotten cannot be added up
	})
	for seed := range uint64(8) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			config := enginesim.Config{
				Model: "traffic", Blocks: 60, Traffic: small, Seed: seed, ReplayHWM: -1,
				Faults: enginesim.RandomScript(seed, 150, 0.5, kinds...),
			}
			inLab(t, config, func(l *lab) {
				pub, replay := l.Endpoints()
				for i := range 150 {
					step(l, l.Engine)
					// Peers come all the time, and may fail.
					if endpoint, kind := pub, zmtp.SUB; i%5 == 0 {
						if i%2 == 0 {
							endpoint, kind = replay, zmtp.DEALER
						}
						go func() {
							c, err := zmtp.Dial(l.Context(), endpoint, kind,
								&zmtp.Options{Dial: l.net.Dial, HeartbeatInterval: -1})
							if err != nil {
								return
							}
							defer c.Close()
							if kind == zmtp.SUB {
								err = c.Subscribe(nil)
							} else {
								err = c.Send(nil, make([]byte, 8))
							}
							for range 300 {
								if err != nil {
									return
								}
								_, err = c.Recv()
							}
						}()
					}
					time.Sleep(500 * time.Millisecond)
				}
				if t.Failed() {
					return
				}
				l.Heal()
				sub := l.sub()
				_, next := l.Truth()
				for range 5 {
					step(l, l.Engine)
				}
				if got := l.seqs(sub); len(got) < 3 || got[0] != next {
					t.Errorf("live messages %v, want %d and more", got, next)
				}
				dealer := l.dealer()
				if err := dealer.Send(nil, make([]byte, 8)); err != nil {
					t.Fatal(err)
				}
				messages, _ := dealer.take()
				var fold event.Fold
				var b event.Batch
				for _, m := range messages[:len(messages)-1] {
					if b.Decode([]byte(m[3])) == nil {
						fold.Apply(&b)
					} else if m[3][0] != 0xc1 {
						t.Errorf("%q was published", m[3])
					}
				}
				checkFold(t, l.Engine, &fold)
				if l.Life() == 0 {
					t.Error("150 faulty steps and no restart")
				}
			})
		})
	}
}

func TestFaultsAreSafeForConcurrentUse(t *testing.T) {
	config := enginesim.Config{Model: "traffic", Blocks: 60, Traffic: small}
	inLab(t, config, func(l *lab) {
		var tasks sync.WaitGroup
		for i := range uint64(4) {
			tasks.Go(func() {
				for _, f := range enginesim.RandomScript(i, 60, 1) {
					f.Fault.For = min(f.Fault.For, 100*time.Millisecond)
					if err := l.Inject(f.Fault); err != nil {
						t.Error(err)
					}
					if _, err := l.Step(); err != nil {
						t.Error(err)
					}
					time.Sleep(10 * time.Millisecond)
				}
			})
		}
		tasks.Go(func() {
			for range 5 {
				l.Heal()
				time.Sleep(100 * time.Millisecond)
				if err := l.WaitSubscribers(l.Context(), 0); err != nil {
					t.Error(err)
				}
			}
		})
		tasks.Wait()
		l.Heal()
		l.sub()
		total := 0
		for _, k := range enginesim.FaultKinds() {
			total += l.FaultCount(k)
		}
		if total != 240 {
			t.Errorf("%d faults were counted", total)
		}
	})
}

func TestKillAndRestartOverTCP(t *testing.T) {
	t.Parallel()
	e := startEngine(t, freePorts(enginesim.Config{Quiet: true}))
	pub, endpoint := e.Endpoints()
	sub := subscribe(t, e, nil, "")
	for life := range 3 {
		payload := fmt.Sprint("life ", life)
		if err := e.Publish([]byte(payload)); err != nil {
			t.Fatal(err)
		}
		if got := live(t, sub); got != (message{Payload: payload}) {
			t.Errorf("live: %+v", got)
		}
		if got := replay(t, dial(t, nil, endpoint, zmtp.DEALER), enginesim.FramingTopic, 0); len(got) != 1 ||
			got[0].Payload != payload {
			t.Errorf("replayed: %+v", got)
		}
		if err := e.Inject(enginesim.Fault{Kind: enginesim.FaultKill}); err != nil {
			t.Fatal(err)
		}
		if _, err := sub.Recv(); err == nil {
			t.Error("a message from a dead engine")
		}
		if _, err := zmtp.Dial(t.Context(), pub, zmtp.SUB, nil); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dialling a dead engine: %v", err)
		}
		restart(t, e)
		sub = subscribe(t, e, nil, "")
	}
}

// restart tries again while something of this machine has the port.
func restart(t *testing.T, e *enginesim.Engine) {
	t.Helper()
	for {
		err := e.Inject(enginesim.Fault{Kind: enginesim.FaultRestart})
		if err == nil {
			return
		}
		if t.Context().Err() != nil || !errors.Is(err, syscall.EADDRINUSE) {
			t.Fatal(err)
		}
	}
}

func TestStopOverTCP(t *testing.T) {
	t.Parallel()
	e := startEngine(t, freePorts(enginesim.Config{Quiet: true}))
	pub, _ := e.Endpoints()
	sub := subscribe(t, e, nil, "")
	if err := e.Inject(enginesim.Fault{Kind: enginesim.FaultStop, For: time.Hour}); err != nil {
		t.Fatal(err)
	}
	if err := e.Publish([]byte("queued")); err != nil {
		t.Fatal(err)
	}
	nc, err := net.Dial("tcp", strings.TrimPrefix(pub, "tcp://")) // the kernel completes it
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	_, err = zmtp.Dial(t.Context(), pub, zmtp.SUB, &zmtp.Options{HandshakeTimeout: 50 * time.Millisecond})
	if err == nil || errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the handshake with a stopped engine: %v", err)
	}
	if err := nc.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, err := nc.Read(make([]byte, 1)); n != 0 || err == io.EOF {
		t.Errorf("a stopped engine said %d bytes, %v", n, err)
	}
	e.Heal()
	if got := live(t, sub); got != (message{Payload: "queued"}) {
		t.Errorf("live: %+v", got)
	}
	greeting := make([]byte, 10)
	if err := nc.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(nc, greeting); err != nil || !bytes.Equal(greeting[:1], []byte{0xff}) {
		t.Errorf("greeted with %x, %v", greeting, err)
	}
}

func TestPartitionOverTCP(t *testing.T) {
	t.Parallel()
	e := startEngine(t, freePorts(enginesim.Config{Quiet: true}))
	pub, endpoint := e.Endpoints()
	sub := subscribe(t, e, nil, "")
	if err := e.Inject(enginesim.Fault{Kind: enginesim.FaultPartition, For: time.Hour}); err != nil {
		t.Fatal(err)
	}
	if _, err := sub.Recv(); err == nil {
		t.Error("a message through a partition")
	}
	for _, at := range []string{pub, endpoint} {
		if _, err := zmtp.Dial(t.Context(), at, zmtp.SUB, nil); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dialling %s: %v", at, err)
		}
	}
	if err := e.Publish([]byte("unheard")); err != nil {
		t.Fatal(err)
	}
	e.Heal()
	// Should the port be taken at this moment, the engine tries again.
	var got []message
	for got == nil {
		c, err := zmtp.Dial(t.Context(), endpoint, zmtp.DEALER, nil)
		if errors.Is(err, syscall.ECONNREFUSED) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		got = replay(t, c, enginesim.FramingTopic, 0)
		c.Close()
	}
	if diff := cmp.Diff([]message{{Payload: "unheard"}}, got); diff != "" {
		t.Errorf("replayed (-want +got):\n%s", diff)
	}
}

func TestHalfOpenOverTCP(t *testing.T) {
	t.Parallel()
	e := startEngine(t, freePorts(enginesim.Config{Quiet: true}))
	pub, _ := e.Endpoints()
	sub, err := zmtp.Dial(t.Context(), pub, zmtp.SUB,
		&zmtp.Options{HeartbeatInterval: 20 * time.Millisecond, HeartbeatTimeout: 20 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Close()
	if err := errors.Join(sub.Subscribe(nil), e.WaitSubscribers(t.Context(), 1)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(e.Inject(enginesim.Fault{Kind: enginesim.FaultHalfOpen}), e.Publish([]byte("x"))); err != nil {
		t.Fatal(err)
	}
	if got, err := sub.Recv(); !errors.Is(err, zmtp.ErrSilent) {
		t.Errorf("got %q, %v", got, err)
	}
	if err := e.WaitSubscribers(t.Context(), 0); err != nil {
		t.Error(err)
	}
	subscribe(t, e, nil, "")
}

func TestTheListenerIsCalledAgainAfterARestart(t *testing.T) {
	t.Parallel()
	m := new(memnet.Network)
	asked := map[string]int{}
	config := freePorts(enginesim.Config{Quiet: true})
	config.Listen = func(ctx context.Context, network, address string) (net.Listener, error) {
		asked[address]++
		return m.Listen(ctx, network, address)
	}
	e := startEngine(t, config)
	for range 2 {
		if err := e.Inject(enginesim.Fault{Kind: enginesim.FaultRestart}); err != nil {
			t.Fatal(err)
		}
	}
	pub, endpoint := e.Endpoints()
	want := map[string]int{
		"127.0.0.1:0": 2, strings.TrimPrefix(pub, "tcp://"): 2, strings.TrimPrefix(endpoint, "tcp://"): 2,
	}
	if !maps.Equal(asked, want) {
		t.Errorf("asked for %v, want %v", asked, want)
	}
}

// shakyListener fails when told to.
type shakyListener struct {
	net.Listener
	errs chan error
}

func (l *shakyListener) Accept() (net.Conn, error) {
	type result struct {
		nc  net.Conn
		err error
	}
	accepted := make(chan result, 1)
	go func() {
		nc, err := l.Listener.Accept()
		accepted <- result{nc, err}
	}()
	select {
	case r := <-accepted:
		return r.nc, r.err
	case err := <-l.errs:
		l.Close()
		return nil, err
	}
}

type tooManyFiles struct{ error }

func (tooManyFiles) Temporary() bool { return true }

func TestAnEngineOutlivesTroubleWithItsListener(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		config, m := inMemory(enginesim.Config{Quiet: true, NoReplay: true})
		failures := 3
		config.Listen = func(ctx context.Context, network, address string) (net.Listener, error) {
			l, err := m.Listen(ctx, network, address)
			return flakyListener{l, &failures}, err
		}
		l := &lab{T: t, Engine: startEngine(t, config), net: m}
		began := time.Now()
		l.sub()
		if took := time.Since(began); took != 150*time.Millisecond || failures != 0 {
			t.Errorf("connected after %v, %d failures to come", took, failures)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		config, m := inMemory(enginesim.Config{Quiet: true, NoReplay: true})
		errs := make(chan error)
		config.Listen = func(ctx context.Context, network, address string) (net.Listener, error) {
			l, err := m.Listen(ctx, network, address)
			return &shakyListener{l, errs}, err
		}
		var log bytes.Buffer
		config.Logger = slog.New(slog.NewTextHandler(&log, nil))
		l := &lab{T: t, Engine: startEngine(t, config), net: m}
		sub := l.sub()
		errs <- errors.New("the card burned down")
		if !hungUp(sub) || !strings.Contains(log.String(), "the card burned down") {
			t.Errorf("the listener is broken; log:\n%s", log.String())
		}
		l.inject(enginesim.Fault{Kind: enginesim.FaultRestart}) // has a listener of its own
		sub = l.sub()
		if err := l.Publish([]byte("x")); err != nil {
			t.Fatal(err)
		}
		l.expect("live", []uint64{0}, l.seqs(sub))
	})
}

// flakyListener fails at first, for lack of descriptors.
type flakyListener struct {
	net.Listener
	failures *int
}

func (l flakyListener) Accept() (net.Conn, error) {
	if *l.failures > 0 {
		*l.failures--
		return nil, tooManyFiles{errors.New("too many open files")}
	}
	return l.Listener.Accept()
}
