// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvtap/kvtap/internal/zmtp"
)

// pipeListener hands out what is put into it, so that whole sockets run in a synctest bubble.
type pipeListener struct {
	conns  chan net.Conn
	errs   chan error
	closed chan struct{}
	once   sync.Once
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), errs: make(chan error), closed: make(chan struct{})}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case nc := <-l.conns:
		return nc, nil
	case err := <-l.errs:
		return nil, err
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }

func (l *pipeListener) dial(context.Context, string, string) (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case l.conns <- theirs:
		return ours, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) connect(t *testing.T, local zmtp.SocketType, o zmtp.Options) *zmtp.Conn {
	t.Helper()
	o.Dial = l.dial
	c, err := zmtp.Dial(t.Context(), "ipc:///pipe", local, &o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// play joins a scripted peer.
func (l *pipeListener) play(t *testing.T, peerHello []byte) scripted {
	t.Helper()
	nc, err := l.dial(t.Context(), "", "")
	if err != nil {
		t.Fatal(err)
	}
	peer := scripted{nc, t}
	go peer.say(peerHello)
	peer.hear(64)
	peer.hear(1)
	peer.hear(int(peer.hear(1)[0]))
	synctest.Wait()
	return peer
}

func subscribe(t *testing.T, c *zmtp.Conn, prefixes ...string) {
	t.Helper()
	for _, prefix := range prefixes {
		if err := c.Subscribe([]byte(prefix)); err != nil {
			t.Fatal(err)
		}
	}
}

func receive(t *testing.T, c *zmtp.Conn, want ...string) {
	t.Helper()
	frames, err := c.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, copies(frames)); diff != "" {
		t.Errorf("message (-want +got)\n%s", diff)
	}
}

func TestPublisherSendsWhatWasAskedFor(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newPipeListener()
		p := zmtp.NewPublisher(nil, 0)
		served := make(chan error)
		go func() { served <- p.Serve(t.Context(), l) }()

		all, some := l.connect(t, zmtp.SUB, zmtp.Options{}), l.connect(t, zmtp.SUB, zmtp.Options{})
		old := l.play(t, hello(0, "SUB"))
		if n := p.Send([]byte("kv@a"), []byte("1")); n != 0 || p.Subscribers() != 0 {
			t.Errorf("%d reached, %d subscribers before any subscription", n, p.Subscribers())
		}
		subscribe(t, all, "")
		subscribe(t, some, "kv@a", "kv@a", "load", "k")
		old.say(message([]byte("\x01kv@b")), message([]byte("\x02ignored")), message([]byte("\x01also"), []byte("ignored")),
			message(nil))
		if err := p.WaitSubscribers(t.Context(), 3); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		if err := some.Unsubscribe([]byte("k")); err != nil {
			t.Error(err)
		}
		if err := some.Unsubscribe([]byte("never asked for")); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		frames := [][]byte{[]byte("kv@a"), []byte("1")}
		if n := p.Send(frames...); n != 2 {
			t.Errorf("kv@a reached %d", n)
		}
		frames[1][0] = 'X' // ours again
		if n := p.Send([]byte("kv@b"), []byte("2")); n != 2 {
			t.Errorf("kv@b reached %d", n)
		}
		if n := p.Send([]byte("x"), []byte("3")); n != 1 {
			t.Errorf("x reached %d", n)
		}
		if n := p.Send([]byte("load"), []byte("4")); n != 2 {
			t.Errorf("load reached %d", n)
		}
		if n := p.Send(); n != 0 {
			t.Errorf("a message without frames reached %d", n)
		}
		old.expect(message([]byte("kv@b"), []byte("2")))
		receive(t, some, "kv@a", "1")
		receive(t, some, "load", "4")
		receive(t, all, "kv@a", "1")
		receive(t, all, "kv@b", "2")
		receive(t, all, "x", "3")

		old.say(message([]byte("\x00kv@b")))
		synctest.Wait()
		if n := p.Send([]byte("kv@b")); n != 1 || p.Subscribers() != 2 {
			t.Errorf("after cancelling: %d reached, %d subscribers", n, p.Subscribers())
		}
		some.Close()
		synctest.Wait()
		if p.Subscribers() != 1 {
			t.Errorf("after one left: %d subscribers", p.Subscribers())
		}
		p.Close()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		receive(t, all, "load", "4")
		if _, err := all.Recv(); !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("after Close: %v", err)
		}
		if err := p.Serve(t.Context(), newPipeListener()); !errors.Is(err, zmtp.ErrClosed) {
			t.Errorf("Serve after Close: %v", err)
		}
		if err := p.Connect(t.Context(), "ipc:///x"); !errors.Is(err, zmtp.ErrClosed) {
			t.Errorf("Connect after Close: %v", err)
		}
		if err := p.WaitSubscribers(t.Context(), 1); !errors.Is(err, zmtp.ErrClosed) {
			t.Errorf("WaitSubscribers after Close: %v", err)
		}
		p.Close()
		all.Close()
	})
}

func TestPublisherDropsAtTheHighWaterMark(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const hwm, size = 100, 10_000
		l := newPipeListener()
		p := zmtp.NewPublisher(&zmtp.Options{HeartbeatInterval: -1}, hwm)
		go p.Serve(t.Context(), l)
		slow := l.connect(t, zmtp.SUB, zmtp.Options{})
		subscribe(t, slow, "")
		synctest.Wait()
		sent, reached := 1000, 0
		for i := range sent {
			reached += p.Send(binary.BigEndian.AppendUint64(nil, uint64(i)), make([]byte, size))
			synctest.Wait() // the writer takes the first, which nobody reads
		}
		if want := hwm + 1; reached != want || p.Dropped() != uint64(sent-want) {
			t.Errorf("%d reached, %d dropped; want %d in the queue and on the way", reached, p.Dropped(), want)
		}
		time.Sleep(time.Hour) // slowness alone never costs the connection
		for i := range reached {
			frames, err := slow.Recv()
			if err != nil || binary.BigEndian.Uint64(frames[0]) != uint64(i) || len(frames[1]) != size {
				t.Fatalf("message %d: %v", i, err)
			}
		}
		if n := p.Send([]byte("again")); n != 1 {
			t.Error("a subscriber that caught up is not reached")
		}
		receive(t, slow, "again")
		p.Close()
		slow.Close()
	})
}

func TestANegativeHighWaterMarkDropsNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newPipeListener()
		p := zmtp.NewPublisher(&zmtp.Options{HeartbeatInterval: -1}, -1)
		go p.Serve(t.Context(), l)
		c := l.connect(t, zmtp.SUB, zmtp.Options{HeartbeatInterval: -1})
		subscribe(t, c, "")
		synctest.Wait()
		const messages = 20_000
		next := uint64(0)
		for i := range uint64(messages) {
			if p.Send(binary.BigEndian.AppendUint64(nil, i)) != 1 {
				t.Fatalf("message %d was dropped", i)
			}
			if i > messages/2 && i%3 == 0 { // the queue shrinks at its head while it grows at its end
				receive(t, c, string(binary.BigEndian.AppendUint64(nil, next)))
				next++
			}
		}
		for ; next < messages; next++ {
			receive(t, c, string(binary.BigEndian.AppendUint64(nil, next)))
		}
		p.Close()
		c.Close()
	})
}

func TestASubscriberCannotFillAPublishersMemory(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		says func(i int) []byte
		most int // accepted
	}{
		{"with many subscriptions", func(i int) []byte { return command("SUBSCRIBE", fmt.Sprint(i)) }, 4096},
		{"with long subscriptions", func(i int) []byte {
			return frame(0, append(fmt.Appendf(nil, "\x01%09d", i), make([]byte, 60_000)...))
		}, 17},
		{"with a long message", func(int) []byte { return frame(0, make([]byte, 64<<10+1)) }, 0},
		{"with a long command", func(int) []byte { return frame(4, make([]byte, 64<<10+1)) }, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c, peer := meet(t, zmtp.PUB, &zmtp.Options{HeartbeatInterval: -1}, hello(1, "SUB"))
				accepted := make(chan int, 1)
				go func() {
					for i := 0; ; i++ {
						if !peer.say(test.says(i)) {
							accepted <- i
							return
						}
					}
				}()
				if _, err := c.Recv(); !errors.Is(err, zmtp.ErrTooLarge) {
					t.Errorf("Recv: %v", err)
				}
				// A buffered read may have taken in one more than it had looked at.
				if n := <-accepted; n < test.most || n > test.most+1 {
					t.Errorf("%d were accepted, want %d", n, test.most)
				}
			})
		})
	}
}

func TestPublisherDialsUntilItsContextEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		attempts := 0
		l := newPipeListener()
		o := &zmtp.Options{Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			if attempts++; attempts <= 3 {
				return nil, errors.New("nobody listens yet")
			}
			return l.dial(ctx, network, address)
		}}
		p := zmtp.NewPublisher(o, 0)
		ctx, cancel := context.WithCancel(t.Context())
		connected := make(chan error)
		began := time.Now()
		go func() { connected <- p.Connect(ctx, "tcp://gateway:5557") }()
		for range 3 { // a listening SUB that comes back
			nc, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			c, err := zmtp.NewConn(t.Context(), nc, zmtp.SUB, nil)
			if err != nil {
				t.Fatal(err)
			}
			subscribe(t, c, "")
			if err := p.WaitSubscribers(t.Context(), 1); err != nil {
				t.Fatal(err)
			}
			p.Send([]byte("x"))
			receive(t, c, "x")
			c.Close()
			synctest.Wait()
		}
		if attempts != 6 || time.Since(began) != 500*time.Millisecond {
			t.Errorf("%d attempts in %v", attempts, time.Since(began))
		}
		cancel()
		if err := <-connected; err != nil {
			t.Errorf("Connect: %v", err)
		}
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := p.WaitSubscribers(short, 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("WaitSubscribers: %v", err)
		}
		p.Close()
	})
}

type temporary struct{ error }

func (temporary) Temporary() bool { return true }

func TestServeOutlivesTroubleAndEndsWithItsListener(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newPipeListener()
		p := zmtp.NewPublisher(nil, 0)
		defer p.Close()
		served := make(chan error, 1)
		go func() { served <- p.Serve(t.Context(), l) }()
		began := time.Now()
		for range 10 {
			l.errs <- temporary{errors.New("too many open files")}
		}
		if waited := time.Since(began); waited != (5+10+20+40+80+160+320+640+1000)*time.Millisecond {
			t.Errorf("ten failures took %v", waited)
		}
		stranger, err := l.dial(t.Context(), "", "")
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(stranger, "GET / HTTP/1.1\r\n\r\n") // its connection is closed, no more
		c := l.connect(t, zmtp.SUB, zmtp.Options{})
		subscribe(t, c, "")
		if err := p.WaitSubscribers(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		broken := errors.New("broken")
		l.errs <- broken
		if err := <-served; !errors.Is(err, broken) {
			t.Errorf("Serve: %v", err)
		}
		if _, err := c.Recv(); !errors.Is(err, io.EOF) {
			t.Errorf("its connections: %v", err)
		}
		c.Close()
	})
}

func TestServeEndsWithItsContext(t *testing.T) {
	t.Parallel()
	for _, failing := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			l := newPipeListener()
			p := zmtp.NewPublisher(nil, 0)
			defer p.Close()
			ctx, cancel := context.WithCancel(t.Context())
			served := make(chan error, 1)
			go func() { served <- p.Serve(ctx, l) }()
			c := l.connect(t, zmtp.SUB, zmtp.Options{})
			if failing {
				l.errs <- temporary{errors.New("too many open files")}
			}
			cancel()
			if err := <-served; err != nil {
				t.Errorf("Serve: %v", err)
			}
			if _, err := c.Recv(); !errors.Is(err, io.EOF) {
				t.Errorf("its connections: %v", err)
			}
			c.Close()
			<-l.closed
		})
	}
}

func TestRouterAnswersEachPeer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newPipeListener()
		r := zmtp.NewRouter(nil, 0)
		served := make(chan error)
		go func() { served <- r.Serve(t.Context(), l) }()
		named := l.connect(t, zmtp.DEALER, zmtp.Options{Identity: []byte("gateway")})
		nameless := l.connect(t, zmtp.DEALER, zmtp.Options{})
		for _, c := range []*zmtp.Conn{named, nameless} {
			request := []byte("start")
			if err := c.Send(nil, request); err != nil {
				t.Fatal(err)
			}
			id, frames, err := r.Recv(t.Context())
			if err != nil || len(frames) != 2 || string(frames[1]) != "start" {
				t.Fatalf("%q, %v", frames, err)
			}
			if c == named && id != "gateway" || c == nameless && !strings.HasPrefix(id, "\x00") {
				t.Errorf("id %q", id)
			}
			if !r.Send(id, nil, []byte("for "+id)) {
				t.Error("not sent")
			}
			receive(t, c, "", "for "+id)
		}
		if r.Send("gateway") || r.Send("nobody", []byte("x")) {
			t.Error("a message without frames, or for nobody, was sent")
		}

		second := l.connect(t, zmtp.DEALER, zmtp.Options{Identity: []byte("gateway")})
		if _, err := second.Recv(); !errors.Is(err, io.EOF) {
			t.Errorf("a second peer of that name: %v", err)
		}
		second.Close()
		if !r.Send("gateway", []byte("still here")) {
			t.Error("the first peer was pushed out")
		}
		receive(t, named, "still here")
		named.Close()
		synctest.Wait()
		if r.Send("gateway", []byte("x")) {
			t.Error("sent to a peer that is gone")
		}

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, _, err := r.Recv(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Recv: %v", err)
		}
		if err := nameless.Send([]byte("never received")); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		r.Close()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if _, _, err := r.Recv(t.Context()); !errors.Is(err, zmtp.ErrClosed) {
			t.Errorf("Recv after Close: %v", err)
		}
		nameless.Close()
	})
}

func TestRouterDropsAnswersAtTheHighWaterMark(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newPipeListener()
		r := zmtp.NewRouter(&zmtp.Options{HeartbeatInterval: -1}, 0) // 1000, as in a real engine
		go r.Serve(t.Context(), l)
		c := l.connect(t, zmtp.DEALER, zmtp.Options{Identity: []byte("gateway"), HeartbeatInterval: -1})
		synctest.Wait()
		sent := 0
		for i := range 5000 {
			if r.Send("gateway", nil, binary.BigEndian.AppendUint64(nil, uint64(i)), make([]byte, 1<<16)) {
				sent++
			}
			synctest.Wait()
		}
		if sent != 1001 { // one of 64 KiB is on the way
			t.Errorf("%d sent", sent)
		}
		for i := range sent {
			frames, err := c.Recv()
			if err != nil || binary.BigEndian.Uint64(frames[1]) != uint64(i) {
				t.Fatalf("message %d: %v", i, err)
			}
		}
		r.Close()
		c.Close()
	})
}

func TestARouterHoldsOneRequestOfEachPeer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newPipeListener()
		r := zmtp.NewRouter(&zmtp.Options{HeartbeatInterval: -1}, 0)
		go r.Serve(t.Context(), l)
		peer := l.play(t, hello(1, "DEALER"))
		taken := make(chan int, 1)
		go func() {
			n := 0
			for peer.say(frame(0, make([]byte, 50_000))) {
				n++
			}
			taken <- n
		}()
		time.Sleep(time.Hour)
		peer.Close()
		// One is held for Recv and what fits is in the read buffer; the rest is the peer's own.
		if n := <-taken; n > 2 {
			t.Errorf("%d requests were taken in while nobody received any", n)
		}
		r.Close()
	})
}
