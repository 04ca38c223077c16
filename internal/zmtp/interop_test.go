// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kvtap/kvtap/internal/interop"
	"github.com/kvtap/kvtap/internal/zmtp"
)

// transports are the endpoints over which each pairing with libzmq is tried. listen gives a fresh one to listen on.
var transports = []struct {
	name   string
	listen func(t *testing.T) string
}{
	{"tcp", func(*testing.T) string { return "tcp://127.0.0.1:*" }},
	{"tcp over IPv6", func(t *testing.T) string {
		l, err := net.Listen("tcp", "[::1]:0")
		if err != nil {
			t.Skipf("no IPv6 loopback: %v", err)
		}
		l.Close()
		return "tcp://[::1]:*"
	}},
	{"ipc", func(t *testing.T) string {
		if runtime.GOOS == "windows" {
			t.Skip("libzmq has no ipc on Windows")
		}
		dir, err := os.MkdirTemp("", "zmtp") // t.TempDir may be too long for a socket
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		return "ipc://" + filepath.Join(dir, "s")
	}},
	{"an abstract name", func(t *testing.T) string {
		if runtime.GOOS != "linux" {
			t.Skip("abstract names exist on Linux only")
		}
		return fmt.Sprintf("ipc://@zmtp-%d-%s", os.Getpid(), t.Name())
	}},
}

func overTransports(t *testing.T, test func(t *testing.T, listen string)) {
	interop.Python(t)
	for _, transport := range transports {
		t.Run(transport.name, func(t *testing.T) {
			t.Parallel()
			test(t, transport.listen(t))
		})
	}
}

func dial(t *testing.T, endpoint string, local zmtp.SocketType, o *zmtp.Options) *zmtp.Conn {
	t.Helper()
	c, err := zmtp.Dial(t.Context(), endpoint, local, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// listen returns a listener and the endpoint that a peer dials.
func listen(t *testing.T, endpoint string) (net.Listener, string) {
	t.Helper()
	l, err := zmtp.Listen(t.Context(), endpoint, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	if strings.HasPrefix(endpoint, "tcp") {
		endpoint = "tcp://" + l.Addr().String()
	}
	return l, endpoint
}

// receiveBurst checks the messages of peer.py's burst.
func receiveBurst(t *testing.T, c *zmtp.Conn, n, size int) {
	t.Helper()
	for i := range n {
		frames, err := c.Recv()
		if err != nil {
			t.Fatalf("message %d: %v", i, err)
		}
		if len(frames) != 3 || string(frames[0]) != "kv@pod@model" || binary.BigEndian.Uint64(frames[1]) != uint64(i) ||
			len(frames[2]) != size || bytes.Count(frames[2], []byte("p")) != size {
			t.Fatalf("message %d: %d frames %.60q", i, len(frames), frames)
		}
	}
}

func TestInteropOurSubDialsALibzmqPublisher(t *testing.T) {
	t.Parallel()
	overTransports(t, func(t *testing.T, endpoint string) {
		peer := interop.Start(t, "xpub", "--bind", endpoint, "--hwm", "0")
		sub := dial(t, peer.Endpoint("endpoint"), zmtp.SUB, nil)
		if sub.PeerType() != zmtp.XPUB || sub.PeerMinor() < 1 {
			t.Errorf("peer is %s 3.%d", sub.PeerType(), sub.PeerMinor())
		}
		subscribe(t, sub, "kv@")
		if got, want := peer.Expect("message"), hex.EncodeToString([]byte("\x01kv@")); got != want {
			t.Errorf("libzmq saw the subscription %s, want %s", got, want)
		}
		peer.Say("send 786d 00")       // a topic that we did not ask for
		peer.Say("send 6b7640 - 0102") // with an empty frame; it alone arrives
		receive(t, sub, "kv@", "", "\x01\x02")
		peer.Say("burst 2000 657")
		receiveBurst(t, sub, 2000, 657)
		peer.Say("burst 3", fmt.Sprint(10<<20)) // far more than our buffer
		receiveBurst(t, sub, 3, 10<<20)
		if err := sub.Unsubscribe([]byte("kv@")); err != nil {
			t.Error(err)
		}
		if got, want := peer.Expect("message"), hex.EncodeToString([]byte("\x00kv@")); got != want {
			t.Errorf("libzmq saw %s, want %s", got, want)
		}
	})
}

// A plain PUB does not say when a subscription has arrived: send until one message comes through.
func TestInteropAPlainPublisher(t *testing.T) {
	t.Parallel()
	peer := interop.Start(t, "pub", "--hwm", "0")
	sub := dial(t, peer.Endpoint("endpoint"), zmtp.SUB, nil)
	subscribe(t, sub, "")
	got := make(chan error, 1)
	go func() {
		_, err := sub.Recv()
		got <- err
	}()
	knock := time.NewTicker(10 * time.Millisecond)
	defer knock.Stop()
	for arrived := false; !arrived; {
		select {
		case err := <-got:
			if err != nil {
				t.Fatal(err)
			}
			arrived = true
		case <-knock.C:
			peer.Say("send 6b6e6f636b")
		}
	}
	peer.Say("burst 1000 657")
	for {
		frames, err := sub.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if len(frames) == 3 && binary.BigEndian.Uint64(frames[1]) == 999 {
			break
		}
	}
	peer.Stop() // a crash
	if _, err := sub.Recv(); err == nil {
		t.Error("Recv returned a message of a dead peer")
	}
}

// rewritten is a connection whose peer seems to speak ZMTP 3.0, so that our SUB uses the old form with a libzmq that
// understands both.
type rewritten struct {
	net.Conn
	at int
}

func (r *rewritten) Read(b []byte) (int, error) {
	n, err := r.Conn.Read(b)
	if minor := 11 - r.at; minor >= 0 && minor < n {
		b[minor] = 0
	}
	r.at += n
	return n, err
}

func TestInteropLibzmqTakesTheOldSubscription(t *testing.T) {
	t.Parallel()
	peer := interop.Start(t, "xpub")
	sub := dial(t, peer.Endpoint("endpoint"), zmtp.SUB, &zmtp.Options{
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			nc, err := new(net.Dialer).DialContext(ctx, network, address)
			return &rewritten{Conn: nc}, err
		},
	})
	if sub.PeerMinor() != 0 {
		t.Fatalf("peer speaks 3.%d", sub.PeerMinor())
	}
	subscribe(t, sub, "kv@")
	if got, want := peer.Expect("message"), hex.EncodeToString([]byte("\x01kv@")); got != want {
		t.Errorf("libzmq saw %s, want %s", got, want)
	}
	peer.Say("send 6b7640 00")
	receive(t, sub, "kv@", "\x00")
}

func TestInteropOurDealerAsksALibzmqRouter(t *testing.T) {
	t.Parallel()
	overTransports(t, func(t *testing.T, endpoint string) {
		peer := interop.Start(t, "router", "--bind", endpoint)
		dealer := dial(t, peer.Endpoint("endpoint"), zmtp.DEALER, &zmtp.Options{Identity: []byte("gateway-1")})
		for i := range 50 {
			frames := [][]byte{nil, binary.BigEndian.AppendUint64(nil, uint64(i)), bytes.Repeat([]byte("x"), i*100)}
			if err := dealer.Send(frames...); err != nil {
				t.Fatal(err)
			}
			receive(t, dealer, copies(frames)...)
		}
	})
}

func TestInteropOurPublisherFeedsALibzmqSub(t *testing.T) {
	t.Parallel()
	overTransports(t, func(t *testing.T, endpoint string) {
		l, endpoint := listen(t, endpoint)
		p := zmtp.NewPublisher(nil, -1)
		t.Cleanup(p.Close)
		go p.Serve(t.Context(), l)
		peer := interop.Start(t, "sub", "--connect", endpoint, "--subscribe", hex.EncodeToString([]byte("kv@")))
		if err := p.WaitSubscribers(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		if n := p.Send([]byte("x")); n != 0 {
			t.Errorf("a topic that nobody asked for reached %d", n)
		}
		for i := range 500 {
			if n := p.Send([]byte("kv@a"), []byte{byte(i)}, bytes.Repeat([]byte("x"), i), nil); n != 1 {
				t.Fatalf("reached %d", n)
			}
		}
		for i := range 500 {
			payload := strings.Repeat("78", i)
			if payload == "" {
				payload = "-"
			}
			if got, want := peer.Line(), fmt.Sprintf("message 6b764061 %02x %s -", byte(i), payload); got != want {
				t.Fatalf("libzmq received %.80q, want %.80q", got, want)
			}
		}
		peer.Say("subscribe 6c6f6164")
		for p.Send([]byte("load"), []byte("1")) == 0 {
			runtime.Gosched() // the subscription is on its way
		}
		if got := peer.Expect("message"); got != "6c6f6164 31" {
			t.Errorf("libzmq received %q", got)
		}
	})
}

func TestInteropOurPublisherDialsALibzmqSub(t *testing.T) {
	t.Parallel()
	peer := interop.Start(t, "sub", "--subscribe", "-")
	p := zmtp.NewPublisher(nil, 0)
	t.Cleanup(p.Close)
	go p.Connect(t.Context(), peer.Endpoint("endpoint"))
	if err := p.WaitSubscribers(t.Context(), 1); err != nil {
		t.Fatal(err)
	}
	p.Send([]byte("kv@"), []byte("hello"))
	if got := peer.Expect("message"); got != "6b7640 68656c6c6f" {
		t.Errorf("libzmq received %q", got)
	}
}

func TestInteropOurListeningSubHearsAnEngineThatDials(t *testing.T) {
	t.Parallel()
	overTransports(t, func(t *testing.T, endpoint string) {
		l, endpoint := listen(t, endpoint)
		peer := interop.Start(t, "xpub", "--connect", endpoint, "--hwm", "0")
		nc, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		sub, err := zmtp.NewConn(t.Context(), nc, zmtp.SUB, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { sub.Close() })
		subscribe(t, sub, "")
		peer.Expect("message")
		peer.Say("burst 1000 657")
		receiveBurst(t, sub, 1000, 657)
	})
}

func TestInteropOurRouterAnswersALibzmqDealer(t *testing.T) {
	t.Parallel()
	overTransports(t, func(t *testing.T, endpoint string) {
		l, endpoint := listen(t, endpoint)
		r := zmtp.NewRouter(nil, 0)
		t.Cleanup(r.Close)
		go r.Serve(t.Context(), l)
		named := interop.Start(t, "dealer", "--connect", endpoint, "--opt", "IDENTITY=gateway-1")
		nameless := interop.Start(t, "dealer", "--connect", endpoint)
		for _, peer := range []*interop.Peer{named, nameless} {
			peer.Say("send - 0000000000000007")
			id, frames, err := r.Recv(t.Context())
			if err != nil || len(frames) != 2 || len(frames[0]) != 0 || binary.BigEndian.Uint64(frames[1]) != 7 {
				t.Fatalf("%q, %v", frames, err)
			}
			if (id == "gateway-1") != (peer == named) {
				t.Errorf("id %q", id)
			}
			if !r.Send(id, nil, frames[1], []byte("batch")) {
				t.Error("not sent")
			}
			if got := peer.Expect("message"); got != "- 0000000000000007 6261746368" {
				t.Errorf("libzmq received %q", got)
			}
		}
	})
}

// tap counts the heartbeats on a connection. It looks for the commands' names, which appear nowhere else in these
// tests.
type tap struct {
	net.Conn
	mu       sync.Mutex
	in, out  []byte
	progress chan struct{}
}

func (p *tap) note(kept *[]byte, b []byte) {
	p.mu.Lock()
	*kept = append(*kept, b...)
	p.mu.Unlock()
	select {
	case p.progress <- struct{}{}:
	default:
	}
}

func (p *tap) Read(b []byte) (int, error) {
	n, err := p.Conn.Read(b)
	p.note(&p.in, b[:n])
	return n, err
}

func (p *tap) Write(b []byte) (int, error) {
	n, err := p.Conn.Write(b)
	p.note(&p.out, b[:n])
	return n, err
}

// await waits until name was read and answer written n times.
func (p *tap) await(name, answer string, n int) {
	for {
		p.mu.Lock()
		enough := bytes.Count(p.in, []byte(name)) >= n && bytes.Count(p.out, []byte(answer)) >= n
		p.mu.Unlock()
		if enough {
			return
		}
		<-p.progress
	}
}

func TestInteropHeartbeats(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name        string
		o           zmtp.Options
		peer        []string
		read, wrote string
	}{
		{"libzmq asks", zmtp.Options{HeartbeatInterval: -1},
			[]string{"--opt", "HEARTBEAT_IVL=20", "--opt", "HEARTBEAT_TIMEOUT=20000", "--opt", "HEARTBEAT_TTL=20000"},
			"\x04PING", "\x04PONG"},
		{"we ask", zmtp.Options{HeartbeatInterval: 20 * time.Millisecond, HeartbeatTimeout: time.Minute}, nil,
			"\x04PONG", "\x04PING"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			peer := interop.Start(t, append([]string{"xpub", "--monitor"}, test.peer...)...)
			wire := &tap{progress: make(chan struct{}, 1)}
			o := test.o
			o.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
				var err error
				wire.Conn, err = new(net.Dialer).DialContext(ctx, network, address)
				return wire, err
			}
			sub := dial(t, peer.Endpoint("endpoint"), zmtp.SUB, &o)
			subscribe(t, sub, "")
			peer.Expect("message")
			received := make(chan error, 1)
			go func() {
				frames, err := sub.Recv()
				if err == nil && string(frames[0]) != "done" {
					err = fmt.Errorf("got %q", frames)
				}
				received <- err
			}()
			wire.await(test.read, test.wrote, 5)
			peer.Say("send", hex.EncodeToString([]byte("done")))
			if err := <-received; err != nil {
				t.Error(err)
			}
		})
	}
}

// hushable is a connection whose writes can be made to vanish, as if our process had stopped. It notes PINGs, and the
// longest time that one was late or waited for an answer.
type hushable struct {
	net.Conn
	hushed atomic.Bool
	pinged chan struct{} // gets a value for each PING, as long as there is room

	mu    sync.Mutex
	last  time.Time // PING
	worst time.Duration
}

func (h *hushable) note(ping bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.last.IsZero() {
		h.worst = max(h.worst, time.Since(h.last))
	}
	if ping {
		h.last = time.Now()
	}
}

func (h *hushable) Write(b []byte) (int, error) {
	if h.hushed.Load() {
		return len(b), nil
	}
	n, err := h.Conn.Write(b)
	if err == nil && bytes.Contains(b, []byte("\x04PING")) {
		h.note(true)
		select {
		case h.pinged <- struct{}{}:
		default:
		}
	}
	return n, err
}

func (h *hushable) Read(b []byte) (int, error) {
	n, err := h.Conn.Read(b)
	h.note(false)
	return n, err
}

// libzmq keeps a connection whose PINGs go on, and ends one whose PINGs have stopped when their TTL is over.
func TestInteropLibzmqHoldsUsToOurTTL(t *testing.T) {
	t.Parallel()
	const interval, ttl = 50 * time.Millisecond, time.Second
	// A machine that stands still for long cannot show that PINGs keep a connection.
	for range 5 {
		peer := interop.Start(t, "xpub", "--monitor")
		wire := &hushable{pinged: make(chan struct{}, 1000)}
		sub := dial(t, peer.Endpoint("endpoint"), zmtp.SUB, &zmtp.Options{
			HeartbeatInterval: interval,
			HeartbeatTimeout:  ttl - interval,
			Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
				var err error
				wire.Conn, err = new(net.Dialer).DialContext(ctx, network, address)
				return wire, err
			},
		})
		subscribe(t, sub, "")
		peer.Expect("message")
		received := make(chan error, 1)
		go func() {
			frames, err := sub.Recv()
			if err == nil && string(frames[0]) != "done" {
				err = fmt.Errorf("got %q", frames)
			}
			received <- err
		}()
		var err error
		for range 2 * ttl / interval {
			select {
			case <-wire.pinged:
				continue
			case err = <-received:
			}
			break
		}
		if err == nil {
			peer.Say("send", hex.EncodeToString([]byte("done")))
			err = <-received
		}
		if err != nil {
			wire.note(false)
			if wire.worst < ttl/4 {
				t.Fatalf("while our PINGs went on, each within %v: %v", wire.worst, err)
			}
			continue
		}

		// No Recv waits from here on, so that it cannot be us who find the other silent.
		wire.hushed.Store(true)
		for peer.Expect("event") != "DISCONNECTED" {
		}
		if _, err := sub.Recv(); err == nil || errors.Is(err, zmtp.ErrSilent) {
			t.Errorf("after our silence: %v, want the peer's end of the connection", err)
		}
		return
	}
	t.Skip("this machine stands still too often")
}

func TestInteropSwappedPortsAreNamed(t *testing.T) {
	t.Parallel()
	for local, role := range map[zmtp.SocketType]string{zmtp.SUB: "router", zmtp.DEALER: "pub"} {
		peer := interop.Start(t, role)
		c, err := zmtp.Dial(t.Context(), peer.Endpoint("endpoint"), local, nil)
		if err == nil {
			c.Close()
			t.Fatalf("a %s was accepted by a %s", local, role)
		}
		if !errors.Is(err, zmtp.ErrSocketType) || !strings.Contains(err.Error(), strings.ToUpper(role)) ||
			!strings.Contains(err.Error(), string(local)) {
			t.Errorf("%v", err)
		}
	}
}
