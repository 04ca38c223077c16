// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kvtap/kvtap/internal/zmtp"
)

// With the defaults (5s, 4s) a PING's TTL is three intervals: 150 tenths.
var defaultPing = command("PING", "\x00\x96")

func TestASilentPeerIsFound(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, peer := meet(t, zmtp.SUB, nil, hello(1, "PUB"))
		go peer.drain()
		began := time.Now()
		_, err := c.Recv()
		if !errors.Is(err, zmtp.ErrSilent) || time.Since(began) != 9*time.Second {
			t.Errorf("%v after %v, want ErrSilent 4s after the first PING at 5s", err, time.Since(began))
		}
		c.Close()
	})
}

func TestAnyByteShowsThatAPeerIsAlive(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, peer := meet(t, zmtp.SUB, nil, hello(1, "PUB"))
		go peer.drain()
		go func() {
			// A message so slow that no PONG gets through: one byte every 3s, the last at 60s.
			for _, b := range message(make([]byte, 18)) {
				time.Sleep(3 * time.Second)
				peer.say([]byte{b})
			}
		}()
		if frames, err := c.Recv(); err != nil || len(frames) != 1 {
			t.Fatalf("%q, %v", frames, err)
		}
		if !c.LastReceived().Equal(time.Now()) {
			t.Errorf("last received %v ago", time.Since(c.LastReceived()))
		}
		began := time.Now()
		if _, err := c.Recv(); !errors.Is(err, zmtp.ErrSilent) || time.Since(began) != 9*time.Second {
			t.Errorf("%v after %v; the next PING was 5s away", err, time.Since(began))
		}
		c.Close()
	})
}

func TestAnsweredPingsKeepAConnection(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, peer := meet(t, zmtp.SUB, nil, hello(1, "PUB"))
		go func() {
			for range 100 {
				peer.expect(defaultPing)
				time.Sleep(3900 * time.Millisecond)
				peer.say(command("PONG", ""))
			}
			peer.Close()
		}()
		began := time.Now()
		_, err := c.Recv()
		if want := 500*time.Second + 3900*time.Millisecond; !errors.Is(err, io.EOF) || time.Since(began) != want {
			t.Errorf("%v after %v, want %v", err, time.Since(began), want)
		}
		c.Close()
	})
}

// lagging is a connection whose writes return a moment after the peer has read them, as any write may on a busy
// machine.
type lagging struct{ net.Conn }

func (l lagging) Write(b []byte) (int, error) {
	n, err := l.Conn.Write(b)
	time.Sleep(time.Second)
	return n, err
}

func TestAnAnswerThatOvertakesTheEndOfTheWriteCounts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		peer := scripted{theirs, t}
		go peer.say(hello(1, "PUB"))
		go func() {
			peer.hear(64)
			peer.hear(1)
			peer.hear(int(peer.hear(1)[0]))
			for range 20 {
				peer.expect(defaultPing)
				peer.say(command("PONG", ""))
			}
			peer.Close()
		}()
		c, err := zmtp.NewConn(t.Context(), lagging{ours}, zmtp.SUB, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Recv(); !errors.Is(err, io.EOF) {
			t.Errorf("%v, though every PING was answered at once", err)
		}
		c.Close()
	})
}

func TestPingsGoOnWhileAHandlerRuns(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, peer := meet(t, zmtp.SUB, nil, hello(1, "PUB"))
		pings := make(chan time.Duration, 100)
		began := time.Now()
		go func() {
			peer.say(message([]byte("work")))
			for range 12 {
				peer.expect(defaultPing)
				pings <- time.Since(began)
			}
			peer.drain()
		}()
		if _, err := c.Recv(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(62 * time.Second) // the handler, longer than any timeout
		if len(pings) != 12 {
			t.Errorf("%d PINGs in 62s of handling", len(pings))
		}
		for i := range len(pings) {
			if at, want := <-pings, time.Duration(i+1)*5*time.Second; at != want {
				t.Errorf("PING at %v, want %v", at, want)
			}
		}
		// Only from here on is the peer's time running.
		reading := time.Now()
		if _, err := c.Recv(); !errors.Is(err, zmtp.ErrSilent) || time.Since(reading) != 4*time.Second {
			t.Errorf("%v after reading for %v, want ErrSilent after 4s", err, time.Since(reading))
		}
		c.Close()
	})
}

func TestAPeerThatAnsweredDuringAHandlerIsAlive(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, peer := meet(t, zmtp.SUB, nil, hello(1, "PUB"))
		go func() {
			peer.say(message([]byte("work")))
			go peer.drain()
			peer.say(message([]byte("more"))) // waits until somebody reads, like bytes in the kernel
			time.Sleep(3900 * time.Millisecond)
			peer.Close()
		}()
		if _, err := c.Recv(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if frames, err := c.Recv(); err != nil || string(frames[0]) != "more" {
			t.Errorf("%q, %v", frames, err)
		}
		if _, err := c.Recv(); !errors.Is(err, io.EOF) {
			t.Errorf("%v", err)
		}
		c.Close()
	})
}

func TestNoPingsToThoseWhoDoNotKnowThem(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		o    zmtp.Options
		peer []byte
	}{
		{"a ZMTP 3.0 peer", zmtp.Options{}, hello(0, "PUB")},
		{"heartbeats turned off", zmtp.Options{HeartbeatInterval: -1}, hello(1, "PUB")},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c, peer := meet(t, zmtp.SUB, &test.o, test.peer)
				time.AfterFunc(24*time.Hour, func() { c.Close() })
				heard := make(chan []byte, 1)
				go func() { heard <- peer.drain() }()
				if _, err := c.Recv(); !errors.Is(err, zmtp.ErrClosed) {
					t.Errorf("after a silent day: %v", err)
				}
				if b := <-heard; len(b) > 0 {
					t.Errorf("the peer was sent %q", b)
				}
			})
		})
	}
}

func TestPublishersAndRoutersPingWithoutATTL(t *testing.T) {
	t.Parallel()
	for local, peerType := range map[zmtp.SocketType]string{zmtp.PUB: "SUB", zmtp.ROUTER: "DEALER"} {
		t.Run(string(local), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c, peer := meet(t, local, nil, hello(1, peerType))
				peer.expect(command("PING", "\x00\x00"))
				c.Close()
			})
		})
	}
}

func TestAPingsTTLLeavesRoomForThree(t *testing.T) {
	t.Parallel()
	const s = time.Second
	for _, test := range []struct {
		name              string
		local             zmtp.SocketType
		interval, timeout time.Duration
		want              string
	}{
		{"the defaults", zmtp.SUB, 0, 0, "\x00\x96"}, // 15s
		{"a dealer's", zmtp.DEALER, 5 * s, 4 * s, "\x00\x96"},
		{"a long time to answer", zmtp.SUB, 2 * s, 20 * s, "\x00\xdc"},
		{"parts of a tenth round up", zmtp.SUB, 1001 * time.Millisecond, s, "\x00\x1f"},
		{"as short as it gets", zmtp.SUB, 1, 1, "\x00\x01"},
		{"three intervals that just fit", zmtp.SUB, 2184500 * time.Millisecond, s, "\xff\xff"},
		{"three intervals that do not", zmtp.SUB, 6000 * s, 100 * s, "\xff\xff"},
		{"one that just fits", zmtp.SUB, 6553 * s, s / 2, "\xff\xff"},
		{"one that does not: the peer would drop us in between", zmtp.SUB, 6553 * s, s, "\x00\x00"},
		{"the longest interval", zmtp.SUB, 1<<63 - 1, 1<<63 - 1, "\x00\x00"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				o := &zmtp.Options{HeartbeatInterval: test.interval, HeartbeatTimeout: test.timeout, WriteTimeout: -1}
				c, peer := meet(t, test.local, o, hello(1, accepted[test.local]))
				peer.expect(command("PING", test.want))
				c.Close()
			})
		})
	}
}

// accepted is a peer for each of our sockets.
var accepted = map[zmtp.SocketType]string{zmtp.SUB: "PUB", zmtp.DEALER: "ROUTER"}

func TestAPeersTTLIsHonoured(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, peer := meet(t, zmtp.SUB, &zmtp.Options{HeartbeatInterval: -1}, hello(1, "PUB"))
		began := time.Now()
		go func() {
			go peer.drain()
			for range 3 {
				peer.say(command("PING", "\x00\x19")) // 2.5s
				time.Sleep(2400 * time.Millisecond)
			}
			peer.say(message([]byte("work"))) // counts as much as a PING
		}()
		if _, err := c.Recv(); err != nil {
			t.Fatal(err)
		}
		if at := time.Since(began); at != 7200*time.Millisecond {
			t.Errorf("the message came at %v", at)
		}
		time.Sleep(time.Minute) // the handler's time is not the peer's
		reading := time.Now()
		if _, err := c.Recv(); !errors.Is(err, zmtp.ErrSilent) || time.Since(reading) != 2500*time.Millisecond {
			t.Errorf("%v after %v", err, time.Since(reading))
		}
		c.Close()
	})
}

func TestPingsAreAnsweredWithTheirContext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, peer := meet(t, zmtp.SUB, &zmtp.Options{HeartbeatInterval: -1}, hello(1, "PUB"))
		go func() {
			peer.say(command("PING", "\x00\x00"))
			peer.expect(command("PONG", ""))
			peer.say(command("PING", "\x00\x000123456789abcdef"))
			peer.expect(command("PONG", "0123456789abcdef"))
			peer.say(command("PING", "\x00\x00a"), command("PING", "\x00\x00b"))
			peer.expect(command("PONG", "a"))
			peer.expect(command("PONG", "b"))
			peer.say(message([]byte("done")))
		}()
		if frames, err := c.Recv(); err != nil || string(frames[0]) != "done" {
			t.Errorf("%q, %v", frames, err)
		}
		c.Close()
	})
}

func TestAFloodOfPingsDoesNotStopTheReader(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, peer := meet(t, zmtp.SUB, &zmtp.Options{HeartbeatInterval: -1}, hello(1, "PUB"))
		go func() {
			for i := range 100 { // and reads no answer
				peer.say(command("PING", fmt.Sprintf("\x00\x00%02d", i)))
			}
			peer.say(message([]byte("done")))
		}()
		if frames, err := c.Recv(); err != nil || string(frames[0]) != "done" {
			t.Errorf("%q, %v", frames, err)
		}
		// The keeper held the first answers when the flood came; of the rest the newest are kept.
		go func() {
			time.Sleep(time.Second)
			c.Close()
		}()
		heard := peer.drain()
		pong := len(command("PONG", "00"))
		last := command("PONG", "99")
		if n := len(heard) / pong; n > 17 || string(heard[len(heard)-pong:]) != string(last) {
			t.Errorf("%d answers, the last is %q", n, heard[len(heard)-pong:])
		}
	})
}

func TestAPeerThatNeverReadsLosesItsConnection(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		says []byte
		want time.Duration
	}{
		{"owed a PONG", command("PING", "\x00\x00"), 3 * time.Second},
		{"sent a PING", nil, 8 * time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c, peer := meet(t, zmtp.SUB, &zmtp.Options{WriteTimeout: 3 * time.Second}, hello(1, "PUB"))
				defer peer.Close()
				began := time.Now()
				go func() {
					peer.say(test.says)
					for peer.say(message([]byte("x"))) {
						time.Sleep(time.Second)
					}
				}()
				for {
					_, err := c.Recv()
					if err == nil {
						continue
					}
					if !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) != test.want {
						t.Errorf("%v after %v, want a write's deadline after %v", err, time.Since(began), test.want)
					}
					break
				}
				if err := c.Subscribe(nil); !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("Subscribe afterwards: %v", err)
				}
				c.Close()
				time.Sleep(2 * time.Second) // for the peer to notice
			})
		})
	}
}

// reluctant is a connection whose peer takes each write only after a while.
type reluctant struct {
	net.Conn
	after time.Duration
}

func (r reluctant) Write(b []byte) (int, error) {
	time.Sleep(r.after)
	return r.Conn.Write(b)
}

// A peer that takes each PING just before the write would fail, and says nothing, holds up the keeper. That must not
// look like a process of ours that stood still, whose peer is given its time anew.
func TestAPeerThatOnlyReadsIsSilent(t *testing.T) {
	t.Parallel()
	for _, interval := range []time.Duration{time.Second, 2 * time.Second, 5 * time.Second} {
		for _, after := range []time.Duration{0, 2 * time.Second, 3990 * time.Millisecond} {
			t.Run(fmt.Sprintf("a PING each %v, taken after %v", interval, after), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					ours, theirs := net.Pipe()
					peer := scripted{theirs, t}
					go peer.drain()
					go peer.say(hello(1, "PUB"))
					o := &zmtp.Options{HeartbeatInterval: interval}
					c, err := zmtp.NewConn(t.Context(), reluctant{ours, after}, zmtp.SUB, o)
					if err != nil {
						t.Fatal(err)
					}
					began := time.Now()
					time.AfterFunc(time.Minute, func() { c.Close() })
					// The first PING, 4s to answer it once it is taken, and then the keeper may just be writing another.
					limit := interval + after + 4*time.Second + after
					if _, err := c.Recv(); !errors.Is(err, zmtp.ErrSilent) || time.Since(began) > limit {
						t.Errorf("%v after %v, want ErrSilent within %v", err, time.Since(began), limit)
					}
					c.Close()
				})
			})
		}
	}
}

func TestASendThatIsNotReadEndsTheConnection(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, peer := meet(t, zmtp.DEALER, nil, hello(1, "ROUTER"))
		defer peer.Close()
		began := time.Now()
		err := c.Send([]byte("nobody reads this"))
		if !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) != 4*time.Second {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		if _, again := c.Recv(); again != err {
			t.Errorf("Recv: %v", again)
		}
		c.Close()
	})
}

func TestWhatAPeerSentBeforeItClosedIsRead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c, peer := meet(t, zmtp.SUB, nil, hello(1, "PUB"))
		go func() {
			peer.say(join(command("PING", "\x00\x00"), message([]byte("a")), message([]byte("b"))))
			peer.Close()
		}()
		receive(t, c, "a")
		synctest.Wait() // the PONG has failed
		if err := c.Subscribe(nil); err == nil {
			t.Error("Subscribe wrote to a closed peer")
		}
		time.Sleep(time.Minute)
		receive(t, c, "b")
		if _, err := c.Recv(); !errors.Is(err, io.EOF) {
			t.Errorf("then %v", err)
		}
		c.Close()
	})
}

// unwritable is a connection that lost one of its directions without the other's noticing.
type unwritable struct {
	net.Conn
	lost atomic.Bool
}

func (u *unwritable) Write(b []byte) (int, error) {
	if u.lost.Load() {
		return 0, io.ErrClosedPipe
	}
	return u.Conn.Write(b)
}

func TestAConnectionThatCannotBeWrittenEndsWithSilence(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		peer := scripted{theirs, t}
		go peer.drain()
		go func() {
			peer.say(hello(1, "PUB"))
			for range 10 {
				time.Sleep(3 * time.Second)
				peer.say(message([]byte("x")))
			}
		}()
		nc := &unwritable{Conn: ours}
		c, err := zmtp.NewConn(t.Context(), nc, zmtp.SUB, nil)
		if err != nil {
			t.Fatal(err)
		}
		nc.lost.Store(true)
		for range 10 {
			receive(t, c, "x")
		}
		began := time.Now()
		// The count begins where the keeper looks, at most one timeout after the last byte.
		if _, err := c.Recv(); !errors.Is(err, zmtp.ErrSilent) || time.Since(began) > 8*time.Second {
			t.Errorf("%v after %v", err, time.Since(began))
		}
		c.Close()
	})
}
