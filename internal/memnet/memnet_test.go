// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package memnet_test

import (
	"context"
	"errors"
	"io"
	"net"
	"syscall"
	"testing"

	"github.com/kvtap/kvtap/internal/memnet"
)

func TestNetwork(t *testing.T) {
	t.Parallel()
	var n memnet.Network
	l, err := n.Listen(t.Context(), "tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	if _, err := n.Listen(t.Context(), "tcp", address); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a second listener: %v", err)
	}
	accepted := make(chan net.Conn, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			t.Error(err)
		}
		accepted <- c
	}()
	near, err := n.From("10.0.0.7")(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	far := <-accepted
	if got := far.RemoteAddr().(*net.TCPAddr).IP.String(); got != "10.0.0.7" {
		t.Errorf("the peer is %s", got)
	}
	if near.RemoteAddr().String() != address || far.LocalAddr().String() != address ||
		near.LocalAddr().String() != far.RemoteAddr().String() {
		t.Errorf("addresses %v %v, %v %v", near.LocalAddr(), near.RemoteAddr(), far.LocalAddr(), far.RemoteAddr())
	}
	if err := n.Cut(); err != nil {
		t.Error(err)
	}
	if _, err := far.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("reading a cut connection: %v", err)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := n.Dial(cancelled, "tcp", address); !errors.Is(err, context.Canceled) {
		t.Errorf("dialling with a context that ended: %v", err)
	}
	before := n.Listeners()
	if err := errors.Join(l.Close(), l.Close()); err != nil {
		t.Error(err)
	}
	if after := n.Listeners(); before != 1 || after != 0 {
		t.Errorf("%d listeners before Close, %d after", before, after)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accepting after Close: %v", err)
	}
	if _, err := n.Dial(t.Context(), "tcp", address); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dialling after Close: %v", err)
	}
	for _, bad := range []string{"nowhere", "host:1"} {
		_, listenErr := n.Listen(t.Context(), "tcp", bad)
		_, dialErr := n.Dial(t.Context(), "tcp", bad)
		if listenErr == nil || dialErr == nil {
			t.Errorf("%q: listen %v, dial %v", bad, listenErr, dialErr)
		}
	}
}
