// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

// Package zmtp speaks ZeroMQ's wire protocol, ZMTP 3.1 (https://rfc.zeromq.org/spec/37/), over net.Conn.
//
// A [Conn] is one connection: the greeting, the NULL mechanism, frames, multipart messages, subscriptions and
// heartbeats. It neither reconnects nor queues: its caller reads with Recv at its own pace and back-pressure is the
// socket's own. [Publisher] and [Router] are the many-peer sockets on top, with the bounded queues of libzmq's PUB and
// ROUTER.
//
// Beside the goroutine that calls Recv, each Conn has a keeper: the goroutine that writes PINGs and PONGs and decides
// when a peer is silent. It ends with the Conn.
package zmtp

import (
	"context"
	"math"
	"net"
	"slices"
	"time"
)

// SocketType is the type that a socket announces in its READY command.
type SocketType string

// The socket types that take part in the patterns of this package. A Conn is a PUB, SUB, DEALER or ROUTER; the others
// are known as peers.
const (
	PUB    SocketType = "PUB"
	SUB    SocketType = "SUB"
	XPUB   SocketType = "XPUB"
	XSUB   SocketType = "XSUB"
	DEALER SocketType = "DEALER"
	ROUTER SocketType = "ROUTER"
	REQ    SocketType = "REQ"
	REP    SocketType = "REP"
)

// accepts lists for each of our own types the peers that libzmq's would accept (check_socket_type in its
// mechanism.cpp).
var accepts = map[SocketType][]SocketType{
	PUB:    {SUB, XSUB},
	SUB:    {PUB, XPUB},
	DEALER: {ROUTER, DEALER, REP},
	ROUTER: {DEALER, ROUTER, REQ},
}

func (t SocketType) accepts(peer SocketType) bool { return slices.Contains(accepts[t], peer) }

// AwayAfter is how long the reader must have been away from the socket for Options.Away to be called.
const AwayAfter = time.Second

const (
	// maxHandshakeCommand bounds a command before the peer is known, in bytes.
	maxHandshakeCommand = 4096
	// maxCommand bounds a command after the handshake, and with it one subscription, in bytes.
	maxCommand = 64 << 10
	// maxSubscriptions and maxSubscriptionBytes bound what one subscriber can make a publisher remember.
	maxSubscriptions     = 4096
	maxSubscriptionBytes = 1 << 20
	// minReadBuffer leaves room for the longest frame header.
	minReadBuffer = 16
)

// Options configures connections. The zero value, and nil, work; one Options may serve many connections and is not
// changed by them.
type Options struct {
	// Identity is sent to the peer in READY; a ROUTER addresses us by it. At most 255 bytes. Empty: the peer makes one up.
	Identity []byte
	// MaxMessage limits one message, all its frames together, in bytes. A longer one ends the connection with ErrTooLarge,
	// unless SkipTooLarge is set. Memory grows only as bytes arrive, whatever length a frame claims. Zero or less means
	// 64 MiB.
	MaxMessage int
	// SkipTooLarge keeps the connection of a SUB or DEALER when a message does not fit: a frame of more than MaxMessage,
	// or one that would make the message exceed that by more than 4 KiB, is read and dropped as it arrives, whatever
	// length it claims, and Recv returns an empty frame in its place; see Conn.Omitted. Commands, and MaxFrames, still end
	// the connection, and so does a message that is too large under a mechanism that seals frames: none can be judged
	// before it is held whole.
	SkipTooLarge bool
	// MaxFrames limits the frames of one message. Zero or less means 64.
	MaxFrames int
	// ReadBuffer is the size in bytes of the buffer that messages are read into and handed out from; it grows for a
	// longer message and shrinks again. Zero or less means 64 KiB.
	ReadBuffer int
	// HandshakeTimeout is how long the TCP connect, the greeting and READY may take together. Zero or less means 10s.
	HandshakeTimeout time.Duration
	// WriteTimeout is how long one write (a message, a PING, a PONG) may take before the connection fails. Publisher and
	// Router do not use it: there a peer that reads slowly loses messages, not its connection. Zero means as long as
	// HeartbeatTimeout, so that a stopped peer is found as soon when its socket is full as when it is not; negative means
	// no limit.
	WriteTimeout time.Duration
	// HeartbeatInterval is how often a PING goes to a peer that speaks ZMTP 3.1. Zero means 5s, negative means never. With
	// the defaults a peer that stops is found within 9s of its last byte, while a Recv waits.
	HeartbeatInterval time.Duration
	// HeartbeatTimeout is how long after a PING a Recv may wait without a single byte from the peer before the connection
	// fails with ErrSilent. Zero or less means 4s.
	HeartbeatTimeout time.Duration
	// Away is called by Recv when it turns to the socket again after more than AwayAfter: whoever called it did something
	// else meanwhile, and the peer may have dropped messages. Nil means nobody wants to know.
	Away func(d time.Duration)
	// Dial makes connections. Nil means a net.Dialer with TCP keepalive.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// ListenFunc makes listeners. Nil means a net.ListenConfig with TCP keepalive.
	ListenFunc func(ctx context.Context, network, address string) (net.Listener, error)

	// security makes the mechanism of one connection. Nil means NULL.
	security func() mechanism
}

// keepAlive finds a vanished host within about 30s where heartbeats cannot: peers older than ZMTP 3.1.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3}

// withDefaults returns a copy of o with every zero replaced by what it means.
func (o *Options) withDefaults() Options {
	var d Options
	if o != nil {
		d = *o
	}
	orInt := func(v *int, def int) {
		if *v <= 0 {
			*v = def
		}
	}
	orInt(&d.MaxMessage, 64<<20)
	d.MaxMessage = min(d.MaxMessage, math.MaxInt/4) // room for sums
	orInt(&d.MaxFrames, 64)
	orInt(&d.ReadBuffer, 64<<10)
	d.ReadBuffer = max(d.ReadBuffer, minReadBuffer)
	if d.HandshakeTimeout <= 0 {
		d.HandshakeTimeout = 10 * time.Second
	}
	if d.HeartbeatInterval == 0 {
		d.HeartbeatInterval = 5 * time.Second
	}
	if d.HeartbeatTimeout <= 0 {
		d.HeartbeatTimeout = 4 * time.Second
	}
	const forever = 365 * 24 * time.Hour // room for sums
	d.HeartbeatInterval = min(d.HeartbeatInterval, forever)
	d.HeartbeatTimeout = min(d.HeartbeatTimeout, forever)
	if d.WriteTimeout == 0 {
		d.WriteTimeout = d.HeartbeatTimeout
	}
	if d.Dial == nil {
		d.Dial = (&net.Dialer{KeepAliveConfig: keepAlive}).DialContext
	}
	if d.ListenFunc == nil {
		d.ListenFunc = (&net.ListenConfig{KeepAliveConfig: keepAlive}).Listen
	}
	if d.security == nil {
		d.security = func() mechanism { return null{} }
	}
	return d
}
