// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// ParseEndpoint splits a ZeroMQ endpoint into what package net calls a network and an address: "tcp://host:port" (also
// "tcp://[::1]:port" and, to listen, "tcp://*:port") gives "tcp"; "ipc:///path" and, on Linux, "ipc://@name" give
// "unix". A port of "*" is a free port, as in libzmq. An error matches ErrEndpoint and says what to write instead.
func ParseEndpoint(endpoint string) (network, address string, err error) {
	bad := func(format string, args ...any) (string, string, error) {
		return "", "", fmt.Errorf("%w %q: %s", ErrEndpoint, endpoint, fmt.Sprintf(format, args...))
	}
	scheme, rest, found := strings.Cut(endpoint, "://")
	if !found {
		if strings.HasPrefix(endpoint, "/") {
			return bad("no scheme; write ipc://%s", endpoint)
		}
		return bad("no scheme; write tcp://HOST:PORT or ipc:///PATH")
	}
	if strings.ContainsFunc(rest, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return bad("it holds a control character")
	}
	switch scheme {
	case "tcp":
		return parseTCP(rest, bad)
	case "ipc":
		return parseIPC(rest, bad)
	case "inproc":
		return bad("inproc reaches only into its own process; write tcp://HOST:PORT or ipc:///PATH")
	}
	return bad("scheme %q is not supported; write tcp://HOST:PORT or ipc:///PATH", scheme)
}

type badEndpoint func(format string, args ...any) (string, string, error)

func parseTCP(rest string, bad badEndpoint) (network, address string, err error) {
	if strings.ContainsAny(rest, " /;?#") {
		return bad("only HOST:PORT may follow tcp://")
	}
	colon := strings.LastIndexByte(rest, ':')
	if colon < 0 || strings.HasSuffix(rest, "]") {
		return bad("no port; write tcp://%s:PORT", rest)
	}
	host, port := rest[:colon], rest[colon+1:]
	if port == "*" {
		port = "0"
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || strconv.FormatUint(n, 10) != port {
		return bad("port %q is not a number from 0 to 65535", port)
	}
	switch {
	case host == "":
		return bad("no host; write tcp://*:%s to listen on every address", port)
	case host == "*":
		return "tcp", ":" + port, nil
	case strings.HasPrefix(host, "["):
		inner, closed := strings.CutSuffix(host[1:], "]")
		addr, err := netip.ParseAddr(inner)
		if !closed || err != nil || !addr.Is6() {
			return bad("%s is not an IPv6 address in brackets", host)
		}
		return "tcp", net.JoinHostPort(inner, port), nil
	case strings.Contains(host, ":"):
		return bad("an IPv6 address goes in brackets; write tcp://[%s]:%s", host, port)
	case strings.ContainsAny(host, "[]*@"):
		return bad("%q is not a host", host)
	}
	return "tcp", host + ":" + port, nil
}

func parseIPC(rest string, bad badEndpoint) (network, address string, err error) {
	// The kernel's sun_path has 108 bytes on Linux and 104 on the BSDs, one of them for the closing zero.
	limit := 107
	if runtime.GOOS == "darwin" {
		limit = 103
	}
	switch {
	case rest == "" || rest == "@":
		return bad("no path; write ipc:///PATH")
	case rest == "*":
		return bad("a wildcard names no socket; write ipc:///PATH")
	case rest[0] == '@' && runtime.GOOS != "linux":
		return bad("names in the abstract space exist on Linux only; write ipc:///PATH")
	case len(rest) > limit:
		return bad("the path has %d bytes, the system allows %d", len(rest), limit)
	}
	return "unix", rest, nil
}

// Listen listens on an endpoint. The listener is a plain one: its caller accepts and runs NewConn on a goroutine for
// each connection, so that a slow greeting holds up nobody. An ipc socket file that nobody listens on any more is
// removed first.
func Listen(ctx context.Context, endpoint string, o *Options) (net.Listener, error) {
	opts := o.withDefaults()
	network, address, err := ParseEndpoint(endpoint)
	if err != nil {
		return nil, err
	}
	if network == "unix" && address[0] != '@' {
		removeStale(ctx, address)
	}
	l, err := opts.ListenFunc(ctx, network, address)
	if err != nil {
		return nil, fmt.Errorf("zmtp: listen on %s: %w", endpoint, err)
	}
	return l, nil
}

// removeStale removes a socket file that refuses connections: its listener died without removing it. Anything else
// stays, and the attempt to listen will report it.
func removeStale(ctx context.Context, path string) {
	info, err := os.Lstat(path)
	if err != nil || info.Mode()&fs.ModeSocket == 0 {
		return
	}
	nc, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "unix", path)
	if err == nil {
		nc.Close()
		return
	}
	if refused(err) {
		_ = os.Remove(path) // if it stays, listening says so
	}
}

// Dial connects to an endpoint as a socket of type t and runs the handshake. ctx and HandshakeTimeout bound both; ctx
// has no hold on the connection afterwards.
func Dial(ctx context.Context, endpoint string, t SocketType, o *Options) (*Conn, error) {
	network, address, err := parseDial(endpoint)
	if err != nil {
		return nil, err
	}
	opts := o.withDefaults()
	ctx, cancel := context.WithTimeout(ctx, opts.HandshakeTimeout)
	defer cancel()
	nc, err := opts.Dial(ctx, network, address)
	if err != nil {
		return nil, fmt.Errorf("zmtp: dial %s: %w", endpoint, err)
	}
	c, err := newConn(ctx, nc, t, &opts)
	if err != nil {
		return nil, &atEndpoint{endpoint, err}
	}
	return c, nil
}

// parseDial is ParseEndpoint for an endpoint to dial: one with a wildcard only listens.
func parseDial(endpoint string) (network, address string, err error) {
	network, address, err = ParseEndpoint(endpoint)
	if err == nil && network == "tcp" && (strings.HasPrefix(address, ":") || strings.HasSuffix(address, ":0")) {
		err = fmt.Errorf("%w %q: a wildcard can be listened on, not dialled; write tcp://HOST:PORT", ErrEndpoint, endpoint)
	}
	return network, address, err
}

func refused(err error) bool { return errors.Is(err, syscall.ECONNREFUSED) }
