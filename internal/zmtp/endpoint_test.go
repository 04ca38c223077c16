// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp_test

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/kvtap/kvtap/internal/zmtp"
)

func TestParseEndpoint(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, endpoint, network, address string }{
		{"a host name", "tcp://engine-0.engines:5557", "tcp", "engine-0.engines:5557"},
		{"an IPv4 address", "tcp://10.0.0.1:5557", "tcp", "10.0.0.1:5557"},
		{"an IPv6 address", "tcp://[::1]:5557", "tcp", "[::1]:5557"},
		{"an IPv6 address with a zone", "tcp://[fe80::1%eth0]:1", "tcp", "[fe80::1%eth0]:1"},
		{"every address", "tcp://*:5557", "tcp", ":5557"},
		{"every IPv6 address", "tcp://[::]:5557", "tcp", "[::]:5557"},
		{"a free port", "tcp://*:*", "tcp", ":0"},
		{"a path", "ipc:///run/kv events.sock", "unix", "/run/kv events.sock"},
		{"a relative path", "ipc://events.sock", "unix", "events.sock"},
	} {
		t.Run(test.name, func(t *testing.T) {
			network, address, err := zmtp.ParseEndpoint(test.endpoint)
			if err != nil || network != test.network || address != test.address {
				t.Errorf("ParseEndpoint(%q) = %q, %q, %v", test.endpoint, network, address, err)
			}
		})
	}
}

func TestParseEndpointSaysWhatToWrite(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, endpoint, says string }{
		{"nothing", "", "write tcp://HOST:PORT"},
		{"no scheme", "engine:5557", "write tcp://HOST:PORT"},
		{"a bare path", "/run/x", "write ipc:///run/x"},
		{"no port", "tcp://engine", "write tcp://engine:PORT"},
		{"no port after brackets", "tcp://[::1]", "write tcp://[::1]:PORT"},
		{"no host", "tcp://:5557", "write tcp://*:5557"},
		{"an empty port", "tcp://engine:", `port "" is not a number`},
		{"a named port", "tcp://engine:http", `port "http" is not a number`},
		{"a port out of range", "tcp://engine:65536", "from 0 to 65535"},
		{"a port with a sign", "tcp://engine:+1", "from 0 to 65535"},
		{"a port with a zero in front", "tcp://engine:05557", "from 0 to 65535"},
		{"a URL's path", "tcp://engine:5557/", "only HOST:PORT"},
		{"a source address", "tcp://eth0;engine:5557", "only HOST:PORT"},
		{"a bare IPv6 address", "tcp://::1:5557", "write tcp://[::1]:5557"},
		{"IPv4 in brackets", "tcp://[10.0.0.1]:1", "not an IPv6 address"},
		{"a bracket left open", "tcp://[::1:1", "not an IPv6 address"},
		{"a stray star", "tcp://*x:1", "not a host"},
		{"a control character", "tcp://a\nb:1", "control character"},
		{"an empty path", "ipc://", "write ipc:///PATH"},
		{"a path left to chance", "ipc://*", "names no socket"},
		{"a long path", "ipc:///" + strings.Repeat("x", 200), "the system allows"},
		{"inproc", "inproc://x", "its own process"},
		{"HTTP", "http://engine:80", `"http" is not supported`},
		{"another spelling", "TCP://engine:1", `"TCP" is not supported`},
	} {
		t.Run(test.name, func(t *testing.T) {
			network, address, err := zmtp.ParseEndpoint(test.endpoint)
			if !errors.Is(err, zmtp.ErrEndpoint) || !strings.Contains(err.Error(), test.says) || network+address != "" {
				t.Errorf("ParseEndpoint(%q) = %q, %q, %v; want an error that says %q", test.endpoint, network, address, err,
					test.says)
			}
			if _, err := zmtp.Dial(t.Context(), test.endpoint, zmtp.SUB, nil); !errors.Is(err, zmtp.ErrEndpoint) {
				t.Errorf("Dial: %v", err)
			}
			if _, err := zmtp.Listen(t.Context(), test.endpoint, nil); !errors.Is(err, zmtp.ErrEndpoint) {
				t.Errorf("Listen: %v", err)
			}
		})
	}
}

func TestAbstractNamesAreForLinux(t *testing.T) {
	t.Parallel()
	network, address, err := zmtp.ParseEndpoint("ipc://@kv")
	if runtime.GOOS == "linux" {
		if err != nil || network != "unix" || address != "@kv" {
			t.Errorf("got %q, %q, %v", network, address, err)
		}
	} else if !errors.Is(err, zmtp.ErrEndpoint) {
		t.Errorf("got %v", err)
	}
}

func TestAWildcardIsNotDialled(t *testing.T) {
	t.Parallel()
	for _, endpoint := range []string{"tcp://*:5557", "tcp://localhost:0"} {
		if _, err := zmtp.Dial(t.Context(), endpoint, zmtp.SUB, nil); !errors.Is(err, zmtp.ErrEndpoint) {
			t.Errorf("Dial(%q): %v", endpoint, err)
		}
		p := zmtp.NewPublisher(nil, 0)
		if err := p.Connect(t.Context(), endpoint); !errors.Is(err, zmtp.ErrEndpoint) {
			t.Errorf("Connect(%q): %v", endpoint, err)
		}
		p.Close()
	}
}

func TestListenRemovesOnlyAStaleSocket(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("Windows does not show a socket file as one")
	}
	dir, err := os.MkdirTemp("", "zmtp") // t.TempDir may be too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()

	l, err := zmtp.Listen(t.Context(), "ipc://"+path, nil)
	if err != nil {
		t.Fatalf("with a stale socket: %v", err)
	}
	defer l.Close()
	if second, err := zmtp.Listen(t.Context(), "ipc://"+path, nil); err == nil {
		second.Close()
		t.Error("a living listener lost its path")
	}
	file := filepath.Join(dir, "f")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if l, err := zmtp.Listen(t.Context(), "ipc://"+file, nil); err == nil {
		l.Close()
		t.Error("a file that is no socket was replaced")
	}
	if content, err := os.ReadFile(file); err != nil || string(content) != "precious" {
		t.Errorf("the file now holds %q, %v", content, err)
	}
}

func TestDialUsesTheGivenFunctions(t *testing.T) {
	t.Parallel()
	boom := errors.New("boom")
	o := &zmtp.Options{
		Dial:       func(context.Context, string, string) (net.Conn, error) { return nil, boom },
		ListenFunc: func(context.Context, string, string) (net.Listener, error) { return nil, boom },
	}
	if _, err := zmtp.Dial(t.Context(), "tcp://engine:1", zmtp.SUB, o); !errors.Is(err, boom) {
		t.Errorf("Dial: %v", err)
	}
	if _, err := zmtp.Listen(t.Context(), "tcp://*:0", o); !errors.Is(err, boom) {
		t.Errorf("Listen: %v", err)
	}
}

func FuzzParseEndpoint(f *testing.F) {
	for _, seed := range []string{
		"tcp://h:1", "tcp://[::1]:1", "tcp://*:*", "tcp://::1:1", "ipc://@x", "ipc:///p", "tcp://[", "tcp://]:1", "://",
		"inproc://x",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, endpoint string) {
		network, address, err := zmtp.ParseEndpoint(endpoint)
		switch {
		case err != nil:
			if !errors.Is(err, zmtp.ErrEndpoint) || network != "" || address != "" {
				t.Errorf("%q: %q, %q, %v", endpoint, network, address, err)
			}
		case network == "tcp":
			host, port, err := net.SplitHostPort(address)
			if err != nil {
				t.Fatalf("%q: address %q: %v", endpoint, address, err)
			}
			if host == "" {
				host = "*"
			}
			if strings.Contains(host, ":") {
				host = "[" + host + "]"
			}
			if n, a, err := zmtp.ParseEndpoint("tcp://" + host + ":" + port); n != network || a != address || err != nil {
				t.Errorf("%q: read again as %q, %q, %v", endpoint, n, a, err)
			}
		case network != "unix" || "ipc://"+address != endpoint:
			t.Errorf("%q: %q, %q", endpoint, network, address)
		}
	})
}
