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
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kvtap/kvtap/internal/zmtp"
)

func TestHandshakeLearnsWhoThePeerIs(t *testing.T) {
	t.Parallel()
	mixed := command("READY", property("X-Unknown", "x")+property("IDENTITY", "engine-7")+property("socket-type",
		"ROUTER"))
	synctest.Test(t, func(t *testing.T) {
		c, peer := meet(t, zmtp.DEALER, &zmtp.Options{Identity: []byte("me")}, append(greeting(0), mixed...))
		defer peer.Close()
		defer c.Close()
		if c.PeerType() != zmtp.ROUTER || c.PeerMinor() != 0 || string(c.PeerIdentity()) != "engine-7" {
			t.Errorf("peer is %s 3.%d %q", c.PeerType(), c.PeerMinor(), c.PeerIdentity())
		}
		if c.LocalAddr().Network() != "pipe" || c.RemoteAddr().Network() != "pipe" || !c.LastReceived().Equal(time.Now()) {
			t.Errorf("addresses %v, %v; last received %v", c.LocalAddr(), c.RemoteAddr(), c.LastReceived())
		}
	})
}

func TestGreetingAndReadyOnTheWire(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		peer := scripted{theirs, t}
		go peer.say(hello(1, "ROUTER"))
		go func() {
			peer.expect(greeting(1))
			peer.expect(command("READY", property("Socket-Type", "DEALER")+property("Identity", "me")))
		}()
		c, err := zmtp.NewConn(t.Context(), ours, zmtp.DEALER, &zmtp.Options{Identity: []byte("me")})
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		peer.Close()
	})
}

func TestAPeerOfALaterMajorVersionIsSpokenToInOurs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		later := greeting(0)
		later[10] = 4
		c, peer := meet(t, zmtp.SUB, nil, append(later, ready("PUB")...))
		defer peer.Close()
		defer c.Close()
		if c.PeerMinor() != 1 {
			t.Errorf("minor version %d", c.PeerMinor())
		}
	})
}

func TestHandshakeRefuses(t *testing.T) {
	t.Parallel()
	plain := greeting(1)
	copy(plain[12:], "PLAIN")
	zmtp2 := greeting(0)[:12]
	zmtp2[10] = 1
	endOfSignature := greeting(1)
	endOfSignature[9] = 0x7e
	for _, test := range []struct {
		name string
		says []byte
		kind error
		want string // in the error's text
	}{
		{"an HTTP server", []byte("HTTP/1.1 400 Bad Request\r\n"), zmtp.ErrNotZMTP, "HTTP server"},
		{"an HTTP client", []byte("GET / HTTP/1.1\r\nHost: x\r\n"), zmtp.ErrNotZMTP, "HTTP client"},
		{"TLS", []byte("\x15\x03\x01\x00\x02\x02\x16"), zmtp.ErrNotZMTP, "TLS"},
		{"garbage", []byte("SSH-2.0-OpenSSH"), zmtp.ErrNotZMTP, "SSH-2.0"},
		{"one wrong byte", []byte{0}, zmtp.ErrNotZMTP, "a ZMTP greeting"},
		{"a signature that ends wrong", endOfSignature, zmtp.ErrNotZMTP, "a ZMTP greeting"},
		{"ZMTP 1.0", []byte{1, 0}, zmtp.ErrVersion, "ZMTP 1.0"},
		{"ZMTP 2.0", zmtp2, zmtp.ErrVersion, "ZMTP 2"},
		{"another mechanism", plain, zmtp.ErrMechanism, `got "PLAIN", expected NULL`},
		{"a SUB that dialled a ROUTER", hello(1, "ROUTER"), zmtp.ErrSocketType,
			"got a ROUTER socket, expected PUB or XPUB for our SUB (is this the port of another socket"},
		{"an unknown socket type", hello(1, "CLIENT"), zmtp.ErrSocketType, "CLIENT"},
		{"no socket type", append(greeting(1), command("READY", "")...), zmtp.ErrMalformed, "no Socket-Type"},
		{"an ERROR", append(greeting(1), command("ERROR", "\x07go away")...), zmtp.ErrRefused, "go away"},
		{"a garbled ERROR", append(greeting(1), command("ERROR", "\x70go away")...), zmtp.ErrRefused, "no reason"},
		{"another command", append(greeting(1), command("HELLO", "")...), zmtp.ErrMalformed,
			`the command "HELLO", expected READY`},
		{"a message too early", append(greeting(1), message([]byte("x"))...), zmtp.ErrMalformed, "flags 0x00"},
		{"reserved flags", append(greeting(1), 0x84, 0), zmtp.ErrMalformed, "flags 0x84"},
		{"a command without a name", append(greeting(1), 4, 0), zmtp.ErrMalformed, "command frame"},
		{"a command shorter than its name", append(greeting(1), 4, 2, 9, 'R'), zmtp.ErrMalformed, "command frame"},
		{"a property without a name", append(greeting(1), command("READY", "\x00\x00\x00\x00\x00")...), zmtp.ErrMalformed,
			"broken property"},
		{"a property cut short", append(greeting(1), command("READY", "\x0bSocket-Type\x00")...), zmtp.ErrMalformed,
			"broken property"},
		{"a value of 4 GiB", append(greeting(1), command("READY", "\x0bSocket-Type\xff\xff\xff\xffPUB")...),
			zmtp.ErrMalformed, "3 bytes of a value of 4294967295"},
		{"a long identity", append(greeting(1), frame(4, []byte("\x05READY"+property("Identity",
			strings.Repeat("x", 256))))...), zmtp.ErrTooLarge, "256 bytes"},
		{"a READY of 2^62 bytes", binary.BigEndian.AppendUint64(append(greeting(1), 6), 1<<62), zmtp.ErrTooLarge,
			"4611686018427387904"},
		{"the end before a greeting", nil, io.ErrUnexpectedEOF, "closed after 0 bytes"},
		{"the end within a greeting", greeting(1)[:30], io.ErrUnexpectedEOF, "closed after 30 bytes"},
		{"the end before READY", greeting(1), io.ErrUnexpectedEOF, "socket type does not fit ours (SUB)"},
		{"the end within READY", hello(1, "PUB")[:70], io.ErrUnexpectedEOF, "socket type does not fit ours (SUB)"},
	} {
		for _, piece := range []int{1, 1 << 10} { // how it is cut decides nothing but what there is to quote
			t.Run(fmt.Sprintf("%s in pieces of %d", test.name, piece), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					ours, theirs := net.Pipe()
					peer := scripted{theirs, t}
					go func() {
						for b := range slices.Chunk(test.says, piece) {
							peer.say(b)
						}
						peer.Close()
					}()
					go peer.drain()
					began := time.Now()
					c, err := zmtp.NewConn(t.Context(), ours, zmtp.SUB, nil)
					if err == nil {
						c.Close()
						t.Fatal("accepted")
					}
					if !errors.Is(err, test.kind) || !strings.HasPrefix(err.Error(), "zmtp: ") {
						t.Errorf("error %v, want one that matches %q", err, test.kind)
					}
					if piece > 1 && !strings.Contains(err.Error(), test.want) {
						t.Errorf("error %q does not say %q", err, test.want)
					}
					if p, ok := errors.AsType[*zmtp.ProtocolError](err); ok && p.Got == "" {
						t.Errorf("%#v does not say what was seen", p)
					}
					if time.Since(began) != 0 {
						t.Errorf("took %v", time.Since(began))
					}
				})
			})
		}
	}
}

func TestHandshakeHasADeadline(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name string
		peer func(p scripted)
		want string
	}{
		{"against a peer that only accepts", func(p scripted) {}, "awaiting the peer's greeting"},
		{"against a peer that reads and says nothing", func(p scripted) { p.drain() }, "awaiting the peer's greeting"},
		{"against a byte each second", func(p scripted) {
			go p.drain()
			for _, b := range hello(1, "PUB") {
				time.Sleep(time.Second)
				if !p.say([]byte{b}) {
					return
				}
			}
		}, "awaiting the peer's greeting"},
		{"against half a READY", func(p scripted) {
			go p.drain()
			p.say(hello(1, "PUB")[:80])
		}, "awaiting READY"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				o := &zmtp.Options{HandshakeTimeout: 7 * time.Second,
					Dial: func(context.Context, string, string) (net.Conn, error) {
						time.Sleep(2 * time.Second) // a slow connect counts
						ours, theirs := net.Pipe()
						go test.peer(scripted{theirs, t})
						return ours, nil
					}}
				began := time.Now()
				_, err := zmtp.Dial(t.Context(), "tcp://engine:5557", zmtp.SUB, o)
				if !errors.Is(err, os.ErrDeadlineExceeded) || !strings.Contains(err.Error(), test.want) ||
					!strings.HasPrefix(err.Error(), "zmtp: tcp://engine:5557: no handshake in time") {
					t.Errorf("error %v", err)
				}
				if time.Since(began) != 7*time.Second {
					t.Errorf("took %v", time.Since(began))
				}
				time.Sleep(time.Second) // for the peer to notice
			})
		})
	}
}

func TestHandshakeEndsWithItsContext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		go scripted{theirs, t}.drain()
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		began := time.Now()
		_, err := zmtp.NewConn(ctx, ours, zmtp.SUB, nil)
		if !errors.Is(err, context.Canceled) || time.Since(began) != time.Second {
			t.Errorf("error %v after %v", err, time.Since(began))
		}
	})
}

func TestOurOwnMistakesAreRefused(t *testing.T) {
	t.Parallel()
	ours, theirs := net.Pipe()
	if _, err := zmtp.NewConn(t.Context(), ours, zmtp.REQ, nil); !errors.Is(err, zmtp.ErrSocketType) {
		t.Errorf("a REQ: %v", err)
	}
	if _, err := theirs.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the connection stayed open: %v", err)
	}
	ours, theirs = net.Pipe()
	o := &zmtp.Options{Identity: make([]byte, 256)}
	if _, err := zmtp.NewConn(t.Context(), ours, zmtp.DEALER, o); !errors.Is(err, zmtp.ErrTooLarge) {
		t.Errorf("a long identity: %v", err)
	}
	if _, err := theirs.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the connection stayed open: %v", err)
	}
}
