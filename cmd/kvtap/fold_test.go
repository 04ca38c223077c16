// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"cmp"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/kvtap/kvtap/event"
)

const streams = "../../testdata/streams"

// held is a line of fold's output.
type held struct {
	Hash    string  `json:"hash"`
	Group   *int64  `json:"group"`
	Medium  *string `json:"medium"`
	Copies  int64   `json:"copies"`
	Certain *int64  `json:"certain_copies"`
}

func readFold(t *testing.T, text string) []held {
	t.Helper()
	var all []held
	for line := range strings.Lines(text) {
		var h held
		decoder := json.NewDecoder(strings.NewReader(line))
		decoder.DisallowUnknownFields()
		if err := decoder.Decode(&h); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		if h.Certain != nil && *h.Certain == h.Copies {
			t.Errorf("certain_copies says nothing new: %s", line)
		}
		all = append(all, h)
	}
	return all
}

// readTruth reads a truth file: copies by "hash:group" or "hash:medium", hashes in the canonical form.
func readTruth(t *testing.T, path string) map[string]int64 {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var file map[string]int64
	if err := json.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	truth := map[string]int64{}
	for key, n := range file {
		name, rest, ok := strings.Cut(key, ":")
		if !ok {
			t.Fatalf("%s: key %q", path, key)
		}
		truth[canonical(t, name)+":"+rest] += n
	}
	return truth
}

// canonical returns a hash of a truth file, a decimal number or a digest in hex, as fold shows it.
func canonical(t *testing.T, name string) string {
	t.Helper()
	if len(name) >= 32 {
		digest, err := hex.DecodeString(name)
		if err != nil {
			t.Fatal(err)
		}
		return event.HashOfDigest(digest).String()
	}
	if u, err := strconv.ParseUint(name, 10, 64); err == nil {
		return event.Hash(u).String()
	}
	i, err := strconv.ParseInt(name, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return event.Hash(i).String()
}

func TestFoldOfEveryStreamEqualsItsTruth(t *testing.T) {
	t.Parallel()
	names, err := filepath.Glob(streams + "/*.txt.gz")
	if err != nil || len(names) < 15 {
		t.Fatalf("%d streams, %v", len(names), err)
	}
	truths := 0
	for _, name := range names {
		base := strings.TrimSuffix(name, ".txt.gz")
		for _, by := range []string{"truth", "media"} {
			path := base + "." + by + ".json"
			if _, err := os.Stat(path); err != nil {
				continue
			}
			truths++
			t.Run(filepath.Base(base)+" by "+by, func(t *testing.T) {
				t.Parallel()
				got := kvtap(t, "", "fold", name)
				if got.code != exitDone || got.stderr != "" {
					t.Fatalf("code %d, stderr %q", got.code, got.stderr)
				}
				lower, upper := map[string]int64{}, map[string]int64{}
				for _, h := range readFold(t, got.stdout) {
					key := h.Hash + ":" + media(h.Medium)
					if by == "truth" {
						// Where an engine sends no group, the truth has 0.
						key = h.Hash + ":" + strconv.FormatInt(*cmp.Or(h.Group, new(int64)), 10)
					}
					upper[key] += h.Copies
					lower[key] += *cmp.Or(h.Certain, &h.Copies)
				}
				truth := readTruth(t, path)
				if strings.Contains(name, "fullreport") {
					for key, n := range truth {
						if lower[key] > n || n > upper[key] {
							t.Errorf("%s: %d copies, folded to between %d and %d", key, n, lower[key], upper[key])
						}
					}
					for key, n := range lower {
						if n > truth[key] {
							t.Errorf("%s: %d copies, folded to at least %d", key, truth[key], n)
						}
					}
					return
				}
				if diff := gocmp.Diff(truth, upper); diff != "" {
					t.Errorf("copies (-truth +fold):\n%s", diff)
				}
				if strings.HasPrefix(filepath.Base(name), "sglang-") {
					if diff := gocmp.Diff(truth, lower); diff != "" {
						t.Errorf("certain copies (-truth +fold):\n%s", diff)
					}
				}
			})
		}
	}
	if truths < 15 {
		t.Errorf("only %d truths", truths)
	}
}

func media(medium *string) string {
	if medium == nil {
		return ""
	}
	return *medium
}

// stored is a batch that stores one block on the GPU, removed one that removes it.
func stored(hash byte) string  { return oneEvent(event.BlockStored, hash) }
func removed(hash byte) string { return oneEvent(event.BlockRemoved, hash) }

func oneEvent(kind event.Type, hash byte) string {
	e := event.Event{Type: kind, Hashes: []event.Hash{event.Hash(hash)}, Medium: []byte("GPU")}
	if kind == event.BlockStored {
		e.Tokens, e.Stride, e.BlockSize = []uint32{1, 2}, 1, event.Some[int64](2)
	}
	b := event.Batch{Time: event.Some(1.5), Events: []event.Event{e}}
	payload, err := b.Append(nil, event.VLLM014)
	if err != nil {
		panic(err)
	}
	return hex.EncodeToString(payload)
}

// Batches with an event of a known type that cannot be read.
const (
	badRemoved = "92cb3ff800000000000091" + "92ac426c6f636b52656d6f76656405" // block_hashes is a number
	badStored  = "92cb3ff800000000000091" + "92ab426c6f636b53746f72656405"
	unknown    = "92cb3ff800000000000091" + "92a84e65774b696e642105"
)

func TestFoldSaysWhatItIsWorth(t *testing.T) {
	t.Parallel()
	line := func(hash byte, copies int) string {
		return fmt.Sprintf(`{"hash":"%016x","group":null,"medium":"GPU","copies":%d}`+"\n", hash, copies)
	}
	for _, c := range []struct {
		name, in     string
		code         int
		stdout       string
		stderr       []string // parts of it, in order; none means that it is empty
		textContains string
	}{{
		name:   "copies are counted and removals take one each",
		in:     "0 " + stored(1) + "\n1 " + stored(1) + "\n2 " + stored(2) + "\n3 " + removed(2),
		stdout: line(1, 2), textContains: "1 held, 2 copies, after 4 batches up to sequence 3\n",
	}, {
		name:   "a sequence that goes back is another life",
		in:     "0 " + stored(1) + "\n1 " + stored(2) + "\n0 " + stored(3),
		stdout: line(3, 1), textContains: "in 2 lives",
	}, {
		name:   "the same number with other bytes is another life",
		in:     "0 " + stored(1) + "\n0 " + stored(2),
		stdout: line(2, 1), textContains: "in 2 lives",
	}, {
		name:   "the same message again counts once",
		in:     "0 " + stored(1) + "\n0 " + stored(1),
		stdout: line(1, 1), textContains: "after 1 batch",
	}, {
		name:         "missing numbers are reported and the fold goes on",
		in:           "0 " + stored(1) + "\n3 " + stored(2) + "\n5 " + stored(3),
		stdout:       line(1, 1) + line(2, 1) + line(3, 1),
		stderr:       []string{"line 2: sequences 1 to 2 are missing", "line 3: sequence 4 is missing"},
		textContains: "Gaps: 3 sequence",
	}, {
		name:   "a cleared cache settles every doubt",
		in:     "5 " + stored(1) + "\n9 " + cleared + "\n10 " + stored(2),
		stdout: line(2, 1),
		stderr: []string{"begin with sequence 5", "6 to 8 are missing"}, textContains: "sequence 10\n",
	}, {
		name:   "a late start is reported",
		in:     "5 " + stored(1) + "\n6 " + removed(9),
		stdout: line(1, 1),
		stderr: []string{"line 1: ", "begin with sequence 5"}, textContains: "Partial: ",
	}, {
		name:   "an engine that counts from 1 is complete",
		in:     "1 " + stored(1),
		stdout: line(1, 1),
	}, {
		name: "a line that cannot be read may hide removals",
		in:   "0 " + stored(1) + "\n1 zz\n2 " + stored(2), code: exitFailed,
		stdout: line(2, 1),
		stderr: []string{"line 2: the payload is not hex", "line 2: it may have removed any block",
			"line 3: sequence 1 is missing"}, textContains: "Partial: ",
	}, {
		name: "so does a payload that cannot be read",
		in:   "0 " + stored(1) + "\n1 c1\n2 " + stored(2), code: exitFailed,
		stdout:       line(2, 1),
		stderr:       []string{"line 2: event: malformed MessagePack", "line 2: it may have removed any block"},
		textContains: "Partial: ",
	}, {
		name: "and a removal that cannot be read",
		in:   "0 " + stored(1) + "\n1 " + badRemoved + "\n2 " + stored(2), code: exitFailed,
		stdout:       line(2, 1),
		stderr:       []string{"line 2: event 0 (BlockRemoved) cannot", "line 2: it may have removed any block"},
		textContains: "Partial: ",
	}, {
		name: "a store that cannot be read only hides a block",
		in:   "0 " + stored(1) + "\n1 " + badStored, code: exitFailed,
		stdout: line(1, 1),
		stderr: []string{"line 2: event 0 (BlockStored) cannot be read"},
	}, {
		name:   "an unknown event changes nothing",
		in:     "0 " + stored(1) + "\n1 " + unknown,
		stdout: line(1, 1),
		stderr: []string{`line 2: event 0 is of unknown type "NewKind!"`},
	}, {
		name: "a line without a number cannot be folded",
		in:   stored(1), code: exitFailed,
		stderr: []string{"line 1: it has no sequence number"},
	}, {
		name:   "a recording may be empty",
		stderr: []string{"there is no batch"}, textContains: "0 held, 0 copies, after 0 batches\n",
	}, {
		name:         "removals of what was not held are counted",
		in:           "0 " + removed(1),
		textContains: "Unmatched: 1 removal was",
	}} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			got := kvtap(t, c.in, "fold", "-")
			if got.code != c.code || got.stdout != c.stdout {
				t.Errorf("code %d, stdout %s", got.code, got.stdout)
			}
			if len(c.stderr) == 0 && got.stderr != "" {
				t.Errorf("stderr: %s", got.stderr)
			}
			rest := got.stderr
			for _, part := range c.stderr {
				_, after, ok := strings.Cut(rest, part)
				if !ok {
					t.Errorf("stderr lacks %q: %s", part, got.stderr)
				}
				rest = after
			}
			text := kvtap(t, c.in, "fold", "-", "-o", "text")
			if text.code != c.code || !strings.Contains(text.stdout, c.textContains) || text.stderr != got.stderr {
				t.Errorf("text lacks %q: %+v", c.textContains, text)
			}
		})
	}
}

func TestFoldGolden(t *testing.T) {
	t.Parallel()
	got := kvtap(t, "", "fold", "-o", "text", filepath.Join(streams, "real-v0.32.0-fullreport-hybrid.txt.gz"))
	// The table is long; its head and its foot show all there is to see.
	lines := strings.SplitAfter(got.stdout, "\n")
	golden(t, "fold.text", strings.Join(lines[:12], "")+"...\n"+strings.Join(lines[len(lines)-6:], ""))
}

func TestFoldOfACutFileShowsWhatItHas(t *testing.T) {
	t.Parallel()
	whole, err := os.ReadFile(filepath.Join(streams, "stream-main.txt.gz"))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "cut.gz")
	if err := os.WriteFile(path, whole[:len(whole)/2], 0o666); err != nil {
		t.Fatal(err)
	}
	got := kvtap(t, "", "fold", path)
	if got.code != exitFailed || len(readFold(t, got.stdout)) == 0 || !strings.Contains(got.stderr, "cut off") {
		t.Errorf("code %d, stderr %q, stdout %s", got.code, got.stderr, got.stdout)
	}
}
