// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package event_test

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/kvtap/kvtap/event"
)

// vectorNames lists the payloads of testdata/vectors that match the pattern.
func vectorNames(tb testing.TB, pattern string) []string {
	tb.Helper()
	paths, err := filepath.Glob("../testdata/vectors/" + pattern + ".hex")
	if err != nil || len(paths) == 0 {
		tb.Fatalf("vectors %s: found %d, error %v", pattern, len(paths), err)
	}
	for i, p := range paths {
		paths[i] = strings.TrimSuffix(filepath.Base(p), ".hex")
	}
	return paths
}

func vector(tb testing.TB, name string) []byte {
	tb.Helper()
	text, err := os.ReadFile("../testdata/vectors/" + name + ".hex")
	if err != nil {
		tb.Fatal(err)
	}
	return unhex(tb, string(bytes.TrimSpace(text)))
}

func unhex(tb testing.TB, s string) []byte {
	tb.Helper()
	p, err := hex.DecodeString(s)
	if err != nil {
		tb.Fatal(err)
	}
	return p
}

// streamNames lists the recordings of testdata/streams.
func streamNames(tb testing.TB) []string {
	tb.Helper()
	paths, err := filepath.Glob("../testdata/streams/*.txt.gz")
	if err != nil || len(paths) == 0 {
		tb.Fatalf("streams: found %d, error %v", len(paths), err)
	}
	for i, p := range paths {
		paths[i] = strings.TrimSuffix(filepath.Base(p), ".txt.gz")
	}
	return paths
}

// stream returns the payloads of a recording, in order.
func stream(tb testing.TB, name string) (payloads [][]byte) {
	tb.Helper()
	file, err := os.Open("../testdata/streams/" + name + ".txt.gz")
	if err != nil {
		tb.Fatal(err)
	}
	defer func() {
		if err := file.Close(); err != nil {
			tb.Error(err)
		}
	}()
	text, err := gzip.NewReader(file)
	if err != nil {
		tb.Fatal(err)
	}
	lines := bufio.NewScanner(text)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		_, payload, ok := strings.Cut(lines.Text(), " ")
		if !ok {
			tb.Fatalf("%s: a line without a payload: %q", name, lines.Text())
		}
		payloads = append(payloads, unhex(tb, payload))
	}
	if err := lines.Err(); err != nil {
		tb.Fatal(err)
	}
	return payloads
}

// hashAndRest is a key of the truth files: a hash in decimal or as a digest in hex, and a group or medium.
type hashAndRest struct {
	hash event.Hash
	rest string
}

// truth reads what an engine held after its last batch, or nil where that was not recorded.
func truth(tb testing.TB, file string) map[hashAndRest]int64 {
	tb.Helper()
	text, err := os.ReadFile("../testdata/streams/" + file)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		tb.Fatal(err)
	}
	var raw map[string]int64
	if err := json.Unmarshal(text, &raw); err != nil {
		tb.Fatalf("%s: %v", file, err)
	}
	held := make(map[hashAndRest]int64, len(raw))
	for key, n := range raw {
		hash, rest, ok := strings.Cut(key, ":")
		if !ok {
			tb.Fatalf("%s: key %q", file, key)
		}
		held[hashAndRest{parseHash(tb, hash), rest}] += n
	}
	return held
}

func parseHash(tb testing.TB, s string) event.Hash {
	tb.Helper()
	if len(s) == 64 {
		return event.HashOfDigest(unhex(tb, s))
	}
	if i, err := strconv.ParseInt(s, 10, 64); err == nil {
		return event.Hash(uint64(i))
	}
	u, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		tb.Fatal(err)
	}
	return event.Hash(u)
}
