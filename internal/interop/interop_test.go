// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package interop_test

import (
	"compress/gzip"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/kvtap/kvtap/internal/interop"
)

// The publisher and its replay are checked by libzmq's own sockets, so that a test that uses them can trust them.
func TestPublisherReplaysWhatItLost(t *testing.T) {
	t.Parallel()
	for _, framing := range []struct{ name, batch, end string }{
		{"old", "message - 0000000000000001 bb", "message - ffffffffffffffff -"},
		{"new", "message - 6b76 0000000000000001 bb", "message - - ffffffffffffffff -"},
	} {
		t.Run(framing.name, func(t *testing.T) {
			t.Parallel()
			pub := interop.Start(t, "publish", "--stream", stream(t, "0 aa\n1 bb\n2 cc\n"), "--topic", "kv",
				"--framing", framing.name, "--xpub", "--hwm", "10")
			sub := interop.Start(t, "sub", "--connect", pub.Endpoint("pub"), "--subscribe", "6b")
			if got := pub.Expect("message"); got != "016b" {
				t.Fatalf("subscription %q, want 016b", got)
			}
			expect := func(p *interop.Peer, want string) {
				t.Helper()
				if got := p.Line(); got != want {
					t.Fatalf("got %q, want %q", got, want)
				}
			}
			pub.Say("publish 1")
			expect(pub, "published 1 0")
			pub.Say("lose 1")
			expect(pub, "lost 1 1")
			pub.Say("publish all")
			expect(pub, "published 1 2")
			expect(sub, "message 6b76 0000000000000000 aa")
			expect(sub, "message 6b76 0000000000000002 cc")

			dealer := interop.Start(t, "dealer", "--connect", pub.Endpoint("replay"))
			dealer.Say("send - 0000000000000001")
			expect(pub, "replayed 1 2")
			expect(dealer, framing.batch)
			dealer.Line()
			expect(dealer, framing.end)
		})
	}
}

func TestPeerThatIsRestartedKeepsItsEndpointsAndNothingElse(t *testing.T) {
	t.Parallel()
	first := interop.Start(t, "publish", "--stream", stream(t, "0 aa\n1 bb\n"), "--before", "1")
	second := first.Restart("--before", "all")
	for _, name := range []string{"pub", "replay"} {
		if first.Endpoint(name) != second.Endpoint(name) {
			t.Errorf("%s moved from %s to %s", name, first.Endpoint(name), second.Endpoint(name))
		}
	}
	dealer := interop.Start(t, "dealer", "--connect", second.Endpoint("replay"))
	dealer.Say("send - 0000000000000000")
	for _, want := range []string{
		"message - - 0000000000000000 aa", "message - - 0000000000000001 bb", "message - - ffffffffffffffff -",
	} {
		if got := dealer.Line(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}

	router := interop.Start(t, "router", "--bind", "tcp://127.0.0.1:*")
	if again := router.Restart(); again.Endpoint("endpoint") != router.Endpoint("endpoint") {
		t.Errorf("a router moved from %s to %s", router.Endpoint("endpoint"), again.Endpoint("endpoint"))
	}
	if sub := interop.Start(t, "sub", "--connect", second.Endpoint("pub")).Restart(); sub.Endpoint("endpoint") !=
		second.Endpoint("pub") {
		t.Errorf("a subscriber went to %s", sub.Endpoint("endpoint"))
	}
}

func TestPeerThatIsPausedDoesLaterWhatItIsTold(t *testing.T) {
	t.Parallel()
	p := interop.Start(t, "publish", "--stream", stream(t, "0 aa\n1 bb\n2 cc\n"))
	p.Pause()
	p.Say("publish 1")
	p.Say("publish 2")
	p.Continue()
	for _, want := range []string{"published 1 0", "published 2 2"} {
		if got := p.Line(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	p.Pause() // a peer that stands still is killed like any other
	p.Stop()
}

// stream writes lines of numbers and payloads to a file.
func stream(t *testing.T, lines string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "stream.txt.gz")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	zw := gzip.NewWriter(f)
	_, writeErr := io.WriteString(zw, lines)
	if err := errors.Join(writeErr, zw.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}
