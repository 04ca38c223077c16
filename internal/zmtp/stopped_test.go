// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kvtap/kvtap/internal/zmtp"
)

// foundWithin is the promise, with the default options, for a peer that stops: from its last byte to the end of the
// connection. It follows from 5s to the next PING and 4s to answer it, or to write it.
const foundWithin = 9 * time.Second

// living answers our PINGs until it is stopped.
type living struct {
	scripted
	stopped atomic.Bool
}

func (p *living) live() {
	for b := make([]byte, 4096); ; {
		n, err := p.Read(b)
		if err != nil {
			return
		}
		if bytes.Contains(b[:n], []byte("\x04PING")) && !p.stopped.Load() {
			p.say(command("PONG", ""))
		}
	}
}

// stop is SIGSTOP: nothing more is said, and nothing read. The kernel still takes what we write, unless it is full.
func (p *living) stop(full bool) {
	p.stopped.Store(true)
	if full {
		p.SetReadDeadline(time.Now())
	}
}

func TestAStoppedPeerIsFoundInTime(t *testing.T) {
	t.Parallel()
	long := message([]byte("topic"), make([]byte, 500))
	for _, test := range []struct {
		name string
		last []byte // its last bytes
	}{
		{"after the answer to a PING", nil},
		{"after a message", message([]byte("x"))},
		{"after a command", command("PONG", "")},
		{"in the middle of a header", []byte{2, 0, 0}},
		{"in the middle of a frame", long[:300]},
		{"between two frames", frame(1, []byte("topic"))},
		{"in the middle of a command", command("PING", "\x00\x00")[:4]},
		{"in the middle of what is skipped", append(binary.BigEndian.AppendUint64([]byte{2}, 1<<63), long...)},
	} {
		for _, full := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, with a full socket: %v", test.name, full), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					// However the stop falls between two PINGs.
					for after := time.Duration(0); after <= 10*time.Second; after += 250 * time.Millisecond {
						c, far := meet(t, zmtp.SUB, &zmtp.Options{MaxMessage: 1000, SkipTooLarge: true}, hello(1, "PUB"))
						peer := &living{scripted: far}
						go peer.live()
						last := time.Now().Add(after)
						time.AfterFunc(after, func() {
							peer.stop(full)
							if test.last != nil {
								peer.say(test.last)
							}
						})
						var err error
						for err == nil {
							_, err = c.Recv()
						}
						unwritten := full && errors.Is(err, os.ErrDeadlineExceeded)
						if !unwritten && !errors.Is(err, zmtp.ErrSilent) {
							t.Errorf("stopped at %v: %v", after, err)
						}
						if at := time.Since(last); at <= 0 || at > foundWithin {
							t.Errorf("stopped at %v and found %v after its last byte", after, at)
						}
						c.Close()
						peer.Close()
					}
				})
			})
		}
	}
}

func TestAStoppedPeersSendIsCutInTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		for after := time.Duration(0); after <= 10*time.Second; after += 500 * time.Millisecond {
			for later := 100 * time.Millisecond; later < foundWithin; later += 700 * time.Millisecond {
				c, far := meet(t, zmtp.DEALER, nil, hello(1, "ROUTER"))
				peer := &living{scripted: far}
				go peer.live()
				stopped := time.Now().Add(after)
				time.AfterFunc(after, func() {
					peer.stop(true)
					peer.say(message([]byte("x")))
				})
				var calls sync.WaitGroup
				calls.Go(func() {
					var err error
					for err == nil {
						_, err = c.Recv()
					}
					if at := time.Since(stopped); at > foundWithin {
						t.Errorf("stopped at %v, and Recv said so %v later: %v", after, at, err)
					}
				})
				calls.Go(func() {
					time.Sleep(after + later)
					if err := c.Send(nil, []byte("12345678")); err == nil || time.Since(stopped) > foundWithin {
						t.Errorf("stopped at %v, and Send at %v said so %v later: %v", after, after+later, time.Since(stopped), err)
					}
				})
				calls.Wait()
				c.Close()
				peer.Close()
			}
		}
	})
}

func TestAHandshakeWithAStoppedPeerEndsInTime(t *testing.T) {
	t.Parallel()
	whole := hello(1, "PUB")
	for _, said := range []int{0, 1, 11, 64, 65, 70, len(whole) - 1} {
		for _, full := range []bool{false, true} {
			t.Run(fmt.Sprintf("after %d bytes, with a full socket: %v", said, full), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					ours, theirs := net.Pipe()
					defer theirs.Close()
					peer := scripted{theirs, t}
					if !full {
						go peer.drain()
					}
					go peer.say(whole[:said])
					began := time.Now()
					_, err := zmtp.NewConn(t.Context(), ours, zmtp.SUB, nil)
					if !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) > 10*time.Second {
						t.Errorf("%v after %v", err, time.Since(began))
					}
				})
			})
		}
	}
}

// Of real sockets: one that is full, since its peer has stopped after the handshake.
func TestAFullSocketEndsItsConnection(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		nc, err := l.Accept()
		if err != nil {
			t.Error(err)
			close(accepted)
			return
		}
		if err := nc.(*net.TCPConn).SetReadBuffer(64 << 10); err != nil {
			t.Error(err)
		}
		nc.Write(hello(1, "ROUTER"))
		accepted <- nc
	}()
	o := &zmtp.Options{
		HeartbeatInterval: 100 * time.Millisecond,
		HeartbeatTimeout:  100 * time.Millisecond,
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			nc, err := new(net.Dialer).DialContext(ctx, network, address)
			if err == nil {
				err = nc.(*net.TCPConn).SetWriteBuffer(64 << 10)
			}
			return nc, err
		},
	}
	c := dial(t, "tcp://"+l.Addr().String(), zmtp.DEALER, o)
	if peer := <-accepted; peer != nil {
		defer peer.Close()
	}
	// No Recv waits, so that nothing but the write can end it.
	if err := c.Send(make([]byte, 16<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Send: %v", err)
	}
	if _, err := c.Recv(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Recv: %v", err)
	}
}

// A peer that answers PINGs is alive however long nobody calls Recv: its answers lie in the kernel meanwhile.
func TestNoHandlerIsTooSlowForAPeerThatAnswers(t *testing.T) {
	t.Parallel()
	for _, handling := range []time.Duration{10 * time.Second, time.Hour, 24 * time.Hour} {
		t.Run(handling.String(), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				c, peer := meet(t, zmtp.SUB, nil, hello(1, "PUB"))
				kernel := make(chan []byte, 1<<20)
				go func() {
					for b := range kernel {
						if !peer.say(b) {
							return
						}
					}
				}()
				pings := 0
				heard := make(chan struct{})
				go func() {
					defer close(heard)
					for b := make([]byte, 64); ; {
						n, err := peer.Read(b)
						if err != nil {
							return
						}
						if bytes.Equal(b[:n], defaultPing) {
							pings++
							kernel <- command("PONG", "")
						}
					}
				}()
				kernel <- command("PING", "\x00\x0a") // and wants to be held to a second, but that too is while we read
				kernel <- message([]byte("work"))
				receive(t, c, "work")
				began := time.Now()
				time.Sleep(handling)
				kernel <- command("PING", "\x00\x00")
				time.AfterFunc(time.Minute, func() { kernel <- message([]byte("more")) })
				receive(t, c, "more")
				if time.Since(began) != handling+time.Minute {
					t.Errorf("the message came after %v", time.Since(began))
				}
				c.Close()
				<-heard
				close(kernel)
				if want := int((handling + time.Minute) / (5 * time.Second)); pings < want-1 || pings > want {
					t.Errorf("%d PINGs, want one every 5s: %d", pings, want)
				}
			})
		})
	}
}

func TestAReaderThatWasAwayIsTold(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var away []time.Duration
		o := &zmtp.Options{
			HeartbeatInterval: -1, Away: func(d time.Duration) { away = append(away, d.Round(time.Millisecond)) },
		}
		c, peer := meet(t, zmtp.SUB, o, hello(1, "PUB"))
		go func() {
			for range 4 {
				time.Sleep(time.Minute) // a peer that says little is no reader that is away
				peer.say(message([]byte("x")))
			}
			peer.Close()
		}()
		for i := range 5 {
			if _, err := c.Recv(); err != nil {
				break
			}
			switch i {
			case 1:
				time.Sleep(zmtp.AwayAfter)
			case 2:
				time.Sleep(20 * time.Second)
			}
		}
		if len(away) != 1 || away[0] != 20*time.Second {
			t.Errorf("away for %v, want once 20s", away)
		}
	})
}
