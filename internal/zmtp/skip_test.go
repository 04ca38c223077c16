// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kvtap/kvtap/internal/interop"
	"github.com/kvtap/kvtap/internal/zmtp"
)

// received is a message as Recv and Omitted tell it.
type received struct {
	Frames  []string
	Omitted uint64
}

func TestWhatIsTooLargeIsSkipped(t *testing.T) {
	t.Parallel()
	const maxMessage = 1000
	x := func(n int) []byte { return bytes.Repeat([]byte("x"), n) }
	whole := func(frames ...string) received { return received{Frames: frames} }
	without := func(omitted uint64, frames ...string) received { return received{frames, omitted} }
	long := string(x(1000))
	seq := []byte("12345678")
	ping := command("PING", "\x00\x00ctx")
	for _, test := range []struct {
		name string
		wire []byte
		want []received
	}{
		{"a message at the limit is whole", message(x(400), x(600)), []received{whole(string(x(400)), string(x(600)))}},
		{"a payload leaves its number and topic", message([]byte("kv@"), seq, x(5000)),
			[]received{without(5000, "kv@", "12345678", "")}},
		{"messages before and after it are whole", join(message(seq), message(x(1001)), message(nil), message(seq, seq)),
			[]received{whole("12345678"), without(1001, ""), whole(""), whole("12345678", "12345678")}},
		{"one after another", repeat(message(x(100_000)), 3),
			[]received{without(100_000, ""), without(100_000, ""), without(100_000, "")}},
		{"frames behind it are kept", message(x(3000), seq, nil), []received{without(3000, "", "12345678", "")}},
		{"what stands before a payload takes no room from it", message(x(990), seq, x(1000)),
			[]received{whole(string(x(990)), "12345678", string(x(1000)))}},
		{"a frame that fits alone but not behind so many others",
			message(x(1000), x(1000), x(1000), x(1000), x(1000), x(97), x(96), x(1)),
			[]received{without(98, long, long, long, long, long, "", string(x(96)), "")}},
		{"two frames of one message", message(x(2000), seq, x(70_000)), []received{without(72_000, "", "12345678", "")}},
		{"commands around it are heard", join(ping, frame(1, x(2000)), ping, frame(1, seq), ping, frame(0, x(2000)), ping,
			message(seq)), []received{without(4000, "", "12345678", ""), whole("12345678")}},
		{"64 frames, of which each second is too large", message(cross(nil, x(1001), 32)...),
			[]received{without(32*1001, make([]string, 64)...)}},
	} {
		for _, o := range []zmtp.Options{{ReadBuffer: 1}, {ReadBuffer: 700}, {}} {
			t.Run(test.name, func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					o.MaxMessage, o.SkipTooLarge = maxMessage, true
					c, peer := meet(t, zmtp.SUB, &o, hello(1, "PUB"))
					go peer.drain()
					go func() {
						peer.say(test.wire)
						peer.Close()
					}()
					var got []received
					for {
						frames, err := c.Recv()
						if err != nil {
							if !errors.Is(err, io.EOF) {
								t.Error(err)
							}
							break
						}
						omitted, digest := c.Omitted()
						if omitted == 0 && digest != 0 {
							t.Errorf("a whole message has the digest %#x", digest)
						}
						got = append(got, received{copies(frames), omitted})
					}
					if diff := cmp.Diff(test.want, got); diff != "" {
						t.Errorf("(-want +got)\n%s", diff)
					}
				})
			})
		}
	}
}

// cross returns a and b in turn, n times each.
func cross(a, b []byte, n int) [][]byte {
	var s [][]byte
	for range n {
		s = append(s, a, b)
	}
	return s
}

func TestSomeLimitsEndAConnectionThatSkips(t *testing.T) {
	t.Parallel()
	claim := func(flags byte, n uint64) []byte { return binary.BigEndian.AppendUint64([]byte{flags}, n) }
	large := make([]byte, 2000)
	for _, test := range []struct {
		name     string
		local    zmtp.SocketType
		peerType string
		wire     []byte
		want     error
	}{
		{"a frame too many", zmtp.SUB, "PUB", repeat(frame(1, nil), 65), zmtp.ErrTooLarge},
		{"a large frame too many", zmtp.SUB, "PUB", join(repeat(frame(1, nil), 64), frame(0, large)), zmtp.ErrTooLarge},
		{"large frames without end", zmtp.DEALER, "ROUTER", repeat(frame(1, large), 65), zmtp.ErrTooLarge},
		{"a large command", zmtp.SUB, "PUB", claim(6, 1<<62), zmtp.ErrTooLarge},
		{"a large command within a message", zmtp.SUB, "PUB", join(frame(1, large), claim(6, 1<<62)), zmtp.ErrTooLarge},
		{"reserved flags", zmtp.SUB, "PUB", claim(0x82, 1<<62), zmtp.ErrMalformed},
		{"the end within what is skipped", zmtp.SUB, "PUB", claim(2, 1<<63), io.ErrUnexpectedEOF},
		{"the end later within what is skipped", zmtp.SUB, "PUB", frame(0, large)[:1500], io.ErrUnexpectedEOF},
		{"the end behind what was skipped", zmtp.SUB, "PUB", frame(1, large), io.ErrUnexpectedEOF},
		{"a request to a router", zmtp.ROUTER, "DEALER", message(large), zmtp.ErrTooLarge},
		{"a subscription", zmtp.PUB, "SUB", message(large), zmtp.ErrTooLarge},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			nc := &endless{Conn: silentConn{}, hello: join(hello(1, test.peerType), test.wire), ends: true}
			c, err := zmtp.NewConn(t.Context(), nc, test.local, &zmtp.Options{MaxMessage: 1000, SkipTooLarge: true})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if frames, err := c.Recv(); !errors.Is(err, test.want) {
				t.Errorf("%d frames, %v; want %v", len(frames), err, test.want)
			}
		})
	}
}

// reading is a connection whose peer says what r holds and takes every write.
type reading struct {
	net.Conn
	r io.Reader
}

func (r reading) Read(b []byte) (int, error) { return r.r.Read(b) }

// zeros is a stream of zero bytes that never ends.
type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// Not parallel: it counts what the whole process allocates.
func TestSkippingCostsNoMemory(t *testing.T) {
	const claimed, arrives = 1 << 63, 512 << 20
	const readBuffer, maxMessage = 64 << 10, 4 << 20
	topic := []byte("topic")
	for _, test := range []struct {
		name  string
		first []byte
		most  int // of the buffer
	}{
		{"as a message's first frame", nil, readBuffer},
		{"behind a frame", topic, readBuffer},
		{"behind a frame that fills the buffer", make([]byte, readBuffer-32), 2 * readBuffer},
	} {
		t.Run(test.name, func(t *testing.T) {
			start := hello(1, "PUB")
			if test.first != nil {
				start = append(start, frame(1, test.first)...)
			}
			start = binary.BigEndian.AppendUint64(append(start, 2), claimed)
			nc := reading{silentConn{}, io.MultiReader(bytes.NewReader(start), io.LimitReader(zeros{}, arrives))}
			got := allocated(func() {
				c, err := zmtp.NewConn(t.Context(), nc, zmtp.SUB, &zmtp.Options{MaxMessage: maxMessage, SkipTooLarge: true})
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				if _, err := c.Recv(); !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Errorf("Recv: %v", err)
				}
				if n := c.BufferSize(); n > test.most {
					t.Errorf("a buffer of %d bytes", n)
				}
			})
			if got > 1<<20 {
				t.Errorf("%d bytes allocated for %d bytes of a frame that claims 2^63", got, arrives)
			}
		})
	}
}

func TestSkippingAllocatesNothing(t *testing.T) {
	chunk := join(message([]byte("kv@"), make([]byte, 8), make([]byte, 300_000)), engineMessage(benchPayload))
	nc := &endless{Conn: silentConn{}, hello: hello(1, "PUB"), chunk: chunk}
	c, err := zmtp.NewConn(t.Context(), nc, zmtp.SUB, &zmtp.Options{MaxMessage: 2000, SkipTooLarge: true})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	recv := func() {
		for _, want := range []uint64{300_000, 0} {
			if frames, err := c.Recv(); err != nil || len(frames) != 3 {
				t.Fatalf("%d frames, %v", len(frames), err)
			}
			if n, _ := c.Omitted(); n != want {
				t.Fatalf("%d bytes left out, want %d", n, want)
			}
		}
	}
	if n := testing.AllocsPerRun(500, recv); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// What is left out has one digest, on whatever connection, in whatever pieces and behind whatever frames it comes;
// anything else has another.
func TestDigestsTellWhatWasLeftOut(t *testing.T) {
	t.Parallel()
	large := bytes.Repeat([]byte("0123456789abcdef"), 10_000)
	changed := func(at int) []byte {
		b := bytes.Clone(large)
		b[at] ^= 1
		return b
	}
	topic, seq := []byte("kv@"), []byte("12345678")
	type leftOut struct{ bytes, digest uint64 }
	seen := make(map[leftOut]int)
	for i, same := range [][][]byte{
		{message(large), message(topic, seq, large), message(nil, topic, seq, large), message(nil, seq, large, topic)},
		{message(changed(0))},
		{message(changed(len(large) - 1))},
		{message(changed(len(large) / 2))},
		{message(large[:len(large)-1])},
		{message(append(bytes.Clone(large), 0))},
		{message(large, large), message(large, seq, large)},
		{message(large[:len(large)/2], large[len(large)/2:])},
		{message(large[:len(large)/2-1], large[len(large)/2-1:])},
	} {
		var first leftOut
		for j, wire := range same {
			for _, cut := range []struct {
				sizes  []byte
				buffer int
			}{{}, {[]byte{255, 3, 0, 77}, 100}} {
				nc := &pieces{Conn: silentConn{}, stream: join(hello(1, "PUB"), wire), sizes: cut.sizes}
				o := &zmtp.Options{MaxMessage: 1000, SkipTooLarge: true, ReadBuffer: cut.buffer}
				c, err := zmtp.NewConn(t.Context(), nc, zmtp.SUB, o)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := c.Recv(); err != nil {
					t.Fatal(err)
				}
				var got leftOut
				got.bytes, got.digest = c.Omitted()
				c.Close()
				if first == (leftOut{}) {
					first = got
				}
				if got != first {
					t.Errorf("message %d, form %d: %#x, want %#x", i, j, got, first)
				}
			}
		}
		if other, known := seen[first]; known {
			t.Errorf("messages %d and %d have the digest %#x", other, i, first)
		}
		seen[first] = i
	}
}

func TestBytesThatAreSkippedShowLife(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, peer := meet(t, zmtp.SUB, &zmtp.Options{MaxMessage: 1000, SkipTooLarge: true}, hello(1, "PUB"))
		go peer.drain()
		stopped := time.Now().Add(3000 * time.Second)
		go func() {
			peer.say(binary.BigEndian.AppendUint64([]byte{2}, 1<<63))
			for range 1000 {
				time.Sleep(3 * time.Second)
				peer.say(make([]byte, 100))
			}
		}()
		if _, err := c.Recv(); !errors.Is(err, zmtp.ErrSilent) {
			t.Errorf("Recv: %v", err)
		}
		if at := time.Since(stopped); at <= 0 || at > foundWithin {
			t.Errorf("ended %v after the last byte", at)
		}
		c.Close()
	})
}

func TestCloseCutsSkipping(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, peer := meet(t, zmtp.SUB, &zmtp.Options{MaxMessage: 1000, SkipTooLarge: true}, hello(1, "PUB"))
		go peer.drain()
		var sender sync.WaitGroup
		defer sender.Wait()
		sender.Go(func() {
			for wire := binary.BigEndian.AppendUint64([]byte{2}, 1<<63); peer.say(wire); wire = make([]byte, 5000) {
				time.Sleep(time.Millisecond)
			}
		})
		time.AfterFunc(time.Second, func() { c.Close() })
		if _, err := c.Recv(); !errors.Is(err, zmtp.ErrClosed) {
			t.Errorf("Recv: %v", err)
		}
		c.Close()
	})
}

func TestInteropALibzmqPublishersLargeMessageIsSkipped(t *testing.T) {
	t.Parallel()
	peer := interop.Start(t, "xpub", "--hwm", "0")
	sub := dial(t, peer.Endpoint("endpoint"), zmtp.SUB, &zmtp.Options{MaxMessage: 100_000, SkipTooLarge: true})
	subscribe(t, sub, "")
	peer.Expect("message")
	var first uint64
	for range 2 {
		peer.Say("send", hex.EncodeToString([]byte("before")))
		receive(t, sub, "before")
		peer.Say("burst 1 20000000")
		receive(t, sub, "kv@pod@model", "\x00\x00\x00\x00\x00\x00\x00\x00", "")
		n, digest := sub.Omitted()
		if n != 20_000_000 || first != 0 && digest != first {
			t.Errorf("%d bytes left out, digest %#x, before %#x", n, digest, first)
		}
		first = digest
		peer.Say("burst 10 99000")
		receiveBurst(t, sub, 10, 99_000)
	}
}
