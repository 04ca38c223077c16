// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

// Package memnet is a network in memory, for tests that run in a synctest bubble, where real sockets cannot be waited
// for. Its addresses look like TCP's.
package memnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
)

// Network connects the listeners and dialers of one test. The zero value is ready.
type Network struct {
	mu        sync.Mutex
	listeners map[netip.AddrPort]*listener
	conns     []net.Conn
	port      uint16 // the last one given out
}

// Listen listens on host:port; port 0 takes a free one. Its signature is that of net.ListenConfig.Listen.
func (n *Network) Listen(_ context.Context, _, address string) (net.Listener, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	ap, err := parse(address)
	if err != nil {
		return nil, err
	}
	if ap.Port() == 0 {
		ap = netip.AddrPortFrom(ap.Addr(), n.freePort())
	}
	if n.listeners[ap] != nil {
		return nil, fmt.Errorf("memnet: listen %s: %w", ap, syscall.EADDRINUSE)
	}
	if n.listeners == nil {
		n.listeners = make(map[netip.AddrPort]*listener)
	}
	l := &listener{network: n, at: ap, accept: make(chan net.Conn), closed: make(chan struct{})}
	n.listeners[ap] = l
	return l, nil
}

func (n *Network) freePort() uint16 {
	n.port++
	return 10000 + n.port
}

// parse reads host:port; the wildcard host is the loopback one.
func parse(address string) (netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return netip.AddrPort{}, err
	}
	if host == "" {
		host = "127.0.0.1"
	}
	return netip.ParseAddrPort(net.JoinHostPort(host, port))
}

// Dial connects from the loopback address. Its signature is that of net.Dialer.DialContext.
func (n *Network) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return n.From("127.0.0.1")(ctx, network, address)
}

// From returns a Dial of the host with the given IP address.
func (n *Network) From(host string) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, _, address string) (net.Conn, error) {
		to, err := parse(address)
		if err != nil {
			return nil, err
		}
		n.mu.Lock()
		from := netip.AddrPortFrom(netip.MustParseAddr(host), n.freePort())
		l := n.listeners[to]
		n.mu.Unlock()
		if l == nil {
			return nil, fmt.Errorf("memnet: dial %s: %w", to, syscall.ECONNREFUSED)
		}
		near, far := net.Pipe()
		select {
		case l.accept <- conn{far, to, from}:
		case <-l.closed:
			return nil, fmt.Errorf("memnet: dial %s: %w", to, syscall.ECONNREFUSED)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		c := conn{near, from, to}
		n.mu.Lock()
		n.conns = append(n.conns, c)
		n.mu.Unlock()
		return c, nil
	}
}

// Listeners returns how many listeners are open.
func (n *Network) Listeners() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.listeners)
}

// Cut breaks every connection there is. Listeners stay.
func (n *Network) Cut() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	var errs []error
	for _, c := range n.conns {
		errs = append(errs, c.Close())
	}
	n.conns = nil
	return errors.Join(errs...)
}

type conn struct {
	net.Conn
	local, remote netip.AddrPort
}

func (c conn) LocalAddr() net.Addr  { return net.TCPAddrFromAddrPort(c.local) }
func (c conn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.remote) }

type listener struct {
	network *Network
	at      netip.AddrPort
	accept  chan net.Conn
	once    sync.Once
	closed  chan struct{}
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.accept:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *listener) Close() error {
	l.once.Do(func() {
		close(l.closed)
		l.network.mu.Lock()
		defer l.network.mu.Unlock()
		delete(l.network.listeners, l.at)
	})
	return nil
}

func (l *listener) Addr() net.Addr { return net.TCPAddrFromAddrPort(l.at) }
