// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvtap/kvtap/internal/zmtp"
)

func TestRecvReturnsWholeMessages(t *testing.T) {
	t.Parallel()
	long := bytes.Repeat([]byte("0123456789abcdef"), 20)
	short64 := append([]byte{2, 0, 0, 0, 0, 0, 0, 0, 3}, "abc"...) // the long form may carry a short frame
	ping := command("PING", "\x00\x00ctx")
	for _, test := range []struct {
		name string
		wire []byte
		want [][]string
	}{
		{"one frame", message([]byte("a")), [][]string{{"a"}}},
		{"an empty frame", message(nil), [][]string{{""}}},
		{"an engine's batch", message(nil, []byte("12345678"), long), [][]string{{"", "12345678", string(long)}}},
		{"frames of 255 and 256 bytes", message(long[:255], long[:256]),
			[][]string{{string(long[:255]), string(long[:256])}}},
		{"a short frame in the long form", short64, [][]string{{"abc"}}},
		{"several messages", append(message([]byte("a"), []byte("b")), message([]byte("c"))...),
			[][]string{{"a", "b"}, {"c"}}},
		{"commands between messages", join(ping, message([]byte("a")), ping, ping, message([]byte("b"))),
			[][]string{{"a"}, {"b"}}},
		{"commands between frames", join(frame(1, []byte("a")), ping, ping, frame(1, long), ping,
			frame(0, []byte("b"))),
			[][]string{{"a", string(long), "b"}}},
		{"unknown commands and a PONG", join(command("JOIN", "x"), command("PONG", ""), command("SUBSCRIBE", "x"),
			command("CANCEL", "x"), message([]byte("a"))),
			[][]string{{"a"}}},
		{"64 frames", message(several([]byte("x"), 64)...), [][]string{strings.Split(strings.Repeat("x", 64), "")}},
	} {
		for _, buffer := range []int{1, 64, 0} {
			t.Run(test.name, func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					c, peer := meet(t, zmtp.SUB, &zmtp.Options{ReadBuffer: buffer}, hello(1, "PUB"))
					go peer.drain()
					go func() {
						peer.say(test.wire)
						peer.Close()
					}()
					var got [][]string
					for {
						frames, err := c.Recv()
						if err != nil {
							if !errors.Is(err, io.EOF) {
								t.Error(err)
							}
							break
						}
						got = append(got, copies(frames))
						for _, f := range frames {
							_ = append(f, "an append must not reach the next frame"...)
						}
						if diff := cmp.Diff(got[len(got)-1], copies(frames)); diff != "" {
							t.Errorf("an append changed another frame: %s", diff)
						}
					}
					if diff := cmp.Diff(test.want, got); diff != "" {
						t.Errorf("(-want +got)\n%s", diff)
					}
					if _, err := c.Recv(); !errors.Is(err, io.EOF) {
						t.Errorf("Recv after the end: %v", err)
					}
				})
			})
		}
	}
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func several(b []byte, n int) [][]byte {
	s := make([][]byte, n)
	for i := range s {
		s[i] = b
	}
	return s
}

func TestRecvEndsAHostileConnection(t *testing.T) {
	t.Parallel()
	huge := func(flags byte, n uint64) []byte { return binary.BigEndian.AppendUint64([]byte{flags}, n) }
	for _, test := range []struct {
		name string
		wire []byte
		kind error
		want string
	}{
		{"a frame of 2^62 bytes", huge(2, 1<<62), zmtp.ErrTooLarge,
			"a message of at least 4611686018427387904 bytes, at most 1000"},
		{"a frame of 2^64-1 bytes after another", append(frame(1, []byte("ab")), huge(2, 1<<64-1)...), zmtp.ErrTooLarge,
			"at least 18446744073709551615"},
		{"a message above the limit by its second frame",
			append(frame(1, make([]byte, 900)), frame(0, make([]byte, 101))...), zmtp.ErrTooLarge, "1001 bytes"},
		{"frames without end", repeat(frame(1, nil), 1000), zmtp.ErrTooLarge, "more than 64 frames"},
		{"a command of 2^62 bytes", huge(6, 1<<62), zmtp.ErrTooLarge, "a command of 4611686018427387904 bytes"},
		{"reserved flags", []byte{0x80, 0}, zmtp.ErrMalformed, "flags 0x80"},
		{"a command with MORE", []byte{5, 1, 1}, zmtp.ErrMalformed, "flags 0x05"},
		{"an empty command", []byte{4, 0}, zmtp.ErrMalformed, "command frame"},
		{"a command without a name", []byte{4, 1, 0}, zmtp.ErrMalformed, "command frame"},
		{"a command shorter than its name", []byte{4, 2, 200, 'x'}, zmtp.ErrMalformed, "command frame"},
		{"a PING without a TTL", command("PING", "\x00"), zmtp.ErrMalformed, "a PING with 1 bytes"},
		{"a PING with a long context", command("PING", strings.Repeat("x", 19)), zmtp.ErrMalformed, "a PING with 19 bytes"},
		{"an ERROR", command("ERROR", "\x03bye"), zmtp.ErrRefused, `ERROR "bye"`},
		{"the end within a header", []byte{2, 0, 0}, io.ErrUnexpectedEOF, "within a message"},
		{"the end within a frame", message([]byte("abc"))[:3], io.ErrUnexpectedEOF, "within a message"},
		{"the end between frames", frame(1, []byte("abc")), io.ErrUnexpectedEOF, "within a message"},
		{"the end between messages", nil, io.EOF, "peer closed"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c, peer := meet(t, zmtp.SUB, &zmtp.Options{MaxMessage: 1000}, hello(1, "PUB"))
				go peer.drain() // ends when we close
				go func() {
					peer.say(test.wire)
					if test.kind == io.EOF || test.kind == io.ErrUnexpectedEOF {
						peer.Close()
					}
				}()
				frames, err := c.Recv()
				if !errors.Is(err, test.kind) || !strings.Contains(err.Error(), test.want) ||
					!strings.HasPrefix(err.Error(), "zmtp: ") {
					t.Errorf("Recv = %q, %v; want an error that says %q", frames, err, test.want)
				}
				if _, again := c.Recv(); again != err {
					t.Errorf("the next error is %v", again)
				}
				if send := c.Subscribe(nil); send != err {
					t.Errorf("Subscribe afterwards: %v", send)
				}
				if err := c.Close(); err != nil {
					t.Errorf("Close: %v", err)
				}
			})
		})
	}
}

// allocated is how many bytes f allocates, among other things.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// Not parallel: it counts what the whole process allocates.
func TestAClaimedLengthCostsNoMemory(t *testing.T) {
	claim := binary.BigEndian.AppendUint64([]byte{3}, 60<<20)
	nc := &endless{Conn: silentConn{}, hello: join(hello(1, "PUB"), frame(1, nil), claim, []byte("a few bytes")),
		ends: true}
	got := allocated(func() {
		c, err := zmtp.NewConn(t.Context(), nc, zmtp.SUB, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Recv(); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("Recv: %v", err)
		}
	})
	if got > 1<<20 {
		t.Errorf("%d bytes allocated for a claim of 60 MiB", got)
	}
}

func TestAFloodOfCommandsCostsNoMemory(t *testing.T) {
	flood := repeat(command("PING", "\x00\x000123456789abcdef"), 100_000)
	for _, test := range []struct {
		name  string
		first []byte
		want  int // frames
	}{{"between messages", nil, 1}, {"between frames", frame(1, make([]byte, 60<<10)), 2}} {
		t.Run(test.name, func(t *testing.T) {
			nc := &endless{Conn: silentConn{}, hello: join(hello(1, "PUB"), test.first, flood, message([]byte("x"))),
				ends: true}
			var frames [][]byte
			got := allocated(func() {
				c, err := zmtp.NewConn(t.Context(), nc, zmtp.SUB, nil)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				if frames, err = c.Recv(); err != nil {
					t.Error(err)
				}
			})
			if len(frames) != test.want || string(frames[len(frames)-1]) != "x" {
				t.Errorf("got %d frames", len(frames))
			}
			if got > 1<<20 {
				t.Errorf("%d bytes allocated for %d bytes of PINGs", got, len(flood))
			}
		})
	}
}

func TestAGrownBufferIsGivenBack(t *testing.T) {
	// 3 MiB, then small ones: the first small message must already live in a small buffer.
	large := bytes.Repeat([]byte("0123456789abcdef"), 3<<16)
	nc := &endless{Conn: silentConn{}, hello: join(hello(1, "PUB"), message([]byte("t"), large),
		message([]byte("a"))), ends: true}
	c, err := zmtp.NewConn(t.Context(), nc, zmtp.SUB, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	frames, err := c.Recv()
	if err != nil || len(frames) != 2 || !bytes.Equal(frames[1], large) || string(frames[0]) != "t" {
		t.Fatalf("%d frames, %v", len(frames), err)
	}
	if frames, err = c.Recv(); err != nil || len(frames) != 1 || string(frames[0]) != "a" {
		t.Fatalf("%q, %v", frames, err)
	}
}

func TestRecvAllocatesNothing(t *testing.T) {
	for _, payload := range []int{benchPayload, 100 << 10} {
		nc := &endless{Conn: silentConn{}, hello: hello(1, "PUB"), chunk: repeat(engineMessage(payload), 16)}
		c, err := zmtp.NewConn(t.Context(), nc, zmtp.SUB, nil)
		if err != nil {
			t.Fatal(err)
		}
		recv := func() {
			if frames, err := c.Recv(); err != nil || len(frames) != 3 || len(frames[2]) != payload {
				t.Fatalf("%d frames, %v", len(frames), err)
			}
		}
		for range 100 {
			recv() // let the buffer grow
		}
		if n := testing.AllocsPerRun(1000, recv); n != 0 {
			t.Errorf("%v allocations for a message of %d bytes", n, payload)
		}
		c.Close()
	}
}

func TestSendAllocatesNothing(t *testing.T) {
	nc := &endless{Conn: silentConn{}, hello: hello(1, "ROUTER")}
	c, err := zmtp.NewConn(t.Context(), nc, zmtp.DEALER, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	start := make([]byte, 8)
	if n := testing.AllocsPerRun(1000, func() {
		if err := c.Send(nil, start); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func TestSendOnTheWire(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, peer := meet(t, zmtp.DEALER, nil, hello(1, "ROUTER"))
		large := bytes.Repeat([]byte("x"), 2<<20)
		go func() {
			if err := c.Send(nil, []byte("12345678")); err != nil {
				t.Error(err)
			}
			if err := c.Send(large); err != nil {
				t.Error(err)
			}
		}()
		peer.expect(message(nil, []byte("12345678")))
		peer.expect(message(large))
		if err := c.Send(); err == nil {
			t.Error("a message without frames was sent")
		}
		if err := c.Subscribe(nil); err == nil {
			t.Error("a DEALER subscribed")
		}
		c.Close()
		peer.Close()
	})
}

func TestMessagesOfConcurrentSendersNeverInterleave(t *testing.T) {
	t.Parallel()
	ours, theirs := net.Pipe()
	type accepted struct {
		c   *zmtp.Conn
		err error
	}
	met := make(chan accepted, 1)
	go func() {
		c, err := zmtp.NewConn(t.Context(), theirs, zmtp.ROUTER, nil)
		met <- accepted{c, err}
	}()
	sender, err := zmtp.NewConn(t.Context(), ours, zmtp.DEALER, nil)
	if err != nil {
		t.Fatal(err)
	}
	receiver := <-met
	if receiver.err != nil {
		t.Fatal(receiver.err)
	}
	var senders sync.WaitGroup
	for i := range 8 {
		senders.Go(func() {
			for range 50 {
				name := []byte{byte('a' + i)}
				if err := sender.Send(name, bytes.Repeat(name, 300), name); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 8 * 50 {
		frames, err := receiver.c.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if len(frames) != 3 || !bytes.Equal(frames[1], bytes.Repeat(frames[0], 300)) || !bytes.Equal(frames[0], frames[2]) {
			t.Fatalf("got %q", frames)
		}
	}
	senders.Wait()
	sender.Close()
	if _, err := receiver.c.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %v", err)
	}
	receiver.c.Close()
}

func TestSubscribeSpeaksThePeersVersion(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		minor byte
		wire  [][]byte
	}{
		{"commands to ZMTP 3.1", 1, [][]byte{command("SUBSCRIBE", "kv@"), command("CANCEL", "kv@"),
			command("SUBSCRIBE", "")}},
		{"messages to ZMTP 3.0", 0, [][]byte{message([]byte("\x01kv@")), message([]byte("\x00kv@")),
			message([]byte("\x01"))}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c, peer := meet(t, zmtp.SUB, nil, hello(test.minor, "PUB"))
				go func() {
					for _, err := range []error{c.Subscribe([]byte("kv@")), c.Unsubscribe([]byte("kv@")), c.Subscribe(nil)} {
						if err != nil {
							t.Error(err)
						}
					}
					if err := c.Send([]byte("x")); err == nil {
						t.Error("a SUB sent a message")
					}
					c.Close()
				}()
				for _, want := range test.wire {
					peer.expect(want)
				}
				if rest := peer.drain(); len(rest) > 0 {
					t.Errorf("and then %q", rest)
				}
			})
		})
	}
}

func TestCloseCutsABlockedRecvAndSend(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, peer := meet(t, zmtp.DEALER, nil, hello(1, "ROUTER"))
		defer peer.Close()
		began := time.Now()
		time.AfterFunc(time.Second, func() { c.Close() })
		var calls sync.WaitGroup
		for _, call := range []func() error{
			func() error { _, err := c.Recv(); return err },
			func() error { return c.Send([]byte("nobody reads this")) },
			func() error { return c.Send([]byte("nor this, which waits behind it")) },
		} {
			calls.Go(func() {
				if err := call(); !errors.Is(err, zmtp.ErrClosed) || time.Since(began) != time.Second {
					t.Errorf("%v after %v", err, time.Since(began))
				}
			})
		}
		calls.Wait()
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if err := c.Send([]byte("x")); !errors.Is(err, zmtp.ErrClosed) {
			t.Errorf("Send after Close: %v", err)
		}
	})
}

func TestANetworkErrorIsPassedOn(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		nc   *endless
		want error
	}{
		{&endless{Conn: silentConn{}, hello: hello(1, "PUB"), ends: true, last: io.ErrClosedPipe}, io.ErrClosedPipe},
		{&endless{Conn: silentConn{}, hello: hello(1, "PUB")}, io.ErrNoProgress},
	} {
		c, err := zmtp.NewConn(t.Context(), test.nc, zmtp.SUB, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Recv(); !errors.Is(err, test.want) || !strings.HasPrefix(err.Error(), "zmtp: read: ") {
			t.Errorf("Recv: %v", err)
		}
		c.Close()
	}
}
