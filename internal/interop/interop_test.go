// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package interop_test

import (
	"compress/gzip"
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
			stream := filepath.Join(t.TempDir(), "stream.txt.gz")
			f, err := os.Create(stream)
			if err != nil {
				t.Fatal(err)
			}
			zw := gzip.NewWriter(f)
			zw.Write([]byte("0 aa\n1 bb\n2 cc\n"))
			zw.Close()
			f.Close()

			pub := interop.Start(t, "publish", "--stream", stream, "--topic", "kv", "--framing", framing.name, "--xpub",
				"--hwm", "10")
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
